"""The model: parity with transformers' Mamba2, streaming, caches, generation, and torch's machinery."""

import copy
import math
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM

from spiking_mamba import SpikingMambaForCausalLM, spike_driven
from spiking_mamba.spikes.counting import count_spikes
from tests.helpers.tiny import (
    INTEGER,
    LEAKY,
    SHAPE,
    VOCABULARY,
    equal_tokens,
    joined,
    recorded_spikes,
    shake,
    tiny_model,
    tokens,
)

MEMBRANES = ["token", "sequence"]
BLEND = {"mode": "blend", "lam": 0.5}


def spiking(membrane, **fields):
    return tiny_model(neuron=INTEGER if membrane == "token" else LEAKY, membrane=membrane, **fields)


def stream(model, ids, lengths=None):
    """Logits of ``ids`` fed in pieces, one token each unless ``lengths`` says otherwise."""
    functional.set_step_mode(model, "s")
    functional.reset_net(model)
    pieces = ids.split(1 if lengths is None else lengths, dim=1)
    with torch.no_grad():
        return torch.cat([model(piece).logits for piece in pieces], dim=1)


def full(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits


def padding(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[0, : length // 3] = 0
    if kind == "right":
        mask[0, length - length // 3 :] = 0
    return None if kind == "none" else mask


# --- parity ---


def transformers_mamba2(**fields):
    torch.manual_seed(0)
    return shake(Mamba2ForCausalLM(Mamba2Config(**SHAPE | fields))).eval()


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(
    "fields",
    [
        {"n_groups": 1, "tie_word_embeddings": True},
        {"n_groups": 2, "tie_word_embeddings": False, "use_bias": True},
    ],
)
def test_dense_parity(length, pad, fields):
    theirs = transformers_mamba2(**fields)
    ours = SpikingMambaForCausalLM.from_dense(theirs)
    theirs.train()
    ids, mask = tokens(2, length), padding(pad, 2, length)
    weight = torch.randn(2, length, VOCABULARY)
    if mask is not None:
        weight = weight * mask[..., None]
    if pad == "left" and fields.get("use_bias"):
        return  # theirs lets the bias at padding into the convolution
    logits, expected = (m(ids, attention_mask=mask).logits for m in (ours, theirs))
    if mask is not None:  # what comes out at padding means nothing
        logits, expected = (t * mask[..., None] for t in (logits, expected))
    assert (logits - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        wanted = gradients[name].grad
        assert (parameter.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name
        assert length == 1 or wanted.abs().max() > 0, name


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("membrane", MEMBRANES)
def test_padding_does_not_reach_the_tokens(membrane, pad):
    model, ids = spiking(membrane), tokens(2, 30)
    mask = padding(pad, 2, 30)
    kept = mask[0].bool()
    alone = full(model, ids[:1, kept])
    assert torch.allclose(full(model, ids, attention_mask=mask)[:1, kept], alone, atol=1e-5)


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_the_model_is_causal(membrane):
    model, ids = spiking(membrane), tokens(2, 40)
    changed = ids.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % VOCABULARY
    before, after = full(model, ids), full(model, changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


# --- streaming ---


@pytest.mark.parametrize("fields", [{}, {"n_groups": 2}, {"time_step_limit": (0.01, 0.05)}])
def test_dense_stream_equals_the_full_forward(fields):
    model, ids = tiny_model(**fields), tokens(2, 70)
    expected = full(model, ids)
    assert (stream(model, ids) - expected).abs().max() <= 1e-4
    assert (stream(model, ids, [1, 5, 1, 60, 3]) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("threshold", [1.0, 0.3])
@pytest.mark.parametrize("membrane", MEMBRANES)
def test_spiking_stream_equals_the_full_forward(membrane, threshold):
    model, ids = spiking(membrane, threshold=threshold), tokens(4, 70)
    with recorded_spikes(model) as at_once:
        expected = full(model, ids)
    for lengths in (None, [1, 5, 1, 60, 3]):
        with recorded_spikes(model) as one_by_one:
            logits = stream(model, ids, lengths)
        equal = equal_tokens(joined(at_once), joined(one_by_one))
        assert equal.sum() >= 0.75 * ids.numel(), "spikes differ early: nothing would be compared"
        for row, count in enumerate(equal):
            assert (logits[row, :count] - expected[row, :count]).abs().max() <= 1e-4
        perplexity, wanted = (
            math.exp(torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
            for x in (logits, expected)
        )
        assert abs(perplexity / wanted - 1) <= 1e-3


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_a_block_given_identical_inputs_spikes_alike(membrane):
    """At most one spike in 10^5 differs between a block at once and token by token."""
    model = spiking(membrane)
    hidden = torch.randn(16, 80, 32)
    for block in model.backbone.layers:
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), recorded_spikes(model) as at_once:
            block(hidden)
        with torch.no_grad(), recorded_spikes(model) as one_by_one:
            for token in hidden.split(1, dim=1):
                block(token, cache=cache)
        pairs = [(at_once[name], one_by_one[name]) for name in at_once if at_once[name]]
        pairs = [(torch.cat(a, 1), torch.cat(b, 1)) for a, b in pairs]
        assert len(pairs) == 2
        total = sum(a.numel() for a, _ in pairs)
        assert total > 1e5
        assert all(a.count_nonzero() > 0.2 * a.numel() for a, _ in pairs)
        assert sum(int((a != b).sum()) for a, b in pairs) <= math.ceil(total / 1e5)


def test_the_membrane_of_a_sequence_leaks_from_token_to_token():
    """The two membranes are different models, and the state is what an independent loop computes."""
    model, ids = spiking("sequence"), tokens(2, 12)
    other = spiking("token")
    assert not torch.allclose(full(model, ids), full(other, ids))
    encoder = model.backbone.layers[0].mixer.in_spikes
    u = torch.randn(2, 12, 32)
    states = []
    spikes = encoder(u, states).emitted
    v = torch.zeros(2, 32)
    for t in range(12):
        h = 0.5 * v + u[:, t]
        s = (h.sign() * (h.abs() - 0.5).ceil()).clamp(-4, 4)
        v = h - s
        assert torch.equal(spikes[:, t], s)
    assert torch.equal(states[0], v)


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_a_second_sequence_after_reset_net_equals_a_fresh_model(membrane):
    model = spiking(membrane)
    fresh = copy.deepcopy(model)
    stream(model, tokens(3, 20, seed=1))
    functional.reset_net(model)
    assert torch.equal(stream(model, tokens(2, 20)), stream(fresh, tokens(2, 20)))


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_full_forwards_leak_nothing(membrane):
    model, ids = spiking(membrane), tokens(2, 20)
    first = full(model, ids)
    full(model, tokens(3, 9, seed=1))
    assert torch.equal(full(model, ids), first)
    model.train()(ids).logits.sum().backward()
    assert torch.equal(full(model.eval(), ids), first)
    for projection in model.projections().values():
        assert projection.neuron.v == 0.0


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_stream_without_reset_continues(membrane):
    model, ids = spiking(membrane), tokens(2, 24)
    expected = full(model, ids)
    functional.set_step_mode(model, "s")
    with torch.no_grad():
        first, second = model(ids[:, :10]).logits, model(ids[:, 10:]).logits
    assert torch.allclose(torch.cat([first, second], 1), expected, atol=1e-4)
    assert not torch.allclose(second, full_from_scratch(model, ids[:, 10:]), atol=1e-2)


def full_from_scratch(model, ids):
    fresh = copy.deepcopy(model)
    functional.set_step_mode(fresh, "m")
    return full(fresh, ids)


def test_batch_size_changed_in_midstream():
    model = spiking("token")
    stream(model, tokens(2, 3))
    with pytest.raises(ValueError, match=r"holds 2 sequences.*3.*reset_net"):
        model(tokens(3, 1))
    functional.reset_net(model)
    assert model(tokens(3, 1)).logits.shape == (3, 1, VOCABULARY)


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_step_mode_is_ignored_in_training(membrane):
    model, ids = spiking(membrane), tokens(2, 8)
    functional.set_step_mode(model, "s")
    model.train()
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first)
    assert model.backbone.stream.cache is None
    assert torch.equal(first, full_from_scratch(model, ids))


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_step_mode_is_ignored_when_a_cache_is_passed(membrane):
    model, ids, other = spiking(membrane), tokens(2, 12), tokens(2, 5, seed=1)
    expected, cached = full_from_scratch(model, ids), full_from_scratch(model, other)
    functional.set_step_mode(model, "s")
    with torch.no_grad():
        first = model(ids[:, :6]).logits
        cache = DynamicCache(config=model.config)
        between = [model(piece, past_key_values=cache).logits for piece in other.split(1, dim=1)]
        second = model(ids[:, 6:]).logits
    assert torch.allclose(torch.cat([first, second], 1), expected, atol=1e-4)
    assert torch.allclose(torch.cat(between, 1), cached, atol=1e-4)


def test_step_modes_of_the_nodes_are_put_back():
    model = spiking("token")
    for mode in ("s", "m"):
        functional.set_step_mode(model, mode)
        full(model, tokens(1, 4))
        assert {p.neuron.step_mode for p in model.projections().values()} == {mode}


# --- spike-driven inference ---


@pytest.mark.parametrize("threshold", [1.0, 0.3])
@pytest.mark.parametrize("membrane", MEMBRANES)
def test_spike_driven(membrane, threshold):
    model, ids = spiking(membrane, threshold=threshold, use_bias=True), tokens(4, 40)
    driven = spike_driven(model)
    assert driven.config.spike_driven
    assert not model.config.spike_driven
    for name, projection in model.projections().items():
        other, x = driven.projections()[name], 3 * torch.randn(2, 50, projection.in_features)
        assert torch.equal(projection.spikes(x).emitted, other.spikes(x).emitted)
        assert torch.allclose(projection(x), other(x), atol=1e-5)
    with recorded_spikes(model) as integers:
        expected = full(model, ids)
    with recorded_spikes(driven) as unrolled:
        logits = full(driven, ids)
    equal = equal_tokens(joined(integers), joined(unrolled))
    assert equal.sum() >= 0.75 * ids.numel()
    for row, count in enumerate(equal):
        assert (logits[row, :count] - expected[row, :count]).abs().max() <= 1e-4


def test_spike_driven_weights_meet_ternary_spikes_only(monkeypatch):
    driven = spike_driven(spiking("token"))
    seen = []
    linear = torch.nn.functional.linear

    def watched(x, weight, *rest):
        seen.append((x, weight))
        return linear(x, weight, *rest)

    monkeypatch.setattr("torch.nn.modules.linear.F.linear", watched)
    full(driven, tokens(2, 9))
    inputs = [x for x, w in seen if any(w is p.weight for p in driven.projections().values())]
    assert len(inputs) == 4
    assert set(torch.cat([x.flatten() for x in inputs]).tolist()) == {-1.0, 0.0, 1.0}


def test_spike_driven_sees_no_sgc():
    driven = spike_driven(spiking("token", sgc=BLEND))
    ids = tokens(2, 9)
    assert torch.equal(driven.train()(ids).logits, full(driven.eval(), ids))


def test_spike_driven_needs_signed_integers():
    for spec in (None, {"class": "spikingjelly.activation_based.neuron.LIFNode"}):
        with pytest.raises(ValueError, match="signed integer"):
            spike_driven(tiny_model(neuron=spec))


# --- cache and generation ---


@pytest.mark.parametrize("membrane", [None, *MEMBRANES])
def test_prefill_in_chunks_and_decode(membrane):
    model = tiny_model() if membrane is None else spiking(membrane)
    ids = tokens(2, 80)
    expected = full(model, ids)
    for lengths in ([30] + [1] * 50, [7, 1, 2, 64, 1, 5]):
        cache, pieces = DynamicCache(config=model.config), []
        with torch.no_grad():
            for piece in ids.split(lengths, dim=1):
                output = model(piece, cache=cache)
                pieces.append(output.logits)
        assert output.cache is cache
        assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-4)


@pytest.mark.parametrize("membrane", [None, *MEMBRANES])
@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 10}]
)
def test_generate_equals_recomputing_without_cache(membrane, how):
    model = tiny_model() if membrane is None else spiking(membrane)
    ids, found = tokens(3, 7), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **how))
    assert found[0].shape == (3, 19)
    assert torch.equal(*found)
    assert len(set(found[0][:, 7:].flatten().tolist())) > 3


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_generate_from_a_left_padded_batch(membrane):
    model, ids = spiking(membrane), tokens(2, 9)
    mask = padding("left", 2, 9)
    both = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    # generate() takes a prompt's pad_token_id for padding unless it gets a mask
    alone = model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], max_new_tokens=10, do_sample=False)
    assert torch.equal(both[0, 9:], alone[0, 6:])


