"""The layer's sums on a processor: what ``backend="numba"`` runs."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from .events import compiled, events, group_sums, grouped_events, room
from .instructions import INSTRUCTIONS, best, runs_here
from .intrinsics import products
from .kernels import GROUP, tile_outputs
from .memory import aligned
from .packing import pack

__all__ = ["CROSSOVER", "PackedLinear"]

CROSSOVER = 0.75  # share of inputs that fire from which on reading everything in one stream is faster


@cache
def _programs(name: str):
    """Compiled functions for these instructions: one vector of spikes through one matrix, all outputs or a
    part of them; by layout and bits."""
    kernel = products(name)
    tile8, tile4 = kernel.tile[8, False], kernel.tile[4, False]
    kernel_rows8, kernel_rows4 = kernel.rows_int8, kernel.rows_int4
    minus = 128 if INSTRUCTIONS[name].offset else 0
    width = tile_outputs(INSTRUCTIONS[name])

    @compiled
    def rows8(weights, scales, row_bytes, spikes, first, last, offsets, counts, begins, totals, sums):
        eights, _, total = events(spikes, row_bytes, offsets, counts)
        sums[64 * first : 64 * last] = -minus * total
        kernel_rows8(
            weights.ctypes.data + 64 * first,
            offsets.ctypes.data,
            counts.ctypes.data,
            eights,
            64 * (last - first),
            sums.ctypes.data + 256 * first,
        )

    @compiled
    def rows4(weights, scales, row_bytes, spikes, first, last, offsets, counts, begins, totals, sums):
        grouped_events(spikes, row_bytes, offsets, counts, begins, totals)
        sums[128 * first : 128 * last] = 0
        kernel_rows4(
            weights.ctypes.data + 64 * first,
            offsets.ctypes.data,
            counts.ctypes.data,
            begins.ctypes.data,
            totals.ctypes.data,
            scales.ctypes.data + 128 * first,
            2 * row_bytes,
            totals.size,
            64 * (last - first),
            sums.ctypes.data + 512 * first,
        )

    def tiles(tile, has_scales):
        @compiled
        def run(weights, scales, tile_bytes, spikes, first, last, offsets, counts, begins, totals, sums):
            counts[: spikes.size] = spikes
            counts[spikes.size : totals.size * GROUP] = 0
            group_sums(counts[: totals.size * GROUP], totals)
            for t in range(first, last):
                own = scales.ctypes.data + t * totals.size * width if has_scales else scales.ctypes.data
                tile(
                    weights.ctypes.data + t * tile_bytes,
                    counts.ctypes.data,
                    totals.ctypes.data,
                    own,
                    scales.ctypes.data,
                    totals.size,
                    sums.ctypes.data + 4 * width * t,
                )

        return run

    return {
        ("rows", 8): rows8,
        ("rows", 4): rows4,
        ("tiles", 8): tiles(tile8, False),
        ("tiles", 4): tiles(tile4, True),
    }


class PackedLinear:
    """A matrix of integer weights in the layout of a kind of processor.

    Args:
        weight, group_scales, layout: see :func:`neurons.cpu.packing.pack`.
        instructions: a name of :data:`neurons.cpu.instructions.INSTRUCTIONS`; None: the best there are.

    Raises:
        ValueError: this processor lacks the instructions; a row's address does not fit in 32 bits.
    """

    def __init__(
        self,
        weight: np.ndarray,
        group_scales: np.ndarray | None,
        layout: str,
        instructions: str | None = None,
    ) -> None:
        name = best() if instructions is None else instructions
        if not runs_here(name):
            raise ValueError(f"This processor does not have the instructions {name!r}.")
        self.instructions, self.layout = name, layout
        self.packed = packed = pack(weight, group_scales, INSTRUCTIONS[name], layout)
        if packed.weights.size >= 2**31:
            raise ValueError(f"A matrix of {packed.weights.size} bytes is too large for one layer.")
        self._program = _programs(name)[layout, packed.bits]
        per_part = tile_outputs(INSTRUCTIONS[name]) if layout == "tiles" else 64 * 8 // packed.bits
        self._parts = packed.outputs // per_part  # what threads can divide among themselves

    def sums(self, spikes: np.ndarray, threads: int = 1) -> np.ndarray:
        """``int32 [M, out]`` for spikes ``int8 [M, in]``, which lie row by row."""
        packed = self.packed
        if 0 in (packed.in_features, packed.out_features, len(spikes)):
            return np.zeros((len(spikes), packed.out_features), np.int32)
        sums = aligned(len(spikes) * packed.outputs, np.int32).reshape(len(spikes), packed.outputs)
        bounds = [self._parts * i // threads for i in range(threads + 1)]
        spans = [span for span in itertools.pairwise(bounds) if span[0] < span[1]]
        if len(spans) == 1:
            self._run(spikes, spans[0], sums)
        else:
            with ThreadPoolExecutor(len(spans)) as pool:
                list(pool.map(lambda span: self._run(spikes, span, sums), spans))
        return sums[:, : packed.out_features]

    def _run(self, spikes: np.ndarray, span: tuple[int, int], sums: np.ndarray) -> None:
        packed = self.packed
        space = room(packed.in_features)
        offsets, counts = aligned(space, np.int32), aligned(space, np.int8)
        begins, totals = aligned(packed.groups + 1, np.int32), aligned(packed.groups, np.int32)
        for one, own in zip(spikes, sums, strict=True):
            self._program(
                packed.weights,
                packed.group_scales,
                packed.row_bytes,
                one,
                *span,
                offsets,
                counts,
                begins,
                totals,
                own,
            )
