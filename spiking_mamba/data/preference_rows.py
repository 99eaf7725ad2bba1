"""Rows of preferences, of a file, a package or the hub, and which of them are taken."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from spiking_mamba.common.errors import DataError
from spiking_mamba.data.answer_preference import NAME, answer_preference
from spiking_mamba.data.contamination import evaluated_words
from spiking_mamba.data.hub import load_hub

__all__ = ["HALVES", "draw", "half_of", "item_of", "load_preferences", "same_rows"]

HALVES = ("tune", "report")  # of a source's questions: to choose by, and to report


def load_preferences(
    source: str, split: str, decontaminate: bool = False
) -> tuple[Sequence[dict[str, Any]], dict[str, int]]:
    """Rows of a source as they are, and how many items were removed as an evaluation asks them.

    Args:
        source: ``answer_preference`` or ``answer_preference:SET[+SET...]``, see that module; a file,
            ``.jsonl``, ``.json`` (a list of objects) or ``.parquet``; or ``owner/name[:config]`` on the hub.
        split: of what has splits; of a file, all rows are taken.
        decontaminate: leave out rows of a file or of the hub whose texts share 13 words in a row with what is
            evaluated; ``answer_preference`` has its own rule, whatever this says.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    name, _, subset = source.partition(":")
    if name == NAME:
        return answer_preference(split, subset.split("+")) if subset else answer_preference(split)
    rows = _rows_of(source, name, subset, split)
    return _without_evaluated(source, rows) if decontaminate else (rows, {})


def same_rows(source: str, split: str, other: str, other_split: str) -> bool:
    """Whether two sources and splits are the same, as :func:`load_preferences` takes them."""
    if Path(source).is_file() and Path(other).is_file():
        return Path(source).samefile(other)
    return (source, split) == (other, other_split)


def _rows_of(source: str, name: str, subset: str, split: str) -> Sequence[dict[str, Any]]:
    """Of a file, or of the hub's ``name`` in its configuration ``subset``."""
    if Path(source).is_file():
        return _read_file(Path(source))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and Path(name).suffix[1:] not in (
        "json",
        "jsonl",
        "parquet",
    ):
        rows: Sequence[dict[str, Any]] = load_hub(source, name, subset, split, f"is {NAME}")
        return rows
    raise DataError(
        f"There are no preferences {source!r}: name {NAME}, a .jsonl, .json or .parquet file, or "
        "owner/name[:config] on the hub."
    )


def _without_evaluated(
    source: str, rows: Sequence[dict[str, Any]]
) -> tuple[Sequence[dict[str, Any]], dict[str, int]]:
    """The rows that share no run of words with what is evaluated, and how many do, by set.

    It counts for the first set that a row meets.
    """
    words, overlap, kept = evaluated_words(), Counter[str](), []
    texts = [(number, text) for number, row in enumerate(rows) for text in _read_as_one(row)]
    marks = [0] * len(rows)
    for (number, _), mark in zip(texts, words.marks(text for _, text in texts), strict=True):
        marks[number] |= mark
    for number, mark in enumerate(marks):
        if mark:
            overlap[words.names(mark)[0]] += 1
        else:
            kept.append(number)
    if rows and not kept:
        raise DataError(f"{source}: all of its rows share {words.n} words in a row with what is evaluated.")
    if overlap:
        rows = rows.select(kept) if isinstance(rows, datasets.Dataset) else [rows[i] for i in kept]
    return rows, dict(overlap)


def _read_as_one(row: dict[str, Any]) -> list[str]:
    """The texts of a row, whatever it is worth: each completion behind what it answers."""

    def plain(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(plain(m.get("content") if isinstance(m, dict) else m) for m in value)
        return value if isinstance(value, str) else ""

    completions = [row.get(name) for name in ("chosen", "rejected", "completion")]
    return [f"{plain(row.get('prompt'))} {plain(each)}" for each in completions if each is not None]


def _object(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        match path.suffix.lower():
            case ".parquet":
                return pyarrow.parquet.read_table(path).to_pylist()
            case ".json":
                rows = json.loads(path.read_text(encoding="utf-8-sig"))
            case ".jsonl":
                lines = path.read_text(encoding="utf-8-sig").split("\n")
                rows = [_object(line, number) for number, line in enumerate(lines, 1) if line.strip()]
            case _:
                raise DataError(f"{path}: unknown kind of file; known are .jsonl, .json and .parquet.")
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} does not hold one object a row.")
    return rows


def item_of(row: dict[str, Any], otherwise: int | None) -> Any:
    """What says which rows belong together, where a row has something of the kind."""
    return item if isinstance(item := row.get("item"), int | str) else otherwise


def half_of(row: dict[str, Any], seed: int = 0) -> str:
    """To which of ``HALVES`` a row's question belongs.

    A hash of its text decides, so that all answers to a question are in one half, whatever the order and the
    other rows.
    """
    question = row.get("prompt")
    if question is None:  # a conversation: what comes before the answer
        chosen = row.get("chosen") or row.get("completion")
        question = chosen[:-1] if isinstance(chosen, list) else chosen
    text = json.dumps([row.get("task"), question], sort_keys=True, default=str)
    return HALVES[hashlib.sha256(f"{seed}\n{text}".encode()).digest()[0] % 2]


def draw(
    rows: Sequence[dict[str, Any]],
    limit: int | None,
    per_task: bool,
    seed: int,
    chosen: Sequence[bool] | None = None,
) -> list[int]:
    """Numbers of the rows ``chosen``, in an order drawn by ``seed``; the first, where there is a limit."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    if chosen is not None:
        order = [index for index in order if chosen[index]]
    if limit is None or not per_task:
        return order[:limit]
    items: dict[str, set] = {}  # rather than rows, so that all answers to a question are there
    drawn = []
    for index in order:
        task, item = str(rows[index].get("task", "all")), item_of(rows[index], index)
        known = items.setdefault(task, set())
        if item in known or len(known) < limit:
            known.add(item)
            drawn.append(index)
    return drawn
