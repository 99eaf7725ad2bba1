"""What a model can do beyond guessing, and how much of another's it keeps, over the same items."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiking_mamba.data.benchmarks import BENCHMARK_SETS, SOURCE_TASKS
from spiking_mamba.evaluation.outcomes import Outcomes
from spiking_mamba.evaluation.statistics import kept_share, paired_gap

__all__ = ["ability", "guessing", "relative_ability"]


def guessing(data: Any) -> dict[str, float]:
    """What guessing gets right, by task: a choice at random, or always the most frequent right one.

    Where all right choices are one, their place was not drawn, and says nothing: there it is the first.

    Args:
        data: ``evaluated.npz``, see ``prepare.py``.
    """
    scores = {}
    for number, name in enumerate(data["names"].tolist()):
        table = data["requests"][data["requests"][:, 0] == number]
        first = table[np.r_[True, np.diff(table[:, 1]) != 0]]
        if (first[:, 3] < 0).any():  # a continuation is asked for, not a choice
            scores[name] = 0.0
            continue
        chance = float((1 / np.bincount(table[:, 1])[first[:, 1]]).mean())
        majority = float(np.bincount(first[:, 3]).max() / len(first))
        scores[name] = max(chance, majority) if majority < 1 else chance
    return scores


def _main(right: Outcomes, name: str) -> np.ndarray:
    return right[name][BENCHMARK_SETS[name].main]


def ability(right: Outcomes, guess: Mapping[str, float], sets: Sequence[str]) -> float:
    """``sum (accuracy - guessing)`` over sets, each by the metric that counts for it."""
    return float(sum(_main(right, name).mean() - guess[name] for name in sets))


def relative_ability(
    own: Outcomes, others: Outcomes, guess: Mapping[str, float], sets: Sequence[str]
) -> dict[str, Any]:
    """The part of another model's ability that a model keeps, and how many points less it gets right.

    The part only if the other has any ability; the points on the six sets of the source; with 95% intervals
    over items, which both models answered.

    Args:
        own: of the model, by task.
        others: of at least as many items; the first ones are taken.
        guess: what guessing gets right, by task, see :func:`guessing`. sets: the tasks.

    Raises:
        ValueError: the other model was asked fewer items.
    """
    sides = []
    for names in (sets, [name for name in SOURCE_TASKS if name in own]):
        ours = {name: _main(own, name) for name in names}
        theirs = {name: _main(others, name)[: len(ours[name])] for name in names}
        sides.append((theirs, ours))
    measures: dict[str, Any] = {}
    if ability(others, guess, sets) > 0:
        measures["kept"] = kept_share(*sides[0], guess)
    if sides[1][0]:
        measures["gap"] = {key: 100 * value for key, value in paired_gap(*sides[1]).items() if key != "items"}
    return {
        name: {key: round(float(value), 4) for key, value in values.items()}
        for name, values in measures.items()
    }
