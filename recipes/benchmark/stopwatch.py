"""What work takes by the clock, with what a GPU still has to do of it."""

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["seconds_behind_a_prompt", "seconds_of"]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[..., object], *arguments: object) -> float:
    """Of one call, from a GPU that has nothing to do to one that has nothing left to do."""
    _synchronize()
    start = time.perf_counter()
    work(*arguments)
    _synchronize()
    return time.perf_counter() - start


def seconds_behind_a_prompt(seconds: Callable[[int], float], short: int, long: int, times: int) -> float:
    """A token's, by the difference of two lengths, each the median of several times in turn.

    A prompt's own time is not wanted, and scatters by that of many tokens.

    Args:
        seconds: those of the prompt and so many tokens.
        short, long: tokens. The prompt's scatter is divided by their difference.
        times: how often each is measured.
    """
    each = [(seconds(short), seconds(long)) for _ in range(times)]
    few, many = (statistics.median(column) for column in zip(*each, strict=True))
    return (many - few) / (long - short)
