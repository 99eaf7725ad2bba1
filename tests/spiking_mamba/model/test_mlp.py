"""MLP blocks between mixers: the equation, caches, and whatever a projection goes through."""

import pytest
import torch
from spikingjelly.activation_based import functional
from torch.nn import functional as F

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, spike_driven
from spiking_mamba.model.conversion import fold_thresholds
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.energy import model_energy, operations
from tests.helpers.tiny import INTEGER, LEAKY, SHAPE, tiny_model, tokens

KINDS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "mlp", "mamba", "mlp"],
    "intermediate_size": 48,
}


def mixed(**fields):
    return tiny_model(**KINDS | fields).eval()


def test_a_dense_block_by_hand():
    block = mixed().backbone.layers[1]
    x = torch.randn(2, 7, SHAPE["hidden_size"])
    weight = block.mixer.in_proj.weight
    u = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * block.norm.weight
    gate, up = u @ weight[:48].T, u @ weight[48:].T
    expected = x + (F.silu(gate) * up) @ block.mixer.out_proj.weight.T
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("neuron", "shifted"), [(None, False), (INTEGER, False), (INTEGER, True), (LEAKY, False), (LEAKY, True)]
)
def test_full_cached_streamed_and_captured_agree(neuron, shifted):
    fields = {"membrane": "sequence" if neuron is LEAKY else "token", "shift_inputs": shifted}
    model, ids = mixed(neuron=neuron, threshold=0.5, **fields), tokens(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:11], cache=first.cache)
        third = model(ids[:, 11:], cache=second.cache)
        cached = torch.cat([first.logits, second.logits, third.logits], 1)
        torch.testing.assert_close(cached, expected, rtol=1e-3, atol=1e-3)
        functional.set_step_mode(model, "s")
        streamed = torch.cat([model(piece).logits for piece in ids.split(1, dim=1)], 1)
        functional.reset_net(model)
        torch.testing.assert_close(streamed, expected, rtol=1e-3, atol=1e-3)
        functional.set_step_mode(model, "m")
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    text = model.generate(ids, max_new_tokens=6, **settings)
    beams = model.generate(ids, max_new_tokens=4, num_beams=3, **settings)
    again = ids
    for _ in range(6):
        with torch.no_grad():
            again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, again)
    model.capture_decoding()
    assert torch.equal(model.generate(ids, max_new_tokens=6, **settings), text)
    assert len(model.graphs) == 1
    assert beams.shape[1] <= ids.shape[1] + 4


def test_a_stream_whose_batch_changes():
    """An MLP in front has no convolution to tell the batch by."""
    model = mixed(layers_block_type=["mlp", "mamba", "mlp", "mamba"])
    functional.set_step_mode(model, "s")
    with torch.no_grad():
        model(tokens(2, 1))
        with pytest.raises(ValueError, match="holds 2 sequences, this call has 3"):
            model(tokens(3, 1))


@pytest.mark.parametrize("shifted", [False, True])
def test_counted_driven_folded_saved(tmp_path, shifted):
    threshold = {"in_proj": 0.5, "out_proj": 0.25}
    model, ids = mixed(neuron=INTEGER, threshold=threshold, shift_inputs=shifted), tokens(2, 12)
    with torch.no_grad():
        with count_spikes(model) as counts:
            expected = model(ids).logits
        names = [f"backbone.layers.{i}.mixer.{p}" for i in range(4) for p in ("in_proj", "out_proj")]
        assert list(counts.projections) == names
        assert all(counts.projections[name].total > 0 for name in names)
        torch.testing.assert_close(spike_driven(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)
        folded = fold_thresholds(model)
        assert {p.threshold for p in folded.projections().values()} == {1.0}
        assert torch.equal(folded(ids).logits, expected)
        model.save_pretrained(tmp_path)
        loaded = SpikingMambaForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids).logits, expected)


def test_energy_by_hand():
    """Hidden 32, inner 64, MLP 48: two blocks of each kind."""
    model, ids = mixed(neuron=INTEGER), tokens(2, 12)
    with torch.no_grad(), count_spikes(model) as counts:
        model(ids)
    plain = operations(tiny_model().config)  # two mixers and no MLP
    found = operations(model.config)
    more = {"in_proj": 2 * 32 * 96, "out_proj": 2 * 48 * 32, "norms": 2 * 3 * 32, "additions": 2 * 32}
    assert found.pop("mlp") == 2 * 2 * 48
    assert found == {name: number + more.get(name, 0) for name, number in plain.items()}
    energy = model_energy(counts, model.config, measured_in="float32")
    assert energy["model"]["fp32"]["gain"] > 1
    assert [row["name"] for row in energy["layers"]] == list(counts.projections)


def test_gradients_reach_everything():
    fields = {"learn_threshold": True, "shift_inputs": True}
    model, ids = mixed(neuron=INTEGER, threshold=0.5, **fields).train(), tokens(2, 12)
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_block_type": ["mamba", "mlp"]}, "lists 2 layers, the model has 4"),
        ({"layers_block_type": ["mamba", "attention", "mamba", "mlp"]}, "got 'attention'"),
        ({"intermediate_size": None}, "set both or none"),
        ({"layers_block_type": ["mamba"] * 4}, "set both or none"),
        ({"layers_block_type": None}, "layers_block_type has none"),
        ({"intermediate_size": 0}, "must be positive"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SpikingMambaConfig(**SHAPE | KINDS | fields)
