"""The penalty on spikes, against sums written out by hand; plain, compiled and checkpointed."""

import pytest
import torch
from torch._dynamo.utils import counters

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model import block as blocks
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.training.distillation_loss import DistillationLoss
from spiking_mamba.training.spike_penalty import mean_spike_size
from tests.helpers.tiny import INTEGER, recorded_spikes, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")

THRESHOLD = {"in_proj": 0.7, "out_proj": 0.3}


def student(**fields):
    return tiny_model(neuron=INTEGER, threshold=THRESHOLD, **fields).train()


@pytest.fixture
def compiled(monkeypatch):
    """Blocks through dynamo and autograd's tracer, without waiting for a C++ compiler."""
    torch._dynamo.reset()
    counters.clear()
    function = torch.compile(blocks.SpikingMambaBlock._run, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(blocks, "_compiled_block", lambda: function)
    yield
    torch._dynamo.reset()


def test_value_and_gradient_by_hand():
    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    mixer, inputs = model.backbone.layers[0].mixer, []
    mixer.out_spikes.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with recorded_spikes(model) as spikes:
        output = model(ids, output_accumulations=True)
    found = mean_spike_size(model, output.accumulations, mask)

    s_in, s_out = (calls[0] for calls in spikes.values())  # [B, L, 32] and [B, L, 64]
    assert (mixer.in_proj.out_features, mixer.out_proj.out_features) == (148, 32)
    weight = 32 * 148 + 64 * 32
    expected = (s_in[mask].abs().sum() * 148 + s_out[mask].abs().sum() * 32) / 14 / weight
    assert 0.1 < float(expected) < 4  # not the value of a silent or a saturated network
    torch.testing.assert_close(found.detach(), expected)

    # The gated norm's weight g feeds the out_proj's spikes alone: u = g * y / 0.3, slope 1 where |u| <= 4.
    g, u = mixer.norm.weight.detach(), inputs[0] / 0.3
    slope = s_out.sign() * (u.abs() <= 4) * inputs[0] / g / 0.3
    by_hand = slope[mask].sum(0) * 32 / 14 / weight
    (gradient,) = torch.autograd.grad(found, mixer.norm.weight)
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-7)


def test_equals_what_count_spikes_reports():
    model, ids = student(), tokens(3, 16)
    with count_spikes(model) as spikes:
        output = model(ids, output_accumulations=True)
    assert float(mean_spike_size(model, output.accumulations).detach()) == pytest.approx(
        spikes.mean_abs, rel=1e-5
    )


def gradients(model, teacher, ids, **loss):
    model.zero_grad()
    arguments = {"input_ids": ids, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        theirs = teacher(**arguments)
    ours = model(**arguments, output_accumulations=True)
    total, parts = DistillationLoss(**loss)(model, teacher, ours, theirs, input_ids=ids, labels=ids)
    total.backward()
    return (
        total.detach(),
        parts,
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("sgc", [None, {"mode": "blend"}, {"mode": "replace"}], ids=str)
def test_compiled_and_checkpointed(compiled, sgc):
    teacher, ids = tiny_model(), tokens(2, 16)
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=THRESHOLD, sgc=sgc)
    plain, parts, expected = gradients(model, teacher, ids, sparsity=3.0)
    without = gradients(model, teacher, ids)[2]
    assert "spike_size" in parts
    assert any(not torch.allclose(expected[name], without[name], rtol=0.05) for name in expected)
    for compiles, checkpoints in ((True, False), (False, True), (True, True)):
        model.compile_blocks(compiles)
        if checkpoints:
            model.gradient_checkpointing_enable()
        total, _, found = gradients(model, teacher, ids, sparsity=3.0)
        torch.testing.assert_close(total, plain)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_reentrant_checkpointing():
    teacher, ids = tiny_model(), tokens(2, 16)
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER)
    total, _, expected = gradients(model, teacher, ids, sparsity=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    again, _, found = gradients(model, teacher, ids, sparsity=1.0)
    torch.testing.assert_close(again, total)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_below_its_target_nothing_is_penalised():
    teacher, ids = tiny_model(), tokens(2, 16)
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=THRESHOLD)
    plain, _, without = gradients(model, teacher, ids)
    _, parts, _ = gradients(model, teacher, ids, sparsity=1.0)
    size = float(parts["spike_size"])
    total, _, found = gradients(model, teacher, ids, sparsity=1.0, sparsity_target=size + 0.01)
    assert total == plain
    assert all(torch.equal(found[name], without[name]) for name in without)
    total, _, _ = gradients(model, teacher, ids, sparsity=2.0, sparsity_target=size - 0.25)
    assert float(total - plain) == pytest.approx(2.0 * 0.25, rel=1e-4)


def test_sizes_that_were_not_asked_for():
    model = student()
    assert model(tokens(1, 8)).accumulations is None
    for each, accumulations in ((model, None), (tiny_model(), torch.ones(1, 8))):
        with pytest.raises(ValueError, match="output_accumulations"):
            mean_spike_size(each, accumulations)


@pytest.mark.parametrize("wrong", [{"sparsity": -1.0}, {"sparsity_target": -0.1}])
def test_negative_weights_are_refused(wrong):
    with pytest.raises(ValueError, match="sparsity"):
        DistillationLoss(**wrong)


def test_thresholds_are_not_compiled_in(compiled):
    teacher, ids = tiny_model(), tokens(2, 16)
    graphs = []
    for threshold in (0.5, 0.25, {"in_proj": 0.7, "out_proj": 0.3}, [0.4, {"in_proj": 0.6, "out_proj": 1.5}]):
        model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=threshold)
        plain = gradients(model, teacher, ids)
        model.compile_blocks()
        found = gradients(model, teacher, ids)
        torch.testing.assert_close(found[0], plain[0])
        for name, gradient in found[2].items():
            torch.testing.assert_close(gradient, plain[2][name], rtol=1e-4, atol=1e-5, msg=name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 4
