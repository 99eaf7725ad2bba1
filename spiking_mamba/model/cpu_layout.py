"""How a model and its sequences lie in memory for compiled code, and how a model gets there."""

from typing import Any, NamedTuple

import numpy as np
import torch

from neurons.cpu.instructions import INSTRUCTIONS
from neurons.cpu.memory import Arena, aligned
from neurons.cpu.packing import Packed, pack
from neurons.cpu.programs import Scratch, part_outputs
from neurons.cpu.threads import BARRIER, GONE, STATE
from neurons.event_linear import EventDrivenLinear
from spiking_mamba.model.cpu_recurrence import state_bytes
from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["BLOCK", "PARTS", "Buffers", "Kind", "Local", "Matrices", "Weights", "new_buffers", "read"]

f32 = np.float32
PARTS = ("rest", "in_proj", "mixing", "out_proj", "head")  # of a token, as they are timed
BLOCK = 32  # inputs that share a factor or a scale


class Kind(NamedTuple):
    """What is compiled in: everything that models of one shape and layout share.

    Attributes:
        instructions: of :mod:`neurons.cpu.instructions`. spiking: or dense. shifted: whether inputs are.
        dead_zone: up to how many quanta a neuron is silent, see ``SpikingMambaConfig``.
        bits: of the projections' weights, two numbers where layers differ. head_bits: of the head's.
        layouts: of input projection and output projection, and of those of MLP blocks, 'rows' or 'tiles'.
        mlps: whether there are MLP blocks.
        states: 'float32' or 'bfloat16'.
        head_dim, state_size, groups: as in the configuration. taps: of the convolution.
        timed: whether each part's time is measured, on x86 alone.
    """

    instructions: str
    bits: tuple[int, ...]
    head_bits: int
    spiking: bool
    shifted: bool
    dead_zone: float
    layouts: tuple[str, str, str, str]
    mlps: bool
    states: str
    head_dim: int
    state_size: int
    groups: int
    taps: int
    timed: bool = False


class Matrices(NamedTuple):
    """One projection of the L blocks that have it, as :func:`neurons.cpu.programs.program` takes them."""

    weights: np.ndarray  # int64 [L], addresses
    group_scales: np.ndarray  # int64 [L], addresses
    bits: np.ndarray  # int64 [L]
    row_bytes: np.ndarray  # int64 [L]
    parts: np.ndarray  # int64 [L]
    part_outputs: np.ndarray  # int64 [L]
    scale: np.ndarray  # float32 [L, outputs of the widest]
    bias: np.ndarray  # float32 [L, outputs]


class Weights(NamedTuple):
    """A model: L blocks, d wide, of which M are mixers, the others MLPs of width F.

    Mixers have H heads of P channels, I = H * P, G groups, N states, C = I + 2 * G * N.
    """

    embeddings: np.ndarray  # float32 [V, d]
    place: np.ndarray  # int64 [L], a mixer's place among mixers; an MLP's among MLPs, as -1, -2, ...
    norm: np.ndarray  # float32 [L, d], over V_th
    shift: np.ndarray  # float32 [L, d], where inputs are shifted, else [0, 0], as the two below
    in_proj: Matrices
    conv: np.ndarray  # float32 [M, taps, C]
    conv_bias: np.ndarray  # float32 [M, C]
    dt_bias: np.ndarray  # float32 [M, H]
    A: np.ndarray  # float32 [M, H], negative
    D: np.ndarray  # float32 [M, H]
    gated_norm: np.ndarray  # float32 [M, I], over V_th
    gated_shift: np.ndarray  # float32 [M, I]
    out_proj: Matrices
    mlp_in: Matrices
    mlp_out: Matrices
    ones: np.ndarray  # float32 [F]
    mlp_shift: np.ndarray  # float32 [L - M, F]
    last_norm: np.ndarray  # float32 [d]
    head: Matrices
    eps: f32
    max_spike_count: f32
    dt_low: f32
    dt_high: f32


