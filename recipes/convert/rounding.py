"""Weights rounded to integers of few bits, a scale for every group of inputs."""

import torch

__all__ = ["rounded", "scales_of"]

# of the scale at which a group's largest weight is the largest integer, the largest first: it wins a tie
_SHARES = [k / 20 for k in range(20, 12, -1)]


def scales_of(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The scales of weights in groups, ``[out, in] -> [out, in / group]``, of float16's values.

    The scale at which a group's largest weight is the largest integer, or up to a third less where cutting
    that weight off lets the others err less. What is rounded already keeps its scale.
    """
    most = 2 ** (bits - 1) - 1
    parts = weight.unflatten(1, (-1, group))  # [out, in / group, group]
    whole = parts.abs().amax(-1) / most
    scales = torch.stack([(whole * share).clamp(min=2.0**-14) for share in _SHARES])
    scales = _as_float16(scales)  # [shares, out, in / group]
    errors = []
    for scale in scales[..., None]:
        rounded = (parts / scale).round().clamp(-most, most) * scale
        errors.append((rounded - parts).square().sum(-1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return scales.gather(0, best)[0]


def _as_float16(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that float16 has, in float32, of normal ones.

    A compiler may leave out ``.half().float()``, and does.
    """
    return ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def rounded(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """``[n, group] -> [n, group]``: every group as integers times its scale, as packing writes it."""
    most = 2 ** (bits - 1) - 1
    scale = scales_of(parts, bits, parts.shape[1])
    return (parts / scale).round().clamp(-most, most) * scale
