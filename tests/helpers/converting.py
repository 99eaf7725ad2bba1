"""What tests of recipes/convert share: its modules, a small Transformer, data as prepare.py leaves them."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "recipes" / "convert"


@contextlib.contextmanager
def recipe_modules() -> Iterator[Any]:
    """The recipe's modules by name."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    sys.path.insert(0, str(FOLDER))
    try:
        yield type("Recipe", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


def transformer() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_prepared(data: Path) -> None:
    """A text, openings and what is evaluated, at random."""
    random = np.random.default_rng(0)
    data.mkdir()
    random.integers(3, 96, 4000).astype(np.uint16).tofile(data / "package_text.bin")
    lengths = np.full(20, 4, np.uint8)
    np.savez(data / "openings.npz", tokens=random.integers(3, 96, 80).astype(np.uint16), lengths=lengths)
    rows = [
        [0, item, choice, item % 2, 9 + choice, 2 + choice, 3] for item in range(6) for choice in range(2)
    ]
    rows += [[1, item, 0, -1, 8, 1, 1] for item in range(5)]
    table = np.array(rows, np.int32)
    np.savez(
        data / "evaluated.npz",
        names=np.array(["piqa", "lambada_openai"]),
        requests=table,
        tokens=random.integers(3, 96, table[:, 4].sum()).astype(np.uint16),
        texts=random.integers(3, 96, 500).astype(np.uint16),
        **{
            name: random.integers(3, 96, 1200).astype(np.uint16)
            for name in ("openwebtext-passages", "wikipedia-passages")
        },
    )
