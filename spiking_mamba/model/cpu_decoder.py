"""Decoding an event-driven model on a processor, one compiled call a token."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from neurons.cpu.instructions import INSTRUCTIONS, best, runs_here
from neurons.cpu.linear import CROSSOVER
from neurons.cpu.memory import Arena, aligned
from neurons.cpu.packing import Packed, pack
from neurons.cpu.programs import Scratch, part_outputs
from neurons.cpu.threads import BARRIER, GONE, STATE, register_yield
from neurons.event_linear import EventDrivenLinear
from spiking_mamba.model import cache as caches
from spiking_mamba.model.cache import Cache
from spiking_mamba.model.cpu_recurrence import LANES, state_bytes
from spiking_mamba.model.cpu_token import (
    BLOCK,
    Buffers,
    Kind,
    Local,
    Matrices,
    Weights,
    call_helper,
    token_functions,
)
from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["CpuDecoder", "Fetched", "cannot_decode"]

f32 = np.float32


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _stack(tensors: list[torch.Tensor]) -> np.ndarray:
    return np.stack([_array(tensor) for tensor in tensors])


class Fetched(NamedTuple):
    """Bytes that a token reads from memory, of weights as they lie there, each once.

    Attributes:
        in_proj, out_proj: of the inputs that fired, a mean over the tokens so far.
        projections: of both, were all their inputs to fire.
        head: of the weights behind the last norm.
        rest: of states, which are written too, convolutions, norms and an embedding.
    """

    in_proj: float
    out_proj: float
    projections: int
    head: int
    rest: int

    @property
    def share(self) -> float:
        """Of the projections' bytes, how many were fetched."""
        return (self.in_proj + self.out_proj) / self.projections

    @property
    def total(self) -> float:
        """All bytes of a token."""
        return self.in_proj + self.out_proj + self.head + self.rest


def cannot_decode(model: SpikingMambaForCausalLM) -> str | None:
    """Why no decoder can be made of an event-driven model; None where one can."""
    config = model.config
    if model.device.type != "cpu":
        return f"The model is on {model.device}: a decoder for processors needs it on the CPU."
    if config.hidden_act not in ("silu", "swish"):
        return f"Only SiLU is compiled in, not {config.hidden_act!r}."
    if config.num_heads % config.n_groups:
        return f"{config.n_groups} groups do not divide {config.num_heads} heads."
    if config.head_dim % LANES:
        return f"Heads must be a multiple of {LANES} channels wide, not {config.head_dim}."
    return None


