"""Reading dense Mamba2 checkpoints, and exporting a spiking model."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import Mamba2Config, PreTrainedTokenizerBase

from .configuration import PROJECTIONS, SpikingMambaConfig
from .modeling import SpikingMambaForCausalLM

__all__ = ["CheckpointError", "export", "fold_thresholds", "load_dense", "load_model", "locate"]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise CheckpointError(f"{folder} is incomplete: it has none of {', '.join(_WEIGHTS)}.")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is no mapping of keys to values.")
    return settings


def load_dense(name: str | Path) -> SpikingMambaForCausalLM:
    """A dense model with the weights of a Mamba2 checkpoint, every key accounted for.

    Args:
        name: the folder or hub name of a checkpoint of transformers' Mamba2, of state-spaces, or of this
            package.

    Returns:
        The model on the CPU, in float32, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete, a key is missing or left over, or shapes disagree.
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


def load_model(name: str | Path) -> SpikingMambaForCausalLM:
    """A model of this package, spiking or dense, from any form of checkpoint: see ``load_dense``."""
    folder, settings = locate(name)
    if settings.get("neuron") is None:
        return load_dense(folder)
    try:
        return SpikingMambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_transformers(folder: Path, settings: dict[str, Any]) -> SpikingMambaForCausalLM:
    model_type = settings.get("model_type")
    if model_type not in (Mamba2Config.model_type, SpikingMambaConfig.model_type):
        raise CheckpointError(f"{folder} holds a model of type {model_type!r}, not a Mamba2.")
    config = SpikingMambaConfig.from_pretrained(folder)
    if config.neuron is not None:
        raise CheckpointError(f"{folder} holds a spiking model, not a dense one.")
    # sliced projections, say, show as mismatched: report them with the others instead of at the first
    return SpikingMambaForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, weights_only=True
    )


def _load_state_spaces(folder: Path, settings: dict[str, Any]) -> SpikingMambaForCausalLM:
    path = folder / "pytorch_model.bin"
    weights = (
        torch.load(path, map_location="cpu", weights_only=True)
        if path.is_file()
        else load_file(folder / "model.safetensors")
    )
    weights = {key.replace("backbone.embedding.", "backbone.embeddings."): w for key, w in weights.items()}
    try:
        config = _infer_config(weights, settings)
    except KeyError as error:
        raise CheckpointError(f"{folder} is no Mamba2 checkpoint: it lacks {error}.") from error
    model = SpikingMambaForCausalLM(config)
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["backbone.embeddings.weight"])
    model.load_state_dict(weights, strict=True)
    return model.float().eval()


def _infer_config(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> SpikingMambaConfig:
    """The configuration of state-spaces weights. Shapes are trusted above config.json: some published
    files disagree with their weights."""
    layer = "backbone.layers.0.mixer."
    vocab_size, hidden_size = weights["backbone.embeddings.weight"].shape
    intermediate_size = weights[layer + "out_proj.weight"].shape[1]
    conv_dim, _, conv_kernel = weights[layer + "conv1d.weight"].shape
    num_heads = weights[layer + "A_log"].shape[0]
    ssm = settings["ssm_cfg"]
    n_groups = ssm.get("ngroups", 1)
    tied = settings.get("tie_embeddings", True)
    if (head := weights.get("lm_head.weight")) is not None:
        tied = torch.equal(head, weights["backbone.embeddings.weight"])
    return SpikingMambaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=1
        + max(int(key.split(".")[2]) for key in weights if key.startswith("backbone.layers.")),
        expand=intermediate_size // hidden_size,
        num_heads=num_heads,
        head_dim=intermediate_size // num_heads,
        n_groups=n_groups,
        state_size=(conv_dim - intermediate_size) // (2 * n_groups),
        conv_kernel=conv_kernel,
        chunk_size=ssm.get("chunk_size", 256),
        use_bias=layer + "in_proj.bias" in weights,
        use_conv_bias=layer + "conv1d.bias" in weights,
        residual_in_fp32=settings.get("residual_in_fp32", True),
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@torch.no_grad()
def fold_thresholds(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
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
            projection.initial_threshold = 1.0
            if hasattr(projection, "log_threshold"):
                del projection.log_threshold
    folded.config.threshold = 1.0
    folded.config.learn_threshold = False
    return folded


def export(
    model: SpikingMambaForCausalLM, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write ``model`` for inference: thresholds folded, no trace of SGC, safetensors.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it after ``import spiking_mamba``.
    """
    exported = fold_thresholds(model).eval()
    exported.config.sgc = None
    for projection in exported.projections().values():
        projection.sgc, projection.sgc_lambda = None, 0.0
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
