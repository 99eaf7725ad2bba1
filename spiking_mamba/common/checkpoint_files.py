"""Checkpoint folders: finding them, and their files as dictionaries."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file

from spiking_mamba.common.errors import CheckpointError

__all__ = ["INDEX", "WEIGHTS", "Weights", "locate", "read_weights"]

Weights = dict[str, torch.Tensor]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"  # behind the name of weights that are in shards


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
    if not any((folder / name).is_file() or (folder / (name + INDEX)).is_file() for name in WEIGHTS):
        raise CheckpointError(f"{folder} is incomplete: it has none of {', '.join(WEIGHTS)}.")
    return _read_mapping(path)


def _read_file(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(folder: Path) -> Weights:
    """The weights of a folder, in one file or in the shards that an index lists."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _read_file(folder / name)
        if (index := folder / (name + INDEX)).is_file():
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


def locate(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """The local folder of a checkpoint, fetched if it is on the hub, and its config.json.

    Raises:
        CheckpointError: there is none, or it lacks its config.json or its weights.
    """
    folder = _folder(name)
    return folder, _read_config(folder)
