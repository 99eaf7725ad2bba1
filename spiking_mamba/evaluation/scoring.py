"""How good a language model in memory is: zero-shot tasks by lm-eval, and perplexity.

tasks = zero_shot_tasks(["piqa", "arc_easy"])
zero_shot(model, tokenizer, tasks)["piqa"]["acc"]
perplexity(model, rows)["perplexity"]
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from spiking_mamba.common.errors import DataError
from spiking_mamba.common.progress import Share, Stage, part_of, reporting
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.evaluation.tasks import undisturbed
from spiking_mamba.model.modes import evaluating

if TYPE_CHECKING:
    import transformers
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

__all__ = ["perplexity", "score", "zero_shot"]


def score(lm: "LM", task: "Task", limit: int | None = None, progress: bool | Share = True) -> dict[str, Any]:
    """Zero-shot scores of one task, by lm-eval, with those of every item.

    Args:
        lm: lm-eval's model, see ``spiking_mamba.evaluation.harness.SpikingMambaLM``.
        task: one of ``zero_shot_tasks``.
        limit: how many items, from the first; None for all.
        progress: whether to show a bar, or whom to tell the share that is done.

    Returns:
        ``n``, ``main`` and ``chance`` (see ``Benchmark``); ``metrics``, ``{name: {"value", "stderr"}}``: the
        stock task's own, with standard errors over items, None of a single one; ``items``, ``{name: [n
        values in the set's order]}``: 0 or 1 for ``acc`` and ``acc_norm``, and in nats ``loglikelihood`` for
        ``perplexity``.
    """
    from lm_eval.evaluator import evaluate

    name = task.config.task
    lm_tasks = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    with undisturbed(), reporting(progress, name) as lm.share:
        found = evaluate(lm, lm_tasks, limit=limit, bootstrap_iters=0)
    lm.share = None
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    metrics, items = {}, {}
    for metric in samples[0]["metrics"]:
        value = float(found["results"][name][f"{metric},none"])
        values = [float(sample[metric]) for sample in samples]
        error = _standard_error(values)
        if metric == "perplexity":  # exp(-mean of the items): lm-eval would bootstrap it, for minutes
            items["loglikelihood"] = values
            error = None if error is None else value * error
        else:
            items[metric] = [int(value) for value in values]
        metrics[metric] = {"value": value, "stderr": error}
    benchmark = BENCHMARK_SETS[name]
    return {
        "n": len(samples),
        "main": benchmark.main,
        "chance": benchmark.chance,
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
) -> dict[str, dict[str, float | None]]:
    """Zero-shot scores of a causal language model, by lm-eval, on the device the model is on.

    `tasks` come from `zero_shot_tasks`; `limit` takes that many items of each. A `stage`, whose
    bar is moved, has a part for each task; without it each has a bar. Returns for each task `acc`,
    `acc_stderr`, `acc_norm`, `acc_norm_stderr` (shares of 1; None where the stock task has no such metric),
    `chance` and `n`, the number of items. The model's train/eval modes are left as they were. Raises
    FloatingPointError naming the first item with NaN logits, ImportError without lm-eval.
    """
    from spiking_mamba.evaluation.harness import SpikingMambaLM

    scores: dict[str, dict[str, float | None]] = {}
    with evaluating(model):
        lm = SpikingMambaLM(model, tokenizer, batch_size=batch_size)
        for name, task in tasks.items():
            with part_of(stage, name) as progress:
                found = score(lm, task, limit, progress)
            scores[name] = {"chance": found["chance"], "n": found["n"]}
            for metric in ("acc", "acc_norm"):
                known = found["metrics"].get(metric, {"value": None, "stderr": None})
                scores[name] |= {metric: known["value"], f"{metric}_stderr": known["stderr"]}
    return scores


def perplexity(
    model: torch.nn.Module,
    dataset: datasets.Dataset,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: bool | Share = True,
    bytes: int | None = None,
) -> dict[str, float]:
    """How well a causal language model predicts rows of token ids, each row on its own.

    `dataset` has `input_ids`, equally long rows (see `data.tokenize`), and perhaps `labels`, -100 where a
    token is not to be predicted. A row's first token is not predicted. `device` is where the model is moved
    to, None leaves it where it is; `progress` shows a bar, or is told the share that is done. Returns
    `perplexity`, `nll_per_token` (nats, summed in float64) and `tokens` (the number predicted); with `bytes`,
    the UTF-8 bytes that the rows' tokens stand for (`data.count_bytes(rows, tokenizer)`), also
    `bits_per_byte`, in which the first tokens cost the mean.
    Raises DataError for unusable rows, FloatingPointError naming the first row with NaN logits.
    """
    if "input_ids" not in dataset.column_names or not len(dataset):
        raise DataError("Perplexity needs a dataset with rows of `input_ids`, as `tokenize` returns it.")
    if device is not None:
        model.to(device)
    device = next(model.parameters()).device
    total, predicted, spelled = 0.0, 0, 0
    with torch.no_grad(), evaluating(model), reporting(progress, "perplexity") as share:
        for start in range(0, len(dataset), batch_size):
            rows = dataset[start : start + batch_size]
            if len(lengths := set(map(len, rows["input_ids"]))) != 1 or min(lengths) < 2:
                raise DataError(
                    f"Rows must be equally long, with at least 2 tokens; among those from row {start} on are "
                    f"lengths {sorted(lengths)}."
                )
            ids = torch.as_tensor(rows["input_ids"], dtype=torch.long, device=device)  # [batch, length]
            labels = torch.as_tensor(rows["labels"], device=device).long() if "labels" in rows else ids
            logits = model(input_ids=ids, use_cache=False).logits  # [batch, length, vocabulary]
            for offset in range(len(ids)):  # one row at a time: float32 logits are large
                target = labels[offset, 1:]
                nll = F.cross_entropy(logits[offset, :-1].float(), target, reduction="none")
                loss = nll.double().sum().item()
                if math.isnan(loss):
                    raise FloatingPointError(f"The model's logits are NaN in row {start + offset}.")
                total += loss
                predicted += int((target != -100).sum())
                spelled += int((labels[offset] != -100).sum())
            share((start + len(ids)) / len(dataset))
    if not predicted:
        raise DataError("No token is to be predicted: every label is -100.")
    mean = total / predicted
    with np.errstate(over="ignore"):  # infinite, and said to be
        result = {"perplexity": float(np.exp(mean)), "nll_per_token": mean, "tokens": predicted}
    if bytes is not None:
        result["bits_per_byte"] = mean / math.log(2) * spelled / bytes
    return result
