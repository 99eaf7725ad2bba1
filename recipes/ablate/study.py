"""Distil the rows of a table, one student after another, and keep what each is worth.

python recipes/ablate/study.py recipes/ablate/tables/frontier.yaml
python recipes/ablate/study.py recipes/ablate/tables/frontier.yaml only='*learned*' minutes=9
"""

import copy
import fcntl
import fnmatch
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

# Other students in turn fragment the memory; an allocator that has to give blocks back costs time.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import datasets
import pyarrow.parquet
import torch
from transformers import TrainerCallback

from spiking_mamba import SpikingMambaForCausalLM, data
from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import file_sha256, write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.settings import is_list_of, parse_settings, reject_unknown_keys, set_dotted
from spiking_mamba.evaluation.scoring import perplexity
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.conversion import spike_driven
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.spikes.counting import SpikeCounts, count_spikes
from spiking_mamba.spikes.energy import model_energy, projection_energy
from spiking_mamba.training.arguments import TRAINING_KEYS
from spiking_mamba.training.calibration import asks_for_calibration, resolve_threshold
from spiking_mamba.training.distillation import DistillationSettings, distill

VERSION = 1  # of what a row measures: another number, and every row is run again
CHECKS = ("bf16", "int8", "spike_driven")
MEASURED = ("done", "diverged")  # a row that failed is run again
DRIVEN_ROWS = 8  # that spike_driven is measured on
_OWN = ("name", "seeds", "checks", "lever")  # of a row; its other keys are settings
# Of the settings, what the runner fills in or a number does not depend on.
OUTSIDE = ("teacher", "output", "data", "seed", "resume", "overwrite", "dry_run", "compile")
_START = time.monotonic()


