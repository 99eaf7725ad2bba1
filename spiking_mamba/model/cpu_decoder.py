"""Decoding an event-driven model on a processor, one compiled call a token."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from neurons.cpu.instructions import best, runs_here
from neurons.cpu.linear import layout_for
from neurons.cpu.memory import Arena
from neurons.cpu.threads import STATE, register_yield
from neurons.event_linear import EventDrivenLinear
from spiking_mamba.model import cache as caches
from spiking_mamba.model.cache import Cache
from spiking_mamba.model.compiled import cannot_compile
from spiking_mamba.model.cpu_layout import BLOCK, PARTS, Kind, Matrices, new_buffers, read
from spiking_mamba.model.cpu_recurrence import LANES
from spiking_mamba.model.cpu_token import call_helper, token_functions
from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["CpuDecoder", "Fetched", "cannot_decode"]

Shares = tuple[float, float] | tuple[float, float, float, float]
_BITS = {"int8": 8, "int4": 4}


class Fetched(NamedTuple):
    """Bytes that a token reads from memory, of weights as they lie there, each once.

    Attributes:
        in_proj, out_proj: of inputs that fire, of mixers and of MLP blocks.
        projections: of both, were all their inputs to fire.
        head: of the weights behind the last norm.
        states: of convolutions and scans, read; they are written too.
        rest: of the convolutions' weights, norms, scales and an embedding.
    """

    in_proj: float
    out_proj: float
    projections: int
    head: int
    states: int
    rest: int

    @property
    def share(self) -> float:
        """Of the projections' bytes, how many were fetched."""
        return (self.in_proj + self.out_proj) / self.projections

    @property
    def total(self) -> float:
        """All bytes of a token."""
        return self.in_proj + self.out_proj + self.head + self.states + self.rest


def _bytes(m: Matrices, inputs: int) -> tuple[np.ndarray, int]:
    """Of each layer's matrix the bytes of an input's weights, and of all of them those of groups' scales."""
    outputs = m.parts * m.part_outputs
    return outputs * m.bits // 8, int(-(-inputs // BLOCK) * outputs[m.bits == 4].sum())


