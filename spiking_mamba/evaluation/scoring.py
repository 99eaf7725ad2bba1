"""How good a language model in memory is: zero-shot tasks by lm-eval, and perplexity.

tasks = zero_shot_tasks(["piqa", "arc_easy"])
zero_shot(model, tokenizer, tasks)["piqa"]["acc"]
perplexity(model, rows)["perplexity"]
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from spiking_mamba.common.errors import DataError
from spiking_mamba.common.progress import Share, Stage, part_of, reporting
from spiking_mamba.evaluation.tasks import draw_items, main_metric, undisturbed
from spiking_mamba.model.modes import evaluating

if TYPE_CHECKING:
    import transformers
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

__all__ = ["kl_and_agreement", "perplexity", "score", "zero_shot"]


def score(
    lm: "LM", task: "Task", limit: int | None = None, progress: bool | Share = True, seed: int = 0
) -> dict[str, Any]:
    """Zero-shot scores of one task, by lm-eval, with those of every item.

    Args:
        lm: lm-eval's model, see ``spiking_mamba.evaluation.harness.SpikingMambaLM``.
        task: one of ``zero_shot_tasks``.
        limit: how many items, see ``draw_items``; None for all.
        progress: whether to show a bar, or whom to tell the share that is done.
        seed: of the draw of the items.

    Returns:
        ``n``, ``main`` and ``chance`` (see ``Benchmark``); ``drawn``, see ``draw_items``; ``metrics``,
        ``{name: {"value", "stderr"}}``: the stock task's own, with standard errors over items, None of a
        single one; ``items``, ``{name: [n values in the set's order]}``: what each item gives, 0 or 1 for
        most of ``acc`` and ``acc_norm``, and in nats ``loglikelihood`` for ``perplexity``.

    Raises:
        DataError: a metric of the task is no mean over items, or only of answers that were filtered.
        ValueError: ``limit`` is below 1.
    """
    from lm_eval.evaluator import evaluate

    name = task.config.task
    lm_tasks = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    drawn = draw_items(task, limit, seed)
    lm.item_numbers = drawn and drawn["items"]
    with undisturbed(), reporting(progress, name) as lm.share:
        evaluated = evaluate(lm, lm_tasks, samples=drawn and {name: drawn["items"]}, bootstrap_iters=0)
    lm.share = lm.item_numbers = None
    samples = sorted(evaluated["samples"][name], key=lambda sample: sample["doc_id"])
    metrics, items = {}, {}
    for metric in samples[0]["metrics"]:
        known = evaluated["results"][name]
        if f"{metric},none" not in known or not all(isinstance(s[metric], Real) for s in samples):
            raise DataError(f"{name}: {metric} is no number of each item, of which gaps could be taken.")
        value = float(known[f"{metric},none"])
        values = [float(sample[metric]) for sample in samples]
        error = _standard_error(values)
        if metric == "perplexity":  # exp(-mean of the items): lm-eval would bootstrap it, for minutes
            items["loglikelihood"] = values
            error = None if error is None else value * error
        else:
            items[metric] = [int(value) if value.is_integer() else value for value in values]
        metrics[metric] = {"value": value, "stderr": error}
    main, chance = main_metric(task, list(metrics))
    return {
        "n": len(samples),
        "main": main,
        "chance": chance,
        "drawn": drawn,
        "metrics": metrics,
        "items": items,
    }


def _standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None of a single value."""
    return None if len(values) < 2 else float(np.std(values, ddof=1) / math.sqrt(len(values)))


def zero_shot(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    tasks: "Mapping[str, Task]",
    limit: int | None = None,
    batch_size: int = 16,
    stage: Stage | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Zero-shot scores of a causal language model, by lm-eval, on the device the model is on.

    `tasks` come from `zero_shot_tasks`; `limit` takes that many items of each, drawn by `seed` as
    `draw_items` says. A `stage`, whose bar is moved, has a part for each task; without it each has a bar.
    Returns for each task `acc`, `acc_stderr`, `acc_norm`, `acc_norm_stderr` (shares of 1; None where the
    stock task has no such metric), `chance` and `n`, the number of items. The model's train/eval modes are
    left as they were. Raises FloatingPointError naming the first item with NaN logits, ImportError without
    lm-eval.
    """
    from spiking_mamba.evaluation.harness import SpikingMambaLM

    scores: dict[str, dict[str, float | None]] = {}
    with evaluating(model):
        lm = SpikingMambaLM(model, tokenizer, batch_size=batch_size)
        for name, task in tasks.items():
            with part_of(stage, name) as progress:
                result = score(lm, task, limit, progress, seed)
            scores[name] = {"chance": result["chance"], "n": result["n"]}
            for metric in ("acc", "acc_norm"):
                known = result["metrics"].get(metric, {"value": None, "stderr": None})
                scores[name] |= {metric: known["value"], f"{metric}_stderr": known["stderr"]}
    return scores


def perplexity(
    model: torch.nn.Module,
    dataset: datasets.Dataset,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: bool | Share = True,
    bytes: int | None = None,
    reference: torch.nn.Module | None = None,
) -> dict[str, float]:
    """How well a causal language model predicts rows of token ids, each row on its own.

    `dataset` has `input_ids`, equally long rows (see `data.tokenize`), and perhaps `labels`, -100 where a
    token is not to be predicted. A row's first token is not predicted. `device` is where the model is moved
    to, None leaves it where it is; `progress` shows a bar, or is told the share that is done. Returns
    `perplexity`, `nll_per_token` (nats, summed in float64) and `tokens` (the number predicted); with `bytes`,
    the UTF-8 bytes that the rows' tokens stand for (`data.count_bytes(rows, tokenizer)`), also
    `bits_per_byte`, in which the first tokens cost the mean. With a `reference`, a model of the same
    vocabulary, also `kl`, KL(reference || model) in nats a token, and `top1_agreement`, how often both have
    the same likeliest next token: a student may predict a text as well as its teacher and say other things.
    Raises DataError for unusable rows, FloatingPointError naming the first row with NaN logits, ValueError
    for a `batch_size` or `bytes` below 1.
    """
    if batch_size < 1 or (bytes is not None and bytes < 1):
        raise ValueError(f"batch_size and bytes must be at least 1, got {batch_size} and {bytes}.")
    if "input_ids" not in dataset.column_names or not len(dataset):
        raise DataError("Perplexity needs a dataset with rows of `input_ids`, as `tokenize` returns it.")
    if device is not None:
        model.to(device)
    device = next(model.parameters()).device
    models = [model] if reference is None else [model, reference.to(device)]
    sums = _Sums()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for each in models:
            stack.enter_context(evaluating(each))
        share = stack.enter_context(reporting(progress, "perplexity"))
        for start in range(0, len(dataset), batch_size):
            ids, labels = _tensors(dataset[start : start + batch_size], start, device)
            every = [each(input_ids=ids, use_cache=False).logits for each in models]
            if every[0].shape != every[-1].shape:
                raise ValueError("The model's vocabulary and its reference's are of different sizes.")
            for offset in range(len(ids)):  # one row at a time: float32 logits are large
                sums.add(labels[offset], [logits[offset] for logits in every], start + offset)
            share((start + len(ids)) / len(dataset))
    return sums.result(bytes, reference is not None)


def _tensors(rows: Any, start: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of rows from ``start`` on, int64 ``[batch, length]`` each."""
    if len(lengths := set(map(len, rows["input_ids"]))) != 1 or min(lengths) < 2:
        raise DataError(
            f"Rows must be equally long, with at least 2 tokens; among those from row {start} on are "
            f"lengths {sorted(lengths)}."
        )
    ids = torch.as_tensor(rows["input_ids"], dtype=torch.long, device=device)
    return ids, torch.as_tensor(rows["labels"], device=device).long() if "labels" in rows else ids


@dataclass
class _Sums:
    """Over all rows so far.

    Attributes:
        nats, divergence: in float64, see :func:`perplexity`. agreed: tokens with the same likeliest one.
        predicted, spelled: tokens that are predicted, and those with a row's first one.
    """

    nats: float = 0.0
    predicted: int = 0
    spelled: int = 0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, labels: torch.Tensor, logits: Sequence[torch.Tensor], row: int) -> None:
        """A row: labels ``[length]``, and logits ``[length, vocabulary]`` of one or two models."""
        target = labels[1:]
        nats = F.cross_entropy(logits[0][:-1].float(), target, reduction="none").double().sum().item()
        if math.isnan(nats):
            raise FloatingPointError(f"The model's logits are NaN in row {row}.")
        counts = target != -100
        self.nats += nats
        self.predicted += int(counts.sum())
        self.spelled += int((labels != -100).sum())
        if len(logits) > 1:
            kl, same = kl_and_agreement(*(each[:-1][counts] for each in logits))
            if math.isnan(kl):
                raise FloatingPointError(f"The reference's logits are NaN in row {row}.")
            self.divergence, self.agreed = self.divergence + kl, self.agreed + same

    def result(self, bytes: int | None, compares: bool) -> dict[str, float]:
        """What :func:`perplexity` returns."""
        if not self.predicted:
            raise DataError("No token is to be predicted: every label is -100.")
        mean = self.nats / self.predicted
        with np.errstate(over="ignore"):  # infinite, and said to be
            measures = {"perplexity": float(np.exp(mean)), "nll_per_token": mean, "tokens": self.predicted}
        if bytes is not None:
            measures["bits_per_byte"] = mean / math.log(2) * self.spelled / bytes
        if compares:
            measures["kl"] = self.divergence / self.predicted
            measures["top1_agreement"] = self.agreed / self.predicted
        return measures


def kl_and_agreement(logits: torch.Tensor, reference: torch.Tensor) -> tuple[float, int]:
    """KL(reference || logits) in nats, summed in float64, and how many likeliest tokens are the same.

    Args:
        logits, reference: ``[..., vocabulary]``.
    """
    log_q, log_p = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    each = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    each = each.where(log_p != -math.inf, 0.0)  # what has no probability adds none
    return each.sum(-1).double().sum().item(), int((logits.argmax(-1) == reference.argmax(-1)).sum())
