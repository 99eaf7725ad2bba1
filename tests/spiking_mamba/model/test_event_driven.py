"""Event-driven models: against the model they were made of, with the same rounded weights."""

import copy

import pytest
import torch
from spikingjelly.activation_based import neuron
from transformers import AutoModelForCausalLM

import neurons
from spiking_mamba.model.event_driven import (
    EventDrivenMambaForCausalLM,
    event_driven,
)
from spiking_mamba.model.quantised import QuantisedLinear, round_blocks
from tests.helpers.tiny import DEAD_ZONE, INTEGER, LEAKY, tiny_model, tokens

MLPS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mlp", "mamba", "mamba", "mlp"],
    "intermediate_size": 56,
}
THRESHOLDS = {"in_proj": 0.25, "out_proj": 0.5}  # powers of two: folding them is exact


def rounded(model, weights):
    """A copy of a model with its projections' weights rounded, and its head's and the head's inputs left."""
    made = copy.deepcopy(model)
    for block in made.backbone.layers:
        for name in ("in_proj", "out_proj"):
            linear = getattr(block.mixer, name)
            layer = neurons.EventDrivenLinear.from_linear(linear, weights)
            linear.weight.data = (layer.integer_weight() * layer.scale).t().contiguous()
    return made


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "fields",
    [
        {"learn_threshold": False},
        {"learn_threshold": True},
        MLPS,
        MLPS | {"shift_inputs": True},
        {"neuron": DEAD_ZONE},
    ],
    ids=["fixed", "learned", "mlps", "shifted", "dead zone"],
)
def test_hidden_states_are_those_of_the_rounded_model(weights, fields):
    fields = {"neuron": INTEGER} | fields
    model = tiny_model(threshold=THRESHOLDS, use_bias=True, **fields)
    made = event_driven(model, weights)
    ids = tokens(2, 20)
    with torch.no_grad():
        wanted = rounded(model, weights).backbone(ids).last_hidden_state
        found = made.backbone(ids).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-5)
    assert made.config.threshold == 1.0
    assert not any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("spec", [INTEGER, None])
def test_logits_stay_close(weights, spec):
    model = tiny_model(neuron=spec)
    made = event_driven(model, weights)
    with torch.no_grad():
        wanted, found = model(tokens(2, 20)).logits, made(tokens(2, 20)).logits
    error = (found - wanted).norm() / wanted.norm()
    # spikes amplify the rounding of weights
    assert error < {"int8": 0.03, "int4": 0.3}[weights] + (0 if spec is None else 0.3)


