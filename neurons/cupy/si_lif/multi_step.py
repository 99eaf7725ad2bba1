"""``neurons::si_lif_multi_step``: T steps of N neurons with a potential, each way by one kernel."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import operator
from . import kernel
from .kernel import Variant

__all__ = ["MultiStep", "multi_step"]


class MultiStep(NamedTuple):
    """The constants of a call."""

    beta: float
    v_threshold: float
    max_spike_count: int
    alpha: float
    grad_window: float
    detach_reset: bool
    spike_dtype: torch.dtype
    store_mask: bool  # for a backward pass
    store_v_seq: bool


def _outputs(x_seq: Tensor, v: Tensor | None, call: MultiStep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, N = x_seq.shape[0], math.prod(x_seq.shape[1:])
    return (
        x_seq.new_empty(x_seq.shape, dtype=call.spike_dtype),
        x_seq.new_empty(x_seq.shape[1:], dtype=torch.float32),
        x_seq.new_empty(kernel.layout(T, N).mask_bytes if call.store_mask else 0, dtype=torch.uint8),
        x_seq.new_empty(x_seq.shape if call.store_v_seq else 0, dtype=torch.float32),
    )


@operator("si_lif_multi_step", _outputs)
def multi_step(x_seq: Tensor, v: Tensor | None, call: MultiStep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(spike_seq, v, mask, v_seq)`` of ``x_seq`` ``[T, N, *]`` and ``v`` ``[N, *]``.

    ``mask``, one bit an element in a layout of the kernels' own, and ``v_seq`` are empty unless asked for.
    """
    T, N = x_seq.shape[0], math.prod(x_seq.shape[1:])
    spike_seq, v_out, mask, v_seq = _outputs(x_seq, v, call)
    if T == 0:
        return spike_seq, v_out.zero_() if v is None else v_out.copy_(v), mask, v_seq
    if N > 0:
        x_seq, v = x_seq.contiguous(), None if v is None else v.contiguous()
        plan = kernel.layout(T, N)
        stored = v_seq if call.store_v_seq else None, mask if call.store_mask else None
        numbers = call.beta, call.v_threshold, call.max_spike_count, call.grad_window
        kernel.run(
            f"forward_{plan.family}",
            Variant(x_seq.dtype, call.spike_dtype, call.v_threshold == 1.0, True, v_seq=call.store_v_seq),
            x_seq.device,
            plan,
            kernel.pack((x_seq, v, spike_seq, v_out, *stored), T, N, numbers),
        )
    return spike_seq, v_out, mask, v_seq


class Backward(NamedTuple):
    """The constants of a backward pass."""

    shape: list[int]  # of x_seq
    beta: float
    v_threshold: float
    alpha: float
    detach_reset: bool
    x_dtype: torch.dtype
    spike_dtype: torch.dtype
    need_grad_v: bool


def _gradients(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    mask: Tensor,
    call: Backward,
) -> tuple[Tensor, Tensor]:
    return (
        mask.new_empty(call.shape, dtype=call.x_dtype),
        mask.new_empty(call.shape[1:] if call.need_grad_v else 0, dtype=torch.float32),
    )


@operator("si_lif_multi_step_backward", _gradients)
def multi_step_backward(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    mask: Tensor,
    call: Backward,
) -> tuple[Tensor, Tensor]:
    """The gradients to ``x_seq`` and to the initial ``v`` (empty unless needed)."""
    T, N = call.shape[0], math.prod(call.shape[1:])
    grads = grad_spike_seq, grad_v, grad_v_seq
    grad_x_seq, grad_v0 = _gradients(*grads, mask, call)
    if T == 0 and call.need_grad_v:
        return grad_x_seq, grad_v0.zero_() if grad_v is None else grad_v0.copy_(grad_v)
    if T > 0 and N > 0:
        plan = kernel.layout(T, N)
        dense = (None if g is None else g.contiguous() for g in grads)
        tensors = (*dense, mask, grad_x_seq, grad_v0 if call.need_grad_v else None)
        unit, has_v_seq, has_spike = (
            call.v_threshold == 1.0,
            grad_v_seq is not None,
            grad_spike_seq is not None,
        )
        kernel.run(
            f"backward_{plan.family}",
            Variant(call.x_dtype, call.spike_dtype, unit, True, has_v_seq, has_spike),
            mask.device,
            plan,
            kernel.pack(tensors, T, N, (call.beta, call.v_threshold, call.alpha), (call.detach_reset,)),
        )
    return grad_x_seq, grad_v0


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor | None, MultiStep], output: tuple[Tensor, ...]) -> None:
    x_seq, _, ctx.call = inputs
    ctx.shape, ctx.x_dtype = x_seq.shape, x_seq.dtype
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)  # an absent gradient costs nothing


def _backward(
    ctx: Any, grad_spike_seq: Any, grad_v: Any, _grad_mask: Any, grad_v_seq: Any
) -> tuple[Any, Any]:
    (mask,), call = ctx.saved_tensors, ctx.call
    if not call.store_mask:
        raise RuntimeError("neurons::si_lif_multi_step was called with store_mask=False: no backward pass.")
    if not call.store_v_seq:
        grad_v_seq = None
    if grad_spike_seq is None and grad_v is None and grad_v_seq is None:
        return None, None
    constants = Backward(
        ctx.shape,
        call.beta,
        call.v_threshold,
        call.alpha,
        call.detach_reset,
        ctx.x_dtype,
        call.spike_dtype,
        need_grad_v=ctx.needs_input_grad[1],
    )
    grad_x_seq, grad_v0 = multi_step_backward(grad_spike_seq, grad_v, grad_v_seq, mask, constants)
    return grad_x_seq, grad_v0 if constants.need_grad_v else None


multi_step.differentiable(_setup, _backward)
