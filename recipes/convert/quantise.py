"""A model in integers after training: what a student's rival costs no training, and students in few bits."""

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
def quantise(
    model: SpikingMambaForCausalLM, weights: int | None, activations: int | None, group: int = 32
) -> None:
    """Round all projections' weights, and from here on what they are given, in place; None: not that.

    Args:
        model: dense, or spiking, whose inputs are integers.
        weights: bits; of 8 an output's inputs share a scale, of fewer ``group`` inputs do.
        activations: bits, a scale for each token.
        group: inputs that share a scale.

    Raises:
        ValueError: inputs of a spiking model are to be rounded.
    """
    if activations is not None and model.config.neuron is not None:
        raise ValueError("activations: a spiking model's inputs are integers as they are.")

    def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert activations is not None
        return (rounded_tokens(args[0], activations), *args[1:])

    for _, projection in spike_fed(model):
        if weights is not None:
            weight = projection.weight
            parts = weight.data if weights >= 8 else weight.data.view(-1, group)
            weight.data.copy_(rounded(parts.float().contiguous(), weights).view_as(weight))
        if activations is not None:
            projection.linear.register_forward_pre_hook(hook)
