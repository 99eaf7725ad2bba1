"""A token in torch, step by step: what every kernel of this folder has to equal."""

import torch
from torch.nn import functional as F

from neurons import functional
from spiking_mamba.model.cuda.parts import Convolution, Given, Kept, Matrix, Neuron, Scan, Stream
from spiking_mamba.model.quantised import BLOCK, round_blocks

__all__ = ["embed", "project", "scan"]


def embed(tokens: torch.Tensor, table: torch.Tensor) -> Stream:
    """The residual stream of tokens ``[B]`` by a table of embeddings, float32 ``[V, d]``."""
    x = table[tokens]
    return Stream(x, x.square().sum(-1, keepdim=True))


def project(
    given: Given,
    matrix: Matrix,
    neuron: Neuron | None,
    convolution: Convolution | None = None,
    onto: torch.Tensor | None = None,
    kept: Kept | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Norm or gate, neuron or rounding, the product, and what follows it.

    Args:
        given: what the norm or the gate gets. matrix: of the projection, integers.
        neuron: whose spikes are its inputs; None: activations are rounded to int8, a factor for every 32.
        convolution: of some of the columns, followed by SiLU; their last inputs move on in place.
        onto: the residual stream ``[B, N]``, to which the product is added in place.
        kept: takes up the product's inputs and sums.

    Returns:
        The product or the residual stream, float32 ``[B, N]``; and, of the stream, the sums of its squares.
    """
    u = _before(given)
    integers, sums = _sums(u, matrix, neuron)
    if kept is not None:
        kept.inputs.copy_(integers)
        kept.sums.copy_(sums)
    y = sums * matrix.factor
    y = y if matrix.bias is None else y + matrix.bias
    if convolution is not None:
        last = convolution.first + convolution.state.shape[1]
        y[:, convolution.first : last] = _convolve(y[:, convolution.first : last], convolution)
    if onto is None:
        return y, None
    onto += y
    return onto, onto.square().sum(-1, keepdim=True)


def _before(given: Given) -> torch.Tensor:
    u = _activations(given)
    return u if given.shift is None else u - given.shift


def _activations(given: Given) -> torch.Tensor:
    if given.weight is None:
        gate, up = given.x.chunk(2, -1)
        return F.silu(gate) * up
    assert given.squares is not None
    squares = given.squares.unflatten(-1, (given.groups, -1)).sum(-1)  # [B, groups]
    size = given.x.shape[1] // given.groups
    inverse = 1.0 / torch.sqrt(squares / size + given.eps)
    return given.x * inverse.repeat_interleave(size, -1) * given.weight


def _sums(u: torch.Tensor, matrix: Matrix, neuron: Neuron | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The product's inputs, int8 ``[B, K]``, and its sums ``[B, N]``."""
    weight = _integers(matrix)
    if neuron is not None:
        counts = (u.abs() - 0.5).ceil().clamp(0, neuron.largest) * (u.abs() > neuron.dead_zone)
        spikes = torch.where(u > 0, counts, -counts).to(torch.int8)
        return spikes, functional.event_driven_linear(spikes, weight)
    integers, scales = round_blocks(u)
    rounded = integers * scales.repeat_interleave(BLOCK, -1)[:, : integers.shape[1]]
    return integers, rounded @ weight.float()


def _integers(matrix: Matrix) -> torch.Tensor:
    """The weights without their factors, int8 or int16 ``[K, N]``."""
    if matrix.group_scale is None:
        return matrix.weight[:, : matrix.outputs]
    both = torch.stack((matrix.weight & 15, matrix.weight >> 4), -1).flatten(1)[:, : matrix.outputs]
    each = matrix.group_scale.repeat_interleave(BLOCK, 0)[: len(both)]
    return (both.to(torch.int16) - 8) * each.to(torch.int16)


def _convolve(y: torch.Tensor, convolution: Convolution) -> torch.Tensor:
    state = convolution.state
    state.copy_(torch.cat([state[..., 1:], y[..., None]], -1))
    sums = (state * convolution.weight[:, 0]).sum(-1)
    return F.silu(sums if convolution.bias is None else sums + convolution.bias)


def scan(projected: torch.Tensor, mixer: Scan) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan's step and the gate.

    Args:
        projected: gate ``[H * P]``, then x, B and C behind the convolution, then the time steps ``[H]``:
            float32 ``[B, 2 * H * P + 2 * G * N + H]``.
        mixer: its parameters, and its state, which moves on in place.

    Returns:
        ``[B, H * P]``, and the sums of its squares in pieces, a few for each head.
    """
    rows, heads, head_dim, size = mixer.state.shape
    inner, width = heads * head_dim, mixer.groups * size
    gate, x, B, C, dt = projected.split([inner, inner, width, width, heads], -1)
    x = x.view(rows, heads, head_dim)
    B, C = (t.reshape(rows, mixer.groups, size).repeat_interleave(heads // mixer.groups, 1) for t in (B, C))
    dt = F.softplus(dt + mixer.dt_bias).clamp(*mixer.limit)  # [B, H]
    decay = torch.exp(dt * -torch.exp(mixer.A_log))
    moved = mixer.state * decay[..., None, None] + (dt[..., None] * x)[..., None] * B[:, :, None]
    mixer.state.copy_(moved)
    y = (moved * C[:, :, None]).sum(-1) + mixer.D[:, None] * x
    y = y.flatten(1) * F.silu(gate)
    return y, y.square().unflatten(-1, (heads, head_dim)).sum(-1)
