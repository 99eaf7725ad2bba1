"""``neurons::event_driven_linear``: integer sums of the rows that fire, for few rows of spikes at a time."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import launcher
from ..operators import operator

__all__ = ["LARGEST_BATCH", "SOURCE", "Plan", "event_driven_linear", "module_options", "plan"]

SOURCE = launcher.Source(Path(__file__).with_name("kernel.cu"))

LARGEST_BATCH = 8  # rows of spikes that one launch takes
_GROUP = 32  # inputs that share a scale of 4-bit weights
_SUMS = 64  # a thread's integers, its columns times its rows of spikes: they lie in registers
_SUMS_OF_MANY_WARPS = 32  # up to which the sums of eight warps fit into shared memory
_WARPS_WANTED = 2048  # of a launch: 132 multiprocessors with 16 each hide a fetch's latency


class Call(NamedTuple):
    """The constants of a call."""

    bits: int
    out_features: int


class Plan(NamedTuple):
    """How a call is laid over threads, see ``kernel.cu``."""

    batch: int
    vec: int
    warps: int
    chunks: int
    grid: tuple[int, int]


@functools.lru_cache(maxsize=1024)
def plan(bits: int, batch: int, inputs: int, row: int, aligned: bool = True) -> Plan:
    """The layout for ``inputs``, a multiple of 32, and rows of ``row`` bytes, ``aligned`` or not.

    It reads the widest pieces that divide a row and leave a thread's sums in registers, and so many inputs a
    warp that the launch has enough warps.
    """
    padded = 1 << (batch - 1).bit_length()  # 1, 2, 4 or 8: few instantiations
    columns = 8 // bits
    widths = (16, 8, 4, 1) if aligned else (1,)
    vec = next(v for v in widths if row % v == 0 and v * columns * padded <= _SUMS)
    warps = 8 if vec * columns * padded <= _SUMS_OF_MANY_WARPS else 4
    run = 16 if bits == 8 else 32
    blocks = -(-row // (32 * vec))
    runs = inputs // run
    chunks = max(1, runs * blocks // _WARPS_WANTED)
    chunks = 1 << (chunks.bit_length() - 1)
    return Plan(padded, vec, warps, chunks, (blocks, -(-runs // (warps * chunks))))


@functools.cache
def module_options(bits: int, batch: int, vec: int, warps: int, chunks: int) -> tuple[str, ...]:
    """The compiler's options of an instantiation."""
    names = {"BITS": bits, "BATCH": batch, "VEC": vec, "WARPS": warps, "CHUNKS": chunks}
    return launcher.defines(names)


def _sums(spikes: Tensor, weight: Tensor, group_scale: Tensor | None, call: Call) -> Tensor:
    return spikes.new_empty((spikes.shape[0], call.out_features), dtype=torch.int32)


@operator("event_driven_linear", _sums)
def event_driven_linear(spikes: Tensor, weight: Tensor, group_scale: Tensor | None, call: Call) -> Tensor:
    """int32 ``[B, out]`` of spikes int8 ``[B, in]``, B at most 8.

    Args:
        spikes: int8 ``[B, in]``.
        weight: int8 ``[in, out]``, or 4-bit weights as :class:`neurons.EventDrivenLinear` has them, uint8
            ``[in, ceil(out / 2)]``.
        group_scale: of 4-bit weights, uint8 ``[ceil(in / 32), out]``.
        call: how the kernel is launched.
    """
    rows, inputs = spikes.shape
    if not rows or not inputs or not call.out_features:
        return spikes.new_zeros((rows, call.out_features), dtype=torch.int32)
    wide = -(-inputs // _GROUP) * _GROUP
    weight = weight.contiguous()
    aligned = weight.data_ptr() % launcher.ACCESS_BYTES == 0
    found = plan(call.bits, rows, wide, weight.shape[1], aligned)
    if (wide, found.batch) != (inputs, rows):
        spikes = torch.nn.functional.pad(spikes, (0, wide - inputs, 0, found.batch - rows))
    spikes = spikes.contiguous()
    if spikes.data_ptr() % 4:  # they are read by fours
        spikes = spikes.clone()
    sums = spikes.new_zeros((found.batch, call.out_features), dtype=torch.int32)
    addresses, _ = launcher.pointers((spikes, weight, group_scale, sums))
    launcher.launch(
        SOURCE,
        "event_linear",
        spikes.device,
        module_options(call.bits, *found[:4]),
        found.grid,
        (32 * found.warps,),
        (*addresses, np.int64(call.out_features), np.int64(weight.shape[1]), np.int32(wide)),
    )
    return sums[:rows]
