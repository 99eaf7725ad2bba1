"""Distil the rows of a table, one student after another, and keep what each is worth.

python recipes/ablate/study.py recipes/ablate/tables/frontier.yaml
python recipes/ablate/study.py recipes/ablate/tables/frontier.yaml only='*learned*' minutes=9
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Other students in turn fragment the memory; an allocator that has to give blocks back costs time.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from measures import Measures, fingerprint
from table import Table, settings_recorded, steps, tokens_seen
from transformers import TrainerCallback

from spiking_mamba.common.claims import claimed
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import commit_of, is_clean, provenance, refuse_changed_code
from spiking_mamba.common.records import put_record, read_records
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.training.calibration import asks_for_calibration
from spiking_mamba.training.distillation import DistillationSettings, distill

IDENTITY = ("row", "seed")  # of a record in a table's file
MEASURED = ("done", "diverged")  # a row that failed is run again
_START = time.monotonic()


class Study:
    """The rows of a table, made and measured."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.measures = Measures(table)
        self.rate = 0.0  # training tokens a second, the best so far: the first row of a shape compiles

    def key(self, row: dict[str, Any], seed: int) -> str:
        """A hash of everything that a row's numbers depend on."""
        settings = settings_recorded(self.table.settings(row, seed))
        return fingerprint([self.measures.depends, settings, sorted(self.table.checks_of(row)), seed])

    def recorded(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        """The result that is recorded, of these settings or others; empty where there is none."""
        records = {tuple(map(each.get, IDENTITY)): each for each in read_records(self.table.records)}
        return records.get((row["name"], seed), {})

    def done(self, row: dict[str, Any], seed: int) -> bool:
        """Whether a result for exactly these settings is there."""
        record = self.recorded(row, seed)
        if self.table.renew and not is_clean(record.get("commit")):
            return False
        return record.get("key") == self.key(row, seed) and record.get("status") in MEASURED

    def keep(self, row: dict[str, Any], seed: int, result: dict[str, Any]) -> None:
        """Record a result; what is said of a row that failed takes no earlier result away."""
        if result["status"] == "failed" and self.recorded(row, seed).get("status") in MEASURED:
            write_whole(self.table.folder(row, seed, ".failed.json"), json.dumps(result, indent=1) + "\n")
        else:
            put_record(self.table.records, result, IDENTITY)

    def expected(self, settings: DistillationSettings) -> float:
        """Seconds that a row will take, by the best rate so far."""
        return (tokens_seen(settings) / self.rate if self.rate else 0.0) + 10.0

    def run(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train and measure a row; what happens to it is in ``status``: done, diverged or failed."""
        settings = self.table.settings(row, seed)
        key = self.key(row, seed)
        # named by the key, so that what a killed run left there can be gone on with, but not by other code
        names = [key, commit_of(Path(__file__).parents[2]) or "none"] if self.table.renew else [key]
        settings.output = str(self.table.folder(row, seed, "".join(f"-{name[:8]}" for name in names)))
        settings.resume = True
        start, cuda = time.perf_counter(), torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        result: dict[str, Any] = {"row": row["name"], "seed": seed, "status": "done", "key": key}
        try:
            result |= self.train(row, settings)
        except FloatingPointError as error:
            result |= {"status": "diverged", "error": str(error)}
        except Exception as error:  # of this row: the rest goes on
            result |= {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:500]}"}
        about = provenance(settings)
        about["settings"] = {k: about["settings"][k] for k in settings_recorded(settings)}
        result |= {"teacher": self.measures.dense, "depends": self.measures.depends}
        result |= {"tokens": tokens_seen(settings), "seconds": time.perf_counter() - start}
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        return result | about

    def train(self, row: dict[str, Any], settings: DistillationSettings) -> dict[str, Any]:
        measures = self.measures
        result: dict[str, Any] = {"held_out_tokens": len(measures.held_out) * 511}
        if asks_for_calibration(settings.threshold):
            result["threshold"] = measures.calibrated(settings)
            settings = replace(settings, threshold=result["threshold"])
        before = result["before"] = measures.converted(settings)
        model, checks = None, self.table.checks_of(row)
        if not steps(settings):
            result["after"] = before
            if checks:
                model = measures.student(settings)
        else:
            rows = measures.training_rows(settings)
            resumed, watch = any(Path(settings.output).glob("checkpoint-*")), StopWhenNotFinite()
            folder, log = distill(settings, measures.teacher, measures.tokenizer, rows, callbacks=[watch])
            if watch.at is not None:
                raise FloatingPointError(f"The loss was not finite in step {watch.at}.")
            if not resumed:  # or it would be the time of the last part
                result["train_seconds"] = next(r["train_runtime"] for r in log[::-1] if "train_runtime" in r)
                self.rate = max(self.rate, tokens_seen(settings) / result["train_seconds"])
            model = load_model(folder).to(measures.teacher.device)
            result["after"] = measures.measure(model)
        result["checks"] = {name: measures.check(name, model) for name in checks if model is not None}
        return result


class StopWhenNotFinite(TrainerCallback):
    """End a training whose logged loss is not finite."""

    def __init__(self) -> None:
        self.at: int | None = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not math.isfinite(float((logs or {}).get("loss", 0.0))):
            self.at, control.should_training_stop = state.global_step, True


def line(result: dict[str, Any], dense: float) -> str:
    if result["status"] != "done":
        return f"{result['status']}: {result['error']}"
    after = result["after"]
    text = f"perplexity {after['perplexity']:.2f}, {after['perplexity'] / dense:.4f} of the teacher's"
    if "kl" in after:
        text += f", KL to it {after['kl']:.3f} nats, same likeliest token {after['top1_agreement']:.1%}"
    if after["mean_abs"] is not None:
        text += f", mean |s| {after['mean_abs']:.3f}, gain {after['gain']['fp32'] or math.inf:.2f}x"
    if "train_seconds" in result:
        text += f", {result['tokens'] / result['train_seconds'] / 1e3:.0f}k tokens/s"
    return text + f", {result['seconds']:.0f} s"


# rows of other lengths are other shapes, not shapes that change; a table has more than 8 variants
@torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=256)
def study(table: Table) -> int:
    """Run what is not done yet; how many rows failed. One that diverged is a result."""
    read_records(table.records)  # a damaged file is told before the first row
    refuse_changed_code(table.records)
    if not is_clean(commit_of(Path(__file__).parents[2])):
        print("The code differs from its commit, or has none: a page would mark these results.", flush=True)
    with interruptible(lambda: "no row was begun; the same command starts again."):
        shared = Study(table)
    dense, rows = shared.measures.dense["perplexity"], len(shared.measures.held_out)
    print(f"teacher: perplexity {dense:.3f}, {rows} rows", flush=True)
    runs = list(table.runs())
    with interruptible(lambda: finished(shared, runs)):
        return run_rows(shared, runs)


def finished(shared: Study, runs: Sequence[tuple[dict[str, Any], int]]) -> str:
    done, path = sum(shared.done(*run) for run in runs), shared.table.records
    return f"{done} of {len(runs)} rows are finished and kept in {path}; the same command goes on."


def run_rows(shared: Study, runs: Sequence[tuple[dict[str, Any], int]]) -> int:
    """Run these rows; how many failed."""
    table, bad, late = shared.table, 0, 0
    for number, (row, seed) in enumerate(runs, 1):
        title = f"{number}/{len(runs)}  {row['name']}, seed {seed}"
        lock = table.folder(row, seed, ".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with claimed(lock) as free:
            if not free or shared.done(row, seed):
                print(f"{title}: {'done' if free else 'in another process'}", flush=True)
                continue
            left = math.inf if table.minutes is None else 60 * table.minutes - (time.monotonic() - _START)
            if shared.expected(table.settings(row, seed)) > left:
                late += 1
                continue
            print(title, flush=True)
            result = shared.run(row, seed)
            shared.keep(row, seed, result)
            bad += result["status"] == "failed"
            print(f"{title}: {line(result, shared.measures.dense['perplexity'])}", flush=True)
    if late:
        print(f"{late} rows did not fit into {table.minutes:g} minutes.")
    return bad


@fail_clearly()
def main() -> None:
    quiet()
    table = parse_settings(Table, description=__doc__)
    bad = study(table)
    if bad:
        sys.exit(f"{bad} row{'s' if bad > 1 else ''} failed, for the reason given above.")


if __name__ == "__main__":
    main()
