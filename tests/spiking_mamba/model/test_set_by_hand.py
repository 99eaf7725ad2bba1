"""Neurons and thresholds set in projections by hand: whoever reads the model heeds them."""

import pytest
import torch
from spikingjelly.activation_based import neuron as spikingjelly
from spikingjelly.activation_based import surrogate

import neurons
from neurons import SILIFNode
from spiking_mamba import SpikingMambaForCausalLM, event_driven
from spiking_mamba.model.projection import SpikeEncoder
from tests.helpers.tiny import INTEGER, tiny_config, tiny_model, tokens

IDS = tokens(1, 9)


class OneSided(neurons.SignedSpikeCount):
    """No negative spikes."""

    @staticmethod
    def spiking_function(x, max_spike_count, alpha, grad_window):
        return neurons.SignedSpikeCount.spiking_function(x, max_spike_count, alpha, grad_window).clamp(min=0)


class Halved(SILIFNode):
    """Every other quantum."""

    def forward(self, x, *args, **kwargs):
        return (super().forward(x, *args, **kwargs) / 2).trunc()


NODES = {
    "ATan": lambda: SILIFNode(1, surrogate_function=surrogate.ATan()),
    "ATan, D=4": lambda: SILIFNode(4, surrogate_function=surrogate.ATan()),
    "one-sided": lambda: SILIFNode(4, surrogate_function=OneSided(4)),
    "subclass": lambda: Halved(4),
}


def swapped(model, make):
    for encoder in model.modules():  # projections() of a dense model are none
        if isinstance(encoder, SpikeEncoder):
            encoder.neuron = make()
    return model


def greedy(model, count=12):
    """By whole passes of the model's own forward."""
    ids = IDS
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generated(model, decoding, count=12):
    model.set_decoding(decoding)
    return model.generate(IDS, max_new_tokens=count, do_sample=False, eos_token_id=None)


@pytest.mark.numba
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", NODES)
def test_what_is_not_compiled_in_is_called(name, shifted):
    pytest.importorskip("numba")
    neurons.register(OneSided)
    neurons.register(Halved)
    model = SpikingMambaForCausalLM.from_dense(
        tiny_model(), NODES[name](), threshold=0.3, shift_inputs=shifted
    )
    made = event_driven(model.eval())
    assert torch.equal(generated(made, "auto"), greedy(made))
    assert made.decoders is None
    with pytest.raises(ValueError, match=r"Only SILIFNode with SignedSpikeCount or DeadZoneSpikeCount"):
        generated(made, "compiled")


@pytest.mark.numba
def test_what_is_compiled_in_still_is():
    pytest.importorskip("numba")
    for node in (SILIFNode(4), SILIFNode(4, surrogate_function=neurons.DeadZoneSpikeCount(4, 0.8))):
        made = event_driven(SpikingMambaForCausalLM.from_dense(tiny_model(), node, threshold=0.3).eval())
        assert torch.equal(generated(made, "compiled"), greedy(made))
        assert made.decoders is not None


@pytest.mark.numba
def test_an_event_driven_models_own_neurons():
    pytest.importorskip("numba")
    made = event_driven(SpikingMambaForCausalLM.from_dense(tiny_model(), SILIFNode(4), threshold=0.3).eval())
    before = generated(made, "auto")
    swapped(made, lambda: SILIFNode(1))
    after = generated(made, "auto")
    assert not torch.equal(before, after)
    assert torch.equal(after, greedy(made))
    with pytest.raises(ValueError, match="was set by hand and is not the configuration's"):
        generated(made, "compiled")


