"""The layer's sums on a processor: what ``backend="numba"`` runs."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .instructions import INSTRUCTIONS, best, runs_here
from .memory import aligned
from .packing import pack
from .programs import Scratch, part_outputs, program

__all__ = ["PackedLinear", "layout_for"]

_NO_FACTORS = np.zeros(0, np.float32)


def layout_for(share: float, bits: int, instructions: str | None = None) -> str:
    """'rows' or 'tiles', whichever is faster where this share of the inputs fires.

    Args:
        share: of the inputs, in [0, 1]. bits: of a weight, 8 or 4.
        instructions: a name of :data:`neurons.cpu.instructions.INSTRUCTIONS`; None: the best there are.
    """
    kind = INSTRUCTIONS[best() if instructions is None else instructions]
    return "rows" if share <= kind.crossover[bits] else "tiles"


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
        self._program = program(name, layout, packed.bits)
        self._parts = packed.outputs // part_outputs(
            name, layout, packed.bits
        )  # what threads can divide among themselves

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
        packed, scratch = self.packed, Scratch(self.packed.in_features)
        for one, own in zip(spikes, sums, strict=True):
            self._program(
                packed.weights.ctypes.data,
                packed.group_scales.ctypes.data,
                packed.row_bytes,
                one,
                _NO_FACTORS,
                *span,
                scratch.arrays,
                own,
            )
