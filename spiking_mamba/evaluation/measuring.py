"""One checkpoint's measurements: tasks, texts, and the spikes of those very forward passes."""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from spiking_mamba.common.errors import CheckpointError, RunError
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.progress import Share, Stage, say
from spiking_mamba.common.provenance import code_state, package_versions
from spiking_mamba.data.benchmarks import SOURCE_TASKS, digest
from spiking_mamba.data.tokens import count_bytes, rules_of, tokenize
from spiking_mamba.evaluation.cache import ResultsCache, TakenError
from spiking_mamba.evaluation.scoring import perplexity, score
from spiking_mamba.evaluation.settings import Checkpoint, EvaluationSettings
from spiking_mamba.evaluation.tasks import describe
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.converted import files_of, is_converted, read_index
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.counts import ProjectionSpikes, SpikeCounts
from spiking_mamba.spikes.energy import Costs, model_energy
from spiking_mamba.spikes.joules import JouleMeter, NoEnergyCounter

if TYPE_CHECKING:
    import datasets
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

    from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["Measured", "reference_of", "weights_sha256"]


class Measured:
    """One checkpoint, loaded, and its measurements, from the cache where they are there."""

    def __init__(
        self,
        settings: EvaluationSettings,
        checkpoint: Checkpoint,
        folder: Path,
        tokenizer: "PreTrainedTokenizerBase",
        cache: ResultsCache,
        costs: Mapping[str, Costs],
        stage: Stage,
    ) -> None:
        from spiking_mamba.evaluation.harness import SpikingMambaLM

        self.settings, self.checkpoint, self.cache, self.stage = settings, checkpoint, cache, stage
        self.lm = SpikingMambaLM(folder, tokenizer, dtype=settings.dtype, batch_size=settings.batch_size)
        self.weights = weights_sha256(folder)
        self.costs = costs
        self.reference: Reference | None = None
        self._digests: dict[str, str] = {}  # of texts
        # what every number of this model depends on
        self.identity = {
            "weights": self.weights,
            "config": file_sha256(folder / "config.json"),
            "tokenizer": tokenizer_sha256(tokenizer),
            "dtype": settings.dtype,
            "batch_size": settings.batch_size,
            "limit": settings.limit,
            "limit_seed": settings.limit_seed,
            "device": self.lm.device.type,
            "versions": package_versions(),
            "code": code_state(),
        }

    def compare_with(self, name: str, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Measure how far this model's predictions are from another's, if both read the same tokens."""
        if tokenizer_sha256(tokenizer) != self.identity["tokenizer"]:
            return
        model = load_model(folder)
        if model.config.vocab_size == self.lm.model.config.vocab_size:
            sums = weights_sha256(folder), file_sha256(folder / "config.json")
            self.reference = Reference(name, model.to(self.lm.device), *sums)

    def everything(
        self, tasks: "Mapping[str, Task]", texts: "Mapping[str, datasets.Dataset]"
    ) -> dict[str, Any]:
        """An entry of the results' ``models``."""
        model, checkpoint = self.lm.model, self.checkpoint
        of_tasks = {name: self._task(name, task) for name, task in tasks.items()}
        of_texts = {name: self._text(name, text) for name, text in texts.items()}
        scores, losses = (
            {
                name: m["result"] | {"data": m["data"], "spikes": _brief(m["spikes"])}
                for name, m in kind.items()
            }
            for kind in (of_tasks, of_texts)
        )
        measured = [*of_tasks.values(), *of_texts.values()]
        total = None if model.config.neuron is None else sum(_unpack(m["spikes"]) for m in measured)
        main = [scores[t]["metrics"][scores[t]["main"]]["value"] for t in SOURCE_TASKS if t in scores]
        return {
            "name": checkpoint.name,
            "group": checkpoint.group,
            "seed": checkpoint.seed,
            "path": checkpoint.path,
            "reference": checkpoint.reference,
            "neuron": model.config.neuron and model.config.neuron["class"].rsplit(".", 1)[-1],
            "levels": model.config.levels,
            "parameters": model.num_parameters(),
            "dtype": self.settings.dtype,
            "weights_sha256": self.weights,
            "tasks": scores,
            "average": math.fsum(main) / len(main) if len(main) == len(SOURCE_TASKS) else None,
            "perplexity": losses,
            "spikes": total and total.to_dict(detail=True),
            "energy": total
            and model_energy(
                total,
                model.config,
                measured_in=self.settings.dtype,
                costs=self.costs,
                length=self.settings.length,
            ),
            "joules": _together([m["joules"] for m in measured]),
        }

    def what_is_left(self, tasks: "Mapping[str, Task]", texts: "Mapping[str, datasets.Dataset]") -> None:
        """Make the measurements that no other process has made or is at, those of many items first."""
        by_size = sorted(tasks.items(), key=lambda task: -len(task[1].eval_docs))
        for name, task in by_size:
            with contextlib.suppress(TakenError):
                self._task(name, task)
        for measure, (name, text) in itertools.product((self._loss, self._compared), texts.items()):
            with contextlib.suppress(TakenError):
                measure(name, text)

    def _task(self, name: str, task: "Task") -> dict[str, Any]:
        data = describe(task, self.settings.data)

        def measure(share: Share) -> dict[str, Any]:
            with count_spikes(self.lm.model) as counts, self._metered() as joules:
                found = score(self.lm, task, self.settings.limit, share, self.settings.limit_seed)
            return {"result": found, "spikes": _pack(counts), "joules": joules}

        return self._kept(name, {"task": name, "data": data["sha256"]}, measure) | {"data": data}

    def _text(self, name: str, text: "datasets.Dataset") -> dict[str, Any]:
        found = self._loss(name, text)
        return found | {"result": found["result"] | {"compared": self._compared(name, text)}}

    def _about_text(self, name: str, text: "datasets.Dataset") -> tuple[dict[str, Any], dict[str, Any]]:
        """Where a text comes from, and what its measurements depend on."""
        if name not in self._digests:
            self._digests[name] = digest(text["text"])
        data = {"source": name, "documents": len(text), "sha256": self._digests[name]}
        return data, {"corpus": name, "data": data["sha256"], "length": self.settings.length}

    def _rows(self, text: "datasets.Dataset") -> "datasets.Dataset":
        limit = self.settings.limit
        rows = tokenize(text, self.lm.tokenizer, self.settings.length)
        if limit is not None and limit < len(rows):
            drawn = random.Random(self.settings.limit_seed).sample(range(len(rows)), limit)
            rows = rows.select(sorted(drawn))
        return rows

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    def _loss(self, name: str, text: "datasets.Dataset") -> dict[str, Any]:
        data, key = self._about_text(name, text)

        def measure(share: Share) -> dict[str, Any]:
            rows = self._rows(text)
            spelled = count_bytes(rows, self.lm.tokenizer)
            with count_spikes(self.lm.model) as counts, self._precision(), self._metered() as joules:
                found = perplexity(
                    self.lm.model, rows, self.settings.batch_size, progress=share, bytes=spelled
                )
            return {"result": found, "spikes": _pack(counts), "joules": joules}

        return self._kept(name, key, measure) | {"data": data}

    def _compared(self, name: str, text: "datasets.Dataset") -> dict[str, Any] | None:
        """How far predictions are from the reference's; None without one."""
        if (reference := self.reference) is None:
            return None

        def compare(share: Share) -> dict[str, Any]:
            # passes of their own: those of _loss are the ones whose spikes and joules are measured
            size, other = self.settings.batch_size, reference.model
            with self._precision():
                found = perplexity(self.lm.model, self._rows(text), size, progress=share, reference=other)
            return {key: found[key] for key in ("kl", "top1_agreement")}

        about = {"reference": reference.weights, "reference_config": reference.config}
        key = self._about_text(name, text)[1] | about
        return {"reference": reference.name} | self._kept(
            f"{name}, compared with {reference.name}", key, compare
        )

    @contextlib.contextmanager
    def _metered(self) -> Iterator[dict[str, Any]]:
        """The GPU's energy over the block, see :class:`JouleMeter`; nothing where there is no counter."""
        energy: dict[str, Any] = {}
        try:
            meter = JouleMeter(self.lm.device, idle_seconds=2.0) if self.lm.device.type == "cuda" else None
        except NoEnergyCounter:
            meter = None
        with contextlib.nullcontext() if meter is None else meter:
            yield energy
        if meter is not None:
            energy |= meter.result()

    def _kept(self, name: str, key: dict[str, Any], measure: Callable[[Share], Any]) -> dict[str, Any]:
        label, key = f"{self.checkpoint.name}: {name}", self.identity | key
        with self.stage.part(label) as share:

            def report_and_measure() -> Any:
                say(label)
                return measure(share)

            try:
                result, before = self.cache.get(name, key, report_and_measure)
            except FloatingPointError as error:
                raise RunError(f"{label}: {error} No result was written for it.") from error
            if before and self.cache.waits is None:
                say(f"{label}: measured before, see {self.cache.path(name, key)}")
        return result


class Reference(NamedTuple):
    """A model that others are compared with, loaded; the sums are those of its files."""

    name: str
    model: "SpikingMambaForCausalLM"
    weights: str
    config: str


def reference_of(checkpoint: Checkpoint, checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """Which reference a checkpoint's predictions are compared with.

    Of several that of its own seed, else the first; None for a reference, or where there is none.
    """
    references = [] if checkpoint.reference else [other for other in checkpoints if other.reference]
    same_seed = (other for other in references if other.seed == checkpoint.seed)
    return next(same_seed, references[0] if references else None)


def weights_sha256(folder: Path) -> str:
    """sha256 of the file of weights, or of the sums of several in the order of their names.

    Of a converted model the files are those of its mixers and of what a student has of its own; the name of
    the source, which everything else is from, counts too.

    Raises:
        CheckpointError: there is no file of weights.
    """
    files = sorted({*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")})
    sums = [file_sha256(path) for path in files]
    if is_converted(folder):
        index = read_index(folder)
        sums += [file_sha256(folder / name) for name in sorted(files_of(index))]
        sums.append(hashlib.sha256(index["source"].encode()).hexdigest())
    if not sums:
        raise CheckpointError(f"{folder} holds no weights.")
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    return digest(
        [rules_of(tokenizer), {key: str(token) for key, token in tokenizer.special_tokens_map.items()}]
    )


def _pack(counts: SpikeCounts) -> dict[str, Any]:
    """All that ``counts`` holds, for JSON; float64 survives it exactly."""
    return {
        name: {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(spikes).items()}
        for name, spikes in counts.projections.items()
    }


def _unpack(packed: dict[str, Any]) -> SpikeCounts:
    settings = {field.name for field in dataclasses.fields(ProjectionSpikes) if field.init}
    projections = {}
    for name, row in packed.items():
        spikes = ProjectionSpikes(**{key: row[key] for key in settings & row.keys()})
        for key, value in row.items():
            if isinstance(value, list):
                whole = bool(value) and all(isinstance(number, int) for number in value)
                setattr(spikes, key, torch.tensor(value, dtype=torch.int64 if whole else torch.float64))
        projections[name] = spikes
    return SpikeCounts(projections)


def _brief(packed: dict[str, Any]) -> dict[str, float] | None:
    """The spikes of one task's passes; None for a dense model."""
    if not packed:
        return None
    counts = _unpack(packed)
    return {
        "mean_abs": counts.mean_abs,
        "nonzero_share": counts.nonzero_share,
        "tokens": max(spikes.tokens for spikes in counts.projections.values()),
        "accumulations": counts.accumulations,
        "dense_macs": counts.dense_macs,
    }


def _together(measurements: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The joules of several blocks added up; None where they were not measured."""
    if not measurements or not all(measurements):
        return None
    keys = ("joules_total", "joules_idle", "joules_net", "seconds")
    return {"gpu": measurements[0]["gpu"]} | {key: math.fsum(m[key] for m in measurements) for key in keys}
