"""Weights of a linear layer as integers of 8 or 4 bits, and what they are multiplied by."""

import torch

__all__ = ["GROUP", "LARGEST_SPIKE", "LARGEST_SUM", "int4_weights", "int8_weights"]

GROUP = 32  # inputs that share a scale of 4-bit weights
LARGEST_SUM = 2**31 - 1
LARGEST_SPIKE = 128
_DAMPING = 0.01  # of the mean second moment: what is added to each, so that the inverse exists
# of the scale at which a group's largest weight is just held: less cuts it off, and rounds the others finer
_SHARES = [k / 40 for k in range(40, 23, -1)]


def int8_weights(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to integers from -127 to 127 times one scale an output.

    Args:
        weight: ``[out, in]``, floating point.

    Returns:
        int8 ``[in, out]`` and the scales, float32 ``[out]``.
    """
    wide = weight.detach().float()
    scale = _amax(wide, 1) / 127
    integers = torch.round(wide / _no_zero(scale)[:, None]).to(torch.int8)
    return integers.t().contiguous(), scale


def int4_weights(
    weight: torch.Tensor, moments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to integers from -8 to 7 times a scale for every 32 inputs of an output.

    These scales are integers in turn, from 0 to 255, times one scale an output, so that sums of spikes stay
    exact integers.

    Args:
        weight: ``[out, in]``, floating point.
        moments: ``[in, in]``, the sum of ``x x^T`` over inputs ``x`` like those that the layer will meet. The
            weights are rounded for them then: a scale may cut a group's largest weight off where the others
            gain by it, and inputs not yet rounded make up for those that are (GPTQ, Frantar et al., arXiv
            2210.17323).

    Returns:
        Integers from -8 to 7, int8 ``[in, out]``; the groups' scales, uint8 ``[ceil(in / 32), out]``; the
        outputs' scales, float32 ``[out]``.

    Raises:
        ValueError: so many inputs that a sum could leave 32 bits; moments of another shape, or not finite.
    """
    out_features, in_features = weight.shape
    groups = -(-in_features // GROUP)
    largest = min(255, LARGEST_SUM // (LARGEST_SPIKE * 8 * max(1, groups * GROUP)))
    if largest < 1:
        raise ValueError(f"{in_features} inputs of 4-bit weights are too many: a sum could leave 32 bits.")
    wide = torch.zeros(out_features, groups * GROUP, device=weight.device)
    wide[:, :in_features] = weight.detach().float()
    parts = wide.view(out_features, groups, GROUP)
    # -8 has no positive counterpart: what is largest below 0 may take 8 steps, above 0 only 7
    wanted = torch.maximum(_amax(parts, -1, sign=-1) / 8, _amax(parts, -1, sign=1) / 7)  # [out, groups]
    if moments is not None:
        moments = _usable(moments, in_features).to(weight.device)
        wanted = _least_error(parts, wanted, moments.diagonal())
    scale = _amax(wanted, 1) / largest
    up = torch.ceil if moments is None else torch.round  # up: so that no weight is cut off
    group_scale = up(wanted / _no_zero(scale)[:, None]).clamp(max=largest)
    steps = _no_zero(group_scale * scale[:, None]).repeat_interleave(GROUP, 1)[:, :in_features]
    wide = wide[:, :in_features]
    integers = _nearest(wide, steps) if moments is None else _fed_back(wide, steps, moments)
    return integers.to(torch.int8).t().contiguous(), group_scale.to(torch.uint8).t().contiguous(), scale


def _nearest(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return torch.round(weight / steps).clamp(-8, 7)


def _usable(moments: torch.Tensor, in_features: int) -> torch.Tensor:
    """The moments in float64, damped, no input without one."""
    if moments.shape != (in_features, in_features):
        raise ValueError(f"moments must be {[in_features, in_features]}, got {list(moments.shape)}.")
    if not bool(moments.isfinite().all()):
        raise ValueError("moments must be finite.")
    wide = moments.detach().double().clone()
    diagonal = wide.diagonal()
    mean = diagonal.mean()
    diagonal += _DAMPING * torch.where(mean > 0, mean, 1.0)  # inputs that were never seen count a little
    return wide


def _least_error(parts: torch.Tensor, whole: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Of shares of the whole groups' steps ``[out, groups]``, those by which the output errs least.

    Args:
        parts: weights, ``[out, groups, 32]``.
        whole: the steps at which no weight is cut off.
        power: mean squares of the inputs, ``[in]``.
    """
    weights = torch.zeros(parts.shape[1:], device=parts.device)
    weights.view(-1)[: len(power)] = power.float()
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in _SHARES:
        steps = whole * share
        error = _nearest(parts, _no_zero(steps)[..., None]) * steps[..., None] - parts
        error = (error.square() * weights).sum(-1)
        best, least = torch.where(error < least, steps, best), torch.minimum(error, least)
    return best


def _fed_back(weight: torch.Tensor, steps: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Integers ``[out, in]``, the inputs that count most first; those that are left make up for each.

    With ``U^T U`` the inverse of the moments in that order, an input's rounding error ``e`` is best made up
    for by ``-e * U[k, j] / U[k, k]`` at every input ``j`` behind it.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left, steps = weight[:, order].clone(), steps[:, order]
    integers = torch.zeros_like(left)
    for start in range(0, left.shape[1], 64):  # by blocks: what is behind one hears of it once
        end = min(start + 64, left.shape[1])
        errors = left.new_zeros(len(left), end - start)
        for k in range(start, end):
            integers[:, k] = _nearest(left[:, k], steps[:, k])
            error = (left[:, k] - integers[:, k] * steps[:, k]) / upper[k, k]
            left[:, k:end] -= error[:, None] * upper[k, k:end]
            errors[:, k - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    return integers[:, order.argsort()]


def _amax(x: torch.Tensor, dim: int, sign: int = 0) -> torch.Tensor:
    """The largest magnitude, or the largest value of ``sign * x``, at least 0; 0 of nothing."""
    x = x.abs() if sign == 0 else sign * x
    return x.amax(dim).clamp(min=0) if x.shape[dim] else x.new_zeros(x.shape[:dim] + x.shape[dim:][1:])


def _no_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
