"""Copies of a model for inference: thresholds folded, projections fed by ternary micro-steps."""

import copy

import torch

from neurons.event_linear import EventDrivenLinear
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.projection import reject_wrapped, spike_fed

__all__ = ["fold_thresholds", "spike_driven"]


def spike_driven(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A copy of ``model`` whose projections are fed by ternary micro-steps and sum them.

    Every projection sees, for the same input, exactly the integers of ``model``; its weight only ever
    meets -1, 0 and 1.

    Raises:
        ValueError: the neuron has no signed integer spikes, or the model is event-driven, which multiplies.
    """
    if any(isinstance(p.linear, EventDrivenLinear) for _, p in spike_fed(model)):
        raise ValueError(
            "An event-driven model has integer weights; spike_driven() takes what it was made of."
        )
    config = copy.deepcopy(model.config)
    config.spike_driven = True
    config.__post_init__()
    driven = copy.deepcopy(model)
    driven.config = driven.backbone.config = config
    for _, projection in spike_fed(driven):
        projection.spikes.spike_driven = projection.spikes.neuron is not None
    return driven


@torch.no_grad()
def fold_thresholds(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A copy of ``model`` with every V_th equal to 1.

    1/V_th is folded into the weight before the neuron, of a norm or of an MLP's upper half, and V_th into the
    projection, so that accumulations stay accumulations.

    Exact where V_th is a power of two; else in float32 up to rounding, which may tip a spike that stands
    on a tie.

    Raises:
        ValueError: a projection carries an adapter that is not merged.
    """
    reject_wrapped(model)
    folded = copy.deepcopy(model)
    for block in folded.backbone.blocks:
        for name, projection in spike_fed(block.mixer):
            threshold = projection.spikes.threshold
            block.divide_before(name, threshold)
            projection.weight.mul_(threshold)
            if projection.spikes.level is not None:
                projection.spikes.level.div_(threshold)
            projection.spikes.fix_threshold(1.0)
    folded.config.threshold = 1.0
    folded.config.learn_threshold = False
    return folded
