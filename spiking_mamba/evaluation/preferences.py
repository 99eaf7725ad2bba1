"""What a preference optimisation was worth: preference accuracy, perplexity, spikes, energy."""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import torch
import torch.nn.functional as F

from spiking_mamba.common.progress import Share, Stage, part_of, reporting
from spiking_mamba.data.preferences import Preference
from spiking_mamba.evaluation.scoring import perplexity
from spiking_mamba.evaluation.statistics import paired_gap
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.modes import evaluating
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.energy import projection_energy

__all__ = ["compare", "completion_log_probs", "evaluate_preferences", "preference_scores"]


def completion_log_probs(
    model: SpikingMambaForCausalLM,
    rows: Sequence[tuple[list[int], list[int]]],
    batch_size: int = 32,
    progress: bool | Share = True,
) -> torch.Tensor:
    """Summed log-probability of each completion given its prompt, in nats; float64 ``[rows]``.

    Args:
        model: spiking or dense.
        rows: prompts, at least one token each, and completions, as token ids.
        progress: whether to show a bar, or whom to tell the share that is done.
        batch_size: rows of one forward pass.

    Raises:
        FloatingPointError: the model's logits are NaN.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(rows), dtype=torch.float64)
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)  # little padding
    with torch.no_grad(), evaluating(model), reporting(progress, "preferences") as share:
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            width = max(lengths[index] for index in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                prompt, completion = rows[index]
                ids[row, : lengths[index]] = torch.tensor(prompt + completion)
                labels[row, len(prompt) : lengths[index]] = torch.tensor(completion)
                mask[row, : lengths[index]] = 1
            ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, L, V]
            counts = labels[:, 1:] != -100  # [B, L - 1]
            nll = torch.zeros(counts.shape, dtype=torch.float64, device=device)
            nll[counts] = F.cross_entropy(
                logits[:, :-1][counts].float(), labels[:, 1:][counts], reduction="none"
            ).double()
            sums[batch] = -nll.sum(-1).cpu()
            share((start + len(batch)) / len(rows))
    if sums.isnan().any():
        raise FloatingPointError("The model's logits are NaN on the held-out preferences.")
    return sums


def preference_scores(
    model: SpikingMambaForCausalLM,
    preferences: Sequence[Preference],
    batch_size: int = 32,
    progress: bool | Share = True,
) -> dict[str, dict[str, list[float]]]:
    """How often the model gives the chosen completion more probability than the rejected one.

    Returns:
        ``{"sum": {task: scores}, "per_token": ...}``: of each item, in the order of its first pair, the share
        of its pairs whose chosen completion has the larger summed log-probability, or the larger one divided
        by the completion's number of tokens. Pairs of one question are no independent trials, so items it is.
    """
    rows = [(p.prompt, completion) for p in preferences for completion in p.completions]
    distinct = {(tuple(prompt), tuple(completion)): row for row in rows for prompt, completion in [row]}
    places = {key: place for place, key in enumerate(distinct)}
    log_probs = completion_log_probs(model, list(distinct.values()), batch_size, progress)
    wins: dict[str, dict[str, dict[Any, list[bool]]]] = {"sum": {}, "per_token": {}}
    for number, p in enumerate(preferences):
        chosen, rejected = (float(log_probs[places[tuple(p.prompt), tuple(c)]]) for c in p.completions)
        item = ("pair", number) if p.item is None else p.item
        lengths = [len(completion) for completion in p.completions]
        for kind, win in (
            ("sum", chosen > rejected),
            ("per_token", chosen / lengths[0] > rejected / lengths[1]),
        ):
            wins[kind].setdefault(p.task, {}).setdefault(item, []).append(win)
    return {
        kind: {task: [sum(w) / len(w) for w in items.values()] for task, items in sorted(tasks.items())}
        for kind, tasks in wins.items()
    }


def _accuracy(scores: dict[str, list[float]]) -> dict[str, float]:
    """By task, and ``average``, the mean over tasks."""
    accuracies = {task: math.fsum(values) / len(values) for task, values in scores.items()}
    return accuracies | {"average": math.fsum(accuracies.values()) / len(accuracies)}


def evaluate_preferences(
    model: SpikingMambaForCausalLM,
    preferences: Sequence[Preference] | None,
    text: datasets.Dataset | None,
    batch_size: int = 32,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """Measure one model; the spikes are those of the very same forward passes.

    Args:
        model: spiking or dense, on its device. preferences: pairs for the accuracy; None: none.
        text: rows of equal length for the perplexity; None: none. batch_size: rows of one forward pass.
        stage: whose bar to move; it has a part for each of ``preferences`` and ``text``.

    Returns:
        ``scores`` (see :func:`preference_scores`), ``accuracy`` ``{kind: {task or "average": share}}``,
        ``perplexity``, ``mean_abs`` and ``energy`` (see ``projection_energy``); None where there is nothing
        to measure, for a dense model the last two.
    """
    with count_spikes(model, histogram=False) as counts:
        scores = nll = None
        if preferences is not None:
            with part_of(stage, "preferences") as progress:
                scores = preference_scores(model, preferences, batch_size, progress)
        if text is not None:
            with part_of(stage, "perplexity") as progress:
                nll = perplexity(model, text, batch_size=min(batch_size, 16), progress=progress)
    spiking = bool(counts.projections) and (scores is not None or nll is not None)
    return {
        "accuracy": scores and {kind: _accuracy(of_kind) for kind, of_kind in scores.items()},
        "perplexity": nll and nll["perplexity"],
        "mean_abs": counts.mean_abs if spiking else None,
        "energy": projection_energy(counts) if spiking else None,
        "scores": scores,
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What changed from one :func:`evaluate_preferences` to another, of the same items.

    Returns:
        ``accuracy`` ``{kind: {task or "average": {"gain", "low", "high", "items"}}}``, with 95% intervals of
        a bootstrap over items in pairs, and ``perplexity_ratio``; None where it was not measured.
    """
    gains = None
    if before["scores"] is not None:
        gains = {}
        for kind, scores in before["scores"].items():
            sets = {task: [task] for task in scores} | {"average": list(scores)}
            gains[kind] = {
                name: _gain({t: scores[t] for t in tasks}, {t: after["scores"][kind][t] for t in tasks})
                for name, tasks in sets.items()
            }
    ratio = after["perplexity"] and after["perplexity"] / before["perplexity"]
    return {"accuracy": gains, "perplexity_ratio": ratio}


def _gain(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, Any]:
    gap = paired_gap(after, before)
    return {"gain": gap.pop("gap")} | gap
