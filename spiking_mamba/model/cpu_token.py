"""A whole token of an event-driven model as one compiled function, which a few threads run together.

Between the projections stand two passes: norm and neuron, from floats to int8 spikes; and convolution, scan,
gate and the squares for the next norm, head by head. Every thread makes all spikes for itself, which costs
less than to wait for one another, and computes its own part of the outputs.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import neurons.cpu
from neurons.cpu.disk_cache import keep_on_disk
from neurons.cpu.events import compiled, internal
from neurons.cpu.programs import program_of_either
from neurons.cpu.threads import GONE, STATE, WORK, barrier, cycles, exchange, wait_for_work
from spiking_mamba.model.cpu_layout import BLOCK, Kind
from spiking_mamba.model.cpu_recurrence import recurrence, state_bytes

__all__ = ["call_helper", "token_functions"]

f32, i8, i32 = np.float32, np.int8, np.int32
_SOURCES = (  # of what is compiled
    *Path(neurons.cpu.__file__).parent.glob("*.py"),
    *Path(__file__).parent.glob("cpu_*.py"),
)


@internal
def _copy(source, target):
    # numba's own assignment brings a message about shapes along, which takes seconds to compile
    for i in range(target.size):
        target[i] = source[i]


@internal
def _exp(x):
    # 2**n * e**r with |r| <= ln(2) / 2, by the polynomial of Cephes' expf; a call of libm is no vector
    x = min(max(x, f32(-87.0)), f32(88.0))
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1.0)) * i32((i32(n) + i32(127)) << i32(23)).view(f32)


@internal
def _silu(x):
    return x / (f32(1.0) + _exp(-x))


@internal
def _mean_square(x):
    total = f32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total / f32(x.size)


@internal
def _spikes(x, weight, scale, most, silent, out):
    """The neuron at unit threshold on ``x * scale * weight``: up to the dead zone's edge nothing fires."""
    for i in range(x.size):
        u = x[i] * scale * weight[i]
        count = min(np.ceil(abs(u) - f32(0.5)), most) if abs(u) > silent else f32(0.0)
        out[i] = i8(count if u > f32(0.0) else -count)


@internal
def _shifted_spikes(x, weight, shift, scale, most, silent, out):
    """The same on ``x * scale * weight - shift``."""
    for i in range(x.size):
        u = x[i] * scale * weight[i] - shift[i]
        count = min(np.ceil(abs(u) - f32(0.5)), most) if abs(u) > silent else f32(0.0)
        out[i] = i8(count if u > f32(0.0) else -count)


