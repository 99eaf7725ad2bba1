"""Reading and writing dense Mamba2 checkpoints, and exporting a spiking model."""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerBase

from spiking_mamba.common.checkpoint_files import WEIGHTS, locate, one_line
from spiking_mamba.common.claims import whole_folder
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.files import share_weights
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.conversion import fold_thresholds
from spiking_mamba.model.converted import is_converted, read_converted
from spiking_mamba.model.dense import read_dense
from spiking_mamba.model.event_driven import EventDrivenMambaConfig
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.projection import reject_wrapped
from spiking_mamba.model.state_spaces import to_state_spaces

__all__ = ["FORMS", "export", "export_dense", "load_dense", "load_model"]


FORMS = ("transformers", "state-spaces")


def load_dense(name: str | Path) -> SpikingMambaForCausalLM:
    """A dense model with the weights of a Mamba2 checkpoint: see :func:`.dense.read_dense`."""
    return read_dense(name, SpikingMambaForCausalLM)


def load_model(name: str | Path) -> SpikingMambaForCausalLM:
    """A model of this package, spiking, event-driven or dense, from any form of checkpoint.

    The forms are those of :func:`load_dense`.
    """
    folder, settings = locate(name)
    dense = settings.get("neuron") is None and settings.get("model_type") != EventDrivenMambaConfig.model_type
    if dense:
        return load_dense(folder)
    try:
        if is_converted(folder):
            return read_converted(folder, SpikingMambaForCausalLM)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error


def export_dense(
    model: SpikingMambaForCausalLM | Mamba2ForCausalLM,
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
        ValueError: the form is unknown, the model is spiking or carries an adapter that is not merged, or
            that form has no such model.
        FileExistsError: the folder holds files.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}.")
    if getattr(model.config, "neuron", None) is not None:
        raise ValueError("The model is spiking; neither form has neurons. export() writes it.")
    reject_wrapped(model)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already holds files.")
    with whole_folder(folder) as draft:
        _write_dense(model, draft, form)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)


def _write_dense(model: SpikingMambaForCausalLM | Mamba2ForCausalLM, folder: Path, form: str) -> None:
    if form == "transformers":
        if "mlp" in (getattr(model.config, "layers_block_type", None) or ()):
            raise ValueError("transformers' Mamba2 has no MLP layers: save_pretrained() writes this model.")
        known = set(Mamba2Config().to_dict()) - {"model_type", "architectures"}
        fields = {key: value for key, value in model.config.to_dict().items() if key in known}
        with torch.device("meta"):
            dense = Mamba2ForCausalLM(Mamba2Config(**fields))
        dense.load_state_dict(model.state_dict(), assign=True)
        dense.tie_weights()
        dense.generation_config = copy.deepcopy(model.generation_config)
        dense.save_pretrained(folder)
        share_weights(folder)
    else:
        config = model.config
        if not isinstance(config, SpikingMambaConfig):  # transformers', which has the same fields
            own = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
            config = SpikingMambaConfig.from_dict(own)
        settings, weights = to_state_spaces(config, model.state_dict())
        folder.mkdir(parents=True)
        torch.save({key: weight.detach().cpu() for key, weight in weights.items()}, folder / WEIGHTS[1])
        (folder / "config.json").write_text(json.dumps(settings, indent=4))


def export(
    model: SpikingMambaForCausalLM, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write ``model`` for inference: thresholds folded, no trace of SGC, safetensors.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it after ``import spiking_mamba``.
    """
    exported = fold_thresholds(model).eval()
    exported.config.sgc = None
    exported.config.use_cache = True  # training has switched it off
    for projection in exported.projections().values():
        projection.spikes.sgc, projection.spikes.sgc_lambda = None, 0.0
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