class CpuDecoder:
    """A model laid out for this processor, and one sequence of it.

    A decoder belongs to one caller at a time; :meth:`another` shares its weights.

    Attributes:
        tokens: how many it has decoded, of any sequence.

    Args:
        model: what :func:`~spiking_mamba.model.event_driven.event_driven` made, on the CPU.
        threads: how many work on a token together; more than there are cores take turns.
        shares: shares of inputs that fire at input and output projections, by which their layout is chosen;
            None: as a spiking model's are where nothing is known, half.
        keep: keep each token's inputs and sums of all projections in :attr:`spikes` and :attr:`sums`.
        instructions: a name of :data:`neurons.cpu.instructions.INSTRUCTIONS`; None: the best there are.

    Raises:
        ValueError: the model is on another device, or has what is not compiled in, see
            :func:`cannot_decode`; this processor lacks the instructions.
    """

    def __init__(
        self,
        model: SpikingMambaForCausalLM,
        threads: int = 1,
        shares: tuple[float, float] | None = None,
        keep: bool = False,
        instructions: str | None = None,
    ) -> None:
        if (reason := cannot_decode(model)) is not None:
            raise ValueError(reason)
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        if instructions is not None and not runs_here(instructions):
            raise ValueError(f"This processor does not have the instructions {instructions!r}.")
        self.config, self.threads = model.config, threads
        register_yield()
        self._kind = self._choose(instructions or best(), shares or (0.5, 0.5))
        self._arena = Arena()
        self._keep: list[np.ndarray] = []  # what addresses point into
        self._weights = self._read(model)
        self._token, self._serve = token_functions(self._kind)
        self._make_buffers(keep)

    def another(self) -> "CpuDecoder":
        """A decoder for another sequence, of the same weights in memory."""
        made = copy.copy(self)
        made._arena = Arena()
        made._make_buffers(self._buffers.spikes.size > 0)
        return made

    def _choose(self, instructions: str, shares: tuple[float, float]) -> Kind:
        config = self.config
        spiking = config.neuron is not None
        layouts = tuple("rows" if spiking and share < CROSSOVER else "tiles" for share in shares)
        return Kind(
            instructions=instructions,
            bits={"int8": 8, "int4": 4}[config.weights],
            spiking=spiking,
            layouts=layouts,  # type: ignore[arg-type]
            states=config.states,
            head_dim=config.head_dim,
            state_size=config.state_size,
            groups=config.n_groups,
            taps=config.conv_kernel,
        )

    def _read(self, model: SpikingMambaForCausalLM) -> Weights:
        config, blocks = self.config, list(model.backbone.layers)
        mixers: list[Any] = [block.mixer for block in blocks]
        channels = mixers[0].conv_dim
        none = torch.zeros(channels)
        low, high = config.time_step_limit
        stack = lambda tensors: self._arena.copy(_stack(tensors))  # noqa: E731
        return Weights(
            embeddings=_array(model.backbone.embeddings.weight),
            norm=stack([block.norm.weight for block in blocks]),
            in_proj=self._matrices([mixer.in_proj for mixer in mixers], self._kind.layouts[0]),
            conv=stack([mixer.conv1d.weight[:, 0].t() for mixer in mixers]),
            conv_bias=stack([none if m.conv1d.bias is None else m.conv1d.bias for m in mixers]),
            dt_bias=stack([mixer.dt_bias for mixer in mixers]),
            A=stack([-torch.exp(mixer.A_log.float()) for mixer in mixers]),
            D=stack([mixer.D for mixer in mixers]),
            gated_norm=stack([mixer.norm.weight for mixer in mixers]),
            out_proj=self._matrices([mixer.out_proj for mixer in mixers], self._kind.layouts[1]),
            last_norm=self._arena.copy(_array(model.backbone.norm_f.weight)),
            head=self._matrices([model.lm_head], "tiles"),
            eps=f32(config.layer_norm_epsilon),
            max_spike_count=f32(config.max_spike_count or 0),
            dt_low=f32(low),
            dt_high=f32(min(high, np.finfo(f32).max)),  # compiled code knows no infinity
        )

    def _matrices(self, layers: list[EventDrivenLinear], layout: str) -> Matrices:
        packed = [self._pack(layer, layout) for layer in layers]
        one = packed[0]
        scale, bias = self._arena.copy(np.zeros((2, len(layers), one.outputs), f32))
        for i, layer in enumerate(layers):
            scale[i, : one.out_features] = layer.scale.numpy()
            if layer.bias is not None:
                bias[i, : one.out_features] = layer.bias.numpy()
        outputs = part_outputs(self._kind.instructions, layout, one.bits)
        return Matrices(
            weights=np.array([p.weights.ctypes.data for p in packed], np.int64),
            group_scales=np.array([p.group_scales.ctypes.data for p in packed], np.int64),
            row_bytes=one.row_bytes,
            parts=one.outputs // outputs,
            part_outputs=outputs,
            scale=scale,
            bias=bias,
        )

    def _pack(self, layer: EventDrivenLinear, layout: str) -> Packed:
        kind = INSTRUCTIONS[self._kind.instructions]
        if layer.group_scale is None:
            packed = pack(layer.weight.numpy(), None, kind, layout, self._arena.take)
        else:
            packed = pack(
                layer.four_bit_integers().numpy(),
                layer.group_scale.numpy(),
                kind,
                layout,
                self._arena.take,
            )
        self._keep += [packed.weights, packed.group_scales]
        return packed

    def _make_buffers(self, keep: bool) -> None:
        w, config, kind = self._weights, self.config, self._kind
        layers, d = w.norm.shape
        inner, channels = w.gated_norm.shape[1], w.conv.shape[2]
        head = config.state_size * kind.head_dim * state_bytes(kind.states)
        outputs = [m.scale.shape[1] for m in (w.in_proj, w.out_proj, w.head)]
        widest = -(-max(d, inner) // BLOCK) * BLOCK
        self._buffers = Buffers(
            conv=self._arena.copy(np.zeros(w.conv.shape, f32)),
            state=self._arena.take(layers * config.num_heads * head).reshape(layers, config.num_heads, head),
            x=aligned(max(outputs[1], d), f32),
            projected=aligned(outputs[0], f32),
            y=aligned(inner, f32),
            squares=np.zeros((self.threads, config.n_groups), f32),
            logits=aligned(outputs[2], f32),
            token=np.zeros(1, np.int64),
            barrier=aligned(BARRIER, np.int64),
            helpers=aligned(self.threads * STATE, np.int64).reshape(self.threads, STATE),
            fired=np.zeros(2, np.int64),
            spikes=np.zeros((layers, d + inner) if keep else (0, 0), np.int8),
            sums=np.zeros((layers, sum(outputs[:2])) if keep else (0, 0), np.int32 if kind.spiking else f32),
        )
        self._buffers.helpers[:] = GONE
        self.tokens = 0
        # starts none before they are needed
        self._pool = ThreadPoolExecutor(max(1, self.threads - 1), "decoder")
        self._locals = [
            Local(
                scratch=Scratch(widest).arrays,
                integers=aligned(widest, np.int8),
                factors=aligned(widest // BLOCK, f32),
                sums=aligned(max(outputs[:2]), np.int32 if kind.spiking else f32),
                xbc=aligned(channels, f32),
                gated=aligned(inner, f32),
            )
            for _ in range(self.threads)
        ]

    @property
    def spikes(self) -> np.ndarray:
        """The last token's inputs of both projections of every layer, int8 ``[L, d + I]``, where kept."""
        return self._buffers.spikes

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The last token's sums of input and output projections, ``[L, outputs]`` each, where kept."""
        split = self._weights.in_proj.scale.shape[1]
        return self._buffers.sums[:, :split], self._buffers.sums[:, split:]

    @property
    def fired(self) -> np.ndarray:
        """Inputs of input and output projections, of all layers, that have fired so far, int64 ``[2]``."""
        return self._buffers.fired

    def fetched(self, fired: np.ndarray | None = None) -> Fetched:
        """What a token reads of which so many inputs fire, ``[2]``; None: as in the tokens so far."""
        w, kind = self._weights, self._kind
        if fired is None:
            fired = self.fired / max(1, self.tokens)
        layers = len(w.norm)
        matrices = (w.in_proj, self.config.hidden_size), (w.out_proj, w.gated_norm.shape[1])
        sizes, read = [], []
        for (m, inputs), layout, fires in zip(matrices, kind.layouts, fired, strict=True):
            bits = kind.bits * m.scale.shape[1]
            scales = layers * -(-inputs // BLOCK) * m.scale.shape[1] if kind.bits == 4 else 0
            rows = layers * inputs if layout == "tiles" else fires
            sizes.append(layers * inputs * bits // 8 + scales)
            read.append(rows * bits / 8 + scales)
        head = self.config.hidden_size * w.head.scale.shape[1] * kind.bits // 8
        head += -(-self.config.hidden_size // BLOCK) * w.head.scale.shape[1] if kind.bits == 4 else 0
        small = w.norm, w.conv, w.conv_bias, w.dt_bias, w.A, w.D, w.gated_norm, w.last_norm
        states = self._buffers.conv.nbytes + self._buffers.state.nbytes
        scales = sum(m.scale.nbytes + m.bias.nbytes for m in (w.in_proj, w.out_proj, w.head))
        rest = states + scales + sum(array.nbytes for array in small) + w.embeddings[0].nbytes
        return Fetched(read[0], read[1], sum(sizes), head, rest)

    def firing(self) -> tuple[float, float]:
        """Shares of inputs of input and output projections that have fired since this was made."""
        w = self._weights
        inputs = max(1, self.tokens) * len(w.norm) * np.array([w.norm.shape[1], w.gated_norm.shape[1]])
        of_input, of_output = self._buffers.fired / inputs
        return float(of_input), float(of_output)

    def reset(self) -> None:
        """Begin a sequence."""
        self._buffers.conv[:] = 0
        self._buffers.state[:] = 0

    def load(self, cache: Cache) -> None:
        """Go on behind the tokens that a cache of one sequence has seen."""
        for layer in range(self.config.num_hidden_layers):
            conv, state = caches.conv_state(cache, layer), caches.scan_state(cache, layer)
            self._buffers.conv[layer] = conv[0].t().float().numpy()  # type: ignore[index]
            self._states(layer)[:] = state[0].transpose(1, 2)  # type: ignore[index]

    def save(self, cache: Cache) -> None:
        """Put the states behind the last token into a cache of one sequence."""
        for layer in range(self.config.num_hidden_layers):
            conv = torch.from_numpy(self._buffers.conv[layer].copy()).t()[None]
            caches.update_conv_state(cache, layer, conv)
            caches.update_scan_state(cache, layer, self._states(layer).transpose(1, 2).float()[None])

    def _states(self, layer: int) -> torch.Tensor:
        """A layer's states ``[H, N, P]``, a view."""
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self._kind.states]
        states = torch.from_numpy(self._buffers.state[layer]).view(dtype)
        return states.view(len(states), self._kind.state_size, self._kind.head_dim)

    def step(self, token: int) -> np.ndarray:
        """One token; the next one's logits, float32 ``[vocab_size]``, which the next call overwrites."""
        if not 0 <= token < self.config.vocab_size:
            raise ValueError(f"Token {token} lies outside the vocabulary of {self.config.vocab_size}.")
        w, buffers = self._weights, self._buffers
        if self.threads > 1:
            buffers.token[0] = token
            for me in range(1, self.threads):
                if call_helper(buffers.helpers.ctypes.data + 8 * STATE * me):
                    self._pool.submit(self._serve, me, self.threads, w, buffers, self._locals[me])
        self._token(0, self.threads, token, w, buffers, self._locals[0])
        self.tokens += 1
        return buffers.logits[: self.config.vocab_size]
