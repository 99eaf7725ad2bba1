"""The benchmark of decoding on a processor: its models have the shares of inputs that fire which it says."""

import cpu_decoding
import pytest
import torch

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.spikes import count_spikes


def test_thresholds_give_the_shares_asked_for():
    torch.manual_seed(0)
    fields = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 32}
    config = SpikingMambaConfig(**fields, n_groups=1, state_size=16, neuron=cpu_decoding.NEURON)
    model = SpikingMambaForCausalLM(config).eval()
    for shares in ((0.724, 0.406), (0.49, 0.255)):
        cpu_decoding.set_shares(model, shares)
        with torch.no_grad(), count_spikes(model) as counts:
            model(torch.randint(300, (2, 50)))
        for name, share in zip(("in_proj", "out_proj"), shares, strict=True):
            found = [each.nonzero_share for key, each in counts.projections.items() if name in key]
            assert len(found) == 3
            assert sum(found) / 3 == pytest.approx(share, abs=0.05)
