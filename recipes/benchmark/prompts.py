"""What a token takes behind a prompt, whose own time is not wanted, and scatters by that of many tokens."""

import statistics
from collections.abc import Callable

__all__ = ["seconds_behind_a_prompt"]


def seconds_behind_a_prompt(seconds: Callable[[int], float], short: int, long: int, times: int) -> float:
    """A token's, by the difference of two lengths, each the median of several times in turn.

    Args:
        seconds: those of the prompt and so many tokens.
        short, long: tokens. The prompt's scatter is divided by their difference.
        times: how often each is measured.
    """
    each = [(seconds(short), seconds(long)) for _ in range(times)]
    few, many = (statistics.median(column) for column in zip(*each, strict=True))
    return (many - few) / (long - short)
