"""A model for tests on a GPU."""

import torch

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}


def make(membrane: str = "token", **fields) -> SpikingMambaForCausalLM:
    torch.manual_seed(0)
    leak = {"tau": 2.0} if membrane == "sequence" else {}
    fields.setdefault("neuron", NEURON | {"args": NEURON["args"] | leak})
    config = SpikingMambaConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=64,
        n_groups=1,
        state_size=64,
        chunk_size=64,
        membrane=membrane,
        **{"threshold": 0.5} | fields,
    )
    return SpikingMambaForCausalLM(config).cuda()
