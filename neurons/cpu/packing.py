"""Integer weights as the kernels read them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .instructions import Portable
from .kernels import GROUP, tile_outputs
from .memory import aligned

__all__ = ["Packed", "pack", "padded"]

_LINE = 64
_READ_PAST = 8192  # bytes behind the last weight that may be prefetched, so that addresses stay inside


@dataclass(frozen=True)
class Packed:
    """Weights in one of the two layouts of :mod:`neurons.cpu.kernels`.

    Attributes:
        layout: 'rows' or 'tiles'. bits: 8 or 4. in_features, out_features: as given.
        weights: uint8, one-dimensional; group_scales: uint8, likewise, of length 1 for int8 weights.
        row_bytes: of a row, a multiple of 64; of tiles: bytes of a tile.
        outputs: how many outputs the kernels write, ``out_features`` rounded up.
        minus: what the weights in memory are too large by.
    """

    layout: str
    bits: int
    in_features: int
    out_features: int
    weights: np.ndarray
    group_scales: np.ndarray
    row_bytes: int
    outputs: int
    minus: int

    @property
    def groups(self) -> int:
        """Groups of 32 inputs, the last one perhaps partly empty."""
        return -(-self.in_features // GROUP)


def padded(count: int, to: int) -> int:
    """``count`` rounded up to a multiple."""
    return -(-count // to) * to


def pack(
    weight: np.ndarray,
    group_scales: np.ndarray | None,
    kind: Portable,
    layout: str,
    take: Callable[[int], np.ndarray] = aligned,
) -> Packed:
    """Lay weights out for a kind of processor.

    Args:
        weight: int8 ``[in, out]``; with ``group_scales``, integers from -8 to 7.
        group_scales: uint8 ``[ceil(in / 32), out]`` of 4-bit weights, or None for int8 ones.
        kind: whose kernels will read them.
        layout: 'rows' or 'tiles'.
        take: gives memory that begins at a multiple of 64 bytes.
    """
    bits = 8 if group_scales is None else 4
    minus = 8 if bits == 4 else 128 if kind.offset else 0
    per_line = _LINE * 8 // bits
    if layout == "rows":
        outputs = padded(weight.shape[1], per_line)
    else:
        outputs = padded(weight.shape[1], tile_outputs(kind))
    shifted = np.full((padded(weight.shape[0], GROUP), outputs), minus, np.uint8)
    shifted[: weight.shape[0], : weight.shape[1]] = (weight.astype(np.int16) + minus).astype(np.uint8)
    scales = np.zeros((len(shifted) // GROUP, outputs), np.uint8)
    if group_scales is not None:
        scales[:, : weight.shape[1]] = group_scales
    body: np.ndarray
    if layout == "rows":
        body, row_bytes = _rows(shifted[: weight.shape[0]], kind, bits), outputs * bits // 8
    else:
        body, row_bytes = _tiles(shifted, kind, bits), len(shifted) * tile_outputs(kind) * bits // 8
        # [groups, outputs] -> a tile's scales together
        width = tile_outputs(kind)
        scales = scales.reshape(len(scales), outputs // width, width).transpose(1, 0, 2).reshape(-1, width)
    memory = take(body.size + _READ_PAST)
    memory[: body.size] = body.ravel()
    kept = take(scales.size if bits == 4 else 1)
    if bits == 4:
        kept[:] = scales.ravel()
    return Packed(layout, bits, weight.shape[0], weight.shape[1], memory, kept, row_bytes, outputs, minus)


def _rows(shifted: np.ndarray, kind: Portable, bits: int) -> np.ndarray:
    """``[in, parts, width]``: within every ``width`` outputs as the instructions want them."""
    (inputs, outputs), width = shifted.shape, kind.width
    parts = shifted.reshape(inputs, outputs // width, width)[:, :, kind.order()]
    if bits == 8:
        return parts
    return parts[:, 0::2] | parts[:, 1::2] << 4


def _tiles(shifted: np.ndarray, kind: Portable, bits: int) -> np.ndarray:
    """``[tiles, in / 4, tile outputs, 4]``, of 4-bit weights the second half above the first."""
    (inputs, outputs), width = shifted.shape, tile_outputs(kind)
    tiles = shifted.reshape(inputs // 4, 4, outputs // width, width).transpose(
        2, 0, 3, 1
    )  # [tiles, in / 4, width, 4]
    if bits == 8:
        return tiles
    return tiles[:, :, : width // 2] | tiles[:, :, width // 2 :] << 4
