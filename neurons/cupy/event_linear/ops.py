"""``neurons::event_driven_linear``: integer sums of the rows that fire, for few rows of spikes at a time.

``neurons::event_driven_linear_scaled`` makes floats of them in the same launch.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import launcher
from ..operators import operator
from .plan import Plan, clusters, plan

__all__ = [
    "SOURCE",
    "Call",
    "Scaled",
    "event_driven_linear",
    "event_driven_linear_scaled",
    "module_options",
]

SOURCE = launcher.Source(Path(__file__).with_name("kernel.cu"))


class Call(NamedTuple):
    """The constants of a call."""

    bits: int
    out_features: int


class Scaled(NamedTuple):
    """The constants of a call that gives floats."""

    bits: int
    out_features: int
    dtype: torch.dtype


@functools.cache
def module_options(bits: int, found: Plan, dtype: torch.dtype | None) -> tuple[str, ...]:
    """The compiler's options of an instantiation; no dtype: integers."""
    out: dict[str, object] = {"OUT": "INTEGERS", "INTEGER_OUT": 1}
    if dtype is not None:
        out = {"OUT": launcher.STORAGE[dtype], "INTEGER_OUT": 0}
    return launcher.defines(layout_names(bits, found) | out)


def layout_names(bits: int, found: Plan) -> dict[str, object]:
    """What ``gather.cuh`` wants defined."""
    names: dict[str, object] = {"BATCH": found.batch, "VEC": found.vec, "LANES": found.lanes}
    return names | {"BITS": bits, "WARPS": found.warps, "CLUSTER": found.cluster}


def _launch(
    spikes: Tensor,
    weight: Tensor,
    group_scale: Tensor | None,
    floats: tuple[Tensor | None, Tensor | None, Tensor | None],
    y: Tensor,
    bits: int,
) -> None:
    """Write ``y`` ``[B, out]``; ``floats``: scale, bias and residual, none of them where it is int32."""
    rows, inputs = spikes.shape
    weight, spikes = weight.contiguous(), spikes.contiguous()
    aligned = weight.data_ptr() % launcher.ACCESS_BYTES == 0
    found = plan(bits, rows, inputs, weight.shape[1], aligned, clusters(weight.device))
    addresses, _ = launcher.pointers((spikes, weight, group_scale, *floats, y))
    sizes = np.int64(y.shape[1]), np.int64(weight.shape[1]), np.int32(inputs), np.int32(rows)
    options = module_options(bits, found, None if y.dtype == torch.int32 else y.dtype)
    launcher.launch(
        SOURCE, "event_linear", spikes.device, options, found.grid, (found.threads,), (*addresses, *sizes),
        overlap=True,
    )  # fmt: skip


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
    sums = _sums(spikes, weight, group_scale, call)
    if sums.numel():
        _launch(spikes, weight, group_scale, (None, None, None), sums, call.bits)
    return sums


def _floats(
    spikes: Tensor,
    weight: Tensor,
    group_scale: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Scaled,
) -> Tensor:
    return spikes.new_empty((spikes.shape[0], call.out_features), dtype=call.dtype)


@operator("event_driven_linear_scaled", _floats)
def event_driven_linear_scaled(
    spikes: Tensor,
    weight: Tensor,
    group_scale: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Scaled,
) -> Tensor:
    """``sums * scale + bias + residual`` ``[B, out]``, computed in float32 and rounded once to the dtype.

    Args:
        spikes, weight, group_scale: see :func:`event_driven_linear`.
        scale: float32 ``[out]``. bias: the same, or none.
        residual: ``[B, out]`` in the call's dtype, or none.
        call: the shapes and dtypes, see :class:`Scaled`.
    """
    y = _floats(spikes, weight, group_scale, scale, bias, residual, call)
    if y.numel():
        residual = None if residual is None else residual.contiguous()
        _launch(spikes, weight, group_scale, (scale, bias, residual), y, call.bits)
    return y
