"""Small models for the tests, and a recorder of their spikes."""

from contextlib import contextmanager

import torch

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM

VOCABULARY = 61
INTEGER = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
DEAD_ZONE = {
    "class": "neurons.SILIFNode",
    "args": {
        "max_spike_count": 4,
        "surrogate_function": {
            "class": "neurons.DeadZoneSpikeCount",
            "args": {"max_spike_count": 4, "dead_zone": 0.75},
        },
    },
}
LEAKY = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4, "tau": 2.0}}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 1,
    "chunk_size": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}


def tiny_config(**fields):
    return SpikingMambaConfig(**SHAPE | fields)


@torch.no_grad()
def shake(model):
    """Move every parameter away from its initial value, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if not name.endswith("log_threshold"):
            scale = 1.0 if "embeddings" in name else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_model(**fields):
    torch.manual_seed(0)
    return shake(SpikingMambaForCausalLM(tiny_config(**fields))).eval()


def tokens(batch, length, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def recorded_spikes(model):
    """All spikes by projection, ``{name: [[B, L, C] of every call]}``."""
    found = {name: [] for name in model.projections()}

    def record(name):
        return lambda encoder, args, output: found[name].append(output.emitted.detach())

    hooks = [p.spikes.register_forward_hook(record(name)) for name, p in model.projections().items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def joined(spikes):
    """``{name: [B, L, C]}`` of recorded calls that continue one another."""
    return {name: torch.cat(calls, dim=1) for name, calls in spikes.items()}


def equal_tokens(one, other):
    """How many leading tokens of each row have the same spikes everywhere, ``[B]``."""
    same = [(one[name] == other[name]).all(-1) for name in one]
    return torch.stack(same).all(0).long().cumprod(-1).sum(-1)
