"""Checkpoint folders: finding them, and their files as dictionaries."""

import contextlib
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file

from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.hub import unreachable

__all__ = [
    "INDEX",
    "MIXERS",
    "WEIGHTS",
    "Header",
    "Weights",
    "check_layers",
    "check_links",
    "is_file_name",
    "locate",
    "model_of_run",
    "one_line",
    "read_headers",
    "read_mapping",
    "read_weights",
    "weight_files",
]

Weights = dict[str, torch.Tensor]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"  # behind the name of weights that are in shards
MIXERS = "mixers.json"  # the index of a converted model's mixers, whose other weights lie elsewhere
_READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")  # files that a checkpoint is read from
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def _folder(name: str | Path) -> Path:
    if (folder := Path(name)).is_dir():
        return folder
    if folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise CheckpointError(f"There is no checkpoint folder {name}.")
    try:
        wanted = ["*.json", "*.safetensors", "*.bin"]
        return Path(snapshot_download(str(name), allow_patterns=wanted, local_files_only=unreachable()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor to be had from the hub: {one_line(error)}"
        ) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds a mapping.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no mapping of keys to values.")
    return content


def one_line(error: BaseException) -> str:
    """What an error says, however long its text is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def check_links(folder: Path) -> None:
    """Raise a CheckpointError for a link to a file elsewhere: what a folder names is read and trusted.

    In the hub's cache a snapshot consists of links to the same repository's ``blobs``, which are allowed.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix in _READ:
            target = path.resolve()
            if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
                raise CheckpointError(f"{path} is a link that leaves its folder, to {target}.")


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The files of weights in a folder, each with the names that it should hold; None where no index says.

    Raises:
        CheckpointError: there is none, one that the index names is not there, or lies outside the folder.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return {name: None}
        if (index := folder / (name + INDEX)).is_file():
            break
    else:
        raise CheckpointError(f"{folder} is incomplete: it has none of {', '.join(WEIGHTS)}.")
    where = read_mapping(index).get("weight_map")
    if not isinstance(where, dict) or not all(map(is_file_name, where.values())):
        raise CheckpointError(f"{index} does not map weights to files beside it.")
    files: dict[str, list[str] | None] = {}
    for key, shard in sorted(where.items(), key=lambda item: item[1]):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} is incomplete: it lacks {shard}.")
        files.setdefault(shard, []).append(key)  # type: ignore[union-attr]
    return files


def is_file_name(name: Any) -> bool:
    """Whether an index may name it: a file beside the index."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


@dataclass(frozen=True)
class Header:
    """What a file says of a weight before it is read."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool


def read_headers(folder: Path) -> dict[str, Header]:
    """Shapes and types of a folder's weights; the weights themselves stay on the disk.

    Raises:
        CheckpointError: see :func:`weight_files`; or a file is damaged.
    """
    headers: dict[str, Header] = {}
    for name in weight_files(folder):
        path = folder / name
        if path.suffix == ".safetensors":
            with _damaged(path), safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    piece = file.get_slice(key)
                    dtype = piece.get_dtype()
                    headers[key] = Header(tuple(piece.get_shape()), dtype, dtype.startswith(("F", "BF")))
        else:
            for key, weight in _unpickle(path, "meta").items():
                headers[key] = Header(tuple(weight.shape), str(weight.dtype), weight.is_floating_point())
    return headers


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # readers of damaged files raise what they please, down to struct.error
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error


def _unpickle(path: Path, device: str) -> Weights:
    try:
        try:
            weights = torch.load(path, map_location=device, weights_only=True, mmap=device == "meta")
        except RuntimeError:  # an old file, which cannot be mapped, or a damaged one
            weights = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text tells how to switch the safety off
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors: it is not read, since a pickle can run code."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(weight, torch.Tensor) for key, weight in weights.items()
    ):
        raise CheckpointError(f"{path} holds no mapping of names to tensors.")
    return dict(weights)


def read_weights(folder: Path) -> Weights:
    """The weights of a folder, in one file or in the shards that an index lists; floating-point all of them.

    Raises:
        CheckpointError: see :func:`weight_files`; a file is damaged, or does not hold what the index says.
    """
    weights: Weights = {}
    files = weight_files(folder)
    for name in files:
        path = folder / name
        if path.suffix == ".safetensors":
            with _damaged(path):
                weights |= load_file(path)
        else:
            weights |= _unpickle(path, "cpu")
    listed = [key for keys in files.values() for key in keys or ()]
    if listed and (wrong := sorted(set(listed) ^ weights.keys())):
        raise CheckpointError(f"The index of {folder} and its files disagree on {', '.join(wrong[:5])}.")
    for key, weight in weights.items():
        if not weight.is_floating_point():
            raise CheckpointError(f"{folder}: {key} is of type {weight.dtype}, no floating-point weight.")
    return weights


def check_layers(folder: Path, settings: dict[str, Any]) -> None:
    """Raise a CheckpointError where config.json promises more layers than there are weights of.

    A configuration takes memory by its number of layers before any weight is looked at.
    """
    layers = settings.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    numbers = [int(m[1]) for key in read_headers(folder) if (m := _LAYER.search(key))]
    if layers > (present := 1 + max(numbers, default=-1)):
        raise CheckpointError(
            f"{folder}: config.json says num_hidden_layers is {layers}, "
            f"but the weights are of {present} layers: missing keys of layers.{present}."
        )


def model_of_run(folder: Path) -> str:
    """Where the model of a run's folder is, for who has named that; nothing where it is no run's."""
    return f"a run's, whose model is {folder}/model" if (folder / "model" / "config.json").is_file() else ""


def locate(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """The local folder of a checkpoint, fetched if it is on the hub, and its config.json.

    Raises:
        CheckpointError: there is none, or it lacks its config.json or its weights.
    """
    folder = _folder(name)
    check_links(folder)
    if not (path := folder / "config.json").is_file():
        hint = f" It is {where}." if (where := model_of_run(folder)) else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.{hint}")
    settings = read_mapping(path)
    if (folder / MIXERS).is_file():
        return folder, settings
    weight_files(folder)  # whose names are checked before any reader follows them
    check_layers(folder, settings)
    return folder, settings
