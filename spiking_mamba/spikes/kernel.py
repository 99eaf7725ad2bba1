"""Counting spikes on a GPU in one launch that reads them once.

What :meth:`.counting.ProjectionSpikes.add` does with torch functions is a launch of its own and another pass
over memory for each sum. Partial sums stay below 2^24, so float32 holds them exactly; across
blocks they meet in float64 atomics, which are exact too: the order in which they come changes nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["accumulate"]

# tokens a block, tokens at a time, channels a block, its warps: the fastest of ten on an H100 at 768 and 1536
# channels (18 and 24 us for 8192 tokens; smaller blocks meet too often in the atomics)
ROWS, STEP, COLUMNS, WARPS = 128, 16, 256, 4

# Compiled kernels by what Triton would otherwise find out anew at every call, which takes longer than the
# kernel runs. Before 3.3 a compiled kernel took other arguments.
_compiled: dict[tuple[object, ...], Any] = {}
_REUSES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


@triton.jit
def _accumulate_kernel(
    spike,  # [B, L, C] with strides (stride_b, stride_l, 1)
    padding,  # bool [B, L]
    position,  # int64 [B, L]
    channel_sum,  # float64 [C]
    channel_nonzero,  # float64 [C]
    position_sum,  # float64 [P]
    position_tokens,  # float64 [P]
    levels,  # float64 [2D + 1]; the middle one is left out
    tokens,  # B * L
    length,
    channels,
    stride_b,
    stride_l,
    D,
    PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < channels
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    nonzero = tl.zeros((STEP, COLUMNS), tl.float32)
    for step in range(0, ROWS, STEP):
        token = tl.program_id(0).to(tl.int64) * ROWS + step + tl.arange(0, STEP)
        real = token < tokens
        where = token % length
        if PADDED:
            real = real & (tl.load(padding + token, mask=real, other=1) == 0)
            where = tl.load(position + token, mask=real, other=0)
        row = (token // length) * stride_b + (token % length) * stride_l
        inside = real[:, None] & in_width[None, :]
        s = tl.load(spike + row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(s)
        total += size
        nonzero += (size > 0).to(tl.float32)
        # relaxed: nobody reads the sums before the kernel has ended
        tl.atomic_add(position_sum + where, tl.sum(size, 1).to(tl.float64), mask=real, sem="relaxed")
        if tl.program_id(1) == 0:
            tl.atomic_add(position_tokens + where, real.to(tl.float64), mask=real, sem="relaxed")
        if LEVELS:
            for level in range(1, D + 1):
                tl.atomic_add(levels + D + level, tl.sum((s == level).to(tl.float64)), sem="relaxed")
                tl.atomic_add(levels + D - level, tl.sum((s == -level).to(tl.float64)), sem="relaxed")
    tl.atomic_add(channel_sum + column, tl.sum(total, 0).to(tl.float64), mask=in_width, sem="relaxed")
    tl.atomic_add(channel_nonzero + column, tl.sum(nonzero, 0).to(tl.float64), mask=in_width, sem="relaxed")


def accumulate(
    spike: torch.Tensor,
    padding: torch.Tensor | None,
    position: torch.Tensor | None,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    max_spike_count: int,
    count_levels: bool,
) -> None:
    """Add spikes ``[B, L, C]`` to ``sums``.

    Args:
        spike: any float dtype and any strides, channels side by side.
        padding, position: contiguous ``[B, L]``, bool and int64, or both ``None``.
        sums: float64, of channels ``[C]`` (of ``|s|``, of non-zeros), of positions ``[P]`` (of ``|s|``, of
            tokens), and of levels ``[2D + 1]``, the middle one of which is not touched.
        max_spike_count: D. count_levels: whether to count the levels.
    """
    batch, length, channels = spike.shape
    if spike.numel() == 0:
        return
    if spike.stride(2) != 1:
        spike = spike.contiguous()
    tokens = batch * length
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(channels, COLUMNS), 1)
    arguments = (
        spike,
        spike if padding is None else padding,
        spike if position is None else position,
        *sums,
        tokens,
        length,
        channels,
        spike.stride(0),
        spike.stride(1),
        max_spike_count,
        padding is not None,
        count_levels,
        ROWS,
        STEP,
        COLUMNS,
    )
    # Triton compiles for dtypes, for integers' values (1, multiples of 16) and for addresses at 16 bytes
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in arguments[:8])
    key = (spike.device, spike.dtype, *arguments[8:16])
    if aligned and (kernel := _compiled.get(key)) is not None:
        kernel[grid](*arguments)
        return
    kernel = _accumulate_kernel[grid](*arguments, num_warps=WARPS)
    if _REUSES and aligned and kernel is not None:  # Triton's interpreter returns none
        _compiled[key] = kernel