class Buffers(NamedTuple):
    """What a sequence and its current token occupy; shared by the threads."""

    conv: np.ndarray  # float32 [M, taps, C], the last inputs, the newest last
    state: np.ndarray  # uint8 [M, H, bytes of one head]
    x: np.ndarray  # float32 [outputs of out_proj], the residual stream
    projected: np.ndarray  # float32 [outputs of the wider in_proj]
    y: np.ndarray  # float32 [I]
    squares: np.ndarray  # float32 [threads, G], sums over a thread's part of a group
    logits: np.ndarray  # float32 [outputs of the head]
    token: np.ndarray  # int64 [2], the one to work on, and the cycle of the last lap
    barrier: np.ndarray  # int64 [BARRIER]
    helpers: np.ndarray  # int64 [threads, STATE]
    cycles: np.ndarray  # int64 [parts], the first thread's, where timed
    fired: np.ndarray  # int64 [4], inputs that fired so far, in the order of Kind.layouts
    spikes: np.ndarray  # int8 [L, d + max(I, F)] where they are kept, else [0, 0]
    sums: np.ndarray  # int32 or float32 [L, outputs of the wider in_proj + outputs of out_proj], likewise


class Local(NamedTuple):
    """What one thread works in; integers and sums of the widest projection."""

    scratch: tuple[np.ndarray, ...]
    integers: np.ndarray  # int8
    factors: np.ndarray  # float32, of every 32 integers
    sums: np.ndarray  # int32 of spikes, float32 of activations
    xbc: np.ndarray  # float32 [C]
    gated: np.ndarray  # float32 [max(I, F)], behind the gated norm or the gate of an MLP


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def read(model: SpikingMambaForCausalLM, kind: Kind, arena: Arena) -> tuple[Weights, list[np.ndarray]]:
    """A model's weights in the arena, and the arrays that their addresses point into."""
    keep: list[np.ndarray] = []
    config, blocks = model.config, list(model.backbone.blocks)
    of_type: dict[str, list[Any]] = {"mamba": [], "mlp": []}
    place = np.zeros(len(blocks), np.int64)
    for i, block in enumerate(blocks):
        own = of_type[config.block_type(i)]
        place[i] = -1 - len(own) if own is of_type["mlp"] else len(own)
        own.append(block.mixer)
    mixers, mlps = of_type["mamba"], of_type["mlp"]
    none = torch.zeros(mixers[0].conv_dim)
    low, high = config.time_step_limit
    stack = lambda tensors: arena.copy(np.stack([_array(tensor) for tensor in tensors]))  # noqa: E731
    shifts = lambda encoders: _shifts(encoders, kind, arena)  # noqa: E731
    matrices = lambda layers, layout: _matrices(layers, layout, kind, arena, keep)  # noqa: E731
    weights = Weights(
        embeddings=_array(model.backbone.embeddings.weight),
        place=place,
        norm=stack([block.norm.weight for block in blocks]),
        shift=shifts([block.mixer.in_spikes for block in blocks]),
        in_proj=matrices([m.in_proj for m in mixers], kind.layouts[0]),
        conv=stack([m.conv1d.weight[:, 0].t() for m in mixers]),
        conv_bias=stack([none if m.conv1d.bias is None else m.conv1d.bias for m in mixers]),
        dt_bias=stack([m.dt_bias for m in mixers]),
        A=stack([-torch.exp(m.A_log.float()) for m in mixers]),
        D=stack([m.D for m in mixers]),
        gated_norm=stack([m.norm.weight for m in mixers]),
        gated_shift=shifts([m.out_spikes for m in mixers]),
        out_proj=matrices([m.out_proj for m in mixers], kind.layouts[1]),
        mlp_in=matrices([m.in_proj for m in mlps], kind.layouts[2]),
        mlp_out=matrices([m.out_proj for m in mlps], kind.layouts[3]),
        ones=np.ones((config.intermediate_size or 0) if mlps else 0, f32),
        mlp_shift=shifts([m.out_spikes for m in mlps]),
        last_norm=arena.copy(_array(model.backbone.norm_f.weight)),
        head=matrices([model.lm_head], "tiles"),
        eps=f32(config.layer_norm_epsilon),
        max_spike_count=f32(config.max_spike_count or 0),
        dt_low=f32(low),
        dt_high=f32(min(high, float(np.finfo(f32).max))),  # compiled code knows no infinity
    )
    return weights, keep


