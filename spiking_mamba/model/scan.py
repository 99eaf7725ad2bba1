"""The state-space-dual scan and the causal convolution, chosen per device when they are called.

On CUDA they are mamba-ssm's Triton kernels (and causal-conv1d's, when installed), elsewhere, or when
those packages are missing, torch functions. Under ``torch.compile`` the scan is an
operator, and the convolution a sum of shifted products that the compiler fuses with its neighbours.
Triton's kernels multiply float32 in TF32: on an H100 their float32 results differ from torch's by up to
1e-3 of the largest value.
"""

import functools
import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from spiking_mamba.model.scan_torch import scan_torch, scan_torch_backward, time_steps

__all__ = ["causal_conv1d", "causal_conv1d_update", "chunk_scan", "state_update"]


@functools.cache
def _triton_kernels() -> types.SimpleNamespace | None:
    """mamba-ssm's Mamba-2 kernels, or None (said once) where they are not installed."""
    if importlib.util.find_spec("mamba_ssm") is None:
        warnings.warn(
            "mamba-ssm is not installed: the scan runs on slow torch functions. Install it with `make gpu`.",
            stacklevel=4,
        )
        return None
    if "selective_scan_cuda" not in sys.modules and not importlib.util.find_spec("selective_scan_cuda"):
        # mamba_ssm 2.3 imports this Mamba-1 extension unconditionally; a build without CUDA lacks it, and
        # Mamba-2 does not use it.
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    ssd_combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    return types.SimpleNamespace(
        chunk_scan=ssd_combined.mamba_chunk_scan_combined,
        forward=ssd_combined._mamba_chunk_scan_combined_fwd,
        backward=ssd_combined._mamba_chunk_scan_combined_bwd,
        state_update=update,
    )


def _loaded() -> types.SimpleNamespace:
    kernels = _triton_kernels()
    assert kernels is not None
    return kernels


@torch.compiler.assume_constant_result
def _has_triton_kernels() -> bool:
    return _triton_kernels() is not None


def _on_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and _has_triton_kernels()


@functools.cache
def _conv_kernels() -> Any | None:
    return importlib.import_module("causal_conv1d") if importlib.util.find_spec("causal_conv1d") else None


def _conv_kernel_takes(x: torch.Tensor, weight: torch.Tensor, activation: str) -> bool:
    """Whether causal-conv1d has a kernel for this; side by side, it reads eight channels at a time."""
    side_by_side = x.stride(2) == 1 and x.stride(1) > 1
    aligned = all(size % 8 == 0 for size in (x.shape[2], x.stride(0), x.stride(1)))
    return 2 <= weight.shape[1] <= 4 and activation in ("silu", "swish") and (aligned or not side_by_side)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    document: torch.Tensor | None = None,
) -> torch.Tensor:
    """Depthwise causal convolution and activation, ``[B, L, C] -> [B, L, C]``; weight ``[C, K]``.

    ``document``, int ``[B, L]``: a token sees those of its own document only.
    """
    if torch.compiler.is_compiling() or document is not None:
        length, taps = x.shape[1], weight.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        windows = [padded[:, k : k + length] for k in range(taps)]
        if document is not None:
            before = F.pad(document, (taps - 1, 0), value=-1)
            windows = [
                window.masked_fill((before[:, k : k + length] != document)[..., None], 0)
                for k, window in enumerate(windows)
            ]
        y = sum(window * weight[:, k] for k, window in enumerate(windows))
        return ACT2FN[activation](y if bias is None else y + bias).to(x.dtype)
    channels_first = x.transpose(1, 2)
    if x.is_cuda and (kernels := _conv_kernels()) is not None and _conv_kernel_takes(x, weight, activation):
        return kernels.causal_conv1d_fn(channels_first, weight, bias, activation=activation).transpose(1, 2)
    channels, taps = weight.shape
    y = F.conv1d(channels_first.to(weight.dtype), weight[:, None], bias, padding=taps - 1, groups=channels)
    return ACT2FN[activation](y[..., : x.shape[1]]).to(x.dtype).transpose(1, 2)


