"""What was set by hand in a model's projections, as its configuration says it."""

import re
from typing import Any

from torch import nn

import neurons
from spiking_mamba.model.configuration import PROJECTIONS, SpikingMambaConfig
from spiking_mamba.model.projection import SpikeEncoder
from spiking_mamba.model.spike_fed import SpikeFed

__all__ = ["set_by_hand"]


def set_by_hand(model: nn.Module, config: SpikingMambaConfig) -> dict[str, Any]:
    """The fields of a configuration in which a model's projections are other than it says.

    Those are ``neuron``, ``threshold`` and ``learn_threshold``, of neurons that were swapped and of V_th that
    was set or fixed.

    Raises:
        ValueError: the projections have different neurons, for which the configuration has one place, or
            none where thresholds are learned or inputs shifted; some thresholds are learned, others not.
        TypeError: the neuron cannot be described, see ``neurons.spec_of``.
    """
    encoders = [module for module in model.modules() if isinstance(module, SpikeEncoder)]
    if not encoders:
        return {}
    found = _neuron(encoders, config)
    spec = found.get("neuron", config.neuron)
    return found if spec is None else found | _thresholds(model, encoders, config)


def _neuron(encoders: list[SpikeEncoder], config: SpikingMambaConfig) -> dict[str, Any]:
    nodes = [encoder.neuron for encoder in encoders]
    own = None if config.neuron is None else neurons.build(config.neuron)
    if any(type(node) is not type(nodes[0]) or not _same(node, nodes[0]) for node in nodes):
        raise ValueError("The projections have different neurons; a configuration holds one for all.")
    if nodes[0] is None and (config.learn_threshold or config.shift_inputs):
        raise ValueError("Its neurons are gone, but learn_threshold and shift_inputs need them.")
    if type(nodes[0]) is type(own) and _same(nodes[0], own):
        return {}
    return {"neuron": None if nodes[0] is None else neurons.spec_of(nodes[0])}


def _same(one: nn.Module | None, other: nn.Module | None) -> bool:
    """Whether two nodes are alike, but for the step mode and the backend they are in at the moment."""
    if one is not None and any(True for _ in one.parameters()):
        return True  # what such a node prints moves as it is trained; its class is compared elsewhere
    texts = [re.sub(r"(step_mode|backend)=\w+", "", repr(node)) for node in (one, other)]
    return texts[0] == texts[1]


def _thresholds(model: nn.Module, encoders: list[SpikeEncoder], config: SpikingMambaConfig) -> dict[str, Any]:
    learned = {encoder.log_threshold is not None for encoder in encoders}
    if len(learned) > 1:
        raise ValueError("Some projections learn V_th and others do not; a configuration says it of all.")
    if learned == {True}:
        return {}  # they are among the weights
    layers: list[dict[str, float]] = [{} for _ in range(config.num_hidden_layers)]
    for module in model.modules():
        if isinstance(module, SpikeFed):
            for name in PROJECTIONS:
                threshold = getattr(module, module.encoders[name]).threshold
                layers[module.layer_idx][name] = float(threshold)
    found = {"learn_threshold": False} if config.learn_threshold else {}
    if layers == [config.layer_threshold(k) for k in range(config.num_hidden_layers)]:
        return found
    return found | {"threshold": layers}
