r"""The equations of the signed spiking neurons: pure functions with explicit state.

SI-LIF, the signed-integer leaky integrate-and-fire neuron (SpikingMamba, arXiv 2510.04595), one step:

.. math::

    H[t] &= \beta V[t-1] + X[t], \qquad \beta = 1 - 1/\tau \\
    S[t] &= \mathrm{sign}(u)\,\min(D, \lceil |u| - \tfrac12 \rceil), \qquad u = H[t] / V_{th} \\
    V[t] &= H[t] - V_{th}\, S[t]

TI-LIF, the ternary one, is the same step with ``D = 1``. With :math:`\beta = 1`, ``D`` of its steps, the
input at the first one only, emit spikes that sum to the SI-LIF integer.

These functions are the reference that every other backend must equal. Precision: ``H``, ``u`` and ``V``
are float32 whatever the input (float64 for a float64 input); spikes have the dtype of the input, or
autocast's inside ``torch.autocast``.
"""

import math
from collections.abc import Callable

import torch

__all__ = ["clip", "event_driven_linear", "si_lif_multi_step", "si_lif_step", "signed_spike_count"]

SurrogateFunction = Callable[[torch.Tensor], torch.Tensor]


def clip(u: torch.Tensor, bound: float) -> torch.Tensor:
    """``min(max(u, -bound), bound)``, of any shape, with slope 1 where ``|u| <= bound`` and 0 elsewhere.

    ``torch.clamp`` has lost that slope on the bounds themselves with torch 2.15.
    """
    return torch.where(u.abs() <= bound, u, u.detach().clamp(-bound, bound))


# The largest count that is exact in the dtype. float32 has the integers up to 2**24, but |u| - 1/2, from
# which counts are made, only up to 2**23.
_LARGEST_COUNT = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**23}


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the membrane potential for the input ``x``: float32, or float64 for a float64 input.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
    """
    if not x.is_floating_point():
        raise TypeError(f"A spiking neuron takes a floating-point input, got {x.dtype}.")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spike_dtype(x: torch.Tensor, surrogate_function: SurrogateFunction) -> torch.dtype:
    """The dtype of the spikes for the input ``x``: its own, or autocast's inside ``torch.autocast``.

    Raises:
        ValueError: the surrogate's spike counts are not all exact in that dtype.
    """
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    largest = getattr(surrogate_function, "max_spike_count", 1)
    if largest > _LARGEST_COUNT.get(dtype, math.inf):
        raise ValueError(f"max_spike_count={largest} is not exact in {dtype}; use a wider dtype.")
    return dtype


def _normalise(h: torch.Tensor, v_threshold: float) -> torch.Tensor:
    # Dividing by a tensor: on CUDA, dividing by a Python number multiplies by its rounded reciprocal,
    # which tips spikes at thresholds that are no powers of two.
    return h if v_threshold == 1.0 else h / torch.full((), v_threshold, dtype=h.dtype, device=h.device)


def signed_spike_count(
    x: torch.Tensor, v_threshold: float, surrogate_function: SurrogateFunction
) -> torch.Tensor:
    """Spikes of neurons that start at ``V = 0``, for one step: ``S(x / V_th)``, without their potential.

    Arguments, dtypes and errors as in :func:`si_lif_step`; any shape.
    """
    u = _normalise(x.to(state_dtype(x)), v_threshold)
    return surrogate_function(u).to(spike_dtype(x, surrogate_function))


def si_lif_step(
    x: torch.Tensor,
    v: torch.Tensor | float,
    tau: float,
    v_threshold: float,
    surrogate_function: SurrogateFunction,
    detach_reset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One SI-LIF step (the equations stand at the head of this module).

    Args:
        x: input ``X[t]``, any shape, float32, float16, bfloat16 or float64; never modified.
        v: membrane potential ``V[t-1]``, the shape of ``x``, or the number 0 for a fresh neuron.
        tau: time constant in steps, > 1; ``math.inf`` means no leak.
        v_threshold: the quantum ``V_th``, > 0, in the units of ``x``.
        surrogate_function: maps ``u`` to spikes.
        detach_reset: keep the reset ``-V_th * S`` out of the backward pass.

    Returns:
        ``(spike, v)`` with the shape of ``x``: spike counts in the dtype of ``x`` (or autocast's) and
        ``V[t]`` in float32.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
    """
    dtype = state_dtype(x)
    h = x.to(dtype)
    if isinstance(v, torch.Tensor) or v != 0.0:
        v = v.to(dtype) if isinstance(v, torch.Tensor) else v
        h = (v if math.isinf(tau) else (1.0 - 1.0 / tau) * v) + h
    u = _normalise(h, v_threshold)
    spike = surrogate_function(u)
    reset = spike.detach() if detach_reset else spike
    v = h - (reset if v_threshold == 1.0 else v_threshold * reset)
    return spike.to(spike_dtype(x, surrogate_function)), v