def _shifts(encoders: list[Any], kind: Kind, arena: Arena) -> np.ndarray:
    if not kind.shifted or not encoders:
        return np.zeros((0, 0), f32)
    return arena.copy(np.stack([_array(encoder.shift) for encoder in encoders]))


def _matrices(
    layers: list[EventDrivenLinear], layout: str, kind: Kind, arena: Arena, keep: list[np.ndarray]
) -> Matrices:
    packed = [_pack(layer, layout, kind, arena) for layer in layers]
    keep += [array for p in packed for array in (p.weights, p.group_scales)]
    widest = max((p.outputs for p in packed), default=0)
    scale, bias = arena.copy(np.zeros((2, len(layers), widest), f32))
    for i, layer in enumerate(layers):
        scale[i, : layer.out_features] = layer.scale.numpy()
        if layer.bias is not None:
            bias[i, : layer.out_features] = layer.bias.numpy()
    each = lambda numbers: np.array(list(numbers), np.int64)  # noqa: E731
    outputs = each(part_outputs(kind.instructions, layout, p.bits) for p in packed)
    return Matrices(
        weights=each(p.weights.ctypes.data for p in packed),
        group_scales=each(p.group_scales.ctypes.data for p in packed),
        bits=each(p.bits for p in packed),
        row_bytes=each(p.row_bytes for p in packed),
        parts=each(p.outputs for p in packed) // outputs,
        part_outputs=outputs,
        scale=scale,
        bias=bias,
    )


def _pack(layer: EventDrivenLinear, layout: str, kind: Kind, arena: Arena) -> Packed:
    instructions = INSTRUCTIONS[kind.instructions]
    if layer.group_scale is None:
        return pack(layer.weight.numpy(), None, instructions, layout, arena.take)
    integers, scales = layer.four_bit_integers().numpy(), layer.group_scale.numpy()
    return pack(integers, scales, instructions, layout, arena.take)


def new_buffers(
    w: Weights, kind: Kind, heads: int, threads: int, keep: bool, arena: Arena
) -> tuple[Buffers, list[Local]]:
    """What a sequence works in, and each of its threads; ``keep``: with all projections' spikes and sums."""
    layers, d = w.norm.shape
    mixers, inner, channels = w.conv.shape[0], w.gated_norm.shape[1], w.conv.shape[2]
    head = kind.state_size * kind.head_dim * state_bytes(kind.states)
    first = max(w.in_proj.scale.shape[1], w.mlp_in.scale.shape[1])
    second = max(w.out_proj.scale.shape[1], w.mlp_out.scale.shape[1])
    wide = max(inner, w.ones.size)
    widest = -(-max(d, wide) // BLOCK) * BLOCK
    of_sums = np.int32 if kind.spiking else f32
    buffers = Buffers(
        conv=arena.copy(np.zeros(w.conv.shape, f32)),
        state=arena.take(mixers * heads * head).reshape(mixers, heads, head),
        x=aligned(max(second, d), f32),
        projected=aligned(first, f32),
        y=aligned(inner, f32),
        squares=np.zeros((threads, kind.groups), f32),
        logits=aligned(w.head.scale.shape[1], f32),
        token=np.zeros(2, np.int64),
        barrier=aligned(BARRIER, np.int64),
        helpers=aligned(threads * STATE, np.int64).reshape(threads, STATE),
        cycles=np.zeros(len(PARTS), np.int64),
        fired=np.zeros(4, np.int64),
        spikes=np.zeros((layers, d + wide) if keep else (0, 0), np.int8),
        sums=np.zeros((layers, first + second) if keep else (0, 0), of_sums),
    )
    buffers.helpers[:] = GONE
    local = [
        Local(
            scratch=Scratch(widest).arrays,
            integers=aligned(widest, np.int8),
            factors=aligned(widest // BLOCK, f32),
            sums=aligned(max(first, second), of_sums),
            xbc=aligned(channels, f32),
            gated=aligned(wide, f32),
        )
        for _ in range(threads)
    ]
    return buffers, local