@dataclass
class Table:
    """A table of students; every field is a key of the YAML file.

    Attributes:
        name: of the folder of results.
        title, about: what stands above the table in ``docs/results.md``.
        teacher: folder of a dense checkpoint with its tokenizer, what every student starts from.
        data, held_out: text to train on and to measure on, see ``spiking_mamba.data.load_text``.
        common: settings of every row: fields of ``spiking_mamba.training.distillation.DistillationSettings``.
        rows: in the order in which they run. Each has a ``name``, perhaps ``seeds`` and ``checks`` of its
            own, a ``lever`` by which the picture groups it, and settings: ``training.max_steps: 500``.
            A row without steps (``training.max_steps: 0``) is converted and measured, not trained. One with
            ``neuron: null`` is a dense control.
        claims: of the source: ``claim``, the ``rows`` it is judged by, and the ``verdict``, which is shown
            when these are there.
        levers: what single changes gave: ``change``, the ``row`` that has it, and the one it is held
            ``against``.
        findings: what follows: ``text``, shown when the ``rows`` that it rests on were run.
        seeds: of rows that name none. All rows get their first seed before any gets its second.
        checks: perplexities measured beside every student, unless its row says otherwise. bf16: with all
            weights rounded to bfloat16, as a student may be shipped. int8: with projection weights rounded to
            int8, as in the equal-level quantised network. spike_driven: of 8 rows, fed ternary micro-steps.
        held_out_rows: rows of 512 tokens to measure on, from the first; null for all.
        results: folder of the results, a small JSON file for each row and seed.
        output: folder of the students, of the tokenised data, and of what is said of a row that failed where
            an earlier result of it stays.
        only: patterns of the rows to run, as of file names; null for all.
        rehearse: every row once, two steps of two rows, measured on four, results beside the students in
            ``output``: whether all of it runs on this machine.
        minutes: start no row that would end later than this many minutes after the start; null: no limit.
    """

    name: str
    teacher: str
    data: Any
    held_out: Any
    common: dict
    rows: Any
    title: str = ""
    about: str = ""
    claims: Any = ()
    levers: Any = ()
    findings: Any = ()
    seeds: Any = (0,)
    checks: Any = ()
    held_out_rows: Any = None
    results: str = "docs/results"
    output: str = "runs/study"
    only: Any = None
    rehearse: bool = False
    minutes: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.rows, list) or not self.rows:
            raise ValueError(f"{self.name} has no rows.")
        if self.rehearse:
            self.held_out_rows, self.output = 4, str(Path(self.output, "rehearsal"))
            self.results = str(Path(self.output, "results"))
        names = [row.get("name") for row in self.rows]
        slugs = [slug(str(name)) for name in names]
        if not all(isinstance(name, str) and slug(name) for name in names) or len(set(slugs)) < len(slugs):
            raise ValueError(f"Every row of {self.name} needs a name of its own, got {names}.")
        self.only = [self.only] if isinstance(self.only, str) else self.only
        if self.only is not None and not is_list_of(self.only, str):
            raise ValueError("only takes names; quote one with a colon or comma twice: only='\"4.76x: *\"'.")
        for pattern in self.only or ():
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"only={pattern!r} is none of the rows {', '.join(map(repr, names))}.")
        number = isinstance(self.minutes, int | float) and not isinstance(self.minutes, bool)
        if self.minutes is not None and not (number and self.minutes > 0):
            raise ValueError(f"minutes must be a positive number or null, got {self.minutes!r}.")
        for seeds in (self.seeds, *(row.get("seeds", ()) for row in self.rows)):
            if not is_list_of(seeds, int):
                raise ValueError(f"seeds must be a list of integers, got {seeds!r}.")
        self._check_entries("claims", ("claim",), ("rows", "verdict"))
        self._check_entries("findings", ("text", "rows"))
        self._check_entries("levers", ("change", "row", "against"))
        for claim in self.claims:
            self._check_rows(claim.get("rows", []), "claims")
        for finding in self.findings:
            self._check_rows(finding["rows"], "findings")
        for lever in self.levers:
            self._check_rows([lever["row"], lever["against"]], "levers")
        for row in self.rows:
            reject_unknown_keys(
                dict.fromkeys(row.get("checks", self.checks)), CHECKS, f"{row['name']}: checks"
            )
            self.settings(row)

    def _check_entries(self, key: str, needed: Sequence[str], others: Sequence[str] = ()) -> None:
        """Raise a ValueError unless ``key`` is a list of mappings with these keys."""
        entries = getattr(self, key)
        if not is_list_of(entries, dict):
            raise ValueError(f"{self.name}: {key} must be a list of mappings, got {entries!r}.")
        for entry in entries:
            reject_unknown_keys(entry, (*needed, *others), f"{self.name}: {key}")
            if missing := [name for name in needed if name not in entry]:
                raise ValueError(f"{self.name}: {key}: {entry} must set {', '.join(missing)}.")

    def _check_rows(self, rows: Any, key: str) -> None:
        if not isinstance(rows, list):
            raise ValueError(f"{self.name}: {key}: rows must be a list of names, got {rows!r}.")
        reject_unknown_keys(dict.fromkeys(rows), [row["name"] for row in self.rows], f"{self.name}: {key}")

    def settings(self, row: dict[str, Any], seed: int = 0) -> DistillationSettings:
        """The settings of a row; the paths are the runner's to fill in."""
        given = copy.deepcopy(self.common)
        for key, value in row.items():
            if key not in _OWN:
                set_dotted(given, key, value)
        known = [f.name for f in fields(DistillationSettings) if f.name not in OUTSIDE or f.name == "compile"]
        reject_unknown_keys(given, known, row["name"])
        if self.rehearse and given["training"].get("max_steps"):
            given["training"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
        reject_unknown_keys(given.get("training", {}), TRAINING_KEYS, f"{row['name']}: training")
        settings = DistillationSettings(teacher=self.teacher, output="", data=self.data, seed=seed, **given)
        settings.make_loss()
        return settings

    def runs(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Rows and seeds, in the order in which they are run."""
        chosen = [
            r for r in self.rows if not self.only or any(fnmatch.fnmatch(r["name"], p) for p in self.only)
        ]
        last = 1 if self.rehearse else None
        seeds = [list(row.get("seeds", self.seeds))[:last] for row in chosen]
        for turn in range(max(map(len, seeds), default=0)):
            for row, own in zip(chosen, seeds, strict=True):
                if turn < len(own):
                    yield row, own[turn]


def slug(name: str) -> str:
    """A row's name as a file name."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")


def result_path(table: Table, row: dict[str, Any], seed: int) -> Path:
    return Path(table.results, table.name, f"{slug(row['name'])}-{seed}.json")


def kept(path: Path) -> dict[str, Any]:
    """The result in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def text_sha256(source: Any) -> Any:
    """The files of a source by their contents; corpora of packages, which do not change, by name."""
    if isinstance(source, list):
        return [text_sha256(each) for each in source]
    return file_sha256(Path(source)) if Path(source).is_file() else str(source)


class Study:
    """What the rows of a table share: the teacher, tokens, and measurements."""

    def __init__(self, table: Table) -> None:
        self.table = table
        folder = locate(table.teacher)[0]
        self.tokenizer = load_tokenizer(folder)
        self.teacher = load_dense(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        files = [path for name in ("*.safetensors", "*.bin", "tokenizer.json") for path in folder.glob(name)]
        self.depends = {
            "version": VERSION,
            "teacher": {path.name: file_sha256(path) for path in sorted(files)},
            "data": text_sha256(table.data),
            "held_out": text_sha256(table.held_out),
            "held_out_rows": table.held_out_rows,
        }
        held_out = self.rows(table.held_out, self.depends["held_out"], 512)
        self.held_out = held_out.select(range(min(table.held_out_rows or len(held_out), len(held_out))))
        for row, seed in table.runs():  # text that is not there is no fault of a row's
            settings = table.settings(row, seed)
            if steps(settings) or asks_for_calibration(settings.threshold):
                self.rows(table.data, self.depends["data"], settings.length)
                break
        self.measured: dict[str, dict[str, Any]] = {}
        self.thresholds: dict[str, Any] = {}
        self.dense = self.measure(self.teacher)
        self.rate = 0.0  # training tokens a second, the best so far: the first row of a shape compiles

    def rows(self, source: Any, sha256: Any, length: int) -> datasets.Dataset:
        """Packed rows of token ids, tokenised once and kept on disk."""
        name = fingerprint([sha256, self.depends["teacher"].get("tokenizer.json"), length])[:16]
        path = Path(self.table.output, "tokens", f"{name}.parquet")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            tokens = data.tokenize(data.load_text(source), self.tokenizer, length)
            draft = path.with_name(f"{name}.{os.getpid()}.part")
            pyarrow.parquet.write_table(tokens.data.table, draft)
            draft.replace(path)
        rows = datasets.Dataset(pyarrow.parquet.read_table(path))
        return rows.with_format("numpy")  # fetched three times as fast as lists

    def key(self, row: dict[str, Any], seed: int) -> str:
        """A hash of everything that a row's numbers depend on."""
        settings = {k: v for k, v in asdict(self.table.settings(row, seed)).items() if k not in OUTSIDE}
        checks = sorted(row.get("checks", self.table.checks))
        return fingerprint([self.depends, settings, checks, seed])

    def done(self, row: dict[str, Any], seed: int) -> bool:
        """Whether a result for exactly these settings is there."""
        found = kept(result_path(self.table, row, seed))
        return found.get("key") == self.key(row, seed) and found.get("status") in MEASURED

    def measure(self, model: SpikingMambaForCausalLM) -> dict[str, Any]:
        """Held-out perplexity, spikes and energy of the very same forward passes, in float32."""
        with count_spikes(model, histogram=False) as spikes:
            found = perplexity(model, self.held_out, batch_size=32, progress=False)
        return {"perplexity": found["perplexity"], "nll": found["nll_per_token"]} | self.cost(model, spikes)

    def cost(self, model: SpikingMambaForCausalLM, spikes: SpikeCounts) -> dict[str, Any]:
        if not spikes.projections:  # dense
            return {"mean_abs": None, "nonzero_share": None, "gain": {"fp32": 1.0, "fp16": 1.0, "int8": 1.0}}
        if not math.isfinite(spikes.accumulations):
            raise FloatingPointError("The spikes are not finite.")
        whole = model_energy(spikes, model.config)["model"]["fp32"]["gain"] if spikes.accumulations else None
        return {
            "mean_abs": spikes.mean_abs,
            "nonzero_share": spikes.nonzero_share,
            "gain": {k: v if math.isfinite(v) else None for k, v in projection_energy(spikes).items()},
            "gain_whole_model_fp32": whole,
            "mean_abs_by_projection": {name: p.mean_abs for name, p in spikes.projections.items()},
        }

    def student(self, settings: DistillationSettings) -> SpikingMambaForCausalLM:
        """The student before distillation."""
        about = {name: getattr(settings, name) for name in ("neuron", "membrane", "threshold")}
        return SpikingMambaForCausalLM.from_dense(self.teacher, **about).eval()

    def converted(self, settings: DistillationSettings) -> dict[str, Any]:
        """What it is worth, measured once for all rows that start alike."""
        name = fingerprint([settings.neuron, settings.membrane, settings.threshold])
        if settings.neuron is None:
            return self.dense
        if name not in self.measured:
            self.measured[name] = self.measure(self.student(settings))
        return self.measured[name]

    def calibrated(self, settings: DistillationSettings) -> Any:
        """V_th, calibrated once for all rows that ask for the same."""
        about = {"neuron": settings.neuron, "membrane": settings.membrane}
        name = fingerprint([settings.threshold, settings.length, about])
        if name not in self.thresholds:
            rows = self.rows(self.table.data, self.depends["data"], settings.length)
            self.thresholds[name] = resolve_threshold(settings.threshold, self.teacher, rows, **about)
        return self.thresholds[name]

    def check(self, name: str, model: SpikingMambaForCausalLM) -> dict[str, float]:
        """Perplexity of the changed model and, on the same rows, of the model as it is."""
        rows = self.held_out
        if name == "spike_driven":  # D products instead of one, for what must come out equal
            rows = rows.select(range(min(DRIVEN_ROWS, len(rows))))
        changes = {"bf16": with_bf16_weights, "int8": with_int8_projections, "spike_driven": spike_driven}
        found = {"perplexity": changes[name](model), "without": model}
        return {k: perplexity(m, rows, batch_size=8, progress=False)["perplexity"] for k, m in found.items()}

    def expected(self, settings: DistillationSettings) -> float:
        """Seconds that a row will take, by the best rate so far."""
        return (tokens_seen(settings) / self.rate if self.rate else 0.0) + 10.0

    def run(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train and measure a row; what happens to it is in ``status``: done, diverged or failed."""
        settings = self.table.settings(row, seed)
        key = self.key(row, seed)
        # named by the key, so that what a killed run left there can be gone on with
        folder = f"{slug(row['name'])}-{seed}-{key[:8]}"
        settings.output = str(Path(self.table.output, self.table.name, folder))
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
        about["settings"] = {k: v for k, v in about["settings"].items() if k not in OUTSIDE}
        result |= {"teacher": self.dense, "depends": self.depends, "tokens": tokens_seen(settings)}
        result["seconds"] = time.perf_counter() - start
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        return result | about

    def train(self, row: dict[str, Any], settings: DistillationSettings) -> dict[str, Any]:
        result: dict[str, Any] = {"held_out_tokens": len(self.held_out) * 511}
        if asks_for_calibration(settings.threshold):
            result["threshold"] = self.calibrated(settings)
            settings = replace(settings, threshold=result["threshold"])
        before = result["before"] = self.converted(settings)
        model, checks = None, row.get("checks", self.table.checks)
        if not steps(settings):
            result["after"] = before
            if checks:
                model = self.student(settings)
        else:
            rows = self.rows(self.table.data, self.depends["data"], settings.length)
            resumed, watch = any(Path(settings.output).glob("checkpoint-*")), StopWhenNotFinite()
            folder, log = distill(settings, self.teacher, self.tokenizer, rows, callbacks=[watch])
            if watch.at is not None:
                raise FloatingPointError(f"The loss was not finite in step {watch.at}.")
            runtime = next(r["train_runtime"] for r in reversed(log) if "train_runtime" in r)
            result["log"] = [r for r in log if "loss" in r]
            if not resumed:  # or it would be the time of the last part
                result["train_seconds"] = runtime
                self.rate = max(self.rate, tokens_seen(settings) / runtime)
            model = load_model(folder).to(self.teacher.device)
            result["after"] = self.measure(model)
        result["checks"] = {name: self.check(name, model) for name in checks if model is not None}
        return result


class StopWhenNotFinite(TrainerCallback):
    """End a training whose logged loss is not finite."""

    def __init__(self) -> None:
        self.at: int | None = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not math.isfinite(float((logs or {}).get("loss", 0.0))):
            self.at, control.should_training_stop = state.global_step, True


def with_bf16_weights(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A copy whose weights are rounded to bfloat16, as floats."""
    return copy.deepcopy(model).bfloat16().float()


def with_int8_projections(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A copy whose projections have int8 weights with a scale for each output channel, as floats: with counts
    of 2D + 1 levels in front of them, the equal-level quantised network."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for projection in rounded.projections().values():
            scale = projection.weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            projection.weight.copy_((projection.weight / scale).round() * scale)
    return rounded


def steps(settings: DistillationSettings) -> int:
    return int(settings.training.get("max_steps", 0))


def tokens_seen(settings: DistillationSettings) -> int:
    batch = settings.training.get("per_device_train_batch_size", 8)
    return steps(settings) * batch * settings.training.get("gradient_accumulation_steps", 1) * settings.length


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether no other process is at this row; it is this one's until the block, or the process, ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def line(result: dict[str, Any], dense: float) -> str:
    if result["status"] != "done":
        return f"{result['status']}: {result['error']}"
    after = result["after"]
    text = f"perplexity {after['perplexity']:.2f}, {after['perplexity'] / dense:.4f} of the teacher's"
    if after["mean_abs"] is not None:
        text += f", mean |s| {after['mean_abs']:.3f}, gain {after['gain']['fp32'] or math.inf:.2f}x"
    if "train_seconds" in result:
        text += f", {result['tokens'] / result['train_seconds'] / 1e3:.0f}k tokens/s"
    return text + f", {result['seconds']:.0f} s"


def study(table: Table) -> int:
    """Run what is not done yet; how many rows failed. One that diverged is a result."""
    # rows of other lengths are other shapes, not shapes that change; a table has more than 8 variants
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 256
    with interruptible(lambda: "no row was begun; the same command starts again."):
        shared = Study(table)
    print(f"teacher: perplexity {shared.dense['perplexity']:.3f}, {len(shared.held_out)} rows", flush=True)
    runs = list(table.runs())
    with interruptible(lambda: finished(shared, runs)):
        return run_rows(shared, runs)


def finished(shared: Study, runs: Sequence[tuple[dict[str, Any], int]]) -> str:
    done, folder = sum(shared.done(*run) for run in runs), Path(shared.table.results, shared.table.name)
    return f"{done} of {len(runs)} rows are finished and kept in {folder}; the same command goes on."


def run_rows(shared: Study, runs: Sequence[tuple[dict[str, Any], int]]) -> int:
    """Run these rows; how many failed."""
    table, bad, late = shared.table, 0, 0
    for number, (row, seed) in enumerate(runs, 1):
        title = f"{number}/{len(runs)}  {row['name']}, seed {seed}"
        path = result_path(table, row, seed)
        with claimed(Path(table.output, table.name, f"{path.stem}.lock")) as free:
            if not free or shared.done(row, seed):
                print(f"{title}: {'done' if free else 'in another process'}", flush=True)
                continue
            left = math.inf if table.minutes is None else 60 * table.minutes - (time.monotonic() - _START)
            if shared.expected(table.settings(row, seed)) > left:
                late += 1
                continue
            print(title, flush=True)
            result = shared.run(row, seed)
            if result["status"] == "failed" and kept(path).get("status") in MEASURED:
                path = Path(table.output, table.name, f"{path.stem}.failed.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(result, indent=1) + "\n")
            bad += result["status"] == "failed"
            print(f"{title}: {line(result, shared.dense['perplexity'])}", flush=True)
    if late:
        print(f"{late} rows did not fit into {table.minutes} minutes.")
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