@pytest.mark.parametrize("name", ["ours", *NODES])
def test_on_cuda_spikes_of_unknown_nodes_are_looked_at(name, monkeypatch):
    """Here a processor stands for CUDA."""
    monkeypatch.setattr("spiking_mamba.model.event_driven.FUSED_DEVICES", ("cpu",))
    make = NODES.get(name, lambda: SILIFNode(4, surrogate_function=neurons.DeadZoneSpikeCount(4, 0.8)))
    neurons.register(OneSided)
    neurons.register(Halved)
    model = SpikingMambaForCausalLM.from_dense(tiny_model(), SILIFNode(4), threshold=0.3).eval()
    made = event_driven(model)
    layers = [projection.linear for projection in made.projections().values()]

    def trusted():
        made.set_decoding("auto")
        return {layer.trusts_spikes for layer in layers}

    assert trusted() == {True}
    swapped(made, make)
    assert trusted() == {name == "ours"}
    swapped(made, lambda: neurons.TILIFNode(4))
    assert trusted() == {True}


def test_event_driven_takes_what_is_there():
    model = SpikingMambaForCausalLM.from_dense(tiny_model(), SILIFNode(4), threshold=0.3).eval()
    swapped(model, lambda: SILIFNode(1))
    for projection in model.projections().values():
        projection.spikes.threshold = 0.5
    right = SpikingMambaForCausalLM.from_dense(tiny_model(), SILIFNode(1), threshold=0.5).eval()
    with torch.no_grad():
        assert torch.equal(event_driven(model)(IDS).logits, event_driven(right)(IDS).logits)
    assert model.config.neuron["args"].get("max_spike_count", 4) == 4  # the source stays as it is


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda k: SILIFNode(4 if k else 2), "different neurons"),
        (lambda k: SILIFNode(4, v_threshold=0.5), "inside the model it works at 1"),
        (lambda k: neurons.TILIFNode(4), "needs neurons.SILIFNode"),
        (lambda k: spikingjelly.IFNode(), "needs neurons.SILIFNode"),
        (
            lambda k: SILIFNode(4, surrogate_function=neurons.SignedSpikeCount(4, spiking=False)),
            "emits no spikes",
        ),
    ],
)
def test_event_driven_refuses_what_it_cannot_take(make, said):
    model = SpikingMambaForCausalLM.from_dense(tiny_model(), SILIFNode(4), threshold=0.3).eval()
    for k, projection in enumerate(model.projections().values()):
        projection.neuron = make(k)
    with pytest.raises(ValueError, match=said):
        event_driven(model)


@pytest.mark.parametrize("learned", [False, True])
def test_thresholds_are_saved(learned, tmp_path):
    model = tiny_model(neuron=INTEGER, learn_threshold=learned, threshold=0.3)
    for k, projection in enumerate(model.projections().values()):
        if learned and k % 2:
            projection.spikes.threshold = 0.1 * (k + 1)  # still learned
        elif not learned:
            projection.spikes.threshold = 0.1 * (k + 1)
    model.save_pretrained(tmp_path)
    again = SpikingMambaForCausalLM.from_pretrained(tmp_path).eval()
    for one, other in zip(again.projections().values(), model.projections().values(), strict=True):
        assert torch.equal(torch.as_tensor(one.threshold), torch.as_tensor(other.threshold))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_learned_thresholds_that_were_fixed_are_saved_as_numbers(tmp_path):
    model = tiny_model(neuron=INTEGER, learn_threshold=True, threshold=0.3)
    for k, projection in enumerate(model.projections().values()):
        if k == 1:
            with pytest.raises(ValueError, match="Some projections learn V_th and others do not"):
                model.save_pretrained(tmp_path / "none")
        projection.spikes.fix_threshold(0.2 + k)
    model.save_pretrained(tmp_path)
    again = SpikingMambaForCausalLM.from_pretrained(tmp_path).eval()
    assert not again.config.learn_threshold
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_none(value):
    encoder = next(iter(tiny_model(neuron=INTEGER).projections().values())).spikes
    with pytest.raises(ValueError, match="finite and positive"):
        encoder.threshold = value


