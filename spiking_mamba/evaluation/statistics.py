"""How sure a result is: intervals over seeds, and paired bootstrap intervals over a task's items.

interval([0.46, 0.47, 0.45])["low"]
paired_gap({"piqa": reference_items}, {"piqa": model_items})["gap"]
kept_share({"piqa": reference_items}, {"piqa": model_items}, {"piqa": 0.5})["share"]
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from spiking_mamba.data.benchmarks import SOURCE_TASKS

_UNBOUNDED = 1e9  # a share beyond all

__all__ = ["gaps", "groups", "interval", "kept_share", "median_interval", "paired_gap"]


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Mean, standard deviation and Student's t interval of independent runs.

    Args:
        values: one number a run, at least one.
        confidence: of the interval ``mean +- t(n - 1) * sd / sqrt(n)``.

    Returns:
        ``mean``, ``sd`` (with n - 1), ``low``, ``high`` and ``runs``. A single run has no spread, and neither
        has one that is not finite (a perplexity may overflow): ``sd``, ``low`` and ``high`` are then None.
    """
    runs = len(values)
    if not runs:
        raise ValueError("There is no run to average.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
    mean = float(np.mean(values))
    if runs == 1 or not math.isfinite(mean):
        return {"mean": mean, "sd": None, "low": None, "high": None, "runs": runs}
    sd = float(np.std(values, ddof=1))
    half = float(stdtrit(runs - 1, 0.5 + confidence / 2)) * sd / math.sqrt(runs)
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "runs": runs}


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval of the median of independent values of any distribution, from two of them.

    Args:
        values: such as quotients of times.
        confidence: at least, of the interval.

    Returns:
        Its ends; None where there are too few values for any: less than six at 95%.
    """
    from scipy.stats import quantile_test  # an import of half a second

    found = quantile_test(list(values), p=0.5).confidence_interval(confidence)
    ends = float(found.low), float(found.high)
    return ends if all(map(math.isfinite, ends)) else None


def _resampled(scores: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Means of items drawn with replacement, ``[items, *] -> [resamples, *]``.

    A resample only says how often each value was drawn: of differences of 0/1 scores there are three, so that
    a resample costs three numbers instead of one an item.
    """
    values, counts = np.unique(scores, axis=0, return_counts=True)
    drawn = random.multinomial(len(scores), counts / len(scores), size=resamples)  # [resamples, values]
    return drawn @ values / len(scores)


