"""What stands around linear layers: names in checkpoints, accumulations, layers that were wrapped."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

import neurons
from spiking_mamba import SpikingMambaForCausalLM, SpikingProjection, event_driven, spike_driven
from spiking_mamba.model.projection import SpikeEncoder, spike_fed
from tests.helpers.checkpoints import state_spaces_folder
from tests.helpers.tiny import INTEGER, recorded_spikes, tiny_model, tokens


def first_form(weights):
    """Names of checkpoints in which neuron and threshold belonged to the linear layer."""
    parts = ("in", "in_proj"), ("out", "out_proj")
    renamed = {}
    for name, weight in weights.items():
        for short, linear in parts:
            name = name.replace(f".{short}_spikes.", f".{linear}.")
        renamed[name] = weight
    return renamed


def test_checkpoints_of_the_first_form(tmp_path):
    model = tiny_model(neuron=INTEGER, threshold=0.3, learn_threshold=True).eval()
    ids = tokens(2, 9)
    model.save_pretrained(tmp_path)
    own = load_file(tmp_path / "model.safetensors")
    old = first_form(own)
    assert "backbone.layers.0.mixer.in_proj.log_threshold" in old
    assert old.keys() != own.keys()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = SpikingMambaForCausalLM.from_pretrained(tmp_path).eval()
    fresh = tiny_model(neuron=INTEGER, threshold=0.7, learn_threshold=True).eval()
    fresh.load_state_dict(first_form(model.state_dict()))
    with torch.no_grad():
        for other in (loaded, fresh):
            assert torch.equal(other(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == own.keys()


def test_parameters_are_those_of_mamba2():
    names = {name for name, _ in tiny_model(neuron=INTEGER).named_parameters()}
    assert names == {name for name, _ in tiny_model().named_parameters()}
    assert "backbone.layers.0.mixer.in_proj.weight" in names


def test_linear_layers_are_plain_and_see_spikes():
    model, seen = tiny_model(neuron=INTEGER, threshold=0.3), {}
    for name, projection in model.projections().items():
        assert type(projection.linear) is nn.Linear
        projection.linear.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad(), recorded_spikes(model) as spikes:
        model(tokens(2, 9))
    assert len(seen) == 4
    for name, fed in seen.items():
        assert torch.equal(fed, fed.round())
        assert torch.equal(fed, spikes[name][0])


class Doubled(nn.Module):
    """What wraps a linear layer: its output, and once more."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return 2 * self.base(x) - (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_wrapped_layer(bias, driven):
    """Equal to doubled weights, with its own bias once whatever V_th is."""
    fields = {"neuron": INTEGER, "threshold": {"in_proj": 0.3, "out_proj": 1.0}, "use_bias": bias}
    wrapped, doubled = tiny_model(**fields).eval(), tiny_model(**fields).eval()
    with torch.no_grad():
        for projection in doubled.projections().values():
            projection.weight.mul_(2.0)
        for block in wrapped.backbone.layers:
            block.mixer.in_proj = Doubled(block.mixer.in_proj)
            block.mixer.out_proj = Doubled(block.mixer.out_proj)
        if driven:
            wrapped, doubled = spike_driven(wrapped), spike_driven(doubled)
        ids = tokens(2, 9)
        torch.testing.assert_close(wrapped(ids).logits, doubled(ids).logits, rtol=1e-4, atol=1e-4)
    assert wrapped.projections().keys() == doubled.projections().keys()


def test_a_projection_alone_in_any_network():
    node = neurons.SILIFNode(4)
    net = nn.Sequential(SpikingProjection(nn.Linear(8, 6), SpikeEncoder(node, threshold=0.5)), nn.ReLU())
    assert [name for name, _ in spike_fed(net)] == ["0"]
    x = torch.randn(2, 5, 8)
    spike = ((x / 0.5).sign() * ((x / 0.5).abs() - 0.5).ceil()).clamp(-4, 4)
    expected = 0.5 * spike @ net[0].weight.T + net[0].linear.bias
    torch.testing.assert_close(net(x), expected.relu())


def test_a_neuron_is_swapped_by_name():
    model = tiny_model(neuron=INTEGER)
    new = neurons.SILIFNode(2)
    model.projections()["backbone.layers.0.mixer.in_proj"].neuron = new
    assert model.backbone.layers[0].mixer.in_spikes.neuron is new
    assert model.projections()["backbone.layers.0.mixer.in_proj"].neuron is new


def test_the_backbone_of_an_untied_checkpoint(tmp_path):
    model = tiny_model(neuron=INTEGER, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


def test_from_pretrained_names_the_way_for_another_form(tmp_path):
    state_spaces_folder(tmp_path)
    with pytest.raises(ValueError, match=r"form of state-spaces, which from_dense\(\) reads"):
        SpikingMambaForCausalLM.from_pretrained(tmp_path)
    assert SpikingMambaForCausalLM.from_dense(tmp_path).config.num_hidden_layers == 2


def test_an_event_driven_model_is_not_unrolled():
    model = event_driven(tiny_model(neuron=INTEGER).eval())
    with pytest.raises(ValueError, match="event-driven model has integer weights"):
        spike_driven(model)