@pytest.mark.parametrize("node", [lambda: SILIFNode(4, tau=2.0), spikingjelly.IFNode])
def test_neurons_with_states_put_into_a_dense_model(node, tmp_path):
    """Padding does not move their states, a cache that has no room for them is refused, loaded ones work."""
    model = swapped(tiny_model(membrane="sequence"), node)
    ids = tokens(2, 12)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        found = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="carry 0 states from token to token"):
            model(ids[:, :5], use_cache=True)
        model.save_pretrained(tmp_path)
        again = SpikingMambaForCausalLM.from_pretrained(tmp_path).eval()
        first = again(ids[:, :5], use_cache=True)
        rest = again(ids[:, 5:], cache=first.cache).logits
        torch.testing.assert_close(rest, whole[:, 5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["HalfThresholdIFNode", "IFNode", "ParametricLIFNode"])
def test_nodes_that_read_numbers_when_they_are_made_are_loaded(name, tmp_path):
    spec = {"class": f"spikingjelly.activation_based.neuron.{name}", "args": {}}
    model = tiny_model(neuron=spec)
    model.save_pretrained(tmp_path)
    again = SpikingMambaForCausalLM.from_pretrained(tmp_path).eval()
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_cache_of_another_model():
    model, ids = tiny_model(neuron=INTEGER), tokens(2, 4)

    def cache_of(config, rows=2):
        with torch.no_grad():
            return SpikingMambaForCausalLM(config).eval()(tokens(rows, 4), use_cache=True).cache

    others = [
        tiny_config(num_hidden_layers=3, neuron=INTEGER),
        tiny_config(num_hidden_layers=1, neuron=INTEGER),
        tiny_config(neuron={"class": "neurons.SILIFNode", "args": {"tau": 2.0}}, membrane="sequence"),
    ]
    for config in others:
        with torch.no_grad(), pytest.raises(ValueError, match="The cache is another model's"):
            model(ids, cache=cache_of(config))
    with torch.no_grad(), pytest.raises(ValueError, match="The cache holds 3 sequences, this call has 2"):
        model(ids, cache=cache_of(model.config, 3))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_no_token_at_all(shape):
    for model in (tiny_model(neuron=INTEGER), tiny_model()):
        with pytest.raises(ValueError, match="of at least one token"):
            model(torch.zeros(shape, dtype=torch.long))
        with pytest.raises(ValueError, match="of at least one token"):
            model(inputs_embeds=torch.zeros(*shape, model.config.hidden_size))
    with pytest.raises(ValueError, match=r"inputs_embeds must be \[batch, length, "):
        tiny_model()(inputs_embeds=torch.zeros(4, 5))


def test_what_a_model_without_compensation_refuses():
    model = tiny_model(neuron=INTEGER)
    model.set_sgc_lambda(0.0)
    with pytest.raises(ValueError, match="no SGC whose lambda"):
        model.set_sgc_lambda(0.5)
    model = tiny_model(neuron=INTEGER, sgc={"mode": "blend"})
    for lam in (-0.1, 5.0, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            model.set_sgc_lambda(lam)


def test_levels_that_do_not_fit():
    model = tiny_model(neuron=INTEGER, shift_inputs=True)
    name, projection = next(iter(model.projections().items()))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for levels in (torch.ones(1), torch.ones(projection.in_features + 1)):
        with pytest.raises(ValueError, match=r"Levels .* are wanted"):
            model.rest_at({name: levels})
    with pytest.raises(ValueError, match="There is no projection 'x'"):
        model.rest_at({"x": torch.ones(projection.in_features)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_compiled_blocks_meet_another_largest_count():
    model = SpikingMambaForCausalLM.from_dense(
        tiny_model(), SILIFNode(4, tau=2.0), membrane="sequence"
    ).eval()
    model.compile_blocks()
    with torch.no_grad():
        model(IDS)
    for name, projection in model.projections().items():
        if name.endswith("out_proj"):
            projection.neuron = SILIFNode(2, tau=2.0)
    found = model(IDS).logits
    found.square().mean().backward()
    model.compile_blocks(False)
    with torch.no_grad():
        torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=1e-5)