def si_lif_multi_step(
    x_seq: torch.Tensor,
    v: torch.Tensor | float,
    tau: float,
    v_threshold: float,
    surrogate_function: SurrogateFunction,
    detach_reset: bool = False,
    store_v_seq: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``T`` SI-LIF steps in a row; arguments as in :func:`si_lif_step`.

    Args:
        x_seq: inputs ``X[1..T]``, shape ``[T, N, *]``; ``T = 0`` is legal and leaves ``v`` as it is.
        v: initial potential, shape ``[N, *]``, or the number 0.
        tau, v_threshold, surrogate_function, detach_reset: as in :func:`si_lif_step`.
        store_v_seq: also return ``V[1..T]``.

    Returns:
        ``(spike_seq, v, v_seq)``: spikes ``[T, N, *]``, the last potential ``[N, *]`` and all of them
        ``[T, N, *]`` in float32, or ``None`` unless ``store_v_seq``.
    """
    spikes, potentials = [], []
    for x in x_seq:
        spike, v = si_lif_step(x, v, tau, v_threshold, surrogate_function, detach_reset)
        spikes.append(spike)
        if store_v_seq:
            potentials.append(v)
    if not spikes:
        dtype = state_dtype(x_seq)
        # A copy, so that the spikes stay in the graph: a backward pass over no steps is legal too.
        empty = x_seq.to(spike_dtype(x_seq, surrogate_function), copy=True)
        if not isinstance(v, torch.Tensor):
            v = torch.full(x_seq.shape[1:], float(v), dtype=dtype, device=x_seq.device)
        return empty, v.to(dtype), empty.to(dtype) if store_v_seq else None
    # T = 1 is the model's token mode: a view instead of a copy.
    spike_seq = spikes[0].unsqueeze(0) if len(spikes) == 1 else torch.stack(spikes)
    assert isinstance(v, torch.Tensor)
    return spike_seq, v, torch.stack(potentials) if store_v_seq else None


def event_driven_linear(spikes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``y = sum over inputs k that fire of s_k * W[k, :]``, exactly.

    Args:
        spikes: signed spike counts, int8 ``[..., in]``.
        weight: input-major, int8 ``[in, out]``, or int16 of 4-bit weights times their groups' scales.

    Returns:
        int32 ``[..., out]``.

    Raises:
        TypeError: another dtype.
        ValueError: the shapes do not fit, or a sum leaves 32 bits.
    """
    if spikes.dtype != torch.int8 or weight.dtype not in (torch.int8, torch.int16):
        raise TypeError(f"Spikes and weights must be int8, got {spikes.dtype} and {weight.dtype}.")
    if weight.ndim != 2 or spikes.ndim == 0 or spikes.shape[-1] != weight.shape[0]:
        raise ValueError(f"Spikes {list(spikes.shape)} do not fit weights {list(weight.shape)}.")
    sums = spikes.double() @ weight.double()  # exact in any order: float64 has the integers up to 2**53
    if sums.numel() and float(sums.abs().max()) > 2**31 - 1:
        raise ValueError("A sum leaves 32 bits.")
    return sums.to(torch.int32)
