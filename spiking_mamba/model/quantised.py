"""A linear layer whose inputs are activations, not spikes: they are rounded to int8 in blocks of 32."""

import torch

from neurons.event_linear import EventDrivenLinear

__all__ = ["BLOCK", "QuantisedLinear", "round_blocks"]

BLOCK = 32  # inputs that share a scale, as the groups of 4-bit weights and llama.cpp's Q8_0 have it


def round_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to integers from -127 to 127 times a scale for every 32 elements of the last axis.

    Args:
        x: ``[..., n]``, floating point; the last block may be shorter.

    Returns:
        int8 ``[..., n]`` and the scales, float32 ``[..., ceil(n / 32)]``.
    """
    blocks = -(-x.shape[-1] // BLOCK)
    filled = torch.nn.functional.pad(x.float(), (0, blocks * BLOCK - x.shape[-1]))
    filled = filled.unflatten(-1, (blocks, BLOCK))
    scale = filled.abs().amax(-1) / 127
    integers = torch.round(filled / torch.where(scale > 0, scale, 1.0)[..., None])
    return integers.to(torch.int8).flatten(-2)[..., : x.shape[-1]], scale


class QuantisedLinear(EventDrivenLinear):
    """``y = scale * (sum over blocks of a[block] * sum over the block of q * W) + bias``, ``x = a * q``.

    ``x`` is rounded by :func:`round_blocks`; weights, arguments and attributes as in ``EventDrivenLinear``.

    One scale for all inputs would err by 1.7% of the largest logit in a language model's head.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``, float32."""
        integers, scales = round_blocks(x)
        rounded = integers * scales.repeat_interleave(BLOCK, -1)[..., : self.in_features]
        y = (rounded @ self.integer_weight().float()) * self.scale
        return y if self.bias is None else y + self.bias
