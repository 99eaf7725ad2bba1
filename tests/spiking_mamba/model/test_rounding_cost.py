"""What rounding costs, against the divergence with one layer rounded; and which layers stay int8."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import neurons
from spiking_mamba.model.event_driven import EventDrivenMambaConfig, EventDrivenMambaForCausalLM, event_driven
from spiking_mamba.model.rounding_cost import rounding_costs
from tests.helpers.tiny import INTEGER, SHAPE, tiny_model, tokens

MLPS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mlp", "mamba", "mlp", "mamba"],
    "intermediate_size": 72,
}


def layers_of(model):
    blocks = range(len(model.backbone.layers))
    names = [f"backbone.layers.{k}.mixer.{name}" for k in blocks for name in ("in_proj", "out_proj")]
    return {name: model.get_submodule(name) for name in [*names, "lm_head"]}


def costs_of(model, ids):
    """By the module's own function, of layers rounded by hand, with inputs that hooks have caught."""
    layers, given = layers_of(model), {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    moments = {name: torch.einsum("bli,blj->ij", x, x) for name, x in given.items()}
    made = {
        name: neurons.EventDrivenLinear.from_linear(layer, "int4", moments=moments[name])
        for name, layer in layers.items()
    }
    return rounding_costs(model, ids, layers, made, moments), made


def test_costs_are_the_divergence_of_a_model_with_one_layer_rounded():
    model, ids = tiny_model(), tokens(32, 64)
    costs, made = costs_of(model, ids)
    with torch.no_grad():
        right = model(ids).logits.log_softmax(-1)
        for name, layer in made.items():
            other = copy.deepcopy(model)
            weight = (layer.integer_weight() * layer.scale).t().contiguous()
            other.get_submodule(name).weight = torch.nn.Parameter(weight)  # the head alone, where it is tied
            found = other(ids).logits.log_softmax(-1)
            kl = float((right.exp() * (right - found)).sum(-1).mean())
            assert 0.6 * kl < costs[name] < 1.6 * kl, name


@pytest.mark.parametrize("fields", [{"neuron": INTEGER, "threshold": 0.25}, {"neuron": INTEGER} | MLPS, {}])
def test_what_costs_most_for_its_bytes_stays_int8(fields):
    model, ids = tiny_model(**fields), tokens(4, 40)
    costs, made = costs_of(model, ids)
    gain = {name: cost / layers_of(model)[name].weight.numel() for name, cost in costs.items()}
    order = sorted(gain, key=gain.get, reverse=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for kept in (1, 3):
        tolerance = sum(costs[name] for name in order[kept:]) * 1.0001
        mixed = event_driven(model, "int4", calibration=ids, tolerance=tolerance)
        assert set(mixed.config.int8_layers) == set(order[:kept])
        for name, layer in layers_of(mixed).items():
            wide = neurons.EventDrivenLinear.from_linear(layers_of(model)[name], "int8")
            wanted = wide if name in order[:kept] else made[name]
            assert torch.equal(layer.weight, wanted.weight)
            assert (layer.group_scale is None) == (name in order[:kept])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


def test_the_ends_are_int8_and_int4():
    model, ids = tiny_model(neuron=INTEGER), tokens(4, 40)
    wide, narrow = (event_driven(model, "int4", calibration=ids, tolerance=most) for most in (0, 1e9))
    with torch.no_grad():
        assert torch.equal(wide(ids).logits, event_driven(model)(ids).logits)
        four = event_driven(model, "int4", calibration=ids)
        assert torch.equal(narrow(ids).logits, four(ids).logits)
    assert narrow.config.int8_layers is None


def test_mixed_forms_save_and_load(tmp_path):
    model, ids = tiny_model(neuron=INTEGER, **MLPS), tokens(4, 40)
    tolerance = sum(costs_of(model, ids)[0].values()) / 2
    made = event_driven(model, "int4", calibration=ids, tolerance=tolerance)
    assert 0 < len(made.config.int8_layers) < len(layers_of(made))
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made(ids).logits)


def test_what_makes_no_sense_is_refused():
    model, ids = tiny_model(neuron=INTEGER), tokens(2, 9)
    for weights, how in (
        ("int4", {"tolerance": 0.01}),
        ("int8", {"tolerance": 0.01}),
        ("int4", {"calibration": ids, "tolerance": -0.1}),
        ("int4", {"calibration": ids, "tolerance": float("nan")}),
    ):
        with pytest.raises(ValueError, match="tolerance is at least 0"):
            event_driven(model, weights, **how)
    config = EventDrivenMambaConfig(**SHAPE, weights="int4", int8_layers=["lm_head", "backbone.layers.7"])
    with pytest.raises(ValueError, match=r"no projection and no head: backbone\.layers\.7"):
        EventDrivenMambaForCausalLM(config)
