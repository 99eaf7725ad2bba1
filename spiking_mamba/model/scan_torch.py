"""The chunked scan of Mamba-2 in torch functions, for wherever Triton's kernels do not run."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.nn import functional as F

__all__ = ["scan_torch", "scan_torch_backward", "time_steps"]


def _segment_sums(a: torch.Tensor) -> torch.Tensor:
    """``[..., Q] -> [..., Q, Q]``: ``a[s + 1] + ... + a[l]`` at ``[l, s]``, and -inf where s > l.

    Each is summed by itself: as a difference of two sums from the start it would lose what they share.
    """
    lower = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril()
    columns = a[..., :, None].expand(*a.shape, a.shape[-1])
    return columns.masked_fill(~lower.tril(-1), 0.0).cumsum(-2).masked_fill(~lower, -math.inf)


class _Documents(NamedTuple):
    """Which parts of a chunked scan stay within one document: bool.

    Of tokens ``[b, c, l, s]``, from the start of a chunk and to its end ``[b, c, l]``, and from end to end
    ``[b, c]``.
    """

    pairs: torch.Tensor
    from_start: torch.Tensor
    to_end: torch.Tensor
    whole: torch.Tensor


def _documents_in_chunks(document: torch.Tensor | None, chunk_size: int) -> _Documents | None:
    if document is None:
        return None
    padded = torch.cat([document, document[:, -1:].expand(-1, -document.shape[1] % chunk_size)], 1)
    chunks = padded.unflatten(1, (-1, chunk_size))  # [b, c, l]
    last = chunks[..., -1]
    before = F.pad(last[:, :-1], (1, 0), value=0)  # the state that comes in belongs to document 0
    return _Documents(
        chunks[..., :, None] == chunks[..., None, :],
        chunks == before[..., None],
        chunks == last[..., None],
        last == before,
    )


def time_steps(
    dt: torch.Tensor, dt_bias: torch.Tensor, dt_limit: Sequence[float], real: torch.Tensor | None
) -> torch.Tensor:
    """``[B, L, H]``, float32; 0 at padding, where the state then stays as it is."""
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    return dt if real is None else dt.masked_fill(~real[..., None], 0.0)


def _states(
    a_sums: torch.Tensor,
    B: torch.Tensor,
    inputs: torch.Tensor,
    initial_states: torch.Tensor | None,
    within: _Documents | None,
) -> torch.Tensor:
    """The states at the start of each chunk and behind the last, ``[b, c + 1, g, r, p, n]``.

    Args:
        a_sums: ``[b, c, g, r, l]``. B: ``[b, c, l, g, n]``. inputs: ``[b, c, l, g, r, p]``.
        initial_states: ``[b, h, p, n]``.
        within: what stays within one document; None: all does.
    """
    to_end = (a_sums[..., -1:] - a_sums).exp().permute(0, 1, 4, 2, 3)[..., None]  # [b, c, l, g, r, 1]
    if within is not None:
        to_end = to_end * within.to_end[..., None, None, None]
    added = torch.einsum("bclgn,bclgrp->bcgrpn", B, inputs * to_end)  # by each chunk, at its end
    first = torch.zeros_like(added[:, 0]) if initial_states is None else initial_states.float()
    added = torch.cat([first.view_as(added[:, 0])[:, None], added], 1)
    whole = a_sums[..., -1].movedim(1, -1)  # [b, g, r, c]
    if within is not None:
        whole = whole.masked_fill(~within.whole[:, None, None], -math.inf)
    across = _segment_sums(F.pad(whole, (1, 0))).exp()  # [b, g, r, c + 1, c + 1]
    return torch.einsum("bgrdc,bcgrpn->bdgrpn", across, added)


def scan_torch(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: Sequence[float],
    initial_states: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`chunk_scan` in float32, whatever comes in: ``y`` and the last states.

    Letters of the sums: b batch, c chunk, l and s tokens of a chunk, g group, r head of a group, p channel of
    a head, n state.
    """
    length, groups = x.shape[1], B.shape[2]
    # padded to whole chunks, and 24 tokens in one of 64 take 1.8 times as long as in one of 32; rounded to
    # 16, so that a few tokens more seldom change how sums are cut
    chunk_size = min(chunk_size, 16 * max(1, -(-length // 16)))

    def chunks(tensor: torch.Tensor) -> torch.Tensor:
        padded = F.pad(tensor, (0,) * (2 * tensor.ndim - 3) + (-length % chunk_size,))
        return padded.unflatten(1, (-1, chunk_size))

    dt = time_steps(dt, dt_bias, dt_limit, real)  # [b, L, h]
    x, B, C = x.float(), chunks(B.float()), chunks(C.float())
    inputs = chunks(x * dt[..., None]).unflatten(3, (groups, -1))  # [b, c, l, g, r, p]
    a = chunks(A.float() * dt).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # [b, c, g, r, l]
    a_sums = a.cumsum(-1)

    # what the tokens of a chunk give one another
    scores = torch.einsum("bclgn,bcsgn->bcgls", C, B)[:, :, :, None] * _segment_sums(a).exp()
    within = _documents_in_chunks(document, chunk_size)
    if within is not None:
        scores = scores * within.pairs[:, :, None, None]
    y = torch.einsum("bcgrls,bcsgrp->bclgrp", scores, inputs)

    # what the tokens before a chunk give it
    states = _states(a_sums, B, inputs, initial_states, within)
    from_start = a_sums.exp().permute(0, 1, 4, 2, 3)[..., None]
    if within is not None:
        from_start = from_start * within.from_start[..., None, None, None]
    y = y + torch.einsum("bclgn,bcgrpn->bclgrp", C, states[:, :-1]) * from_start

    y = y.flatten(1, 2)[:, :length].flatten(2, 3) + D.float()[:, None] * x
    return y, states[:, -1].flatten(1, 2)


def scan_torch_backward(
    grad: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    chunk_size: int,
    dt_limit: Sequence[float],
    document: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of a fresh scan, which is computed once more.

    Args:
        grad: of ``y``. inputs: ``x``, ``dt``, ``A``, ``B``, ``C``, ``D`` and ``dt_bias``, in that order.
        chunk_size, dt_limit, document: as in :func:`scan_torch`.

    Returns:
        The inputs' gradients.
    """

    def differentiate() -> tuple[torch.Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        x, dt, A, B, C, D, dt_bias = leaves
        y, _ = scan_torch(x, dt, A, B, C, chunk_size, D, dt_bias, dt_limit, document=document)
        return torch.autograd.grad(y, leaves, grad)

    with ThreadPoolExecutor(1) as thread:  # within an operator this one has no autograd
        return thread.submit(differentiate).result()
