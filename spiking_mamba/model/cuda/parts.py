"""What a token is made of, as the kernels and their reference take it."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from neurons.event_linear import EventDrivenLinear

__all__ = ["Convolution", "Given", "Kept", "Matrix", "Scan", "Stream", "matrix_of"]

_BYTES = 16  # the widest access to memory
_SECTOR = 32  # what memory gives at least


class Matrix(NamedTuple):
    """A projection's weights, ``[K, N]``.

    Attributes:
        weight: int8 ``[K, row]``, or uint8 of 4-bit weights, two a byte; a row may be longer than its N.
        group_scale: uint8 ``[ceil(K / 32), N]`` of 4-bit weights.
        factor: float32 ``[N]``, what a sum of integers is worth. bias: float32 ``[N]`` or None.
    """

    weight: torch.Tensor
    group_scale: torch.Tensor | None
    factor: torch.Tensor
    bias: torch.Tensor | None

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 8 if self.group_scale is None else 4

    @property
    def outputs(self) -> int:
        """N."""
        return self.factor.shape[0]


def matrix_of(layer: EventDrivenLinear) -> Matrix:
    """A layer's weights; a copy with longer rows where no wide access would fit them."""
    weight = layer.weight
    if weight.shape[1] % _BYTES:
        weight = F.pad(weight, (0, -weight.shape[1] % _SECTOR))
    return Matrix(weight.contiguous(), layer.group_scale, layer.scale, layer.bias)


class Neuron(NamedTuple):
    """Of signed integer spikes: the largest count, and up to how many quanta it is silent."""

    largest: int
    dead_zone: float = 0.5


class Given(NamedTuple):
    """What a projection's neuron, or its rounding to int8, gets.

    Attributes:
        x: float32 ``[B, K]`` behind which a norm stands, or ``[B, 2 * K]``, an MLP's gate and upper half.
        weight: the norm's, float32 ``[K]``; None for an MLP's.
        squares: sums of squares of ``x`` in pieces, float32 ``[B, pieces]``, those of a group side by side.
        groups: equal parts of a row, each with a norm of its own.
        eps: the norm's.
        shift: levels that are subtracted before the neuron, float32 ``[K]``; None: none are.
    """

    x: torch.Tensor
    weight: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    groups: int = 1
    eps: float = 0.0
    shift: torch.Tensor | None = None


class Convolution(NamedTuple):
    """Of the columns ``[first, first + C)`` of a projection.

    Attributes:
        weight: float32 ``[C, 1, taps]``. bias: float32 ``[C]`` or None.
        state: the last inputs, float32 ``[B, C, taps]``; moves on in place.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    state: torch.Tensor
    first: int


class Scan(NamedTuple):
    """A mixer's scan.

    Attributes:
        dt_bias, A_log, D: float32 ``[H]``.
        state: float32 or bfloat16 ``[B, H, P, N]``; moves on in place.
        groups: of B and C. limit: of the time step.
    """

    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor
    state: torch.Tensor
    groups: int
    limit: tuple[float, float]


class Stream(NamedTuple):
    """The residual stream: its value, float32 ``[B, d]``, and the sums of its squares in pieces."""

    x: torch.Tensor
    squares: torch.Tensor


class Kept(NamedTuple):
    """Where a projection leaves its inputs and sums.

    Attributes:
        inputs: int8 ``[B, K]``.
        sums: ``[B, N]``, int32 of spikes and float32 of rounded activations.
    """

    inputs: torch.Tensor
    sums: torch.Tensor