def cannot_decode(model: SpikingMambaForCausalLM) -> str | None:
    """Why no decoder can be made of an event-driven model; None where one can."""
    config = model.config
    if model.device.type != "cpu":
        return f"The model is on {model.device}: a decoder for processors needs it on the CPU."
    if (reason := cannot_compile(model)) is not None:
        return reason
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
        shares: shares of inputs that fire at input and output projections, perhaps at those of MLP blocks
            too, by which their layout is chosen; None: as a spiking model's are where nothing is known, half.
        keep: keep each token's inputs and sums of all projections in :attr:`spikes` and :attr:`sums`.
        instructions: a name of :data:`neurons.cpu.instructions.INSTRUCTIONS`; None: the best there are.
        timed: measure what each part of a token takes, see :meth:`parts`; on x86 alone.

    Raises:
        ValueError: the model is on another device, or has what is not compiled in, see
            :func:`cannot_decode`; this processor lacks the instructions.
    """

    def __init__(
        self,
        model: SpikingMambaForCausalLM,
        threads: int = 1,
        shares: Shares | None = None,
        keep: bool = False,
        instructions: str | None = None,
        timed: bool = False,
    ) -> None:
        if (reason := cannot_decode(model)) is not None:
            raise ValueError(reason)
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        if instructions is not None and not runs_here(instructions):
            raise ValueError(f"This processor does not have the instructions {instructions!r}.")
        self.config, self.threads = model.config, threads
        layers = [layer for layer in model.backbone.modules() if isinstance(layer, EventDrivenLinear)]
        self._bits = tuple(sorted({_BITS[layer.weights] for layer in layers}))
        self._head_bits = _BITS[model.lm_head.weights]
        register_yield()
        self._kind = self._choose(instructions or best(), shares or (0.5, 0.5))
        self._kind = self._kind._replace(timed=timed)
        self._arena = Arena()
        self._weights, self._alive = read(model, self._kind, self._arena)
        self._token, self._serve = token_functions(self._kind)
        self._make_buffers(keep)

    def another(self) -> "CpuDecoder":
        """A decoder for another sequence, of the same weights in memory."""
        made = copy.copy(self)
        made._arena = Arena()
        made._make_buffers(self._buffers.spikes.size > 0)
        return made

    def suits(self, shares: Shares) -> bool:
        """Whether its layouts are the fastest where these shares of inputs fire."""
        return self._choose(self._kind.instructions, shares).layouts == self._kind.layouts

    def _choose(self, instructions: str, shares: Shares) -> Kind:
        config = self.config
        spiking = config.neuron is not None
        four = shares if len(shares) == 4 else shares * 2
        bits = _BITS[config.weights]  # as most layers have them
        layouts = tuple(layout_for(share, bits, instructions) if spiking else "tiles" for share in four)
        return Kind(
            instructions=instructions,
            bits=self._bits,
            head_bits=self._head_bits,
            spiking=spiking,
            shifted=spiking and config.shift_inputs,
            dead_zone=config.dead_zone,
            layouts=layouts,  # type: ignore[arg-type]
            mlps=config.layers_block_type is not None and "mlp" in config.layers_block_type,
            states=config.states,
            head_dim=config.head_dim,
            state_size=config.state_size,
            groups=config.n_groups,
            taps=config.conv_kernel,
        )

    def _make_buffers(self, keep: bool) -> None:
        self._buffers, self._locals = new_buffers(
            self._weights, self._kind, self.config.num_heads, self.threads, keep, self._arena
        )
        self.tokens = 0
        # starts none before they are needed
        self._pool = ThreadPoolExecutor(max(1, self.threads - 1), "decoder")

    @property
    def spikes(self) -> np.ndarray:
        """The last token's inputs of both projections of every block, int8 ``[L, d + I]``, where kept.

        I of the wider kind of block.
        """
        return self._buffers.spikes

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The last token's sums of input and output projections, ``[L, outputs]`` each, where kept."""
        split = self._buffers.projected.size
        return self._buffers.sums[:, :split], self._buffers.sums[:, split:]

    @property
    def fired(self) -> np.ndarray:
        """Inputs that have fired so far, int64 ``[4]``.

        Of input and output projections, of all mixers, then of all MLP blocks.
        """
        return self._buffers.fired

    def _projections(self) -> list[tuple[Any, int]]:
        """The matrices in the order of :attr:`fired`, and how many inputs each of theirs has."""
        w = self._weights
        d, inner, width = w.norm.shape[1], w.gated_norm.shape[1], w.ones.size
        return [(w.in_proj, d), (w.out_proj, inner), (w.mlp_in, d), (w.mlp_out, width)]

    def fetched(self, fired: np.ndarray | None = None) -> Fetched:
        """What a token reads of which so many inputs fire, ``[4]``; None: as in the tokens so far.

        Where some layers are int8 and others int4, as if as many inputs fired at each.
        """
        w = self._weights
        if fired is None:
            fired = self.fired / max(1, self.tokens)
        whole, read = [], []
        for (m, inputs), layout, fires in zip(self._projections(), self._kind.layouts, fired, strict=True):
            row, scales = _bytes(m, inputs)
            rows = inputs * row.sum() if layout == "tiles" else float(fires) * row.sum() / max(1, len(row))
            whole.append(int(inputs * row.sum() + scales))
            read.append(float(rows + scales))
        d = w.norm.shape[1]
        row, scales = _bytes(w.head, d)
        head = int(d * row.sum() + scales)
        small = w.norm, w.conv, w.conv_bias, w.dt_bias, w.A, w.D, w.gated_norm, w.last_norm, w.embeddings[0]
        matrices = [m for m, _ in self._projections()] + [w.head]
        states = self._buffers.conv.nbytes + self._buffers.state.nbytes
        rest = sum(array.nbytes for array in small)
        rest += sum(m.scale.nbytes + m.bias.nbytes for m in matrices)
        return Fetched(read[0] + read[2], read[1] + read[3], sum(whole), head, states, rest)

    def parts(self) -> dict[str, float]:
        """What each part has taken of the time so far, as shares of 1, where timed; by the first thread."""
        cycles = self._buffers.cycles
        return dict(zip(PARTS, (cycles / max(1, cycles.sum())).tolist(), strict=True))

    def firing(self) -> tuple[float, float, float, float]:
        """Shares of inputs that have fired since this was made, in the order of :attr:`fired`; 0 of none."""
        inputs = [max(1, len(m.scale) * each * self.tokens) for m, each in self._projections()]
        one, two, three, four = (float(x) for x in self.fired / np.array(inputs))
        return one, two, three, four

    def reset(self) -> None:
        """Begin a sequence."""
        self._buffers.conv[:] = 0
        self._buffers.state[:] = 0

    def load(self, cache: Cache) -> None:
        """Go on behind the tokens that a cache of one sequence has seen."""
        for place, layer in enumerate(self._mixers()):
            conv, state = caches.conv_state(cache, layer), caches.scan_state(cache, layer)
            self._buffers.conv[place] = conv[0].t().float().numpy()  # type: ignore[index]
            self._states(place)[:] = state[0].transpose(1, 2)  # type: ignore[index]

    def save(self, cache: Cache) -> None:
        """Put the states behind the last token into a cache of one sequence."""
        for place, layer in enumerate(self._mixers()):
            conv = torch.from_numpy(self._buffers.conv[place].copy()).t()[None]
            caches.update_conv_state(cache, layer, conv)
            caches.update_scan_state(cache, layer, self._states(place).transpose(1, 2).float()[None])

    def _mixers(self) -> list[int]:
        """The numbers of the layers with a mixer."""
        return [i for i, place in enumerate(self._weights.place) if place >= 0]

    def _states(self, place: int) -> torch.Tensor:
        """A mixer's states ``[H, N, P]``, a view."""
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self._kind.states]
        states = torch.from_numpy(self._buffers.state[place]).view(dtype)
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
