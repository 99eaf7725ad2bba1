"""Signed spike counts <-> ternary micro-steps: how integer-valued training becomes spike-driven inference."""

import numbers

import torch
from spikingjelly.activation_based import base
from torch import nn

__all__ = ["MicroStepSum", "SignedCountToTernary"]


def _check_slots(max_spike_count: int) -> int:
    if not isinstance(max_spike_count, numbers.Integral) or isinstance(max_spike_count, bool):
        raise TypeError(f"max_spike_count must be an integer, got {max_spike_count!r}.")
    if max_spike_count < 1:
        raise ValueError(f"max_spike_count must be at least 1, got {max_spike_count}.")
    return int(max_spike_count)


class SignedCountToTernary(nn.Module, base.MultiStepModule):
    r"""Unroll signed counts into ternary micro-steps, ``[T, *] -> [T * D, *]``.

    Micro-step ``d = 0 .. D-1`` of a count ``s`` carries ``sign(s)`` while ``d < |s|``, else 0: exactly
    the spikes that TI-LIF emits at ``beta = 1`` with its input at the first micro-step. The signed
    counterpart of spikingjelly's ``SpikeCountToBinary``, which zeroes negative counts; unlike that one it
    converts in training mode too. Each micro-step passes ``1/D`` of its gradient on.

    Args:
        max_spike_count: ``D``.

    Raises:
        ValueError: a count exceeds ``D``, or is no integer (checked in eager mode).
    """

    def __init__(self, max_spike_count: int) -> None:
        super().__init__()
        self.max_spike_count = _check_slots(max_spike_count)
        self.step_mode = "m"

    def extra_repr(self) -> str:
        """What ``repr()`` shows between the brackets."""
        return f"max_spike_count={self.max_spike_count}"

    def forward(self, count_seq: torch.Tensor) -> torch.Tensor:
        """``[T, *] -> [T * D, *]``."""
        count = count_seq.unsqueeze(1)
        # the size of int8's -128 is no int8
        size = count.detach() if count.is_floating_point() else count.long()
        size = size.abs()
        if not torch.compiler.is_compiling():
            self._check(size)
        slots = torch.arange(self.max_spike_count, device=count.device)
        slots = slots.view(1, -1, *(1,) * (count_seq.ndim - 1))
        ternary = count.detach().sign() * (slots < size)
        ternary = torch.where(count.detach().isnan(), count.detach(), ternary)
        if count.requires_grad:
            share = count / self.max_spike_count
            ternary = ternary + (share - share.detach())
        return ternary.flatten(0, 1)

    def _check(self, size: torch.Tensor) -> None:
        if bool((size > self.max_spike_count).any()):
            raise ValueError(f"A spike count exceeds max_spike_count={self.max_spike_count}.")
        if size.is_floating_point() and bool((size != size.round()).logical_and(~size.isnan()).any()):
            raise ValueError("Spike counts must be integers, as a signed spiking neuron emits them.")


class MicroStepSum(nn.Module, base.MultiStepModule):
    r"""Sum each run of ``D`` micro-steps, ``[T * D, *] -> [T, *]``.

    The counterpart of :class:`SignedCountToTernary`, to stand behind a bias-free linear layer.

    Args:
        max_spike_count: ``D``.

    Raises:
        ValueError: the first dimension is no multiple of ``D``.
    """

    def __init__(self, max_spike_count: int) -> None:
        super().__init__()
        self.max_spike_count = _check_slots(max_spike_count)
        self.step_mode = "m"

    def extra_repr(self) -> str:
        """What ``repr()`` shows between the brackets."""
        return f"max_spike_count={self.max_spike_count}"

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """``[T * D, *] -> [T, *]``."""
        steps = x_seq.shape[0]
        if steps % self.max_spike_count:
            raise ValueError(
                f"{steps} micro-steps are no multiple of max_spike_count={self.max_spike_count}."
            )
        # -1 would be ambiguous for an empty tensor
        return x_seq.unflatten(0, (steps // self.max_spike_count, self.max_spike_count)).sum(1)
