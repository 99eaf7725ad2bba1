"""What of an event-driven model compiled tokens have, on processors and on CUDA alike."""

from typing import Any

import torch
from torch import nn

import neurons
from spiking_mamba.model.projection import spike_fed

__all__ = ["cannot_compile", "emits_int8"]

_ROUNDING = (neurons.SignedSpikeCount, neurons.DeadZoneSpikeCount)


def cannot_compile(model: Any) -> str | None:
    """Why a model's tokens cannot be compiled, on whatever device; None where nothing here is in the way."""
    config = model.config
    if (reason := _not_in_float32(model)) is not None:
        return reason
    if config.hidden_act not in ("silu", "swish"):
        return f"Only SiLU is compiled in, not {config.hidden_act!r}."
    if config.layers_block_type is not None and "mamba" not in config.layers_block_type:
        return "A model without a Mamba2 block is not compiled."
    if config.num_heads % config.n_groups:
        return f"{config.n_groups} groups do not divide {config.num_heads} heads."
    return _other_neurons(model)


def _not_in_float32(model: nn.Module) -> str | None:
    tensors = (*model.parameters(), *model.buffers())
    dtypes = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32}
    if not dtypes:
        return None
    return f"Only float32 beside the integers is compiled, and the model was cast to {dtypes.pop()}."


def _other_neurons(model: Any) -> str | None:
    """Compiled code rounds by itself: a node that does anything else must be called."""
    config = model.config
    wanted = config.max_spike_count, config.dead_zone, 1.0, 1.0
    for name, projection in spike_fed(model):
        node = projection.neuron
        surrogate: Any = getattr(node, "surrogate_function", None)
        if node is None and config.neuron is None:
            continue
        if type(node) is not neurons.SILIFNode or type(surrogate) not in _ROUNDING:
            given = type(node).__name__ + ("" if surrogate is None else f" with {type(surrogate).__name__}")
            return f"Only SILIFNode with SignedSpikeCount or DeadZoneSpikeCount is compiled in, not {given}."
        threshold = projection.threshold
        own = node.max_spike_count, getattr(surrogate, "dead_zone", 0.5), node.v_threshold, float(threshold)
        if own != wanted or not surrogate.spiking:
            return f"The neuron of {name} was set by hand and is not the configuration's."
    return None


def emits_int8(projection: Any) -> bool:
    """Whether a projection's spikes are integers of int8 whatever its neuron gets.

    A node or a surrogate of one's own may give anything.
    """
    node = projection.neuron
    surrogate: Any = getattr(node, "surrogate_function", None)
    known = type(node) in (neurons.SILIFNode, neurons.TILIFNode) and type(surrogate) in _ROUNDING
    return known and surrogate.spiking and node.max_spike_count <= 127
