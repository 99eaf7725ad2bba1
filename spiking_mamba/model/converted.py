"""Models converted from a Transformer: packed mixers in a folder, everything else from the Transformer.

``recipes/convert`` writes such folders: ``config.json``, ``mixers.json`` (the index, which names the source)
and the mixers' matrices as integers of few bits with a scale for every group of inputs.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spiking_mamba.common.checkpoint_files import MIXERS, check_links, is_file_name, one_line, read_mapping
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.files import file_sha256
from spiking_mamba.model.block import SpikingMambaMixer
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.llama import LlamaWeights, read_llama
from spiking_mamba.model.source import load_source

__all__ = [
    "STUDENT",
    "files_of",
    "is_converted",
    "is_spiking",
    "kept_weights",
    "load_mixers",
    "mixers_of",
    "read_converted",
    "read_index",
]

STUDENT = "student"  # in the index: the file of what a student has of its own beside its mixers

Model = TypeVar("Model", bound=PreTrainedModel)


def is_converted(folder: Path) -> bool:
    """Whether a folder holds packed mixers."""
    return (folder / MIXERS).is_file()


def is_spiking(folder: Path) -> bool:
    """Whether packed mixers are a spiking student's; a dense control is packed as one, but has no neuron."""
    if not is_converted(folder) or read_index(folder).get(STUDENT) is None:
        return False
    return read_mapping(folder / "config.json").get("neuron") is not None


def read_index(folder: Path) -> dict[str, Any]:
    """The index of packed mixers: ``source``, the Transformer's name; ``files``; what else was written there.

    Such as the files' ``sha256`` by name, which older ones lack.

    Raises:
        CheckpointError: there is none, it is damaged, or a file that it names is not there.
    """
    if not is_converted(folder):
        raise CheckpointError(f"{folder} holds no packed mixers: it has no {MIXERS}.")
    check_links(folder)
    index = read_mapping(folder / MIXERS)
    files, own = index.get("files"), index.get(STUDENT)
    if not isinstance(index.get("sha256", {}), dict):
        raise CheckpointError(f"{folder / MIXERS}: sha256 is no mapping of files to checksums.")
    if (
        not isinstance(index.get("source"), str)
        or not isinstance(files, list)
        or not files
        or not all(map(is_file_name, files))
        or not (own is None or is_file_name(own))
    ):
        raise CheckpointError(f"{folder / MIXERS} does not name a source, and files beside it.")
    for name in files_of(index):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is incomplete: it lacks {name}.")
    return index


def files_of(index: dict[str, Any]) -> list[str]:
    """The names of the files of weights that an index lists, a student's own last."""
    own = index.get(STUDENT)
    return [*index["files"], own] if own else index["files"]


def read_converted(folder: Path, cls: type[Model]) -> Model:
    """A model of packed mixers and of the source's embeddings, norms and MLPs, which are fetched.

    As it was converted, or a student, spiking or dense, with its own norms and what it adds to the MLPs.

    Args:
        folder: as ``recipes/convert/pack.py`` or ``pack_student.py`` writes it.
        cls: the class of the model, whose configuration is a :class:`SpikingMambaConfig`.

    Returns:
        The model on the CPU, in float32, in evaluation mode.

    Raises:
        CheckpointError: the folder is damaged, or was converted from another source.
        DataError: the source's package cannot be had.
    """
    index = read_index(folder)
    config = _read_config(folder, index.get(STUDENT) is not None)
    weights = _read_mixers(folder, index)
    source = load_source(index["source"])
    kept = read_llama(source)
    weights |= kept_weights(kept)
    if (own := index.get(STUDENT)) is not None:
        _check_sum(folder, index, own, "a damaged student")
        _add_student(weights, folder, own)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("backbone.layers."))
    if config.num_hidden_layers != layers:  # before they take memory
        raise CheckpointError(f"{folder}: {config.num_hidden_layers} layers, but weights of {layers}.")
    config.tie_word_embeddings = kept.head is kept.embedding  # or a head of its own would be lost
    with torch.device("meta"):
        model = cls(config)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit its source: {one_line(error)}") from error
    model.tie_weights()
    model.generation_config.eos_token_id = source.generation_config.eos_token_id
    return model.eval()


