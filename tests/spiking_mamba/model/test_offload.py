"""Models whose weights lie on disk or elsewhere until a module is called, by accelerate's hooks."""

import copy

import accelerate
import pytest
import torch
from spikingjelly.activation_based import functional
from transformers import AutoModelForCausalLM

from spiking_mamba.spikes import count_spikes
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model, tokens

MODELS = {
    "dense": {"use_bias": True},
    "spiking": {"neuron": INTEGER, "threshold": 0.3, "use_bias": True},
    "learned": {"neuron": INTEGER, "learn_threshold": True, "use_bias": True},
    "sequence": {"neuron": LEAKY, "membrane": "sequence"},
    "tied": {"neuron": INTEGER, "tie_word_embeddings": True},
}
MLPS = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mlp", "mamba"], "intermediate_size": 48}
ON_DISK = {"backbone.embeddings": "cpu", "backbone.layers.0": "cpu", "lm_head": "cpu"} | dict.fromkeys(
    ["backbone.layers.1", "backbone.layers.2", "backbone.norm_f", "backbone.stream"], "disk"
)
IDS = tokens(2, 12)


def same(offloaded, model):
    """Whether two models give the same logits, text, stream and spike counts."""
    found, counted = [], []
    for each in (offloaded, model):
        with torch.no_grad(), count_spikes(each) as counts:
            logits = each(IDS).logits
        counted.append((counts.accumulations, counts.dense_macs))
        text = each.generate(IDS[:, :5], max_new_tokens=5, do_sample=False)
        functional.set_step_mode(each, "s")
        with torch.no_grad():
            stream = torch.cat([each(token).logits for token in IDS.split([6, 1, 1, 4], dim=1)], dim=1)
        functional.reset_net(each)
        functional.set_step_mode(each, "m")
        found.append((logits, text, stream))
    assert counted[0] == counted[1]
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_on_disk(fields, tmp_path):
    model = tiny_model(**fields, **MLPS)
    model.save_pretrained(tmp_path / "model")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for choice in ({"device_map": ON_DISK}, {"device_map": "auto", "max_memory": {"cpu": weights // 2}}):
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", offload_folder=tmp_path / "offload", **choice
        )
        places = {parameter.device.type for parameter in offloaded.parameters()}
        assert places == {"cpu", "meta"}
        assert same(offloaded, model)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_in_memory_beside_the_device(fields):
    model = tiny_model(**fields, **MLPS)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    assert same(offloaded, model)