def test_generate_in_step_mode_s_leaves_the_stream_alone():
    model, ids = spiking("sequence"), tokens(1, 6)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    functional.set_step_mode(model, "s")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert model.backbone.stream.cache is None


# --- torch's machinery ---


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("membrane", MEMBRANES)
def test_gradient_checkpointing(membrane, reentrant):
    model, ids = spiking(membrane, sgc=BLEND, learn_threshold=True).train(), tokens(2, 20)

    def gradients():
        model.zero_grad()
        with count_spikes(model) as counts:
            model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}, counts.to_dict()

    plain, counted = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    hook = model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: calls.append(1))
    again, counted_again = gradients()
    hook.remove()
    assert len(calls) == 2, "nothing was recomputed"
    assert counted_again == counted
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(again[name], gradient, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_compile(membrane):
    model, ids = spiking(membrane, sgc=BLEND).train(), tokens(2, 6)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager")(ids, labels=ids)
    output.loss.backward()
    assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("threshold", [1.0, 0.3])
@pytest.mark.parametrize("membrane", MEMBRANES)
def test_bfloat16_autocast(membrane, threshold):
    model = spiking(membrane, threshold=threshold, sgc=BLEND).train()
    ids = tokens(2, 12)
    with recorded_spikes(model) as spikes, torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for spike in joined(spikes).values():
        assert spike.dtype is torch.bfloat16
        assert torch.equal(spike, spike.round())
        assert 1 <= spike.abs().max() <= 4


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_a_bfloat16_model_streams(membrane):
    model, ids = spiking(membrane, threshold=0.3).bfloat16(), tokens(2, 12)
    with recorded_spikes(model) as spikes:
        logits = stream(model, ids)
    assert logits.isfinite().all()
    assert all(torch.equal(s, s.round()) for s in joined(spikes).values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("membrane", MEMBRANES)
def test_copies_carry_the_stream_on(membrane, copied):
    model, ids = spiking(membrane, sgc=BLEND), tokens(2, 20)
    stream(model, ids[:, :10])
    other = copied(model)
    with torch.no_grad():
        expected = model(ids[:, 10:]).logits
        assert torch.equal(other(ids[:, 10:]).logits, expected)
    functional.reset_net(other)
    assert other.backbone.stream.cache is None
    assert model.backbone.stream.cache is not None


@pytest.mark.parametrize("membrane", MEMBRANES)
def test_detach_net_cuts_the_stream(membrane):
    model, ids = spiking(membrane), tokens(2, 8)
    functional.set_step_mode(model, "s")
    model(ids[:, :4])

    def states():
        layers = model.backbone.stream.cache.layers
        kept = [
            s for layer in layers for s in (*layer.conv_states.values(), *layer.recurrent_states.values())
        ]
        return [s for s in kept if s is not None]

    assert any(state.requires_grad for state in states())
    before = [state.clone() for state in states()]
    functional.detach_net(model)
    assert not any(state.requires_grad for state in states())
    assert all(torch.equal(a, b) for a, b in zip(states(), before, strict=True))
    model(ids[:, 4:]).logits.sum().backward()


def test_moving_a_model_forgets_its_stream():
    model = spiking("sequence")
    stream(model, tokens(2, 3))
    assert model.double().backbone.stream.cache is None


def test_a_monitor_sees_the_spikes():
    pytest.importorskip("tensorboard")
    from spikingjelly.activation_based import monitor

    import neurons

    model, ids = spiking("token"), tokens(2, 5)
    watcher = monitor.OutputMonitor(model, neurons.SILIFNode)
    with recorded_spikes(model) as spikes:
        full(model, ids)
    assert [r[0].shape for r in watcher.records] == [s[0].shape for s in spikes.values()]
    assert all(torch.equal(r[0], s[0]) for r, s in zip(watcher.records, spikes.values(), strict=True))


# --- bad input ---


def test_ids_without_a_batch():
    with pytest.raises(ValueError, match=r"must be \[batch, length\] of at least one token, got \[4\]"):
        tiny_model()(tokens(1, 4)[0])


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_token_outside_the_vocabulary(token):
    ids = tokens(1, 4)
    ids[0, 2] = token
    with pytest.raises(ValueError, match=f"outside the vocabulary of {VOCABULARY}"):
        spiking("token")(ids)


def test_integer_input_of_a_projection():
    projection = spiking("token").projections()["backbone.layers.0.mixer.in_proj"]
    with pytest.raises(TypeError, match="floating-point"):
        projection(torch.ones(1, 2, 32, dtype=torch.long))
    assert projection.neuron.step_mode == "s"


def test_without_a_cache_step_mode_s_keeps_no_state():
    model = tiny_model(neuron=LEAKY, membrane="sequence")
    input_ids = tokens(2, 12)
    with torch.no_grad():
        full = model(input_ids, use_cache=False).logits
        functional.set_step_mode(model, "s")
        model(input_ids[:, :1])  # a stream has begun
        assert torch.equal(model(input_ids, use_cache=False).logits, full)


def test_a_neuron_swapped_by_hand_is_saved(tmp_path):
    model = tiny_model(neuron=INTEGER)
    for projection in model.projections().values():
        projection.neuron = neuron.LIFNode(tau=2.0)
    functional.set_step_mode(model, "s")
    functional.set_step_mode(model, "m")  # a mode is no part of a neuron
    model.save_pretrained(tmp_path)
    input_ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids).logits
        assert torch.equal(
            SpikingMambaForCausalLM.from_pretrained(tmp_path).eval()(input_ids).logits, expected
        )
    model.backbone.layers[0].mixer.in_spikes.neuron = neuron.LIFNode(tau=3.0)
    with pytest.raises(ValueError, match="different neurons"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("field", ["learn_threshold", "shift_inputs"])
def test_what_needs_neurons_is_not_saved_without_them(tmp_path, field):
    model = tiny_model(neuron=INTEGER, **{field: True})
    for projection in model.projections().values():
        projection.neuron = None
    with pytest.raises(ValueError, match="neurons are gone"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