def _add_student(weights: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    """Put a student's own tensors in.

    Those of a low rank, ``NAME:a`` ``[rank, in]`` and ``NAME:b`` ``[out, rank]``, are added as ``b @ a``, the
    others replace what is there.
    """
    try:
        own = load_file(folder / name)
        for key, value in own.items():
            matrix, _, part = key.partition(":")
            if not part:
                weights[key] = value.float()
            elif part == "a":
                weights[matrix] = weights[matrix] + own[f"{matrix}:b"].float() @ value.float()
    except Exception as error:  # readers of damaged files raise what they please
        raise CheckpointError(
            f"{folder} holds a damaged student: {type(error).__name__}: {one_line(error)}"
        ) from error


def _read_config(folder: Path, spiking: bool) -> SpikingMambaConfig:
    settings = read_mapping(folder / "config.json")
    if (model_type := settings.get("model_type")) != SpikingMambaConfig.model_type:
        raise CheckpointError(
            f"{folder} holds packed mixers, but config.json says model_type={model_type!r}."
        )
    if settings.get("neuron") is not None and not spiking:
        raise CheckpointError(
            f"{folder} holds the mixers of a dense model, but config.json says neuron: from_dense() adds one."
        )
    return SpikingMambaConfig.from_pretrained(folder)


def mixers_of(model: PreTrainedModel) -> list[SpikingMambaMixer]:
    """The Mamba2 mixers of a model, first to last."""
    return [module for module in model.modules() if isinstance(module, SpikingMambaMixer)]


def kept_weights(source: LlamaWeights) -> dict[str, torch.Tensor]:
    """What conversion keeps, all but attention, by the names of a model of mixers and MLPs in turn."""
    kept = {
        "backbone.embeddings.weight": source.embedding,
        "backbone.norm_f.weight": source.norm,
        "lm_head.weight": source.head,
    }
    for number, layer in enumerate(source.layers):
        mlp = f"backbone.layers.{2 * number + 1}"
        kept[f"backbone.layers.{2 * number}.norm.weight"] = layer.attention_norm
        kept[f"{mlp}.norm.weight"] = layer.mlp_norm
        kept[f"{mlp}.mixer.in_proj.weight"] = layer.gate_up
        kept[f"{mlp}.mixer.out_proj.weight"] = layer.down
    return kept


def load_mixers(model: PreTrainedModel, folder: str | Path) -> dict[str, Any]:
    """Put packed mixers into a model; returns the index.

    Raises:
        CheckpointError: the folder holds no mixers, or those of another model.
    """
    folder = Path(folder)
    index = read_index(folder)
    weights = _read_mixers(folder, index)
    own = {id(parameter) for mixer in mixers_of(model) for parameter in mixer.parameters()}
    lacking = {name for name, parameter in model.named_parameters() if id(parameter) in own} - weights.keys()
    try:
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds the mixers of another model: {one_line(error)}") from error
    if wrong := sorted(lacking) + unexpected:
        raise CheckpointError(f"{folder} holds the mixers of another model: {', '.join(wrong[:3])}.")
    return index


def _check_sum(folder: Path, index: dict[str, Any], name: str, what: str) -> None:
    """Refuse a file that is not what the index says, where it says something: older ones do not."""
    known = index.get("sha256", {}).get(name)
    if known is not None and file_sha256(folder / name) != known:
        raise CheckpointError(f"{folder} holds {what}: {name} has another sha256 than in {MIXERS}.")


def _read_mixers(folder: Path, index: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Float32 tensors of a folder's mixers, by the names that they have in a model."""
    packed: dict[str, torch.Tensor] = {}
    for name in index["files"]:
        _check_sum(folder, index, name, "damaged mixers")
    try:
        for name in index["files"]:
            packed |= load_file(folder / name)
        return {
            f"backbone.layers.{2 * int(number)}.mixer.{name}": value
            for key, value in _unpacked(packed).items()
            for number, name in [key.split(".", 1)]
        }
    except Exception as error:  # readers of damaged files raise what they please
        raise CheckpointError(
            f"{folder} holds damaged mixers: {type(error).__name__}: {one_line(error)}"
        ) from error


def _unpacked(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 tensors by their own names.

    A packed one is in parts: ``NAME:scale`` ``[out, in / group]``, and ``NAME:integers`` int8 ``[out, in]``,
    or ``NAME:nibbles`` uint8, two integers in a byte.
    """
    tensors = {}
    for key, value in packed.items():
        name, _, part = key.partition(":")
        if not part:
            tensors[name] = value.float()
        elif part != "scale":
            scale = packed[f"{name}:scale"].float()
            whole = (_from_nibbles(value) if part == "nibbles" else value).view(len(scale), -1)
            tensors[name] = whole.float() * scale.repeat_interleave(whole.shape[1] // scale.shape[1], dim=1)
    return tensors


def _from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Integers of 4 bits, int8, of which the lower half of a byte holds the first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten().to(torch.int8) - 8