@pytest.mark.parametrize("spec", [INTEGER, None])
def test_token_by_token_and_at_once(spec):
    made = event_driven(tiny_model(neuron=spec))
    ids = tokens(1, 12)
    with torch.no_grad():
        wanted, cache, found = made(ids).logits, None, []
        for token in ids.split(1, 1):
            output = made(token, cache=cache, use_cache=True)
            cache = output.cache
            found.append(output.logits)
    assert torch.allclose(torch.cat(found, 1), wanted, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("spec", [INTEGER, None])
@pytest.mark.parametrize("fields", [{}, MLPS], ids=["mixers", "mlps"])
def test_saves_and_loads(tmp_path, weights, spec, fields):
    made = event_driven(tiny_model(neuron=spec, use_bias=True, **fields), weights, "bfloat16")
    made.save_pretrained(tmp_path)
    for loaded in (
        EventDrivenMambaForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert (loaded.config.weights, loaded.config.states) == (weights, "bfloat16")
        with torch.no_grad():
            assert torch.equal(loaded(tokens(1, 9)).logits, made(tokens(1, 9)).logits)
    if (weights == "int8") == bool(fields) or spec is None:  # the others compile, for 20 seconds each
        made.set_decoding("torch")
    text = made.generate(tokens(1, 4), max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 9)


def test_backends_have_the_same_logits():
    pytest.importorskip("numba")
    made = event_driven(tiny_model(neuron=INTEGER))
    with torch.no_grad():
        wanted = made(tokens(2, 9)).logits
        made.set_weights_backend("numba")
        layers = [m for m in made.modules() if isinstance(m, neurons.EventDrivenLinear)]
        assert {layer.backend for layer in layers} == {"numba"}
        assert torch.equal(made(tokens(2, 9)).logits, wanted)


def layers_of(model):
    """Projections by place, and the head."""
    layers = {(n, name): getattr(block.mixer, name) for n, block in enumerate(model.backbone.layers)
              for name in ("in_proj", "out_proj")}  # fmt: skip
    return layers | {"head": model.lm_head}


@pytest.mark.parametrize("fields", [{"neuron": INTEGER}, {"neuron": INTEGER} | MLPS, {"neuron": None}])
def test_four_bits_rounded_for_some_text(fields):
    """Every layer's weights are rounded for what it gets there; the model is left as it was."""
    model, ids = tiny_model(threshold=THRESHOLDS if fields["neuron"] else 1.0, **fields), tokens(4, 40)
    given = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, place=place: given.update({place: args[0]}))
        for place, layer in layers_of(model).items()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    model.train().backbone.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    made = event_driven(model, "int4", calibration=ids)
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_pre_hooks for layer in layers_of(model).values())
    for place, layer in layers_of(made).items():
        x = given[place].flatten(0, -2)
        linear = layers_of(model)[place]
        expected = neurons.EventDrivenLinear.from_linear(linear, "int4", moments=x.t() @ x)
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.group_scale, expected.group_scale)
    plain = event_driven(model, "int4")
    assert any(not torch.equal(a.weight, b.weight) for a, b in
               zip(layers_of(made).values(), layers_of(plain).values(), strict=True))  # fmt: skip


def test_calibration_that_makes_no_sense_is_refused():
    model = tiny_model(neuron=INTEGER)
    for weights, ids in (("int8", tokens(2, 9)), ("int4", tokens(2, 9)[0]), ("int4", tokens(2, 9)[:0])):
        with pytest.raises(ValueError, match="calibration is"):
            event_driven(model, weights, calibration=ids)


def test_round_blocks():
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    x[1, 32:64] = 0.0
    integers, scales = round_blocks(x)
    assert (integers.shape, scales.shape, integers.dtype) == ((3, 70), (3, 3), torch.int8)
    assert int(integers.abs().max()) == 127
    each = scales.repeat_interleave(32, 1)[:, :70]
    assert bool(((integers * each - x).abs() <= 0.5001 * each).all())
    assert not integers[1, 32:64].any()
    layer = QuantisedLinear.from_linear(torch.nn.Linear(70, 9))
    dense = (integers * each) @ (layer.integer_weight() * layer.scale) + layer.bias
    assert torch.allclose(layer(x), dense, atol=1e-5)


def test_what_cannot_be_event_driven_is_refused():
    for fields in ({"neuron": LEAKY, "membrane": "sequence"}, {"neuron": neurons.spec_of(neuron.IFNode())}):
        with pytest.raises(ValueError, match=r"needs neurons\.SILIFNode"):
            event_driven(tiny_model(**fields))
    many = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 128}}
    with pytest.raises(ValueError, match="does not fit in int8"):
        event_driven(tiny_model(neuron=many))
    with pytest.raises(ValueError, match="weights must be"):
        event_driven(tiny_model(neuron=INTEGER), "int2")
    with pytest.raises(ValueError, match="states must be"):
        event_driven(tiny_model(neuron=INTEGER), states="int8")
    made = event_driven(tiny_model(neuron=INTEGER))
    with pytest.raises(ValueError, match="for inference"):
        made.train()
    with pytest.raises(ValueError, match="event-driven already, with weights='int8'"):
        event_driven(made, "int4")
    with pytest.raises(TypeError, match=r"got str; .*load_model"):
        event_driven("a/folder")
