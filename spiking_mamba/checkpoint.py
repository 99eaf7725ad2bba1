"""Reading and writing dense Mamba2 checkpoints, and exporting a spiking model."""

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerBase

from .configuration import PROJECTIONS, SpikingMambaConfig
from .state_spaces import Weights, from_state_spaces, to_state_spaces

if TYPE_CHECKING:  # the model reads checkpoints with this module, which finds its class by its configuration
    from .modeling import SpikingMambaForCausalLM

__all__ = [
    "FORMS",
    "CheckpointError",
    "export",
    "export_dense",
    "fold_thresholds",
    "load_dense",
    "load_model",
    "locate",
]

FORMS = ("transformers", "state-spaces")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, or its weights and its configuration disagree."""


def _folder(name: str | Path) -> Path:
    if (folder := Path(name)).is_dir():
        return folder
    if folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise CheckpointError(f"There is no checkpoint folder {name}.")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor to be had from the hub: {error}"
        ) from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no mapping of keys to values.")
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    if not (path := folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.")
    if not any((folder / name).is_file() or (folder / (name + _INDEX)).is_file() for name in _WEIGHTS):
        raise CheckpointError(f"{folder} is incomplete: it has none of {', '.join(_WEIGHTS)}.")
    return _read_mapping(path)


def _read_file(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_weights(folder: Path) -> Weights:
    """The weights of a folder, in one file or in the shards that an index lists."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _read_file(folder / name)
        if (index := folder / (name + _INDEX)).is_file():
            break
    where = _read_mapping(index).get("weight_map")
    if not isinstance(where, dict) or any(Path(name).name != name for name in where.values()):
        raise CheckpointError(f"{index} does not map weights to files beside it.")
    weights: Weights = {}
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} is incomplete: it lacks {shard}.")
        weights |= _read_file(folder / shard)
    if wrong := sorted(where.keys() ^ weights.keys()):
        raise CheckpointError(f"{index} and its files disagree on {', '.join(wrong[:5])}.")
    return weights


def load_dense(name: str | Path) -> "SpikingMambaForCausalLM":
    """A dense model with the weights of a Mamba2 checkpoint, every key accounted for.

    Args:
        name: the folder or hub name of a checkpoint of transformers' Mamba2, of state-spaces, or of this
            package; in one file or in shards.

    Returns:
        The model on the CPU, in float32, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete, a weight is missing or left over, shapes disagree, or the
            configuration asks for something that this model has not.
    """
    folder = _folder(name)
    settings = _read_config(folder)
    try:
        if "d_model" in settings and "ssm_cfg" in settings:
            return _load_state_spaces(folder, settings)
        return _load_transformers(folder, settings)
    except CheckpointError:
        raise
    except Exception as error:  # readers of broken files raise what they please, down to struct.error
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error


def locate(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """The local folder of a checkpoint, fetched if it is on the hub, and its config.json.

    Raises:
        CheckpointError: there is none, or it lacks its config.json or its weights.
    """
    folder = _folder(name)
    return folder, _read_config(folder)


def load_model(name: str | Path) -> "SpikingMambaForCausalLM":
    """A model of this package, spiking or dense, from any form of checkpoint: see ``load_dense``."""
    folder, settings = locate(name)
    if settings.get("neuron") is None:
        return load_dense(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_transformers(folder: Path, settings: dict[str, Any]) -> "SpikingMambaForCausalLM":
    model_type = settings.get("model_type")
    if model_type not in (Mamba2Config.model_type, SpikingMambaConfig.model_type):
        raise CheckpointError(f"{folder} holds a model of type {model_type!r}, not a Mamba2.")
    config = SpikingMambaConfig.from_pretrained(folder)
    if config.neuron is not None:
        raise CheckpointError(f"{folder} holds a spiking model, not a dense one.")
    # sliced projections, say, show as mismatched: report them with the others instead of at the first
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, weights_only=True
    )
    # transformers trusts the weights: a head that differs from the embeddings is not tied to them
    model.config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
    return model


def _load_state_spaces(folder: Path, settings: dict[str, Any]) -> "SpikingMambaForCausalLM":
    try:
        config, weights = from_state_spaces(settings, _read_weights(folder))
    except KeyError as error:
        raise CheckpointError(f"{folder} is no Mamba2 checkpoint: it lacks {error}.") from error
    with torch.device("meta"):  # nothing is drawn that the weights replace
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.float().eval()


def export_dense(
    model: Mamba2ForCausalLM,
    folder: str | Path,
    form: str = "transformers",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a dense model, in its own dtype, for programs that have never heard of this package.

    Args:
        model: a dense model of this package or transformers' ``Mamba2ForCausalLM``.
        folder: new or empty; it is written whole or not at all.
        form: 'transformers', for ``Mamba2ForCausalLM.from_pretrained``, or 'state-spaces', for mamba-ssm's
            ``MambaLMHeadModel.from_pretrained``, which keeps no ids of special tokens.
        tokenizer: to be written beside the model.

    Raises:
        ValueError: the form is unknown, the model is spiking, or that form has no such model.
        FileExistsError: the folder holds files.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}.")
    if getattr(model.config, "neuron", None) is not None:
        raise ValueError("The model is spiking; neither form has neurons. export() writes it.")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already holds files.")
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    if form == "transformers":
        known = set(Mamba2Config().to_dict()) - {"model_type", "architectures"}
        fields = {key: value for key, value in model.config.to_dict().items() if key in known}
        with torch.device("meta"):
            dense = Mamba2ForCausalLM(Mamba2Config(**fields))
        dense.load_state_dict(model.state_dict(), assign=True)
        dense.tie_weights()
        dense.generation_config = copy.deepcopy(model.generation_config)
        dense.save_pretrained(draft)
    else:
        settings, weights = to_state_spaces(model.config, model.state_dict())
        draft.mkdir(parents=True)
        torch.save({key: weight.detach().cpu() for key, weight in weights.items()}, draft / _WEIGHTS[1])
        (draft / "config.json").write_text(json.dumps(settings, indent=4))
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    draft.replace(folder)


@torch.no_grad()
def fold_thresholds(model: "SpikingMambaForCausalLM") -> "SpikingMambaForCausalLM":
    """A copy of ``model`` with every V_th equal to 1: 1/V_th is folded into the RMSNorm before the neuron
    and V_th into the projection, so that accumulations stay accumulations.

    Exact where V_th is a power of two; else in float32 up to rounding, which may tip a spike that stands
    on a tie.
    """
    folded = copy.deepcopy(model)
    for block in folded.backbone.layers:
        for name, norm in zip(PROJECTIONS, (block.norm, block.mixer.norm), strict=True):
            projection = getattr(block.mixer, name)
            threshold = projection.threshold
            norm.weight.div_(threshold)
            projection.weight.mul_(threshold)
            if hasattr(projection, "log_threshold"):
                del projection.log_threshold
            projection.initial_threshold = 1.0
    folded.config.threshold = 1.0
    folded.config.learn_threshold = False
    return folded


def export(
    model: "SpikingMambaForCausalLM", folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write ``model`` for inference: thresholds folded, no trace of SGC, safetensors.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it after ``import spiking_mamba``.
    """
    exported = fold_thresholds(model).eval()
    exported.config.sgc = None
    exported.config.use_cache = True  # training has switched it off
    for projection in exported.projections().values():
        projection.sgc, projection.sgc_lambda = None, 0.0
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
