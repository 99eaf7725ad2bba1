"""``neurons::signed_spike_count``: the first step of fresh neurons, whose potential nobody wants."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import operator
from . import kernel
from .kernel import Variant

__all__ = ["Count", "count"]


class Count(NamedTuple):
    """The constants of a call."""

    v_threshold: float
    max_spike_count: int
    alpha: float
    grad_window: float
    spike_dtype: torch.dtype
    store_mask: bool  # for a backward pass


def _outputs(x: Tensor, call: Count) -> tuple[Tensor, Tensor]:
    mask_bytes = kernel.layout(1, x.numel()).mask_bytes if call.store_mask else 0
    return x.new_empty(x.shape, dtype=call.spike_dtype), x.new_empty(mask_bytes, dtype=torch.uint8)


@operator("signed_spike_count", _outputs)
def count(x: Tensor, call: Count) -> tuple[Tensor, Tensor]:
    """``(spike, mask)`` of ``x`` of any shape; ``mask``, one bit an element, is empty unless asked for."""
    spike, mask = _outputs(x, call)
    if x.numel() > 0:
        x = x.contiguous()
        numbers = 1.0, call.v_threshold, call.max_spike_count, call.grad_window
        tensors = (x, None, spike, None, None, mask if call.store_mask else None)
        kernel.run(
            "forward_single",
            Variant(x.dtype, call.spike_dtype, call.v_threshold == 1.0, False),
            x.device,
            kernel.layout(1, x.numel()),
            kernel.pack(tensors, 1, x.numel(), numbers),
        )
    return spike, mask


class Backward(NamedTuple):
    """The constants of a backward pass."""

    v_threshold: float
    alpha: float
    x_dtype: torch.dtype


def _gradient(grad_spike: Tensor, mask: Tensor, call: Backward) -> Tensor:
    return grad_spike.new_empty(grad_spike.shape, dtype=call.x_dtype)


@operator("signed_spike_count_backward", _gradient)
def count_backward(grad_spike: Tensor, mask: Tensor, call: Backward) -> Tensor:
    """The gradient to ``x``."""
    grad_x = _gradient(grad_spike, mask, call)
    if grad_spike.numel() > 0:
        grad_spike = grad_spike.contiguous()
        tensors = (grad_spike, None, None, mask, grad_x, None)
        kernel.run(
            "backward_single",
            Variant(call.x_dtype, grad_spike.dtype, call.v_threshold == 1.0, False),
            mask.device,
            kernel.layout(1, grad_spike.numel()),
            kernel.pack(tensors, 1, grad_spike.numel(), (1.0, call.v_threshold, call.alpha), (True,)),
        )
    return grad_x


def _setup(ctx: Any, inputs: tuple[Tensor, Count], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.call = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_spike: Tensor | None, _grad_mask: Tensor | None) -> tuple[Tensor | None]:
    (mask,), call = ctx.saved_tensors, ctx.call
    if not call.store_mask:
        raise RuntimeError("neurons::signed_spike_count was called with store_mask=False: no backward pass.")
    if grad_spike is None:
        return (None,)
    return (count_backward(grad_spike, mask, Backward(call.v_threshold, call.alpha, ctx.x_dtype)),)


count.differentiable(_setup, _backward)
