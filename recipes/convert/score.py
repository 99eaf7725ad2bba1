"""Score a converted model, or its source, on the ten zero-shot sets and on held-out passages, in seconds.

python recipes/convert/score.py recipes/convert/score.yaml
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversion import convert
from flat import load_state
from llama import Llama
from tokens import END, PASSAGES, passage_rows
from torch.nn import functional as F

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.schema import Count, Name, Natural, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.evaluation.outcomes import write_outcomes
from spiking_mamba.model.converted import load_mixers, mixers_of
from spiking_mamba.model.source import load_source


@schema
class ScoreSettings:
    """Every field is a key of the YAML file.

    Attributes:
        source: the Transformer, see ``source.load_source``.
        data: folder that ``prepare.py`` has written.
        log: file to which a line is added.
        state: a stage's ``state.pt``, whose mixers are scored; null: `mixers`.
        mixers: folder of packed mixers; null, too: the source itself.
        limit: items of each task, its first ones; 0: all.
        tokens: of a batch, padding included.
        passages: rows of 512 tokens of each kind.
        expand: width of a mixer over the residual stream's.
        items: file (.npz) for every item's outcome, by task and metric; null: none.
    """

    source: Name
    data: Name
    log: Name
    state: Name | None = None
    mixers: Name | None = None
    limit: Natural = 400
    tokens: Count = 32768
    passages: Count = 128
    expand: Count = 2
    items: Name | None = None


class Scored:
    """What is scored: hidden states of ids, and the head they go to."""

    def __init__(self, source: Llama, student: SpikingMambaForCausalLM | None) -> None:
        self.source, self.student = source, student

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """``[B, L] -> [B, L, C]``."""
        if self.student is None:
            return self.source.hidden_states(ids)
        with torch.autocast(ids.device.type, torch.bfloat16, ids.is_cuda):
            hidden = self.student.backbone(ids, use_cache=False).last_hidden_state
        return hidden.to(self.source.head.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[n, C] -> [n, V]`` float32."""
        return F.linear(hidden, self.source.head).float()


