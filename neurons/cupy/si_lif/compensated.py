"""``neurons::compensated_spike_count``: fresh neurons at unit threshold, with SGC's smooth path mixed in.

That of :mod:`neurons.compensation`. The backward pass works ``u`` out anew, so no mask is kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import operator
from . import kernel
from .kernel import Variant

__all__ = ["Compensated", "compensated"]


class Compensated(NamedTuple):
    """The constants of a call, and of its backward pass."""

    max_spike_count: int
    alpha: float
    grad_window: float
    mode: str
    function: str
    lam: float
    spike_dtype: torch.dtype


def _variant(u: Tensor, call: Compensated, grad_spike: bool = True) -> Variant:
    return Variant(u.dtype, call.spike_dtype, True, False, False, grad_spike, call.mode, call.function)


def _outputs(u: Tensor, call: Compensated) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape, dtype=call.spike_dtype), u.new_empty(u.shape, dtype=call.spike_dtype)


@operator("compensated_spike_count", _outputs)
def compensated(u: Tensor, call: Compensated) -> tuple[Tensor, Tensor]:
    """``(spike, mixed)`` of ``u`` of any shape."""
    spike, mixed = _outputs(u, call)
    if u.numel() > 0:
        tensors = u.contiguous(), spike, mixed
        kernel.run(
            "forward_compensated",
            _variant(u, call),
            u.device,
            kernel.layout(1, u.numel()),
            kernel.pack(tensors, 1, u.numel(), (call.max_spike_count, call.lam)),
        )
    return spike, mixed


def _gradient(u: Tensor, grad_spike: Tensor | None, grad_mixed: Tensor, call: Compensated) -> Tensor:
    return u.new_empty(u.shape)


@operator("compensated_spike_count_backward", _gradient)
def compensated_backward(
    u: Tensor, grad_spike: Tensor | None, grad_mixed: Tensor, call: Compensated
) -> Tensor:
    """The gradient to ``u``."""
    grad_u = _gradient(u, grad_spike, grad_mixed, call)
    if u.numel() > 0:
        grads = (None if grad_spike is None else grad_spike.contiguous()), grad_mixed.contiguous()
        numbers = call.max_spike_count, call.grad_window, call.alpha, call.lam
        tensors = u.contiguous(), *grads, grad_u  # held, since a launch takes but their addresses
        kernel.run(
            "backward_compensated",
            _variant(u, call, grad_spike=grad_spike is not None),
            u.device,
            kernel.layout(1, u.numel()),
            kernel.pack(tensors, 1, u.numel(), numbers),
        )
    return grad_u


def _setup(ctx: Any, inputs: tuple[Tensor, Compensated], output: tuple[Tensor, Tensor]) -> None:
    u, ctx.call = inputs
    ctx.save_for_backward(u)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_spike: Tensor | None, grad_mixed: Tensor | None) -> tuple[Tensor | None]:
    (u,) = ctx.saved_tensors
    if grad_mixed is None:
        if grad_spike is None:
            return (None,)
        grad_mixed = torch.zeros_like(grad_spike)  # somebody wants the spikes alone
    return (compensated_backward(u, grad_spike, grad_mixed, ctx.call),)


compensated.differentiable(_setup, _backward)
