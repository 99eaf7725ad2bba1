"""Decoding an event-driven model on a processor, one compiled call a token."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from neurons.cpu.instructions import INSTRUCTIONS, best
from neurons.cpu.linear import CROSSOVER
from neurons.cpu.memory import Arena, aligned
from neurons.cpu.packing import Packed, pack
from neurons.cpu.programs import Scratch, part_outputs
from neurons.cpu.threads import BARRIER, register_yield
from neurons.event_linear import EventDrivenLinear
from spiking_mamba.model.cpu_recurrence import LANES, state_bytes
from spiking_mamba.model.cpu_token import BLOCK, Buffers, Kind, Local, Matrices, Weights, token_function
from spiking_mamba.model.event_driven import EventDrivenMambaForCausalLM

__all__ = ["CpuDecoder"]

f32 = np.float32


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _stack(tensors: list[torch.Tensor]) -> np.ndarray:
    return np.stack([_array(tensor) for tensor in tensors])


class CpuDecoder:
    """A model laid out for this processor, and one sequence of it.

    Args:
        model: what :func:`~spiking_mamba.model.event_driven.event_driven` made, on the CPU.
        threads: how many work on a token together.
        shares: shares of inputs that fire at input and output projections, by which their layout is chosen;
            None: as a spiking model's are where nothing is known, half.
        keep: keep each token's inputs and sums of all projections in :attr:`spikes` and :attr:`sums`.

    Raises:
        ValueError: the model is on another device, or has what is not compiled in: another activation than
            SiLU, heads that groups do not divide.
    """

    def __init__(
        self,
        model: EventDrivenMambaForCausalLM,
        threads: int = 1,
        shares: tuple[float, float] | None = None,
        keep: bool = False,
        instructions: str | None = None,
    ) -> None:
        config = model.config
        if model.device.type != "cpu":
            raise ValueError(f"The model is on {model.device}: a decoder for processors needs it on the CPU.")
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"Only SiLU is compiled in, not {config.hidden_act!r}.")
        if config.num_heads % config.n_groups:
            raise ValueError(f"{config.n_groups} groups do not divide {config.num_heads} heads.")
        if config.head_dim % LANES:
            raise ValueError(f"Heads must be a multiple of {LANES} channels wide, not {config.head_dim}.")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        register_yield()
        self.config, self.threads = config, threads
        self._kind = self._choose(instructions or best(), shares or (0.5, 0.5))
        self._arena = Arena()
        self._keep: list[np.ndarray] = []  # what addresses point into
        self._weights = self._read(model)
        self._token = token_function(self._kind)
        self._pool = ThreadPoolExecutor(max(1, threads - 1), "decoder")  # starts none before they are needed
        self._make_buffers(keep)

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

    def _read(self, model: EventDrivenMambaForCausalLM) -> Weights:
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
            barrier=aligned(BARRIER, np.int64),
            spikes=np.zeros((layers, d + inner) if keep else (0, 0), np.int8),
            sums=np.zeros((layers, sum(outputs[:2])) if keep else (0, 0), np.int32 if kind.spiking else f32),
        )
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

    def reset(self) -> None:
        """Begin a sequence."""
        self._buffers.conv[:] = 0
        self._buffers.state[:] = 0

    def step(self, token: int) -> np.ndarray:
        """One token; the next one's logits, float32 ``[vocab_size]``, which the next call overwrites."""
        if not 0 <= token < self.config.vocab_size:
            raise ValueError(f"Token {token} lies outside the vocabulary of {self.config.vocab_size}.")
        helpers = [self._pool.submit(self._share, me, token) for me in range(1, self.threads)]
        self._share(0, token)
        for helper in helpers:
            helper.result()
        return self._buffers.logits[: self.config.vocab_size]

    def _share(self, me: int, token: int) -> None:
        self._token(me, self.threads, token, self._weights, self._buffers, self._locals[me])
