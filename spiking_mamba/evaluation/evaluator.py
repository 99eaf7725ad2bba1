"""How good language models are: zero-shot tasks, perplexity, and the spikes of those very forward passes.

evaluate(EvaluationSettings(models=["runs/quickstart/student/model"], limit=100))  # results.json, see README

tasks = zero_shot_tasks(["piqa", "arc_easy"])  # of a model in memory
zero_shot(model, tokenizer, tasks)["piqa"]["acc"]
perplexity(model, rows)["perplexity"]
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.progress import Stage
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.ranks import is_first_process, process_count
from spiking_mamba.common.records import finite, to_json
from spiking_mamba.data.benchmarks import CHANCE, SOURCE_TASKS
from spiking_mamba.data.text import load_text
from spiking_mamba.evaluation.cache import ResultsCache
from spiking_mamba.evaluation.measuring import Measured, reference_of, weights_sha256
from spiking_mamba.evaluation.scoring import perplexity, zero_shot
from spiking_mamba.evaluation.settings import RESULTS, Checkpoint, EvaluationSettings, claim_output
from spiking_mamba.evaluation.statistics import gaps, groups
from spiking_mamba.evaluation.tasks import zero_shot_tasks
from spiking_mamba.model.tokenizer import has_tokenizer, load_tokenizer
from spiking_mamba.spikes.energy import COSTS_45NM, Costs, load_costs

if TYPE_CHECKING:
    import datasets
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CHANCE",
    "SOURCE_TASKS",
    "EvaluationSettings",
    "evaluate",
    "perplexity",
    "weights_sha256",
    "zero_shot",
    "zero_shot_tasks",
]

SCHEMA = "spiking_mamba/evaluation/1"


def evaluate(settings: EvaluationSettings) -> dict[str, Any]:
    """Measure every model on every task and text; write ``results.json`` and return what it holds.

    Scores, spikes and energy come from the same forward passes. Each finished measurement is kept in
    ``cache`` below ``output``, so a run that was interrupted, or that names further models or tasks, makes
    only the passes that are missing. Processes of a launcher, on one host, share the measurements among them,
    each on a GPU of its own; each is made whole by one of them, so its numbers are those of one process.

    Returns:
        What ``evaluation.schema.json``, beside this file, describes; in a launcher's other processes nothing,
        as soon as no measurement is left for them.

    Raises:
        ValueError, CheckpointError, DataError, RunError: something cannot be evaluated; found out before
            anything is measured, but for damaged weights and NaN in logits: models are loaded one at a
            time. Results already there stay as they are.
    """
    checkpoints = settings.checkpoints()
    folders = [locate(checkpoint.path)[0] for checkpoint in checkpoints]
    tokenizers = [load_tokenizer(f, None if has_tokenizer(f) else settings.tokenizer) for f in folders]
    tasks = zero_shot_tasks(settings.tasks, settings.data) if settings.tasks else {}
    texts = {str(corpus): load_text(str(corpus)) for corpus in settings.corpora}
    costs = COSTS_45NM | (load_costs(settings.costs) if settings.costs else {})
    run = _Run(settings, checkpoints, folders, tokenizers, tasks, texts, costs)
    if process_count() > 1:
        return _evaluate_together(run)
    with claim_output(settings) as output:
        cache = ResultsCache(output / "cache")
        with interruptible(lambda: _kept_in(cache)):
            return run.results(output, cache)


def _evaluate_together(run: "_Run") -> dict[str, Any]:
    """The same by all processes of a launcher."""
    place = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo")
    try:
        if not is_first_process():
            torch.distributed.barrier()  # until the folder is the first one's
            run.take_part(ResultsCache(Path(run.settings.output) / "cache", waits=False))
            return {}
        with claim_output(run.settings) as output:
            torch.distributed.barrier()
            cache = ResultsCache(output / "cache", waits=True)
            with interruptible(lambda: _kept_in(cache)):
                run.take_part(ResultsCache(cache.folder, waits=False))
                results = run.results(output, cache)  # waits for what others are at
                cache.tidy_up()
                return results
    finally:
        torch.distributed.destroy_process_group()


class _Run(NamedTuple):
    """What is to be measured of what."""

    settings: EvaluationSettings
    checkpoints: Sequence[Checkpoint]
    folders: Sequence[Path]
    tokenizers: "Sequence[PreTrainedTokenizerBase]"
    tasks: "Mapping[str, Task]"
    texts: "Mapping[str, datasets.Dataset]"
    costs: Mapping[str, Costs]

    def _models(self, cache: ResultsCache) -> "Iterator[Measured]":
        """One after another, loaded."""
        compared = [reference_of(checkpoint, self.checkpoints) for checkpoint in self.checkpoints]
        parts = len(self.checkpoints) * (len(self.tasks) + len(self.texts))
        parts += len(self.texts) * sum(reference is not None for reference in compared)
        with Stage(parts, "evaluating", shown=is_first_process()) as stage:
            for number, checkpoint in enumerate(self.checkpoints):
                folder, tokenizer = self.folders[number], self.tokenizers[number]
                measured = Measured(self.settings, checkpoint, folder, tokenizer, cache, self.costs, stage)
                if (reference := compared[number]) is not None:
                    place = self.checkpoints.index(reference)
                    measured.compare_with(reference.name, self.folders[place], self.tokenizers[place])
                yield measured

    def take_part(self, cache: ResultsCache) -> None:
        """Make what no other process has made or is at."""
        for measured in self._models(cache):
            measured.what_is_left(self.tasks, self.texts)

    def results(self, output: Path, cache: ResultsCache) -> dict[str, Any]:
        """Measure what is not there, and write ``results.json``."""
        models = [measured.everything(self.tasks, self.texts) for measured in self._models(cache)]
        results = {
            "schema": SCHEMA,
            "provenance": provenance(self.settings),
            "models": models,
            "groups": groups(models),
            "gaps": gaps(models),
        }
        results = finite(results)
        write_whole(output / RESULTS, to_json(results))
        return results


def _kept_in(cache: ResultsCache) -> str:
    number = len(list(cache.folder.glob("*.json")))
    return f"the cache {cache.folder} keeps what is measured ({number} so far); the same command goes on."
