"""One token of an event-driven model on CUDA."""

from types import ModuleType
from typing import Any, NamedTuple

import torch

from neurons.changes import Seen
from spiking_mamba.model import cache as caches
from spiking_mamba.model.cache import Cache
from spiking_mamba.model.compiled import cannot_compile
from spiking_mamba.model.cuda import kernels
from spiking_mamba.model.cuda.parts import Convolution, Given, Kept, Matrix, Neuron, Scan, Stream, matrix_of
from spiking_mamba.model.mlp import SpikingMambaMLP

__all__ = ["FusedToken", "FusedTokens", "cannot_fuse", "own_cache"]

_LARGEST_ROWS = 32  # channels of a warp in the scan


def cannot_fuse(model: Any) -> str | None:
    """Why a model's tokens cannot go through these kernels, whatever the device; None where they can."""
    config = model.config
    if (reason := cannot_compile(model)) is not None:
        return reason
    part, warps = kernels.scan_parts(config.head_dim, config.num_heads)
    if part // warps > _LARGEST_ROWS:
        return f"Heads of {config.head_dim} channels cannot be divided."
    return None


def own_cache(cache: Cache, states: torch.dtype) -> Cache:
    """A copy of a cache as the kernels want it: contiguous, float32, the scan's states in their dtype."""
    made = caches.copied(cache)
    for layer in caches.linear_layers(made):
        for tensors, dtype in ((layer.conv_states, torch.float32), (layer.recurrent_states, states)):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()
    return made


class _Layer(NamedTuple):
    norm: torch.Tensor
    shifts: tuple[torch.Tensor | None, torch.Tensor | None]  # of in_proj, of out_proj
    in_proj: Matrix
    out_proj: Matrix
    mixer: Any  # None of an MLP


class FusedToken:
    """A model's weights as the kernels take them, and a token made of them.

    They are the model's own tensors, but for weights whose rows allow no wide access, which are copied: make
    it anew when weights change.

    Args:
        model: what :func:`~spiking_mamba.model.event_driven.event_driven` made.
        functions: :mod:`.kernels`, or :mod:`.reference`, which runs anywhere.
        keep: keep the last token's inputs and sums of all projections in :attr:`kept`.

    Raises:
        ValueError: the model has what is not compiled in, see :func:`cannot_fuse`.
    """

    def __init__(self, model: Any, functions: ModuleType = kernels, keep: bool = False) -> None:
        if (reason := cannot_fuse(model)) is not None:
            raise ValueError(reason)
        self._functions, self._keeps = functions, keep
        self._config = model.config
        config = model.config
        self._neuron = None if config.neuron is None else Neuron(config.max_spike_count, config.dead_zone)
        self._table = model.backbone.embeddings.weight
        self._layers = [
            _Layer(
                block.norm.weight,
                (block.mixer.in_spikes.shift, block.mixer.out_spikes.shift),
                matrix_of(block.mixer.in_proj),
                matrix_of(block.mixer.out_proj),
                None if isinstance(block.mixer, SpikingMambaMLP) else block.mixer,
            )
            for block in model.backbone.layers
        ]
        self._last_norm, self._head = model.backbone.norm_f.weight, matrix_of(model.lm_head)
        self.kept: list[Kept] = []

    def _project(self, given: Given, matrix: Matrix, **then: Any) -> tuple[torch.Tensor, Any]:
        kept = None
        if self._keeps:
            rows, inputs = given.x.shape[0], matrix.weight.shape[0]
            of_sums = torch.float32 if self._neuron is None else torch.int32
            kept = Kept(
                given.x.new_zeros(rows, inputs, dtype=torch.int8),
                given.x.new_zeros(rows, matrix.outputs, dtype=of_sums),
            )
            self.kept.append(kept)
        return self._functions.project(given, matrix, self._neuron, **then, kept=kept)

    def __call__(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits ``[B, 1, V]``, float32, of tokens ``[B, 1]`` behind those that a cache has seen.

        The cache is as :func:`own_cache` makes it, and its states move on in place.
        """
        eps = self._config.layer_norm_epsilon
        self.kept = []
        stream = self._functions.embed(input_ids[:, 0].contiguous(), self._table)
        for number, layer in enumerate(self._layers):
            given = Given(stream.x, layer.norm, stream.squares, eps=eps, shift=layer.shifts[0])
            if layer.mixer is None:
                gated = Given(self._project(given, layer.in_proj)[0], shift=layer.shifts[1])
            else:
                gated = self._mix(given, layer, number, cache)
            stream = Stream(*self._project(gated, layer.out_proj, onto=stream.x))
        given = Given(stream.x, self._last_norm, stream.squares, eps=eps)
        return self._functions.project(given, self._head, None)[0][:, None]

    def _mix(self, given: Given, layer: _Layer, number: int, cache: Cache) -> Given:
        """What a mixer's output projection gets."""
        mixer, config = layer.mixer, self._config
        conv = caches.conv_state(cache, number)
        state = caches.scan_state(cache, number)
        assert conv is not None, "the cache has seen no token"
        assert state is not None
        convolution = Convolution(mixer.conv1d.weight, mixer.conv1d.bias, conv, mixer.intermediate_size)
        projected, _ = self._project(given, layer.in_proj, convolution=convolution)
        low, high = config.time_step_limit
        scan = Scan(mixer.dt_bias, mixer.A_log, mixer.D, state, config.n_groups, (low, high))
        y, squares = self._functions.scan(projected, scan)
        eps, shift = config.layer_norm_epsilon, layer.shifts[1]
        return Given(y, mixer.norm.weight, squares, config.n_groups, eps, shift)


class FusedTokens:
    """A model's :class:`FusedToken`, made where it is needed first, and anew when a weight has changed."""

    def __init__(self) -> None:
        self._token: FusedToken | None = None
        self._of: Seen | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedTokens, ()  # a copied or pickled model makes its own

    def __call__(self, model: Any, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """See :class:`FusedToken`."""
        tensors = [*model.parameters(), *model.buffers()]
        if self._token is None or self._of is None or not self._of.unchanged(tensors):
            self._token, self._of = FusedToken(model), Seen(tensors)
        return self._token(input_ids, cache)
