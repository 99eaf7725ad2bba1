"""Surrogate functions for signed spike counts.

A surrogate is a ``spikingjelly`` :class:`SurrogateFunctionBase`: its forward pass gives spikes, its
backward pass a chosen slope. A node applies it to the normalised potential ``u = H / V_th``.
"""

import math
import numbers

import torch
from spikingjelly.activation_based.surrogate import SurrogateFunctionBase

from . import functional

__all__ = ["DeadZoneSpikeCount", "SignedSpikeCount", "SurrogateFunctionBase"]


class _SignedSpikeCount(torch.autograd.Function):
    @staticmethod
    def forward(u: torch.Tensor, max_spike_count: int, alpha: float, grad_window: float) -> torch.Tensor:
        # sign(u) * min(D, ceil(|u| - 1/2)) on one temporary; copysign gives the sign in a single pass and
        # keeps NaN. It is not in place: torch 2.11 compiles a function whose last step is to no gradient.
        return u.abs().sub_(0.5).ceil_().clamp_(max=max_spike_count).copysign(u)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        u, _, ctx.alpha, grad_window = inputs
        ctx.save_for_backward(u.abs() <= grad_window)

    @staticmethod
    def backward(ctx, grad_spike: torch.Tensor):
        (inside,) = ctx.saved_tensors
        grad_u = grad_spike * inside
        return grad_u if ctx.alpha == 1.0 else grad_u * ctx.alpha, None, None, None


class SignedSpikeCount(SurrogateFunctionBase):
    r"""Signed integer spikes with a rectangular surrogate gradient (SpikingMamba, arXiv 2510.04595).

    .. math::

        S(u) = \mathrm{sign}(u)\,\min(D, \lceil |u| - \tfrac12 \rceil), \qquad
        \frac{\partial S}{\partial u} := \alpha\,[\,|u| \le w\,]

    :math:`\lceil |u| - \frac12 \rceil` is exact in floating point and equals rounding to the nearest
    integer, except on exact ties, which go towards zero: a neuron fires only when it is strictly past
    half a quantum. That makes the sum of ``D`` ternary micro-steps equal to the integer.

    With ``spiking=False`` the forward pass is the primitive of the slope, ``alpha * clip(u, -w, w)``.

    Args:
        max_spike_count: ``D``, the largest magnitude of a spike count, an integer >= 1.
        alpha: slope inside the window, finite and > 0.
        grad_window: half width ``w`` of the window on ``u``, > 0; ``None`` means ``D``.
        spiking: as in spikingjelly.

    Shape and dtype: any shape; the output has the dtype of ``u``. NaN in gives NaN out, infinities give
    ``+-D``.

    Raises:
        TypeError: ``max_spike_count`` is not an integer.
        ValueError: a parameter is out of its range.
    """

    def __init__(
        self,
        max_spike_count: int = 4,
        alpha: float = 1.0,
        grad_window: float | None = None,
        spiking: bool = True,
    ) -> None:
        if not isinstance(max_spike_count, numbers.Integral) or isinstance(max_spike_count, bool):
            raise TypeError(f"max_spike_count must be an integer, got {max_spike_count!r}.")
        if max_spike_count < 1:
            raise ValueError(f"max_spike_count must be at least 1, got {max_spike_count}.")
        grad_window = float(max_spike_count if grad_window is None else grad_window)
        if not (math.isfinite(alpha) and alpha > 0.0):
            raise ValueError(f"alpha must be finite and positive, got {alpha}.")
        if not grad_window > 0.0:
            raise ValueError(f"grad_window must be positive, got {grad_window}.")
        super().__init__(
            spiking=spiking, max_spike_count=int(max_spike_count), alpha=float(alpha), grad_window=grad_window
        )

    @staticmethod
    def spiking_function(
        x: torch.Tensor, max_spike_count: int, alpha: float, grad_window: float
    ) -> torch.Tensor:
        """The spikes, with the surrogate's slope."""
        return _SignedSpikeCount.apply(x, max_spike_count, alpha, grad_window)

    @staticmethod
    def primitive_function(
        x: torch.Tensor, max_spike_count: int, alpha: float, grad_window: float
    ) -> torch.Tensor:
        """What the surrogate's slope is the derivative of."""
        return alpha * functional.clip(x, grad_window)


class DeadZoneSpikeCount(SignedSpikeCount):
    r"""As :class:`SignedSpikeCount`, silent where :math:`|u| \le \theta`, beyond half a quantum.

    A count of one stands for inputs from :math:`\theta` to 3/2 then, and fewer weights are fetched. The slope
    is that of the other, within the dead zone, too, or nothing would ever leave it.

    Args:
        max_spike_count, alpha, grad_window, spiking: as there.
        dead_zone: its half width :math:`\theta`, >= 1/2, in quanta; 1/2 is the other.

    Raises:
        TypeError, ValueError: as there, and where ``dead_zone`` is no such number.
    """

    def __init__(
        self,
        max_spike_count: int = 4,
        dead_zone: float = 0.75,
        alpha: float = 1.0,
        grad_window: float | None = None,
        spiking: bool = True,
    ) -> None:
        super().__init__(max_spike_count, alpha, grad_window, spiking)
        if not isinstance(dead_zone, numbers.Real) or isinstance(dead_zone, bool):
            raise TypeError(f"dead_zone must be a number, got {dead_zone!r}.")
        if not (math.isfinite(dead_zone) and dead_zone >= 0.5):
            raise ValueError(f"dead_zone must be at least 0.5, got {dead_zone}.")
        self.dead_zone = float(dead_zone)
        self._sg_param_names = (*self._sg_param_names, "dead_zone")

    @staticmethod
    def spiking_function(  # type: ignore[override]
        x: torch.Tensor, max_spike_count: int, alpha: float, grad_window: float, dead_zone: float
    ) -> torch.Tensor:
        """The spikes, with the surrogate's slope."""
        count = _SignedSpikeCount.apply(x, max_spike_count, alpha, grad_window)
        silent = x.detach().abs() <= dead_zone
        return count - (count.detach() * silent)  # the slope is the count's

    @staticmethod
    def primitive_function(  # type: ignore[override]
        x: torch.Tensor, max_spike_count: int, alpha: float, grad_window: float, dead_zone: float
    ) -> torch.Tensor:
        """What the surrogate's slope is the derivative of."""
        return alpha * functional.clip(x, grad_window)
