"""Which items of zero-shot sets were answered rightly, a bit each, for intervals over the same items."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mamba.data.benchmarks import BENCHMARK_SETS

__all__ = ["Outcomes", "main_outcomes", "read_outcomes", "write_outcomes"]

Outcomes = Mapping[str, Mapping[str, np.ndarray]]  # bool [items] by task and metric


def write_outcomes(path: str | Path, right: Outcomes) -> None:
    """Keep every item's outcome, a bit each, as ``.npz``."""
    kept: dict[str, Any] = {f"{n}/{m}": np.packbits(v) for n, ms in right.items() for m, v in ms.items()}
    kept |= {f"{n}/items": len(ms["acc"]) for n, ms in right.items()}
    np.savez_compressed(path, **kept)


def read_outcomes(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """What :func:`write_outcomes` has written: bool ``[items]`` by task and metric."""
    outcomes: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as held:
        for key in held.files:
            name, _, metric = key.partition("/")
            if metric != "items":
                count = int(held[f"{name}/items"])
                outcomes.setdefault(name, {})[metric] = np.unpackbits(held[key])[:count].astype(bool)
    return outcomes


def main_outcomes(path: str | Path) -> dict[str, np.ndarray]:
    """The same by task, by the metric that counts for it."""
    return {name: metrics[BENCHMARK_SETS[name].main] for name, metrics in read_outcomes(path).items()}