def paired_gap(
    reference: Mapping[str, Sequence[float]],
    model: Mapping[str, Sequence[float]],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean score of a reference minus that of a model on the same items, with a bootstrap interval.

    Items are resampled in pairs, within each task, and the tasks' means are averaged with equal weight.

    Args:
        reference, model: the scores of every item by task, both in the dataset's order.
        resamples: of the percentile bootstrap.
        confidence: of the interval.
        seed: of the bootstrap; the same input gives the same interval.

    Returns:
        ``gap``, ``low``, ``high`` and ``items``, the number of pairs.

    Raises:
        ValueError: the tasks differ, a task has no item, or the two have unequal numbers of items.
    """
    if not reference or reference.keys() != model.keys():
        raise ValueError(
            f"A paired gap needs the same tasks on both sides, got {sorted(reference)} and {sorted(model)}."
        )
    random = np.random.default_rng(seed)
    gap, draws, items = 0.0, np.zeros(resamples), 0
    for task in sorted(reference):
        ours, theirs = np.asarray(reference[task], float), np.asarray(model[task], float)
        if not len(ours) or ours.shape != theirs.shape:
            raise ValueError(f"{task} has {len(ours)} items on one side and {len(theirs)} on the other.")
        gap += float((ours - theirs).mean()) / len(reference)
        draws += _resampled(ours - theirs, resamples, random) / len(reference)
        items += len(ours)
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return {"gap": gap, "low": float(low), "high": float(high), "items": items}


def kept_share(
    reference: Mapping[str, Sequence[float]],
    model: Mapping[str, Sequence[float]],
    chance: Mapping[str, float],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """What a model keeps of a reference's ability.

    The sum over tasks of its mean score above chance, over the reference's, with a bootstrap interval of
    items in pairs as in :func:`paired_gap`.

    Args:
        reference, model: the scores of every item by task, both in the dataset's order.
        chance: the mean score of guessing, by task.
        resamples, confidence, seed: of the bootstrap.

    Returns:
        ``share``, ``low`` and ``high``.

    Raises:
        ValueError: the tasks or numbers of items differ, or the reference is no better than guessing, or so
            little that a bootstrap does not tell.
    """
    if not reference or reference.keys() != model.keys():
        raise ValueError(f"The same tasks are wanted, got {sorted(reference)} and {sorted(model)}.")
    random = np.random.default_rng(seed)
    above, drawn_above = np.zeros(2), np.zeros((resamples, 2))
    for task in sorted(reference):
        if not len(reference[task]) or len(reference[task]) != len(model[task]):
            raise ValueError(f"{task} has {len(reference[task])} and {len(model[task])} items.")
        pairs = np.stack([np.asarray(reference[task], float), np.asarray(model[task], float)], axis=1)
        above += pairs.mean(0) - chance[task]
        drawn_above += _resampled(pairs, resamples, random) - chance[task]
    if above[0] <= 0:
        raise ValueError("The reference is no better than guessing: there is nothing to keep.")
    tells = drawn_above[:, 0] > 0  # a resample in which the reference guesses bounds the share on no side
    shares = drawn_above[:, 1] / np.where(tells, drawn_above[:, 0], 1.0)
    if (~tells).mean() * 2 >= 1 - confidence:
        raise ValueError("The reference is hardly better than guessing: what is kept of it has no bounds.")
    # large numbers, not infinities, between which a quantile would be none
    low = np.quantile(np.where(tells, shares, -_UNBOUNDED), 0.5 - confidence / 2)
    high = np.quantile(np.where(tells, shares, _UNBOUNDED), 0.5 + confidence / 2)
    return {"share": float(above[1] / above[0]), "low": float(low), "high": float(high)}


def _quantities(model: Mapping[str, Any]) -> dict[str, float]:
    """What is averaged over the runs of a group, as far as the model has it."""
    quantities = {task: result["metrics"][result["main"]]["value"] for task, result in model["tasks"].items()}
    quantities["average"] = model.get("average")
    for corpus, result in (model.get("perplexity") or {}).items():
        quantities[f"perplexity:{corpus}"] = result["perplexity"]
    if model.get("spikes"):
        quantities["mean_abs"] = model["spikes"]["mean_abs"]
    if model.get("energy"):
        energies = model["energy"]["projections"]
        quantities |= {f"gain_{table}": row.get("gain") for table, row in energies.items()}
    return {name: value for name, value in quantities.items() if value is not None}


def groups(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """:func:`interval` of every quantity over the runs of each group.

    Args:
        models: the ``models`` of an evaluation's results; those of one ``group`` differ by the seed.

    Returns:
        ``{group: {quantity: interval}}``. A quantity is a task (its main metric), ``average``,
        ``perplexity:<corpus>``, ``mean_abs`` or ``gain_<table of costs>``; those that no run has are left
        out.
    """
    grouped: dict[str, dict[str, list[float]]] = {}
    for model in models:
        group = grouped.setdefault(model["group"], {})
        for name, value in _quantities(model).items():
            group.setdefault(name, []).append(value)
    return {
        group: {name: interval(values) for name, values in quantities.items()}
        for group, quantities in grouped.items()
    }


def _items(model: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """The scores by task, of the tasks' main metrics, where they were kept."""
    items = {task: (result.get("items") or {}).get(result["main"]) for task, result in model["tasks"].items()}
    return {task: scores for task, scores in items.items() if scores}


def gaps(models: Sequence[Mapping[str, Any]], resamples: int = 10_000, seed: int = 0) -> list[dict[str, Any]]:
    """:func:`paired_gap` of every model against every reference.

    For each task that both were asked, and for the source's average where both have all six.

    Args:
        models: the ``models`` of an evaluation's results.
        resamples, seed: of the bootstrap.

    Returns:
        Rows of ``reference``, ``model``, ``task`` (or "average"), ``gap``, ``low``, ``high`` and ``items``.

    Raises:
        ValueError: a task's items are not the same for two models, by their number or by their checksum.
    """
    rows = []
    references = [model for model in models if model["reference"]]
    others = [model for model in models if not model["reference"]]
    for reference in references:
        for model in others:
            ours, theirs = _items(reference), _items(model)
            shared = [task for task in ours if task in theirs]
            for task in shared:
                _check_same_items(task, reference, model, len(ours[task]), len(theirs[task]))
            sets = {task: [task] for task in shared}
            if set(SOURCE_TASKS) <= set(shared):
                sets["average"] = list(SOURCE_TASKS)
            for name, tasks in sets.items():
                gap = paired_gap(
                    {t: ours[t] for t in tasks}, {t: theirs[t] for t in tasks}, resamples, seed=seed
                )
                rows.append({"reference": reference["name"], "model": model["name"], "task": name} | gap)
    return rows


def _check_same_items(
    task: str, reference: Mapping[str, Any], model: Mapping[str, Any], number: int, other: int
) -> None:
    pair = f"{reference['name']} and {model['name']}"
    if number != other:
        raise ValueError(f"{pair} have {number} and {other} items of {task}: a gap needs the same items.")
    sums = [(m["tasks"][task].get("data") or {}).get("sha256") for m in (reference, model)]
    if None not in sums and sums[0] != sums[1]:
        raise ValueError(f"{pair} were asked different items of {task}: their data have other checksums.")
    drawn = [m["tasks"][task].get("drawn") or {} for m in (reference, model)]
    if drawn[0].get("items") != drawn[1].get("items"):
        raise ValueError(f"{pair} were asked different items of {task}: they were drawn otherwise.")
    if reference["tasks"][task]["main"] != model["tasks"][task]["main"]:
        raise ValueError(f"{pair} have different main metrics of {task}.")
