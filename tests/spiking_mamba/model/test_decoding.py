"""Captured decoding, which off CUDA lacks only the capture: it equals plain decoding, whoever takes turns."""

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional

import neurons
from spiking_mamba.spikes.counting import count_spikes
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model, tokens

MODELS = {
    "dense": {},
    "token": {"neuron": INTEGER},
    "threshold": {"neuron": INTEGER, "threshold": 0.5},
    "sequence": {"neuron": LEAKY, "membrane": "sequence"},
    "groups": {"n_groups": 2, "neuron": INTEGER},
    "limit": {"time_step_limit": (0.01, 0.5)},
}


@pytest.fixture(params=MODELS)
def model(request):
    return tiny_model(**MODELS[request.param])


def stream(model, ids):
    functional.set_step_mode(model, "s")
    with torch.no_grad():
        logits = torch.cat([model(token[:, None]).logits for token in ids.unbind(1)], 1)
    functional.reset_net(model)
    functional.set_step_mode(model, "m")
    return logits


def test_generation_is_the_same(model):
    ids = tokens(2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    model.capture_decoding()
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert len(model.graphs) == 1


def test_beam_search_is_the_same(model):
    ids = tokens(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    expected = model.generate(ids, **settings)
    model.capture_decoding()
    assert torch.equal(model.generate(ids, **settings), expected)


def test_padding_is_the_same(model):
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    model.capture_decoding()
    assert torch.equal(model.generate(ids, **settings), expected)


def test_streaming_is_the_same(model):
    ids = tokens(2, 7)
    expected = stream(model, ids)
    model.capture_decoding()
    for _ in range(2):  # reset_net has forgotten the first sequence
        torch.testing.assert_close(stream(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_sequences_take_turns(model):
    """Three caches of one batch size, one of them left alone for a while and one copied in the midst."""
    ids = [tokens(1, 9, seed) for seed in range(3)]
    with torch.no_grad():
        expected = [model(i).logits[:, 4:] for i in ids]
        model.capture_decoding()
        caches = [model(i[:, :4], use_cache=True).cache for i in ids]
        logits = [[], [], []]
        order = [0, 1, 0, 1, 2, 2, 0, 1, 1, 0, 2, 2, 2, 0, 1]
        for n, which in enumerate(order):
            if n == 7:
                caches[1] = copy.deepcopy(caches[1])
            at = 4 + len(logits[which])
            output = model(ids[which][:, at : at + 1], cache=caches[which], use_cache=True)
            logits[which].append(output.logits)
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-3, atol=1e-3)


def test_who_counts_spikes_sees_those_of_every_token():
    model = tiny_model(neuron=INTEGER)
    counts = []
    for captures in (False, True):
        model.capture_decoding(captures)
        with count_spikes(model) as found:
            model.generate(tokens(1, 5), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        counts.append((found.accumulations, found.dense_macs))
    assert counts[0] == counts[1]


def test_a_swapped_neuron_is_not_decoded_by_an_old_graph():
    model = tiny_model(neuron=INTEGER)
    settings = {"max_new_tokens": 8, "do_sample": False}
    model.capture_decoding()
    model.generate(tokens(1, 5), **settings)
    for projection in model.projections().values():
        projection.neuron = neurons.SILIFNode(1)
    found = model.generate(tokens(1, 5), **settings)
    model.capture_decoding(False)
    assert torch.equal(found, model.generate(tokens(1, 5), **settings))


def test_a_moved_model_is_captured_anew():
    model = tiny_model(neuron=INTEGER)
    model.capture_decoding()
    model.generate(tokens(1, 5), max_new_tokens=2)
    assert len(model.graphs) == 1
    other = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    model.double()
    assert len(model.graphs) == len(other.graphs) == len(again.graphs) == 0
    assert other.graphs._blocks is other.backbone.layers
    assert again.graphs._blocks is again.backbone.layers
    ids = tokens(1, 5)
    expected = model.generate(ids, max_new_tokens=4)
    assert torch.equal(other.generate(ids, max_new_tokens=4), expected)
    assert torch.equal(again.generate(ids, max_new_tokens=4), expected)
    assert len(model.graphs) == len(other.graphs) == len(again.graphs) == 1


def test_who_asks_for_a_tuple_gets_one():
    model = tiny_model(neuron=INTEGER)
    model.capture_decoding()
    with torch.no_grad():
        cache = model(tokens(1, 4), use_cache=True).cache
        logits, *_ = model(tokens(1, 1), cache=cache, use_cache=True, return_dict=False)
    assert logits.shape == (1, 1, model.config.vocab_size)
