"""The penalty on spikes, against sums written out by hand; plain, compiled and checkpointed."""

import pytest
import torch
from torch import distributed
from torch._dynamo.utils import counters

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model import block as blocks
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.training.distillation_loss import DistillationLoss
from spiking_mamba.training.spike_penalty import mean_spike_size, share_of_nonzero
from tests.helpers.commands import torchrun
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


def test_share_and_its_gradient_by_hand():
    """Counts of one have slope 1, the others none; the gated norm's weight feeds out_proj's spikes alone."""
    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 0] = False
    mixer, inputs = model.backbone.layers[0].mixer, []
    mixer.out_spikes.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with recorded_spikes(model) as spikes, count_spikes(model) as counts:
        output = model(ids, output_accumulations=True)
    found = share_of_nonzero(model, output.fetches, mask)
    s_in, s_out = (calls[0] for calls in spikes.values())
    weight = 32 * 148 + 64 * 32
    expected = ((s_in[mask] != 0).sum() * 148 + (s_out[mask] != 0).sum() * 32) / 16 / weight
    assert 0.1 < float(expected) < 0.95
    torch.testing.assert_close(found.detach(), expected)
    assert share_of_nonzero(model, output.fetches).item() == pytest.approx(counts.nonzero_share, rel=1e-5)
    slope = s_out.sign() * (s_out.abs() == 1) * inputs[0] / mixer.norm.weight.detach() / 0.3
    by_hand = slope[mask].sum(0) * 32 / 16 / weight
    (gradient,) = torch.autograd.grad(found, mixer.norm.weight)
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-7)


def test_zeros_are_a_term_of_the_loss():
    teacher, ids = tiny_model(), tokens(2, 16)
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=THRESHOLD)
    plain, _, without = gradients(model, teacher, ids)
    _, parts, _ = gradients(model, teacher, ids, zeros=1.0)
    share = float(parts["nonzero"])
    total, _, found = gradients(model, teacher, ids, zeros=1.0, nonzero_target=share + 0.01)
    assert total == plain
    assert all(torch.equal(found[name], without[name]) for name in without)
    total, _, _ = gradients(model, teacher, ids, zeros=2.0, nonzero_target=share - 0.1)
    assert float(total - plain) == pytest.approx(2.0 * 0.1, rel=1e-4)


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


RANKS = """
import sys, torch
from torch import distributed
from tests.spiking_mamba.training.test_spike_penalty import ranked
distributed.init_process_group("gloo")
torch.set_num_threads(1)
ranked(distributed.get_rank(), 2, float(sys.argv[2]), sys.argv[1])
"""


def ranked(rank, processes, target, folder):
    """Loss and averaged gradients of one process's rows, kept by the first."""
    teacher = tiny_model()
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=THRESHOLD)
    rows = penalised_rows().chunk(processes)[rank]
    total, _, found = gradients(model, teacher, rows, sparsity=3.0, sparsity_target=target)
    every = [total, *found.values()]
    if processes > 1:
        for each in every:
            distributed.all_reduce(each)
            each /= processes
    if rank == 0:
        torch.save({"loss": every[0], **dict(zip(found, every[1:], strict=True))}, f"{folder}/{processes}.pt")


def penalised_rows():
    """Rows whose spikes differ in number: the first half is one token again and again."""
    ids = tokens(4, 16)
    ids[:2] = ids[0, 0]
    return ids


def test_one_hinge_for_all_processes(tmp_path):
    teacher, ids = tiny_model(), penalised_rows()
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=THRESHOLD)
    sizes = [float(gradients(model, teacher, part, sparsity=1.0)[1]["spike_size"]) for part in ids.chunk(2)]
    (tmp_path / "ranks.py").write_text(RANKS)
    mean = sum(sizes) / 2
    assert abs(sizes[0] - sizes[1]) > 0.04
    for target in (mean - 0.01, mean + 0.01):  # each lies between the two processes' own means
        done = torchrun(tmp_path / "ranks.py", tmp_path, target)
        assert done.returncode == 0, done.stderr[-3000:]
        ranked(0, 1, target, tmp_path)
        two, one = (torch.load(tmp_path / f"{number}.pt") for number in (2, 1))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_batches_that_are_accumulated_are_hinged_one_by_one():
    """As recipes/distill/README.md states: equal on one side of the target, else larger."""
    teacher, ids = tiny_model(), penalised_rows()
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=THRESHOLD)

    def losses(target):
        whole, *parts = (
            float(gradients(model, teacher, rows, sparsity=3.0, sparsity_target=target)[0])
            for rows in (ids, *ids.chunk(2))
        )
        return whole, sum(parts) / 2

    size = float(gradients(model, teacher, ids, sparsity=1.0)[1]["spike_size"])
    for target in (0.0, 10.0):
        assert losses(target)[1] == pytest.approx(losses(target)[0], rel=1e-5)
    whole, accumulated = losses(size)
    assert accumulated > whole + 0.01


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
