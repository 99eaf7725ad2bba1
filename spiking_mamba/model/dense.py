"""Dense Mamba2 checkpoints as models of this package, and students with their weights.

The classes are arguments: the model itself reads checkpoints with this module.
"""

import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Mamba2Config, PreTrainedModel

from spiking_mamba.common.checkpoint_files import locate, one_line, read_weights
from spiking_mamba.common.errors import CheckpointError, DataError
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.converted import is_converted, is_spiking, read_converted
from spiking_mamba.model.pretrained import OWN_IN_FLOAT32, SpikingMambaPreTrainedModel
from spiking_mamba.model.state_spaces import from_state_spaces

__all__ = ["read_dense", "student_of"]

Model = TypeVar("Model", bound=SpikingMambaPreTrainedModel)


def read_dense(name: str | Path, cls: type[Model]) -> Model:
    """A dense model with the weights of a Mamba2 checkpoint, every key accounted for.

    Args:
        name: the folder or hub name of a checkpoint of transformers' Mamba2, of state-spaces, or of this
            package; in one file or in shards; or a folder of a converted model's mixers.
        cls: the class of the model, whose configuration is a :class:`SpikingMambaConfig`.

    Returns:
        The model on the CPU, in float32, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete, a weight is missing or left over, shapes disagree, or the
            configuration asks for something that this model has not.
        DataError: the package of a converted model's source cannot be had.
    """
    folder, settings = locate(name)
    try:
        if is_spiking(folder):
            raise CheckpointError(f"{folder} holds a spiking model, not a dense one.")
        if is_converted(folder):
            return read_converted(folder, cls)
        if "d_model" in settings and "ssm_cfg" in settings:
            return _from_state_spaces(folder, settings, cls)
        return _from_transformers(folder, settings, cls)
    except (CheckpointError, DataError):  # the latter of a source's package, with a way out
        raise
    except Exception as error:  # readers of broken files raise what they please, down to struct.error
        raise CheckpointError(
            f"{folder} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error


def _from_transformers(folder: Path, settings: dict[str, Any], cls: type[Model]) -> Model:
    model_type = settings.get("model_type")
    if model_type not in (Mamba2Config.model_type, SpikingMambaConfig.model_type):
        raise CheckpointError(f"{folder} holds a model of type {model_type!r}, not a Mamba2.")
    config = SpikingMambaConfig.from_pretrained(folder)
    if config.neuron is not None:
        raise CheckpointError(f"{folder} holds a spiking model, not a dense one.")
    # sliced projections, say, show as mismatched: report them with the others instead of at the first
    model = cls.from_pretrained(
        folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, weights_only=True
    )
    # transformers trusts the weights: a head that differs from the embeddings is not tied to them
    model.config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
    return model


def _from_state_spaces(folder: Path, settings: dict[str, Any], cls: type[Model]) -> Model:
    try:
        config, weights = from_state_spaces(settings, read_weights(folder))
    except KeyError as error:
        raise CheckpointError(f"{folder} is no Mamba2 checkpoint: it lacks {error}.") from error
    with torch.device("meta"):  # nothing is drawn that the weights replace
        model = cls(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.float().eval()


def student_of(dense: PreTrainedModel, cls: type[Model], **choices: Any) -> Model:
    """A model with the weights of a dense one, in training mode, on its device and in its dtype.

    Args:
        dense: of this package, or transformers' ``Mamba2ForCausalLM``.
        cls: the class of the student.
        choices: fields of :class:`SpikingMambaConfig` in which the student differs.

    Raises:
        ValueError: the weights are not those of such a model.
    """
    fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    with dense.device:  # where there is a GPU, what is drawn before the weights replace it takes no time
        model = cls(SpikingMambaConfig.from_dict(fields | choices)).to(dense.device)
    for name, parameter in model.named_parameters():
        if not name.endswith(OWN_IN_FLOAT32):
            parameter.data = parameter.data.to(dense.dtype)
    incompatible = model.load_state_dict(dense.state_dict(), strict=False)
    missing = [
        key for key in incompatible.missing_keys if ".neuron." not in key and not key.endswith(OWN_IN_FLOAT32)
    ]
    if missing or incompatible.unexpected_keys:
        raise ValueError(f"Weights do not fit: missing {missing}, unexpected {incompatible.unexpected_keys}.")
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.train()
