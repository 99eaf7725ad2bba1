"""The cache of a sequence: convolution, scan and neuron states of every layer.

It is transformers' ``DynamicCache``, which ``generate()`` makes, reorders for beams and hands on. Whatever
depends on the release of transformers about it stands here: what a cache is called in arguments and outputs,
and where a layer keeps its states.
"""

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

if TYPE_CHECKING:
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

__all__ = [
    "CACHE_NAMES",
    "GENERATION_NAME",
    "OUTPUT_NAME",
    "Cache",
    "SpikingMambaCausalLMOutput",
    "SpikingMambaOutput",
    "batch_size",
    "conv_state",
    "copied",
    "linear_layers",
    "neuron_states",
    "new_cache",
    "one_cache",
    "scan_state",
    "sizes",
    "takes_any_cache_name",
    "tensors",
    "update_conv_state",
    "update_neuron_states",
    "update_scan_state",
]

# One thing: today's name, that of recurrent models and that of attention before transformers 5.24.
CACHE_NAMES = ("cache", "cache_params", "past_key_values")

# What generate() calls the cache of a recurrent model.
_KNOWS_CACHE = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
GENERATION_NAME = "cache" if _KNOWS_CACHE else "cache_params"

# Where generate() looks for the cache in a model's output.
OUTPUT_NAME = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in CACHE_NAMES)


def _readable_by_any_name(output: type) -> type:
    for name in CACHE_NAMES:
        if name != OUTPUT_NAME:
            setattr(output, name, property(operator.attrgetter(OUTPUT_NAME)))
    return output


@_readable_by_any_name
@dataclass
class SpikingMambaOutput(BaseModelOutputWithPast):
    """What the backbone returns; the cache is its ``cache``, ``cache_params`` and ``past_key_values``.

    Attributes:
        last_hidden_state: ``[B, L, hidden_size]``, behind the last norm.
        hidden_states: the residual stream behind every block, then ``last_hidden_state``, where asked for.
        accumulations: how many the spikes of each token cost, ``sum |s| * out_features`` over all
            projections, with the gradient of the neurons' surrogate; float32 ``[B, L]``, where asked for.
        fetches: how many weights the spikes of each token fetch, ``out_features`` for every count that is
            not zero, with the surrogate's gradient of counts of one; float32 ``[B, L]``, with the other.
    """

    accumulations: torch.Tensor | None = None
    fetches: torch.Tensor | None = None


@_readable_by_any_name
@dataclass
class SpikingMambaCausalLMOutput(CausalLMOutputWithPast):
    """What the language model returns; the cache as in :class:`SpikingMambaOutput`.

    Attributes:
        loss: mean cross-entropy, a scalar, where labels were given.
        logits: ``[B, L, vocab_size]``, float32.
        hidden_states, accumulations, fetches: as in :class:`SpikingMambaOutput`.
    """

    accumulations: torch.Tensor | None = None
    fetches: torch.Tensor | None = None


def one_cache(**named: Cache | None) -> Cache | None:
    """The cache that was passed under one or more of its names.

    Raises:
        TypeError: it is no cache.
        ValueError: the names hold different caches.
    """
    given = {name: cache for name, cache in named.items() if cache is not None}
    for name, cache in given.items():
        if not isinstance(cache, Cache):
            raise TypeError(f"{name} must be a transformers Cache, got {type(cache).__name__}.")
    if len({id(cache) for cache in given.values()}) > 1:
        raise ValueError(f"{' and '.join(given)} are names of one thing, and they hold different caches.")
    return next(iter(given.values()), None)


def takes_any_cache_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function with an argument ``cache`` take it under each of its names, see :func:`one_cache`."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        named = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
        cache = one_cache(**named)
        return forward(*args, **kwargs) if cache is None else forward(*args, cache=cache, **kwargs)

    # generate() looks into signatures for what it may hand on
    others = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in CACHE_NAMES[1:]
    ]
    own = list(inspect.signature(forward).parameters.values())
    rest = own[-1:] if own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    parameters = [*own[: len(own) - len(rest)], *others, *rest]
    renamed.__signature__ = inspect.signature(forward).replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache for a model of this configuration."""
    return DynamicCache(config=config)


def _layer(cache: Cache, layer_idx: int) -> "LinearAttentionCacheLayerMixin":
    # what a configuration whose layers are all of linear attention makes a cache of
    return cast("LinearAttentionCacheLayerMixin", cache.layers[layer_idx])


def linear_layers(cache: Cache) -> "list[LinearAttentionCacheLayerMixin]":
    """The layers of a cache, each with states of convolutions and scans."""
    return [_layer(cache, number) for number in range(len(cache.layers))]


def copied(cache: Cache) -> Cache:
    """A copy that shares no tensor."""
    return copy.deepcopy(cache)


def conv_state(cache: Cache, layer_idx: int) -> torch.Tensor | None:
    """``[B, conv_dim, K]``, the last inputs of a layer's convolution; None before the first token."""
    return cache.get_conv_state(layer_idx)


def update_conv_state(cache: Cache, layer_idx: int, state: torch.Tensor) -> None:
    """Replace the last inputs ``[B, conv_dim, K]`` of a layer's convolution."""
    layer = _layer(cache, layer_idx)
    layer.has_previous_state[0] = False  # or it would be put behind what is there
    cache.update_conv_state(state, layer_idx, conv_kernel_size=state.shape[-1])


def scan_state(cache: Cache, layer_idx: int) -> torch.Tensor | None:
    """``[B, H, P, N]``, the state of a layer's scan; None before the first token."""
    return cache.get_recurrent_state(layer_idx)


def update_scan_state(cache: Cache, layer_idx: int, state: torch.Tensor) -> None:
    """Replace the state of a layer's scan."""
    cache.update_recurrent_state(state, layer_idx)


def neuron_states(cache: Cache, layer_idx: int, slots: range) -> list[torch.Tensor]:
    """A neuron's states ``[B, in_features]``, kept in these slots; an empty list before the first token.

    Slot 0 of a layer holds convolution and scan, see ``SpikingMambaConfig.number_of_conv_states``.
    """
    layer = _layer(cache, layer_idx)
    begun = [slot for slot in slots if layer.has_previous_state[slot]]
    return [cast(torch.Tensor, layer.recurrent_states[slot]) for slot in begun]


def update_neuron_states(cache: Cache, layer_idx: int, slots: range, states: list[torch.Tensor]) -> None:
    """Replace the states of :func:`neuron_states`."""
    layer = _layer(cache, layer_idx)
    for slot, state in zip(slots, states, strict=True):
        layer.update_recurrent_state(state, slot)
        layer.has_previous_state[slot] = True


def tensors(cache: Cache) -> Iterator[tuple[dict[int, torch.Tensor], int]]:
    """Where a cache keeps its tensors: every dictionary and key."""
    for layer_idx in range(len(cache.layers)):
        layer = _layer(cache, layer_idx)
        for states in (layer.conv_states, layer.recurrent_states):
            for key, state in states.items():
                if state is not None:
                    yield cast("dict[int, torch.Tensor]", states), key


def sizes(cache: Cache) -> list[int]:
    """How many states each layer of a cache has room for."""
    return [getattr(layer, "number_of_states", 0) for layer in cache.layers]


def batch_size(cache: Cache) -> int | None:
    """How many sequences a cache holds; None before their first token."""
    return next((states[key].shape[0] for states, key in tensors(cache)), None)
