"""Thresholds with which a given share of inputs fires, as every benchmark of decoding sets them."""

from collections.abc import Callable

import torch

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.model.modes import hooked
from spiking_mamba.model.projection import SpikeEncoder

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 64}}
QUICKSTART = (0.724, 0.406)  # of inputs that fire in the quickstart's student, in_proj and out_proj


def projection_sizes(config: SpikingMambaConfig) -> list[tuple[int, int]]:
    """``(in, out)`` of both projections of a mixer."""
    inner = config.expand * config.hidden_size
    wide = 2 * inner + 2 * config.n_groups * config.state_size + config.num_heads
    return [(config.hidden_size, wide), (inner, config.hidden_size)]


def shares_for(config: SpikingMambaConfig, share: float) -> tuple[float, float]:
    """Shares of inputs that fire, in_proj and out_proj, for a share of all weights that they fetch.

    They are to one another as in the quickstart's student, unless in_proj would have more than all.
    """
    if not 0 < share <= 1:
        raise ValueError(f"A share must lie above 0 and be at most 1, got {share}.")
    first, second = (inputs * outputs for inputs, outputs in projection_sizes(config))
    factor = share * (first + second) / (first * QUICKSTART[0] + second * QUICKSTART[1])
    in_proj = min(1.0, factor * QUICKSTART[0])
    return in_proj, min(1.0, (share * (first + second) - in_proj * first) / second)


@torch.no_grad()
def set_shares(model: SpikingMambaForCausalLM, shares: tuple[float, float]) -> None:
    """Set every V_th so that about this share of a projection's inputs fires, layer after layer."""

    def threshold(share: float) -> Callable:
        def set_it(encoder: SpikeEncoder, args: tuple) -> None:
            size = args[0].abs().flatten().float()
            # half a quantum does not fire
            smallest = size.kthvalue(max(1, round((1 - share) * size.numel()))).values
            encoder.fix_threshold(max(2 * float(smallest), 1e-30))  # all fire where none is 0

        return set_it

    hooks = [
        getattr(block.mixer, block.mixer.encoders[name]).register_forward_pre_hook(threshold(share))
        for block in model.backbone.layers
        for name, share in zip(("in_proj", "out_proj"), shares, strict=True)
    ]
    with hooked(hooks):
        model(torch.randint(model.config.vocab_size, (1, 64)).to(model.device))
