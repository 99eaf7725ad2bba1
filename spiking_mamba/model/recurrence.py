"""What every path of :mod:`spiking_mamba.model.scan` computes, as text: slow, and the oracle."""

import torch
from torch.nn import functional as F

__all__ = ["recurrence"]


def recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's state space, token after token (Dao & Gu, arXiv 2405.21060, equation 2).

    Args:
        x: ``[B, L, H, P]``. dt: ``[B, L, H]``, before bias and softplus. A: ``[H]``, negative.
        B, C: ``[B, L, G, N]``; the heads of a group share them. D, dt_bias: ``[H]``.
        dt_limit: what time steps are clamped to.
        state: ``[B, H, P, N]`` before the first token.

    Returns:
        ``y`` of the shape of ``x``, and the state behind the last token.
    """
    heads = x.shape[2] // B.shape[2]  # of a group
    ys = []
    for t in range(x.shape[1]):
        step = F.softplus(dt[:, t] + dt_bias).clamp(*dt_limit)  # [B, H]
        b, c = (m[:, t].repeat_interleave(heads, 1) for m in (B, C))  # [B, H, N]
        decay = torch.exp(step * A)[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", step, x[:, t], b)
        ys.append(torch.einsum("bhpn,bhn->bhp", state, c) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), state
