"""What nodes call: the kernels' counterparts of :mod:`neurons.functional` and :mod:`neurons.compensation`.

Each is a ``torch.library`` operator with a fake kernel and an autograd formula. Importing this module needs
neither CuPy nor a GPU; running an operator does.
"""

from typing import Any

import torch
from torch import Tensor

from ... import functional
from ...compensation import check_mixture
from ...surrogate import SignedSpikeCount
from .. import launcher
from .compensated import Compensated, compensated
from .count import Count, count
from .multi_step import MultiStep, multi_step

__all__ = ["compensated_spike_count", "si_lif_multi_step", "signed_spike_count"]


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
    launcher.check_input(x)
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
    call = MultiStep(
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
    spike_seq, v_out, _, v_seq = multi_step(x_seq, v0, call)
    return spike_seq, v_out, v_seq if store_v_seq else None


def signed_spike_count(x: Tensor, v_threshold: float, surrogate_function: Any) -> Tensor:
    """The spikes of fresh neurons for one step, any shape: ``surrogate_function(x / v_threshold)``.

    Neither reads nor writes a potential: what a projection wants whose every token is its own window.
    Raises as :func:`si_lif_multi_step` does.
    """
    surrogate = _check(x, surrogate_function)
    call = Count(
        v_threshold,
        surrogate.max_spike_count,
        surrogate.alpha,
        surrogate.grad_window,
        functional.spike_dtype(x, surrogate),
        torch.is_grad_enabled() and x.requires_grad,
    )
    spike, _ = count(x, call)
    return spike


def compensated_spike_count(
    u: Tensor, surrogate_function: Any, mode: str, function: str, lam: float
) -> tuple[Tensor, Tensor]:
    """:func:`neurons.compensation.compensated_spike_count` by one kernel each way.

    Same arguments, same spikes to the bit, the same mixture up to one rounding. Raises as
    :func:`si_lif_multi_step` does.
    """
    surrogate = _check(u, surrogate_function)
    check_mixture(mode, function, lam)
    call = Compensated(
        surrogate.max_spike_count,
        surrogate.alpha,
        surrogate.grad_window,
        mode,
        function,
        lam,
        functional.spike_dtype(u, surrogate),
    )
    return compensated(u, call)
