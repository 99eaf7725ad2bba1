"""What a model can do beyond guessing, and how much of another's it keeps, over the same items."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mamba.data.benchmarks import BENCHMARK_SETS

__all__ = ["SIX", "ability", "guessing", "kept", "read_items", "write_items"]

Outcomes = Mapping[str, Mapping[str, np.ndarray]]  # bool [items] by task and metric

# of arXiv 2510.04595
SIX = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "boolq", "winogrande")


def write_items(path: str | Path, right: Outcomes) -> None:
    """Every item's outcome, a bit each."""
    bits = {f"{n}/{m}": np.packbits(v) for n, ms in right.items() for m, v in ms.items()}
    np.savez_compressed(path, **bits, **{f"{n}/items": len(ms["acc"]) for n, ms in right.items()})


def read_items(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """What :func:`write_items` has written."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as held:
        for key in held.files:
            name, _, metric = key.partition("/")
            if metric != "items":
                count = int(held[f"{name}/items"])
                found.setdefault(name, {})[metric] = np.unpackbits(held[key])[:count].astype(bool)
    return found


def guessing(data: Any) -> dict[str, float]:
    """What guessing gets right, by task: a choice at random, or always the most frequent right one. Where all
    right choices are one, their place was not drawn, and says nothing: there it is the first.

    Args:
        data: ``evaluated.npz``, see ``prepare.py``.
    """
    found = {}
    for number, name in enumerate(data["names"].tolist()):
        table = data["requests"][data["requests"][:, 0] == number]
        first = table[np.r_[True, np.diff(table[:, 1]) != 0]]
        if (first[:, 3] < 0).any():  # a continuation is asked for, not a choice
            found[name] = 0.0
            continue
        chance = float((1 / np.bincount(table[:, 1])[first[:, 1]]).mean())
        majority = float(np.bincount(first[:, 3]).max() / len(first))
        found[name] = max(chance, majority) if majority < 1 else chance
    return found


def _main(right: Outcomes, name: str) -> np.ndarray:
    return right[name][BENCHMARK_SETS[name].main]


def ability(right: Outcomes, guess: Mapping[str, float], sets: Sequence[str]) -> float:
    """``sum (accuracy - guessing)`` over sets, each by the metric that counts for it."""
    return float(sum(_main(right, name).mean() - guess[name] for name in sets))


def kept(
    own: Outcomes,
    others: Outcomes,
    guess: Mapping[str, float],
    sets: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """The part of another model's ability that a model keeps, and how much less it gets right on the six sets
    of the source, with 95% intervals over items: both models answer the same ones, drawn anew for each set.

    Returns:
        ``kept``, ``kept_low``, ``kept_high``, shares; ``gap``, ``gap_low``, ``gap_high``, points out of 100.

    Raises:
        ValueError: the models were asked other items.
    """
    random = np.random.default_rng(seed)
    found = {}
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    six = [name for name in SIX if name in own]
    for name in dict.fromkeys([*sets, *six]):
        pair = [_main(each, name).astype(float) for each in (own, others)]
        count = len(pair[0])
        if len(pair[1]) != count:
            raise ValueError(f"{name}: {count} items here, {len(pair[1])} there.")
        # how often each of the four joint outcomes is drawn is all that matters
        joint = np.bincount((2 * pair[0] + pair[1]).astype(int), minlength=4)
        draws = random.multinomial(count, joint / count, size=resamples) / count
        means = [np.r_[pair[k].mean(), draws[:, places].sum(1)] for k, places in enumerate(([2, 3], [1, 3]))]
        drawn[name] = (means[0], means[1])
    sums = [sum(drawn[name][k] - guess[name] for name in sets) for k in range(2)]
    values = {"kept": sums[0] / sums[1]}
    if six:
        values["gap"] = 100 * np.mean([drawn[name][1] - drawn[name][0] for name in six], axis=0)
    for key, all_of_it in values.items():
        low, high = np.quantile(all_of_it[1:], [0.025, 0.975])
        found |= {key: all_of_it[0], f"{key}_low": low, f"{key}_high": high}
    return {key: round(float(value), 4) for key, value in found.items()}
