"""The benchmarks of decoding: their models have the shares of inputs that fire which they say."""

import pytest
import torch
from shares import NEURON, set_shares, shares_for

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.spikes import count_spikes


def test_thresholds_give_the_shares_asked_for():
    torch.manual_seed(0)
    fields = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 32}
    config = SpikingMambaConfig(**fields, n_groups=1, state_size=16, neuron=NEURON)
    model = SpikingMambaForCausalLM(config).eval()
    for shares in ((0.724, 0.406), (0.49, 0.255)):
        set_shares(model, shares)
        with torch.no_grad(), count_spikes(model) as counts:
            model(torch.randint(300, (2, 50)))
        for name, share in zip(("in_proj", "out_proj"), shares, strict=True):
            found = [each.nonzero_share for key, each in counts.projections.items() if name in key]
            assert len(found) == 3
            assert sum(found) / 3 == pytest.approx(share, abs=0.05)


def test_shares_of_weights():
    config = SpikingMambaConfig(hidden_size=2048, num_heads=64, head_dim=64, n_groups=1, state_size=128)
    first, second = 2048 * 8512, 4096 * 2048
    for share in (0.05, 0.42, 0.63, 0.9, 1.0):
        in_proj, out_proj = shares_for(config, share)
        assert 0 < in_proj <= 1
        assert 0 < out_proj <= 1
        assert in_proj * first + out_proj * second == pytest.approx(share * (first + second))
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="at most 1"):
            shares_for(config, share)
