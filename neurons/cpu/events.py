"""From spikes to the rows that have to be read."""

from typing import Any

import numba
import numpy as np

from . import disk_cache  # noqa: F401  before anything is compiled: it numbers what is
from .kernels import AHEAD, GROUP

__all__ = ["compiled", "events", "group_sums", "grouped_events", "internal", "room"]

# how everything here is compiled: sums of floats may be reordered, and Python's lock is released
HOW: dict[str, Any] = {"fastmath": True, "boundscheck": False, "error_model": "numpy", "nogil": True}
compiled: Any = numba.njit(**HOW)
# for what compiled code alone calls: without a way in from Python, which takes a third of the compiler's time
WITHIN: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
internal: Any = numba.njit(**HOW, **WITHIN)


def room(inputs: int) -> int:
    """How many events the lists below need room for."""
    return inputs + inputs // GROUP * 3 + 8 + AHEAD + GROUP


@compiled
def events(spikes, row_bytes, offsets, counts):
    """The inputs that fire, filled up to a multiple of eight.

    Args:
        spikes: int8 ``[in]``. row_bytes: between two inputs' weights.
        offsets: int32, filled with the inputs' first bytes and, for what is only prefetched, ``AHEAD`` more.
        counts: int8, filled with their spikes.

    Returns:
        How many eights there are, how many inputs fire, and the sum of all spikes.
    """
    n, total = 0, 0
    for k in range(spikes.size):  # no branch: what fires is not to be guessed
        offsets[n] = k * row_bytes
        counts[n] = spikes[k]
        total += spikes[k]
        n += spikes[k] != 0
    firing = n
    while n % 8:
        offsets[n] = offsets[firing - 1]
        counts[n] = 0
        n += 1
    for i in range(AHEAD):
        offsets[n + i] = offsets[firing - 1] if firing else 0
    return n // 8, firing, total


@compiled
def grouped_events(spikes, row_bytes, offsets, counts, begins, totals):
    """As :func:`events`, each group of 32 inputs filled up to a multiple of four.

    Args:
        spikes, row_bytes, offsets, counts: as there.
        begins: int32 ``[groups + 1]``, filled with where each group's fours begin.
        totals: int32 ``[groups]``, filled with each group's sum.

    Returns:
        How many inputs fire.
    """
    n, firing, last = 0, 0, 0
    for group in range((spikes.size + GROUP - 1) // GROUP):
        begins[group] = n // 4
        total, before = 0, n
        for k in range(group * GROUP, min(spikes.size, group * GROUP + GROUP)):
            offsets[n] = k * row_bytes
            counts[n] = spikes[k]
            total += spikes[k]
            n += spikes[k] != 0
        firing += n - before
        if n > before:
            last = offsets[n - 1]
        while n % 4:
            offsets[n] = last
            counts[n] = 0
            n += 1
        totals[group] = total
    begins[(spikes.size + GROUP - 1) // GROUP] = n // 4
    for i in range(AHEAD):
        offsets[n + i] = last
    return firing


@compiled
def group_sums(inputs, totals):
    """The sum of each group of 32 inputs, int8, into ``totals``, int32."""
    for group in range(totals.size):
        total = np.int32(0)
        for k in range(group * GROUP, min(inputs.size, group * GROUP + GROUP)):
            total += inputs[k]
        totals[group] = total
