"""Nodes with states: whose they are, in threads too, and which nodes can stand in a model."""

import threading

import pytest
import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based import neuron as jelly

import neurons
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.model.membrane import drive, probe
from tests.helpers.tiny import INTEGER, LEAKY, SHAPE, tiny_model, tokens


@pytest.mark.parametrize("make", [lambda: neurons.SILIFNode(4, tau=2.0), lambda: jelly.LIFNode(tau=2.0)])
def test_the_node_keeps_nothing_and_is_watched(make):
    node, x, seen = make(), 2 * torch.randn(6, 3, 5), []
    node.register_forward_hook(lambda module, args, output: seen.append(output))
    fresh, states = drive(node, x, []), []
    pieces = torch.cat([drive(node, piece, states) for piece in x.split([1, 2, 3])])
    torch.testing.assert_close(pieces, fresh)
    assert node.v == 0.0
    assert (node.step_mode, len(seen), len(states)) == ("s", 4, 1)
    torch.testing.assert_close(torch.cat(seen[1:]), fresh)


def in_threads(model, captured):
    """Texts of four prompts, each written by a thread of its own, all at once."""
    prompts = [tokens(2, 5 + i, seed=i) for i in range(4)]
    settings = {"max_new_tokens": 12, "do_sample": False}

    def write(ids):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    expected = [write(ids) for ids in prompts]
    if captured:
        model.capture_decoding()
    found, start = [None] * 4, threading.Barrier(4)

    def run(i):
        start.wait()
        found[i] = write(prompts[i])

    for _ in range(3):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("spec", [LEAKY, {"class": "spikingjelly.activation_based.neuron.LIFNode"}])
def test_threads_share_a_model(spec):
    in_threads(tiny_model(neuron=spec, membrane="sequence", threshold=0.5), captured=False)


def test_threads_share_a_captured_model():
    in_threads(tiny_model(neuron=LEAKY, membrane="sequence", threshold=0.5), captured=True)


class Forgetful(jelly.LIFNode):
    """Starts every call afresh: whole sequences and single tokens differ."""

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        return super().multi_step_functional_forward(inputs, (torch.zeros_like(inputs[0][0]),), **kwargs)


class Summing(jelly.IFNode):
    def multi_step_forward(self, x_seq):
        return x_seq.sum(-1)


@pytest.mark.parametrize(("node", "message"), [(Forgetful, "at once"), (Summing, "one value each")])
def test_nodes_that_do_something_else_are_refused(node, message):
    neurons.register(node)
    with pytest.raises(ValueError, match=f"{node.__name__}.*{message}"):
        SpikingMambaConfig(**SHAPE, neuron=neurons.spec_of(node()), membrane="sequence")


class Learning(jelly.IFNode):
    def __init__(self) -> None:
        super().__init__(v_threshold=0.5)
        self.w = torch.nn.Parameter(torch.ones(1))


def test_what_an_example_has_learned_is_kept():
    neurons.register(Learning)
    example = Learning()
    with torch.no_grad():
        example.w += 0.7
    model = SpikingMambaForCausalLM.from_dense(tiny_model(), neuron=example, membrane="sequence")
    for projection in model.projections().values():
        assert torch.equal(projection.neuron.w, example.w)
        assert projection.neuron is not example


@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_counts_that_the_weights_dtype_cannot_hold(threshold):
    many = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 300}}
    model = tiny_model(neuron=many, threshold=threshold)
    model(tokens(1, 4))
    with pytest.raises(ValueError, match="not exact in torch"):
        model.bfloat16()(tokens(1, 4))


def test_single_tokens_in_training():
    model, ids = tiny_model(neuron=INTEGER), tokens(2, 4)
    functional.set_step_mode(model, "s")
    model.train()
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        model(ids[:, :1])
    model(ids)  # whole sequences train as ever
    model.eval()
    expected = model(ids, use_cache=False).logits
    functional.reset_net(model)
    cache = model(ids[:, :2], use_cache=True).cache  # with gradients, token by token
    functional.reset_net(model)
    output = [model(ids[:, t : t + 1], cache=cache).logits for t in (2, 3)]
    torch.testing.assert_close(torch.cat(output, 1), expected[:, 2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_potentials_are_stored_where_that_is_asked(membrane):
    spec = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4, "tau": 2.0, "store_v_seq": True}}
    model, seen = tiny_model(neuron=spec, membrane=membrane, threshold=0.5), {}
    for name, projection in model.projections().items():
        projection.neuron.register_forward_hook(
            lambda node, args, spikes, name=name: seen.update({name: (args[0], spikes)})
        )
    with torch.no_grad():
        model(tokens(2, 9))
    assert len(seen) == 4
    for name, projection in model.projections().items():
        x_seq, spike_seq = seen[name]  # [steps, ...], a single step where a token is a window of its own
        assert len(x_seq) == (1 if membrane == "token" else 9)
        v, expected = torch.zeros_like(x_seq[0]), []
        for x, spike in zip(x_seq, spike_seq, strict=True):
            v = v / 2 + x - spike
            expected.append(v)
        torch.testing.assert_close(projection.neuron.v_seq, torch.stack(expected))


@pytest.mark.parametrize("spec", [INTEGER, LEAKY], ids=str)
def test_a_model_can_be_made_under_any_default_device(spec):
    probe.cache_clear()
    with torch.device("meta"):
        config = SpikingMambaConfig(**SHAPE, neuron=spec)
        assert SpikingMambaForCausalLM(config).device.type == "meta"
