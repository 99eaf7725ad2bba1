"""Smoothed Gradient Compensation (SGC): in training, a smooth path is mixed into the spikes.

Source: SpikingMamba, arXiv 2510.04595. What follows a neuron here is a linear map, so the two paths are mixed
before it and one matrix product serves both.
"""

from collections.abc import Callable

import torch

from . import functional

__all__ = ["MODES", "SMOOTH_FUNCTIONS", "check_mixture", "compensate", "compensated_spike_count"]

MODES = ("blend", "gradient", "replace")

SMOOTH_FUNCTIONS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "tanh": lambda u, d: d * torch.tanh(u),  # the source's
    "scaled_tanh": lambda u, d: d * torch.tanh(u / d),
    "clip": functional.clip,
    "identity": lambda u, d: u,
}


def check_mixture(mode: str, function: str, lam: float | torch.Tensor) -> None:
    """Refuse what :func:`compensate` cannot mix; a tensor ``lam`` is not looked at.

    Raises:
        ValueError: ``mode`` or ``function`` is unknown, or ``lam`` lies outside [0, 1].
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if function not in SMOOTH_FUNCTIONS:
        raise ValueError(f"function must be one of {tuple(SMOOTH_FUNCTIONS)}, got {function!r}.")
    if not isinstance(lam, torch.Tensor) and not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam!r}.")


def compensate(
    u: torch.Tensor,
    spike: torch.Tensor,
    mode: str,
    function: str,
    lam: float | torch.Tensor,
    max_spike_count: int,
) -> torch.Tensor:
    """Mix the smooth path ``f(u)`` into the spikes ``s`` of ``u``:

    - 'blend': ``s + lam * (f(u) - s)``, in the forward and the backward pass;
    - 'gradient': spikes forward; backward the surrogate's slope plus ``lam * f'``;
    - 'replace': spikes forward; backward ``(1 - lam)`` of the surrogate's slope plus ``lam * f'``.

    Args:
        u: the neuron's input in units of V_th, any shape.
        spike: its spikes for it, the same shape.
        mode: of ``MODES``. function: of ``SMOOTH_FUNCTIONS``.
        lam: in [0, 1].
        max_spike_count: ``D``, the saturation of ``f``.

    Returns:
        What the linear map is applied to, in the dtype of ``spike``; worked out in float32 (float64 for a
        float64 ``u``) and rounded once.

    Raises:
        ValueError: see :func:`check_mixture`.
    """
    check_mixture(mode, function, lam)
    smooth = SMOOTH_FUNCTIONS[function](u.to(functional.state_dtype(u)), max_spike_count)
    if mode == "blend":
        return (spike + lam * (smooth - spike)).to(spike.dtype)
    difference = lam * (smooth - smooth.detach())  # zero, with the gradient of lam * f
    if mode == "replace":
        spike = spike.detach() + (1.0 - lam) * (spike - spike.detach())
    return spike + difference.to(spike.dtype)


def compensated_spike_count(
    u: torch.Tensor, surrogate_function: functional.SurrogateFunction, mode: str, function: str, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The spikes of fresh neurons at unit threshold for one step, and these with the smooth path mixed in.

    Arguments as in :func:`compensate`; ``D`` is the surrogate's ``max_spike_count`` (1 if it has none).
    Dtypes and errors as in :func:`neurons.functional.signed_spike_count`.
    """
    spike = functional.signed_spike_count(u, 1.0, surrogate_function)
    max_spike_count = int(getattr(surrogate_function, "max_spike_count", 1))
    return spike, compensate(u, spike, mode, function, lam, max_spike_count)