@internal
def _rounded(x, weight, scale, out, factors):
    """``x * scale * weight`` as int8 times a factor for every 32."""
    for block in range((x.size + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(x.size, block * BLOCK + BLOCK)
        largest = f32(0.0)
        for i in range(first, last):
            largest = max(largest, abs(x[i] * weight[i]))
        largest *= scale
        inverse = scale * f32(127.0) / largest if largest > f32(0.0) else f32(0.0)
        factors[block] = largest / f32(127.0)
        for i in range(first, last):
            out[i] = i8(np.rint(x[i] * weight[i] * inverse))


@internal
def _convolve(inputs, kept, weight, bias, first, last, out):
    """Channels ``first`` to ``last`` of the convolution over the kept inputs and the new one, then SiLU."""
    newest = kept.shape[0] - 1
    for c in range(first, last):
        out[c] = bias[c] + inputs[c] * weight[newest, c]
    for tap in range(newest):
        for c in range(first, last):
            out[c] += kept[tap + 1, c] * weight[tap, c]
    for c in range(first, last):
        out[c] = _silu(out[c])


@internal
def _shift(inputs, kept, first, last):
    """Keep the new input instead of the oldest."""
    newest = kept.shape[0] - 1
    for tap in range(newest):
        for c in range(first, last):
            kept[tap, c] = kept[tap + 1, c]
    for c in range(first, last):
        kept[newest, c] = inputs[c]


@internal
def _softplus(x):
    return x if x > f32(20.0) else f32(np.log1p(np.exp(x)))


@internal
def _gate(y, gate):
    """``y * SiLU(gate)`` in place, and the sum of its squares."""
    squares = f32(0.0)
    for i in range(y.size):
        value = y[i] * _silu(gate[i])
        y[i] = value
        squares += value * value
    return squares


@internal
def _firing(spikes):
    fired = 0
    for i in range(spikes.size):
        fired += spikes[i] != 0
    return fired


@compiled
def call_helper(state):
    """Say that there is work to the helper whose state is at this address; whether there is no helper."""
    return exchange(state, WORK) == GONE


@internal
def _part(m, layer, me, threads):
    """This thread's first part of a layer's outputs, and the one behind its last."""
    parts = m.parts[layer]
    return parts * me // threads, parts * (me + 1) // threads


@internal
def _keep(m, layer, me, threads, local, spikes, sums):
    """Copy a projection's inputs, and this thread's part of its sums."""
    first, last = _part(m, layer, me, threads)
    if me == 0:
        _copy(local.integers, spikes)
    for o in range(first * m.part_outputs[layer], last * m.part_outputs[layer]):
        sums[o] = local.sums[o]


def _lap(kind: Kind) -> Any:
    """A stop-watch of the first thread: what has passed since the last call goes to a part; to none, -1."""
    if not kind.timed:
        return internal(lambda s, me, part: None)

    @internal
    def lap(s, me, part):
        if me == 0:
            now = cycles()
            if part >= 0:
                s.cycles[part] += now - s.token[1]
            s.token[1] = now

    return lap


def _projection(kind: Kind, layout: str, bits: tuple[int, ...], spiking: bool, adds: bool, part: int) -> Any:
    """Norm, neuron or rounding, and one thread's part of a projection; its time goes to the ``part``."""
    run = program_of_either(kind.instructions, layout, bits, not spiking)
    shifted = spiking and kind.shifted
    silent = f32(kind.dead_zone)
    lap = _lap(kind)

    @internal
    def project(s, m, layer, x, weight, shifts, place, scale, most, me, threads, local, sums, out):
        if shifted:
            _shifted_spikes(x, weight, shifts[place], scale, most, silent, local.integers)
        elif spiking:
            _spikes(x, weight, scale, most, silent, local.integers)
        else:
            _rounded(x, weight, scale, local.integers, local.factors)
        lap(s, me, 0)
        first, last = _part(m, layer, me, threads)
        run(
            m.bits[layer],
            m.weights[layer],
            m.group_scales[layer],
            m.row_bytes[layer],
            local.integers[: x.size],
            local.factors,
            first,
            last,
            local.scratch,
            sums,
        )
        factor, bias = m.scale[layer], m.bias[layer]
        for o in range(first * m.part_outputs[layer], last * m.part_outputs[layer]):
            y = f32(sums[o]) * factor[o] + bias[o]
            out[o] = out[o] + y if adds else y
        lap(s, me, part)

    return project


def _mixing(kind: Kind) -> Any:
    """Convolution, scan and gate of one thread's heads."""
    step = recurrence(kind.head_dim, kind.states)
    P, N, groups = kind.head_dim, kind.state_size, kind.groups
    head_bytes = N * kind.head_dim * state_bytes(kind.states)

    @internal
    def mix(w, s, layer, me, threads, local):
        xbc, y, projected = local.xbc, s.y, s.projected
        A, D, dt_bias = w.A[layer], w.D[layer], w.dt_bias[layer]
        heads, channels = A.size, xbc.size
        inner = heads * P
        first, last = heads * me // threads, heads * (me + 1) // threads
        inputs = projected[inner : inner + channels]
        kept, weight, bias = s.conv[layer], w.conv[layer], w.conv_bias[layer]
        _convolve(inputs, kept, weight, bias, first * P, last * P, xbc)
        _convolve(inputs, kept, weight, bias, inner, channels, xbc)  # B and C, which all heads need
        state = s.state.ctypes.data + layer * heads * head_bytes
        for h in range(first, last):
            time = _softplus(projected[inner + channels + h] + dt_bias[h])
            time = min(max(time, w.dt_low), w.dt_high)
            group = inner + (h * groups // heads) * N
            step(
                state + h * head_bytes,
                xbc.ctypes.data + 4 * group,
                xbc.ctypes.data + 4 * (group + groups * N),
                xbc.ctypes.data + 4 * h * P,
                time,
                f32(np.exp(time * A[h])),
                D[h],
                N,
                y.ctypes.data + 4 * h * P,
            )
        for g in range(groups):
            start, stop = max(first, heads // groups * g), min(last, heads // groups * (g + 1))
            own = slice(start * P, max(start, stop) * P)
            s.squares[me, g] = _gate(y[own], projected[own])

    return mix


def _mixer_block(kind: Kind) -> Any:
    """What a block with a mixer adds to the residual stream; one thread's share."""
    input_projection = _projection(kind, kind.layouts[0], kind.bits, kind.spiking, False, 1)
    output_projection = _projection(kind, kind.layouts[1], kind.bits, kind.spiking, True, 3)
    mix, lap = _mixing(kind), _lap(kind)
    groups = kind.groups

    @internal
    def normalise_groups(w, s, x):
        """Divide each group's values by their root mean square; needs all threads' squares."""
        size = x.size // groups
        for g in range(groups):
            squares = f32(0.0)
            for thread in range(s.squares.shape[0]):
                squares += s.squares[thread, g]
            scale = f32(1.0) / np.sqrt(squares / f32(size) + w.eps)
            for i in range(g * size, g * size + size):
                x[i] = s.y[i] * scale

    @internal
    def block(me, threads, layer, x, scale, w, s, local):
        place, d, bar = w.place[layer], x.size, s.barrier.ctypes.data
        channels, inner = local.xbc.size, s.y.size
        input_projection(
            s, w.in_proj, place, x, w.norm[layer], w.shift, layer, scale, w.max_spike_count,
            me, threads, local, local.sums, s.projected,
        )  # fmt: skip
        if me == 0:
            s.fired[0] += _firing(local.integers[:d])
        if s.spikes.size:
            _keep(w.in_proj, place, me, threads, local, s.spikes[layer, :d], s.sums[layer])
        barrier(bar, threads)
        lap(s, me, 0)
        mix(w, s, place, me, threads, local)
        lap(s, me, 2)
        barrier(bar, threads)
        first, last = channels * me // threads, channels * (me + 1) // threads
        _shift(s.projected[inner : inner + channels], s.conv[place], first, last)
        gated = local.gated[:inner]
        normalise_groups(w, s, gated)
        output_projection(
            s, w.out_proj, place, gated, w.gated_norm[place], w.gated_shift, place, f32(1.0),
            w.max_spike_count, me, threads, local, local.sums, s.x,
        )  # fmt: skip
        if me == 0:
            s.fired[1] += _firing(local.integers[:inner])
        if s.spikes.size:
            own = s.sums[layer, s.projected.size :]
            _keep(w.out_proj, place, me, threads, local, s.spikes[layer, d : d + inner], own)

    return block


def _mlp_block(kind: Kind) -> Any:
    """What a block with an MLP adds to the residual stream; one thread's share."""
    input_projection = _projection(kind, kind.layouts[2], kind.bits, kind.spiking, False, 1)
    output_projection = _projection(kind, kind.layouts[3], kind.bits, kind.spiking, True, 3)

    @internal
    def block(me, threads, layer, x, scale, w, s, local):
        place, d, width = -1 - w.place[layer], x.size, w.ones.size
        input_projection(
            s, w.mlp_in, place, x, w.norm[layer], w.shift, layer, scale, w.max_spike_count,
            me, threads, local, local.sums, s.projected,
        )  # fmt: skip
        if me == 0:
            s.fired[2] += _firing(local.integers[:d])
        if s.spikes.size:
            _keep(w.mlp_in, place, me, threads, local, s.spikes[layer, :d], s.sums[layer])
        barrier(s.barrier.ctypes.data, threads)
        gated = local.gated[:width]
        for i in range(width):
            gated[i] = _silu(s.projected[i]) * s.projected[width + i]
        output_projection(
            s, w.mlp_out, place, gated, w.ones, w.mlp_shift, place, f32(1.0), w.max_spike_count,
            me, threads, local, local.sums, s.x,
        )  # fmt: skip
        if me == 0:
            s.fired[3] += _firing(local.integers[:width])
        if s.spikes.size:
            own = s.sums[layer, s.projected.size :]
            _keep(w.mlp_out, place, me, threads, local, s.spikes[layer, d : d + width], own)

    return block


@cache
def token_functions(kind: Kind) -> tuple[Any, Any]:
    """The compiled ``token(me, threads, token, w, s, local)``: thread ``me``'s share of one token.

    And ``serve(me, threads, w, s, local)``: its share of all tokens until none has come for a while.

    ``w`` are :class:`~.cpu_layout.Weights`, ``s`` the :class:`~.cpu_layout.Buffers`, ``local`` this thread's
    :class:`~.cpu_layout.Local`.
    Afterwards ``s.logits`` are the next token's, and the states have moved on.
    """
    head_projection = _projection(kind, "tiles", (kind.head_bits,), False, False, 4)
    mixer = _mixer_block(kind)
    mlps = kind.mlps
    mlp = _mlp_block(kind) if mlps else mixer
    lap = _lap(kind)

    @compiled
    def token(me, threads, token, w, s, local):
        layers, d = w.norm.shape
        bar, x = s.barrier.ctypes.data, s.x[:d]
        if me == 0:
            _copy(w.embeddings[token], x)
        barrier(bar, threads)
        lap(s, me, -1)
        for layer in range(layers):
            scale = f32(1.0) / np.sqrt(_mean_square(x) + w.eps)
            if mlps and w.place[layer] < 0:
                mlp(me, threads, layer, x, scale, w, s, local)
            else:
                mixer(me, threads, layer, x, scale, w, s, local)
            barrier(bar, threads)
        scale = f32(1.0) / np.sqrt(_mean_square(x) + w.eps)
        head_projection(
            s, w.head, 0, x, w.last_norm, w.shift, 0, scale, w.max_spike_count,
            me, threads, local, s.logits, s.logits,
        )  # fmt: skip
        barrier(bar, threads)

    @compiled
    def serve(me, threads, w, s, local):
        state = s.helpers.ctypes.data + 8 * STATE * me
        while wait_for_work(state):
            token(me, threads, s.token[0], w, s, local)

    for function in (token, serve):
        keep_on_disk(function, kind, _SOURCES)
    return token, serve
