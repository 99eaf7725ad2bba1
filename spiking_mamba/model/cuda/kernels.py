"""The launches of a token; every function is what :mod:`.reference` says under the same name."""

import functools
from pathlib import Path

import numpy as np
import torch

from neurons.cupy import launcher
from neurons.cupy.event_linear.ops import layout_names
from neurons.cupy.event_linear.plan import Plan, clusters, plan
from spiking_mamba.model.cuda.parts import Convolution, Given, Kept, Matrix, Neuron, Scan, Stream

__all__ = ["MIX", "PROJECT", "embed", "mix_options", "project", "project_options", "scan", "scan_parts"]

PROJECT = launcher.Source(Path(__file__).with_name("project.cu"))
MIX = launcher.Source(Path(__file__).with_name("mix.cu"))

_BLOCKS_WANTED = 128  # about one for each multiprocessor
_ROWS = 8  # of a head's channels that a warp has, at most where they can be divided


@functools.cache
def project_options(
    found: Plan, bits: int, floats: bool, after: str, groups: int | None, taps: int, shifted: bool = False
) -> tuple[str, ...]:
    """The compiler's options of an instantiation; no groups: an MLP's gate is before it."""
    names: dict[str, object] = {"FLOATS": int(floats), "NORMED": int(groups is not None)}
    names |= {"SHIFTED": int(shifted)}
    names |= {"GROUPS": groups or 1, "AFTER": after, "TAPS": taps}
    return launcher.defines(layout_names(bits, found) | names)


def square_pieces(found: Plan, bits: int) -> int:
    """How many sums of squares a cluster leaves, each of 32 columns or of those that a block finishes."""
    columns = found.lanes * found.vec * 8 // bits
    return columns // min(32, columns // found.cluster)


def project(
    given: Given,
    matrix: Matrix,
    neuron: Neuron | None,
    convolution: Convolution | None = None,
    onto: torch.Tensor | None = None,
    kept: Kept | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`.reference.project`."""
    rows, inputs = given.x.shape[0], matrix.weight.shape[0]
    device, outputs, floats = given.x.device, matrix.outputs, neuron is None
    aligned = matrix.weight.data_ptr() % launcher.ACCESS_BYTES == 0
    found = plan(matrix.bits, rows, inputs, matrix.weight.shape[1], aligned, clusters(device), floats=floats)
    y, squares = onto, None
    if y is None:
        y = given.x.new_empty(rows, outputs)
    else:
        squares = given.x.new_empty(rows, found.slabs * square_pieces(found, matrix.bits))
    after, taps, first, last = "PLAIN", 1, 0, 0
    conv: tuple[torch.Tensor | None, ...] = (None, None, None)
    if convolution is not None:
        conv = convolution.state, convolution.weight, convolution.bias
        after, taps, first = "CONVOLVE", convolution.state.shape[2], convolution.first
        last = first + convolution.state.shape[1]
    elif onto is not None:
        after = "RESIDUAL"
    parts = 0 if given.squares is None else given.squares.shape[1] // given.groups
    addresses, _ = launcher.pointers(
        (
            given.x, given.weight, given.shift, given.squares, matrix.weight, matrix.group_scale,
            matrix.factor, matrix.bias, y, squares, *conv, *((None, None) if kept is None else kept),
        )
    )  # fmt: skip
    counts = [np.int32(n) for n in (inputs, rows, parts, first, last)]
    sizes = np.int64(outputs), np.int64(matrix.weight.shape[1])
    numbers = launcher.float32s((given.eps, *(neuron or (0, 0.0))))
    groups = None if given.weight is None else given.groups
    options = project_options(found, matrix.bits, floats, after, groups, taps, given.shift is not None)
    launcher.launch(
        PROJECT, "project", device, options, found.grid, (found.threads,),
        (*addresses, *sizes, *counts, *numbers), overlap=True,
    )  # fmt: skip
    return y, squares


@functools.cache
def scan_parts(head_dim: int, heads: int) -> tuple[int, int]:
    """How many channels of a head a block has, and how many warps; for ``heads`` of all sequences."""
    part = head_dim
    while part % 2 == 0 and (part > 4 * _ROWS or (heads * head_dim // part < _BLOCKS_WANTED and part > 8)):
        part //= 2
    return part, next(w for w in (4, 2, 1) if part % w == 0)


@functools.cache
def mix_options(head_dim: int, state_size: int, part: int, warps: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The compiler's options of an instantiation."""
    names = {"HEAD_DIM": head_dim, "STATE_SIZE": state_size, "PART": part, "WARPS": warps}
    return launcher.defines(names | {"STATE": launcher.STORAGE[dtype]})


def scan(projected: torch.Tensor, mixer: Scan) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.scan`."""
    rows, heads, head_dim, state_size = mixer.state.shape
    part, warps = scan_parts(head_dim, heads * rows)
    y = projected.new_empty(rows, heads * head_dim)
    blocks = heads * (head_dim // part)
    squares = projected.new_empty(rows, blocks)
    addresses, _ = launcher.pointers(
        (projected, mixer.dt_bias, mixer.A_log, mixer.D, mixer.state, y, squares)
    )
    numbers = np.int64(projected.shape[1]), np.int32(heads), np.int32(mixer.groups)
    options = mix_options(head_dim, state_size, part, warps, mixer.state.dtype)
    launcher.launch(
        MIX, "scan_token", projected.device, options, (blocks, rows), (32 * warps,),
        (*addresses, *numbers, *launcher.float32s(mixer.limit)), overlap=True,
    )  # fmt: skip
    return y, squares


def embed(tokens: torch.Tensor, table: torch.Tensor) -> Stream:
    """See :func:`.reference.embed`."""
    rows, size = tokens.shape[0], table.shape[1]
    stream = Stream(table.new_empty(rows, size), table.new_empty(rows, 1))
    addresses, _ = launcher.pointers((tokens, table, *stream))
    options = mix_options(8, 8, 8, 1, torch.float32)
    arguments = (*addresses, np.int64(size))
    launcher.launch(MIX, "embed_token", table.device, options, (rows, 1), (256,), arguments)
    return stream