def batches(lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Numbers of rows of like length whose padded batch has at most so many tokens."""
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        width = -(-int(lengths[order[start]]) // 32) * 32
        end = start + max(1, most // width)
        yield order[start:end]
        start = end


@torch.no_grad()
def likelihoods(scored: Scored, rows: list[np.ndarray], ends: np.ndarray, most: int) -> tuple[Any, Any]:
    """The log-probability of the last ``ends[k]`` tokens of every row, and whether each was the likeliest.

    Behind the others and the end-of-text token in front; float64 and bool ``[rows]``.
    """
    device = scored.source.head.device
    sums, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
    lengths = np.array([len(row) + 1 for row in rows])
    for numbers in batches(lengths, most):
        width = -(-int(lengths[numbers].max()) // 32) * 32  # few widths: Triton compiles for each kind
        ids = np.full((len(numbers), width), END, np.int64)
        for k, number in enumerate(numbers):
            ids[k, 1 : lengths[number]] = rows[number]
        hidden = scored.hidden_states(torch.from_numpy(ids).to(device))
        row = np.repeat(np.arange(len(numbers)), ends[numbers])
        place = np.concatenate([np.arange(lengths[n] - ends[n], lengths[n]) for n in numbers])
        at = [torch.from_numpy(index).to(device) for index in (row, place - 1)]
        targets = torch.from_numpy(ids[row, place]).to(device)
        log_probs, best = [], []
        for piece in range(0, len(row), 4096):
            part = slice(piece, piece + 4096)
            log_p = scored.logits(hidden[at[0][part], at[1][part]]).log_softmax(-1)
            log_probs.append(log_p.gather(1, targets[part, None])[:, 0].double())
            best.append(log_p.argmax(-1) == targets[part])
        np.add.at(sums, numbers[row], torch.cat(log_probs).cpu().numpy())
        misses = np.bincount(row, ~torch.cat(best).cpu().numpy(), len(numbers))
        greedy[numbers] = misses == 0
    return sums, greedy


def outcomes(scored: Scored, data: Any, limit: int, most: int) -> dict[str, dict[str, np.ndarray]]:
    """Whether each item was answered rightly, bool ``[items]``, by task and metric: ``acc``, ``acc_norm``."""
    table, tokens = data["requests"], data["tokens"]
    starts = np.cumsum(table[:, 4]) - table[:, 4]
    chosen = np.flatnonzero(table[:, 1] < (limit or 10**9))
    table, starts = table[chosen], starts[chosen]
    rows = [tokens[start : start + length] for start, length in zip(starts, table[:, 4], strict=True)]
    sums, greedy = likelihoods(scored, rows, table[:, 5], most)
    by_task = {}
    for number, name in enumerate(data["names"].tolist()):
        own = table[:, 0] == number
        items = table[own, 1]
        by_item = np.split(np.arange(own.sum()), np.flatnonzero(np.diff(items)) + 1)
        right = {"acc": [], "acc_norm": []}
        for item in by_item:
            gold, size = table[own][item[0], 3], table[own][item, 6]
            if gold < 0:
                hits = [greedy[own][item[0]]] * 2
            else:
                values = sums[own][item]
                hits = [np.argmax(values) == gold, np.argmax(values / size) == gold]
            right["acc"].append(hits[0])
            right["acc_norm"].append(hits[1])
        by_task[name] = {key: np.array(value, bool) for key, value in right.items()}
    return by_task


def tasks(right: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """``acc`` and ``acc_norm``, the standard error of the one that counts, and how many items, by task."""
    results = {}
    for name, metrics in right.items():
        results[name] = {key: round(float(np.mean(value)), 4) for key, value in metrics.items()}
        main, items = metrics[BENCHMARK_SETS[name].main].mean(), len(metrics["acc"])
        results[name] |= {"stderr": round(float(np.sqrt(main * (1 - main) / items)), 4), "items": items}
    return results


@torch.no_grad()
def passages(
    scored: Scored, data: Any, count: int, most: int, length: int = 512, reference: Any = None
) -> dict[str, float]:
    """Perplexity, KL from a reference in nats a token, and how often both have the same likeliest token.

    On passages, positions 0 left out; the reference is the source unless another is given.
    """
    measures, reference = {}, reference or scored.source
    device = scored.source.head.device
    for name, short in PASSAGES.items():
        ids = passage_rows(data, name, length)[:count].to(device)
        nll, kl, same, n = 0.0, 0.0, 0, 0
        for part in ids.split(max(1, most // length)):
            own, theirs = scored.hidden_states(part)[:, 1:-1], reference.hidden_states(part)[:, 1:-1]
            for hidden, other, targets in zip(own, theirs, part[:, 2:], strict=True):
                log_p, log_q = (scored.logits(h).log_softmax(-1) for h in (hidden, other))
                nll -= float(log_p.gather(1, targets[:, None]).double().sum())
                kl += float((log_q.exp() * (log_q - log_p)).double().sum())
                same += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
                n += len(targets)
        measures[f"perplexity_{short}"] = round(float(np.exp(nll / max(1, n))), 3)
        measures[f"kl_{short}"] = round(kl / max(1, n), 4)
        measures[f"agreement_{short}"] = round(same / max(1, n), 4)
        measures[f"passages_{short}"] = len(ids)
    return measures


def load_scored(settings: ScoreSettings, device: torch.device) -> tuple[Scored, dict[str, Any]]:
    """The model to be scored, on the device, and what the log should say of it."""
    source = Llama.from_transformers(load_source(settings.source))
    facts: dict[str, Any] = {}
    student = None
    if settings.state or settings.mixers:
        student = convert(source, settings.expand)
        if settings.state:
            progress = load_state(mixers_of(student), settings.state)
            facts = {"stage": progress["settings"]["stage"], "step": progress["step"]}
            facts["tokens"] = progress["tokens"]
        else:
            facts = {"mixers": str(settings.mixers)} | load_mixers(student, settings.mixers)
            files = facts.pop("files")
            facts["sha256"] = {name: file_sha256(Path(settings.mixers, name)) for name in files}
        student = student.to(device).eval()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Scored(source.to(device, dtype), student), facts


@fail_clearly()
def main() -> None:
    settings = parse_settings(ScoreSettings, description=__doc__)
    quiet()
    for path in (settings.log, settings.items):  # or it would be told after the scoring
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise RunError(f"There is no folder for {path}: make it, or choose another file.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scored, facts = load_scored(settings, device)
    data = np.load(Path(settings.data, "evaluated.npz"))
    begun = time.monotonic()
    right = outcomes(scored, data, settings.limit, settings.tokens)
    if settings.items is not None:
        write_outcomes(settings.items, right)
    results = tasks(right)
    rest = passages(scored, data, settings.passages, settings.tokens)
    mains = [values[BENCHMARK_SETS[name].main] for name, values in results.items()]
    entry = {
        "scored": facts or "source",
        "items": settings.items,
        "limit": settings.limit,
        "mean": round(float(np.mean(mains)), 4),
    }
    entry |= {"tasks": results} | rest | {"provenance": provenance(settings)}
    with Path(settings.log).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(f"scored in {time.monotonic() - begun:.0f} s: {facts or 'source'}, mean {entry['mean']}, {rest}")
    for name, values in results.items():
        print(f"{name:16} {' '.join(f'{key} {value}' for key, value in values.items())}", flush=True)


if __name__ == "__main__":
    main()
