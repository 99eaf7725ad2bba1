"""The CuPy kernels as torch operators, and the functions that nodes call.

``neurons::si_lif_multi_step``, ``neurons::signed_spike_count`` and ``neurons::compensated_spike_count`` are
``torch.library`` custom operators
with fake kernels and autograd formulas, so they pass through ``torch.compile(fullgraph=True)``. Importing
this module needs neither CuPy nor a GPU; running an operator does.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional
from ..surrogate import SignedSpikeCount
from . import kernel

__all__ = ["compensated_spike_count", "si_lif_multi_step", "signed_spike_count"]


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op`` that also keeps the plain function, for :func:`_call`."""

    def wrap(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(f"neurons::{name}", function, mutates_args=(), schema=schema)
        operator.function = function  # type: ignore[attr-defined]
        return operator

    return wrap


def _dispatches() -> bool:
    """Whether anything but the kernel itself has to see the call: a tracer, a dispatch mode, functorch."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _call(operator: Any, *arguments: Any) -> Any:
    # A custom operator costs the processor 30 us a call, which a model of 100 neurons and more feels.
    return operator(*arguments) if _dispatches() else operator.function(*arguments)


def _differentiable(operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """Register the operator's autograd formula; return what applies the same one to the plain function."""
    operator.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:  # a setup_context of its own would cost 20 us more
        output = operator.function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(operator._name, (torch.autograd.Function,), members)


def _apply(operator: Any, function: Any, *arguments: Any) -> Any:
    return operator(*arguments) if _dispatches() else function.apply(*arguments)


# ---- Operators. Tensors [T, N, *]; the mask is one bit an element in a layout of the kernels' own. ----


def _empty_forward(
    x_seq: Tensor, spike_dtype: torch.dtype, store_mask: bool, store_v_seq: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, N = x_seq.shape[0], math.prod(x_seq.shape[1:])
    return (
        x_seq.new_empty(x_seq.shape, dtype=spike_dtype),
        x_seq.new_empty(x_seq.shape[1:], dtype=torch.float32),
        x_seq.new_empty(kernel.layout(T, N).mask_bytes if store_mask else 0, dtype=torch.uint8),
        x_seq.new_empty(x_seq.shape if store_v_seq else 0, dtype=torch.float32),
    )


@_operator(
    "si_lif_multi_step",
    "(Tensor x_seq, Tensor? v, float beta, float v_threshold, int max_spike_count, float alpha, "
    "float grad_window, bool detach_reset, ScalarType spike_dtype, bool store_mask, bool store_v_seq) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _multi_step(
    x_seq: Tensor,
    v: Tensor | None,
    beta: float,
    v_threshold: float,
    max_spike_count: int,
    alpha: float,
    grad_window: float,
    detach_reset: bool,
    spike_dtype: torch.dtype,
    store_mask: bool,
    store_v_seq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(spike_seq, v, mask, v_seq)``; ``mask`` and ``v_seq`` are empty unless asked for."""
    T, N = x_seq.shape[0], math.prod(x_seq.shape[1:])
    spike_seq, v_out, mask, v_seq = _empty_forward(x_seq, spike_dtype, store_mask, store_v_seq)
    if T == 0:
        return spike_seq, v_out.zero_() if v is None else v_out.copy_(v), mask, v_seq
    if N > 0:
        plan = kernel.layout(T, N)
        x_seq, v = x_seq.contiguous(), None if v is None else v.contiguous()
        tensors = (x_seq, v, spike_seq, v_out, v_seq if store_v_seq else None, mask if store_mask else None)
        name = f"forward_{plan.family}"
        kernel.launch(
            name,
            x_seq.device,
            kernel.module_options(name, x_seq.dtype, spike_dtype, v_threshold, True, v_seq=store_v_seq),
            plan.grid,
            plan.block,
            kernel.pack(tensors, T, N, (beta, v_threshold, max_spike_count, grad_window)),
        )
    return spike_seq, v_out, mask, v_seq


@_multi_step.register_fake
def _(
    x_seq, v, beta, v_threshold, max_spike_count, alpha, grad_window, detach_reset, spike_dtype,
    store_mask, store_v_seq,
):  # fmt: skip
    return _empty_forward(x_seq, spike_dtype, store_mask, store_v_seq)


@_operator(
    "si_lif_multi_step_backward",
    "(Tensor? grad_spike_seq, Tensor? grad_v, Tensor? grad_v_seq, Tensor mask, SymInt[] shape, "
    "float beta, float v_threshold, float alpha, bool detach_reset, ScalarType x_dtype, "
    "ScalarType spike_dtype, bool need_grad_v) -> (Tensor, Tensor)",
)
def _multi_step_backward(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    mask: Tensor,
    shape: list[int],
    beta: float,
    v_threshold: float,
    alpha: float,
    detach_reset: bool,
    x_dtype: torch.dtype,
    spike_dtype: torch.dtype,
    need_grad_v: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients to ``x_seq`` and to the initial ``v`` (empty unless needed)."""
    T, N = shape[0], math.prod(shape[1:])
    grad_x_seq = mask.new_empty(shape, dtype=x_dtype)
    grad_v0 = mask.new_empty(shape[1:] if need_grad_v else 0, dtype=torch.float32)
    if T == 0 and need_grad_v:
        return grad_x_seq, grad_v0.zero_() if grad_v is None else grad_v0.copy_(grad_v)
    if T > 0 and N > 0:
        plan = kernel.layout(T, N)
        grads = tuple(None if g is None else g.contiguous() for g in (grad_spike_seq, grad_v, grad_v_seq))
        tensors = (*grads, mask, grad_x_seq, grad_v0 if need_grad_v else None)
        name = f"backward_{plan.family}"
        kernel.launch(
            name,
            mask.device,
            kernel.module_options(
                name,
                x_dtype,
                spike_dtype,
                v_threshold,
                True,
                v_seq=grad_v_seq is not None,
                grad_spike=grad_spike_seq is not None,
            ),
            plan.grid,
            plan.block,
            kernel.pack(tensors, T, N, (beta, v_threshold, alpha), (detach_reset,)),
        )
    return grad_x_seq, grad_v0


@_multi_step_backward.register_fake
def _(
    grad_spike_seq, grad_v, grad_v_seq, mask, shape, beta, v_threshold, alpha, detach_reset, x_dtype,
    spike_dtype, need_grad_v,
):  # fmt: skip
    return (
        mask.new_empty(shape, dtype=x_dtype),
        mask.new_empty(shape[1:] if need_grad_v else 0, dtype=torch.float32),
    )


def _multi_step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_seq, _, ctx.beta, ctx.v_threshold, _, ctx.alpha, _, ctx.detach_reset, ctx.spike_dtype, *stored = inputs
    ctx.store_mask, ctx.store_v_seq = stored
    ctx.shape, ctx.x_dtype = x_seq.shape, x_seq.dtype
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)  # an absent gradient costs nothing


def _multi_step_autograd(ctx: Any, grad_spike_seq, grad_v, _grad_mask, grad_v_seq):
    (mask,) = ctx.saved_tensors
    if not ctx.store_mask:
        raise RuntimeError("neurons::si_lif_multi_step was called with store_mask=False: no backward pass.")
    if not ctx.store_v_seq:
        grad_v_seq = None
    if grad_spike_seq is None and grad_v is None and grad_v_seq is None:
        return (None,) * 11
    need_grad_v = ctx.needs_input_grad[1]
    grad_x_seq, grad_v0 = _call(
        _multi_step_backward,
        grad_spike_seq,
        grad_v,
        grad_v_seq,
        mask,
        ctx.shape,
        ctx.beta,
        ctx.v_threshold,
        ctx.alpha,
        ctx.detach_reset,
        ctx.x_dtype,
        ctx.spike_dtype,
        need_grad_v,
    )
    return (grad_x_seq, grad_v0 if need_grad_v else None, *(None,) * 9)


_MultiStep = _differentiable(_multi_step, _multi_step_setup, _multi_step_autograd)


def _empty_count(x: Tensor, spike_dtype: torch.dtype, store_mask: bool) -> tuple[Tensor, Tensor]:
    mask_bytes = kernel.layout(1, x.numel()).mask_bytes if store_mask else 0
    return x.new_empty(x.shape, dtype=spike_dtype), x.new_empty(mask_bytes, dtype=torch.uint8)


@_operator(
    "signed_spike_count",
    "(Tensor x, float v_threshold, int max_spike_count, float alpha, float grad_window, "
    "ScalarType spike_dtype, bool store_mask) -> (Tensor, Tensor)",
)
def _count(
    x: Tensor,
    v_threshold: float,
    max_spike_count: int,
    alpha: float,
    grad_window: float,
    spike_dtype: torch.dtype,
    store_mask: bool,
) -> tuple[Tensor, Tensor]:
    """``(spike, mask)``: the first step of a fresh neuron, whose potential nobody wants."""
    spike, mask = _empty_count(x, spike_dtype, store_mask)
    if x.numel() > 0:
        plan, x = kernel.layout(1, x.numel()), x.contiguous()
        kernel.launch(
            "forward_single",
            x.device,
            kernel.module_options("forward_single", x.dtype, spike_dtype, v_threshold, False),
            plan.grid,
            plan.block,
            kernel.pack(
                (x, None, spike, None, None, mask if store_mask else None),
                1,
                x.numel(),
                (1.0, v_threshold, max_spike_count, grad_window),
            ),
        )
    return spike, mask


@_count.register_fake
def _(x, v_threshold, max_spike_count, alpha, grad_window, spike_dtype, store_mask):
    return _empty_count(x, spike_dtype, store_mask)


@_operator(
    "signed_spike_count_backward",
    "(Tensor grad_spike, Tensor mask, float v_threshold, float alpha, ScalarType x_dtype) -> Tensor",
)
def _count_backward(
    grad_spike: Tensor, mask: Tensor, v_threshold: float, alpha: float, x_dtype: torch.dtype
) -> Tensor:
    grad_x = grad_spike.new_empty(grad_spike.shape, dtype=x_dtype)
    if grad_spike.numel() > 0:
        plan, grad_spike = kernel.layout(1, grad_spike.numel()), grad_spike.contiguous()
        kernel.launch(
            "backward_single",
            mask.device,
            kernel.module_options("backward_single", x_dtype, grad_spike.dtype, v_threshold, False),
            plan.grid,
            plan.block,
            kernel.pack(
                (grad_spike, None, None, mask, grad_x, None),
                1,
                grad_spike.numel(),
                (1.0, v_threshold, alpha),
                (True,),
            ),
        )
    return grad_x


@_count_backward.register_fake
def _(grad_spike, mask, v_threshold, alpha, x_dtype):
    return grad_spike.new_empty(grad_spike.shape, dtype=x_dtype)


def _count_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.v_threshold, _, ctx.alpha, _, _, ctx.store_mask = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _count_autograd(ctx: Any, grad_spike, _grad_mask):
    (mask,) = ctx.saved_tensors
    if not ctx.store_mask:
        raise RuntimeError("neurons::signed_spike_count was called with store_mask=False: no backward pass.")
    if grad_spike is None:
        return (None,) * 7
    return (_call(_count_backward, grad_spike, mask, ctx.v_threshold, ctx.alpha, ctx.x_dtype), *(None,) * 6)


_Count = _differentiable(_count, _count_setup, _count_autograd)


@_operator(
    "compensated_spike_count",
    "(Tensor u, int max_spike_count, float alpha, float grad_window, str mode, str function, "
    "float lam, ScalarType spike_dtype) -> (Tensor, Tensor)",
)
def _compensated(
    u: Tensor,
    max_spike_count: int,
    alpha: float,
    grad_window: float,
    mode: str,
    function: str,
    lam: float,
    spike_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(spike, mixed)``."""
    spike, mixed = (u.new_empty(u.shape, dtype=spike_dtype) for _ in range(2))
    if u.numel() > 0:
        plan, u = kernel.layout(1, u.numel()), u.contiguous()
        name = "forward_compensated"
        kernel.launch(
            name,
            u.device,
            kernel.module_options(name, u.dtype, spike_dtype, 1.0, False, mode=mode, function=function),
            plan.grid,
            plan.block,
            kernel.pack((u, spike, mixed), 1, u.numel(), (max_spike_count, lam)),
        )
    return spike, mixed


@_compensated.register_fake
def _(u, max_spike_count, alpha, grad_window, mode, function, lam, spike_dtype):
    return u.new_empty(u.shape, dtype=spike_dtype), u.new_empty(u.shape, dtype=spike_dtype)


@_operator(
    "compensated_spike_count_backward",
    "(Tensor u, Tensor? grad_spike, Tensor grad_mixed, int max_spike_count, float alpha, "
    "float grad_window, str mode, str function, float lam) -> Tensor",
)
def _compensated_backward(
    u: Tensor,
    grad_spike: Tensor | None,
    grad_mixed: Tensor,
    max_spike_count: int,
    alpha: float,
    grad_window: float,
    mode: str,
    function: str,
    lam: float,
) -> Tensor:
    grad_u = u.new_empty(u.shape)
    if u.numel() > 0:
        plan, u, grad_mixed = kernel.layout(1, u.numel()), u.contiguous(), grad_mixed.contiguous()
        grad_spike = None if grad_spike is None else grad_spike.contiguous()
        name = "backward_compensated"
        kernel.launch(
            name,
            u.device,
            kernel.module_options(
                name,
                u.dtype,
                grad_mixed.dtype,
                1.0,
                False,
                grad_spike=grad_spike is not None,
                mode=mode,
                function=function,
            ),
            plan.grid,
            plan.block,
            kernel.pack(
                (u, grad_spike, grad_mixed, grad_u),
                1,
                u.numel(),
                (max_spike_count, grad_window, alpha, lam),
            ),
        )
    return grad_u


@_compensated_backward.register_fake
def _(u, grad_spike, grad_mixed, max_spike_count, alpha, grad_window, mode, function, lam):
    return u.new_empty(u.shape)


def _compensated_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, *ctx.constants, _ = inputs
    ctx.save_for_backward(u)
    ctx.set_materialize_grads(False)


def _compensated_autograd(ctx: Any, grad_spike, grad_mixed):
    (u,) = ctx.saved_tensors
    if grad_spike is None and grad_mixed is None:
        return (None,) * 8
    if grad_mixed is None:  # somebody wants the spikes alone
        grad_mixed = torch.zeros_like(grad_spike)
    return (_call(_compensated_backward, u, grad_spike, grad_mixed, *ctx.constants), *(None,) * 7)


_Compensated = _differentiable(_compensated, _compensated_setup, _compensated_autograd)


# ---- What nodes call ----


def _check(x: Tensor, surrogate_function: Any) -> SignedSpikeCount:
    """Raise what says why the kernels cannot run this."""
    cls = type(surrogate_function)
    if (
        not isinstance(surrogate_function, SignedSpikeCount)
        or cls.forward is not SignedSpikeCount.forward
        or cls.spiking_function is not SignedSpikeCount.spiking_function
        or not surrogate_function.spiking
    ):
        raise TypeError(
            f"backend='cupy' has a kernel for SignedSpikeCount(spiking=True) only, not for "
            f"{surrogate_function!r}; use backend='torch'."
        )
    if x.dtype not in kernel.STORAGE:
        raise TypeError(
            f"backend='cupy' takes float32, float16 or bfloat16, got {x.dtype}; use backend='torch'."
        )
    if x.device.type not in kernel.DEVICE_TYPES:
        raise RuntimeError(
            f"backend='cupy' runs on CUDA tensors, got one on {x.device}; move the net and its input, or use "
            f"backend='torch'."
        )
    return surrogate_function


def si_lif_multi_step(
    x_seq: Tensor,
    v: Tensor | float,
    tau: float,
    v_threshold: float,
    surrogate_function: Any,
    detach_reset: bool = False,
    store_v_seq: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`neurons.functional.si_lif_multi_step` by one kernel each way; same arguments, same results.

    With ``v`` the number 0 no potential is read. The forward pass keeps one bit an element for the
    backward pass, if there can be one.

    Raises:
        TypeError: no kernel for this surrogate function or input dtype.
        RuntimeError: the input is not on CUDA, or CuPy is missing or broken.
        ValueError: ``v`` is on another device, or the counts are not exact in the spikes' dtype.
    """
    surrogate = _check(x_seq, surrogate_function)
    if isinstance(v, Tensor):
        if v.device != x_seq.device:
            raise ValueError(f"The input is on {x_seq.device}, the potential on {v.device}.")
        v0: Tensor | None = v.to(torch.float32).expand(x_seq.shape[1:])
    elif v != 0.0:
        v0 = torch.full(x_seq.shape[1:], float(v), dtype=torch.float32, device=x_seq.device)
    else:
        v0 = None
    spike_seq, v_out, _, v_seq = _apply(
        _multi_step,
        _MultiStep,
        x_seq,
        v0,
        1.0 - 1.0 / tau,  # tau = inf: exactly 1
        v_threshold,
        surrogate.max_spike_count,
        surrogate.alpha,
        surrogate.grad_window,
        detach_reset,
        functional.spike_dtype(x_seq, surrogate),
        torch.is_grad_enabled() and (x_seq.requires_grad or (v0 is not None and v0.requires_grad)),
        store_v_seq,
    )
    return spike_seq, v_out, v_seq if store_v_seq else None


def signed_spike_count(x: Tensor, v_threshold: float, surrogate_function: Any) -> Tensor:
    """The spikes of fresh neurons for one step, any shape: ``surrogate_function(x / v_threshold)``.

    Neither reads nor writes a potential: what a projection wants whose every token is its own window.
    Raises as :func:`si_lif_multi_step` does.
    """
    surrogate = _check(x, surrogate_function)
    spike, _ = _apply(
        _count,
        _Count,
        x,
        v_threshold,
        surrogate.max_spike_count,
        surrogate.alpha,
        surrogate.grad_window,
        functional.spike_dtype(x, surrogate),
        torch.is_grad_enabled() and x.requires_grad,
    )
    return spike


def compensated_spike_count(
    u: Tensor, surrogate_function: Any, mode: str, function: str, lam: float
) -> tuple[Tensor, Tensor]:
    """:func:`neurons.compensation.compensated_spike_count` by one kernel each way; same arguments, same
    spikes to the bit, the same mixture up to one rounding. Raises as :func:`si_lif_multi_step` does."""
    surrogate = _check(u, surrogate_function)
    return _apply(
        _compensated,
        _Compensated,
        u,
        surrogate.max_spike_count,
        surrogate.alpha,
        surrogate.grad_window,
        mode,
        function,
        lam,
        functional.spike_dtype(u, surrogate),
    )
