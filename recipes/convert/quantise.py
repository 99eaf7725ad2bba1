"""A dense model in integers after training: what a student's rival costs no training."""

from typing import Any

import torch
from rounding import rounded

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model.projection import spike_fed

__all__ = ["quantise", "rounded_tokens"]


def rounded_tokens(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., C]``: every token as integers times its own scale, its largest value the largest of them."""
    most = 2 ** (bits - 1) - 1
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
    return ((wide / scale).round() * scale).to(x.dtype)


@torch.no_grad()
def quantise(model: SpikingMambaForCausalLM, weights: int, activations: int, group: int = 32) -> None:
    """Round all projections' weights, and from here on what they are given, in place.

    Args:
        model: dense.
        weights: bits; of 8 an output's inputs share a scale, of fewer ``group`` inputs do.
        activations: bits, a scale for each token.
        group: inputs that share a scale.
    """

    def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_tokens(args[0], activations), *args[1:])

    for _, projection in spike_fed(model):
        weight = projection.weight
        parts = weight.data if weights >= 8 else weight.data.view(-1, group)
        weight.data.copy_(rounded(parts.float().contiguous(), weights).view_as(weight))
        projection.linear.register_forward_pre_hook(hook)