def causal_conv1d_update(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """One token of :func:`causal_conv1d`: ``x`` is ``[B, 1, C]``; ``state`` ``[B, C, K]`` moves on."""
    window = torch.cat([state[..., 1:], x.transpose(1, 2).to(state.dtype)], dim=-1)
    state.copy_(window)
    y = (window.float() * weight).sum(-1)
    return ACT2FN[activation](y if bias is None else y + bias).to(x.dtype)[:, None]


def _options(
    D: torch.Tensor, dt_bias: torch.Tensor, document: torch.Tensor | None, dt_min: float, dt_max: float
) -> dict[str, Any]:
    """mamba-ssm's names of what a fresh scan takes."""
    limit = dt_min, dt_max
    return {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "dt_limit": limit, "seq_idx": document}


@torch.library.custom_op("spiking_mamba::chunk_scan", mutates_args=())
def _scan_operator(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    document: torch.Tensor | None,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
) -> torch.Tensor:
    """The scan from a fresh state, as ``torch.compile`` takes it; arguments: :func:`chunk_scan`.

    In torch functions, too: with a length that varies, the compiler would be at their sizes for minutes.
    """
    if not _on_triton(x):
        limit = dt_min, dt_max
        return scan_torch(x, dt, A, B, C, chunk_size, D, dt_bias, limit, document=document)[0].contiguous()
    options = _options(D, dt_bias, document, dt_min, dt_max)
    return _loaded().forward(x, dt, A, B, C, chunk_size, **options)[0].contiguous()


@_scan_operator.register_fake
def _(x, dt, A, B, C, D, dt_bias, document, chunk_size, dt_min, dt_max):
    return x.new_empty(x.shape, dtype=x.dtype if _on_triton(x) else torch.float32)


@torch.library.custom_op("spiking_mamba::chunk_scan_backward", mutates_args=())
def _scan_backward_operator(
    grad: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    document: torch.Tensor | None,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
) -> list[torch.Tensor]:
    inputs = x, dt, A, B, C, D, dt_bias
    gradients: Sequence[torch.Tensor]
    if _on_triton(x):
        options = _options(D, dt_bias, document, dt_min, dt_max)
        computed = _loaded().backward(grad, x, dt, A, B, C, y, chunk_size, **options)
        # between them is that of a gate, and behind them of first states
        gradients = [*computed[:6], computed[7]]
    else:
        gradients = scan_torch_backward(grad, inputs, chunk_size, (dt_min, dt_max), document)
    pairs = zip(gradients, inputs, strict=True)
    return [gradient.to(tensor.dtype).contiguous() for gradient, tensor in pairs]


@_scan_backward_operator.register_fake
def _(grad, y, x, dt, A, B, C, D, dt_bias, document, chunk_size, dt_min, dt_max):
    return [tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C, D, dt_bias)]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, chunk_size, dt_min, dt_max = inputs
    ctx.save_for_backward(output, *tensors)
    ctx.constants = chunk_size, dt_min, dt_max


def _scan_autograd(ctx: Any, grad: torch.Tensor):
    return (*_scan_backward_operator(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None)


_scan_operator.register_autograd(_scan_autograd, setup_context=_scan_setup)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    chunk_size: int,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    document: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
):
    """The chunked scan of Mamba-2 (Dao & Gu, arXiv 2405.21060, section 6).

    Args:
        x: ``[B, L, H, P]``. dt: ``[B, L, H]``, before bias and softplus. A: ``[H]``, negative.
        B, C: ``[B, L, G, N]``. D, dt_bias: ``[H]``.
        chunk_size: tokens of a chunk. dt_limit: what time steps are clamped to.
        initial_states: ``[B, H, P, N]``, where document 0 begins.
        return_final_states: whether to return the last states.
        document: int32 ``[B, L]``, ascending in every row: each but 0 begins at zeros.
        real: bool ``[B, L]``, false for padding, at which no state moves.

    Returns:
        ``y`` of the shape of ``x``, and the last states ``[B, H, P, N]`` if asked for.
    """
    fresh = real is None and initial_states is None and not return_final_states
    if torch.compiler.is_compiling() and fresh:
        return _scan_operator(x, dt, A, B, C, D, dt_bias, document, chunk_size, *map(float, dt_limit))
    if not _on_triton(x):
        y, last = scan_torch(x, dt, A, B, C, chunk_size, D, dt_bias, dt_limit, initial_states, document, real)
        return (y, last) if return_final_states else y
    bias: torch.Tensor | None = dt_bias
    softplus = real is None
    if not softplus:  # the kernel knows no padding
        dt, bias, dt_limit = time_steps(dt, dt_bias, dt_limit, real), None, (0.0, math.inf)
    return _loaded().chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        dt_bias=bias,
        initial_states=initial_states,
        seq_idx=document,
        dt_softplus=softplus,
        dt_limit=tuple(dt_limit),
        return_final_states=return_final_states,
    )


def state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: Sequence[float] = (0.0, math.inf),
):
    """One token of :func:`chunk_scan`; ``state`` ``[B, H, P, N]`` moves on in place.

    Args:
        state: ``[B, H, P, N]``.
        x: ``[B, H, P]``. dt: ``[B, H]``. A, D, dt_bias: ``[H]``. B, C: ``[B, G, N]``.
        dt_limit: what time steps are clamped to.

    Returns:
        ``y`` ``[B, H, P]``.
    """
    heads, head_dim, state_size = state.shape[1:]
    if _on_triton(x) and not torch.compiler.is_compiling():
        softplus = tuple(dt_limit) == (0.0, math.inf)
        if not softplus:  # the kernel knows no limit
            dt, dt_bias = F.softplus(dt + dt_bias.to(dt.dtype)).clamp(*dt_limit), torch.zeros_like(dt_bias)
        return _loaded().state_update(
            state,
            x,
            dt[..., None].expand(-1, -1, head_dim),
            A[:, None, None].expand(heads, head_dim, state_size),
            B,
            C,
            D[:, None].expand(heads, head_dim),
            dt_bias=dt_bias[:, None].expand(heads, head_dim),
            dt_softplus=softplus,
        )
    x32, dt = x.float(), F.softplus(dt.float() + dt_bias).clamp(*dt_limit)
    B, C = (t.float().repeat_interleave(heads // t.shape[1], dim=1) for t in (B, C))  # [B, H, N]
    dBx = (dt[..., None] * x32)[..., None] * B[:, :, None]
    new = state * torch.exp(dt * A)[..., None, None] + dBx
    state.copy_(new)
    return ((new * C[:, :, None]).sum(-1) + x32 * D[:, None]).to(x.dtype)
