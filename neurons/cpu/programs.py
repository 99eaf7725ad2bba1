"""One vector of inputs through one matrix, or through a part of its outputs, compiled."""

from functools import cache
from typing import Any

import numpy as np

from .events import compiled, events, group_sums, grouped_events, internal, room
from .instructions import INSTRUCTIONS
from .intrinsics import products
from .kernels import GROUP, tile_outputs
from .memory import aligned

__all__ = ["Scratch", "part_outputs", "program", "program_of_either"]


class Scratch:
    """What one thread works in, for up to so many inputs: arrays, see :mod:`neurons.cpu.events`."""

    def __init__(self, inputs: int) -> None:
        groups = -(-inputs // GROUP)
        self.arrays = (
            aligned(room(inputs), np.int32),
            aligned(room(inputs), np.int8),
            aligned(groups + 1, np.int32),
            aligned(groups, np.int32),
        )


def part_outputs(name: str, layout: str, bits: int) -> int:
    """Outputs of the smallest part of a matrix that a program can be asked for."""
    return tile_outputs(INSTRUCTIONS[name]) if layout == "tiles" else 64 * 8 // bits


@cache
def program(name: str, layout: str, bits: int, floats: bool = False) -> Any:
    """The compiled function for weights of this layout and these instructions.

    Its arguments: the address of the weights, that of the groups' scales and ``row_bytes``, see
    :class:`neurons.cpu.packing.Packed`; the inputs, int8 ``[in]``; a float for each group of 32 inputs,
    float32, used where ``floats``; the first part and the one behind the last; a :class:`Scratch`'s arrays;
    the sums, int32, or float32 where ``floats``, ``[outputs]``, aligned to 64 bytes.
    """
    if layout == "tiles":
        return _tiles(name, bits, floats)
    if floats:
        raise ValueError("Inputs with factors are read in tiles.")
    return _rows_int8(name) if bits == 8 else _rows_int4(name)


def program_of_either(name: str, layout: str, bits: tuple[int, ...], floats: bool = False) -> Any:
    """As :func:`program`, of matrices of one or two widths: the bits of the one at hand come first."""
    runs = [program(name, layout, each, floats) for each in bits]
    one, other, own = runs[0], runs[-1], bits[0]
    if len(runs) == 1:

        @internal
        def run(bits, weights, scales, row_bytes, inputs, factors, first, last, scratch, sums):
            one(weights, scales, row_bytes, inputs, factors, first, last, scratch, sums)

    else:

        @internal
        def run(bits, weights, scales, row_bytes, inputs, factors, first, last, scratch, sums):
            if bits == own:
                one(weights, scales, row_bytes, inputs, factors, first, last, scratch, sums)
            else:
                other(weights, scales, row_bytes, inputs, factors, first, last, scratch, sums)

    return run


def _rows_int8(name: str) -> Any:
    kernel = products(name).rows_int8
    minus = 128 if INSTRUCTIONS[name].offset else 0

    @compiled
    def rows_int8(weights, scales, row_bytes, inputs, factors, first, last, scratch, sums):
        offsets, counts = scratch[0], scratch[1]
        eights, _, total = events(inputs, row_bytes, offsets, counts)
        for o in range(64 * first, 64 * last):
            sums[o] = -minus * total
        kernel(
            weights + 64 * first,
            offsets.ctypes.data,
            counts.ctypes.data,
            eights,
            64 * (last - first),
            sums.ctypes.data + 256 * first,
        )

    return rows_int8


def _rows_int4(name: str) -> Any:
    kernel = products(name).rows_int4

    @compiled
    def rows_int4(weights, scales, row_bytes, inputs, factors, first, last, scratch, sums):
        offsets, counts, begins, totals = scratch
        grouped_events(inputs, row_bytes, offsets, counts, begins, totals)
        for o in range(128 * first, 128 * last):
            sums[o] = 0
        kernel(
            weights + 64 * first,
            offsets.ctypes.data,
            counts.ctypes.data,
            begins.ctypes.data,
            totals.ctypes.data,
            scales + 128 * first,
            2 * row_bytes,
            (inputs.size + GROUP - 1) // GROUP,
            64 * (last - first),
            sums.ctypes.data + 512 * first,
        )

    return rows_int4


def _tiles(name: str, bits: int, floats: bool) -> Any:
    kernel = products(name).tile[bits, floats]
    width = tile_outputs(INSTRUCTIONS[name])
    scales_of_a_group = width if bits == 4 else 0

    @compiled
    def tiles(weights, scales, row_bytes, inputs, factors, first, last, scratch, sums):
        counts, totals = scratch[1], scratch[3]
        groups = (inputs.size + GROUP - 1) // GROUP
        for k in range(inputs.size):  # an assignment of slices would take seconds to compile
            counts[k] = inputs[k]
        for k in range(inputs.size, groups * GROUP):
            counts[k] = 0
        group_sums(counts[: groups * GROUP], totals[:groups])
        for tile in range(first, last):
            kernel(
                weights + tile * row_bytes,
                counts.ctypes.data,
                totals.ctypes.data,
                scales + tile * groups * scales_of_a_group,
                factors.ctypes.data,
                groups,
                sums.ctypes.data + 4 * width * tile,
            )

    return tiles
