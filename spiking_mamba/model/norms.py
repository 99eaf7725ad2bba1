"""Mamba2's two norms; both compute in float32 and return the dtype of their input times the weight's."""

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["GatedRMSNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size] -> [..., size]``."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``repr()`` shows between the brackets."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """:class:`RMSNorm` of ``x * SiLU(gate)``, over each of ``groups`` parts of the last axis by itself.

    (Dao & Gu, arXiv 2405.21060, section 7)
    """

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """``x`` and ``gate`` ``[..., size] -> [..., size]``."""
        wide = x.float() * F.silu(gate.float())
        wide = wide.unflatten(-1, (self.groups, -1))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``repr()`` shows between the brackets."""
        return f"{self.weight.shape[0]}, groups={self.groups}, eps={self.eps}"
