"""Projections whose inputs rest at levels of their own: the equation, what is counted, calibration."""

import numpy as np
import pytest
import torch

from neurons import SILIFNode
from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model.checkpoint import export, load_model
from spiking_mamba.model.projection import SpikeEncoder, SpikingProjection, spike_fed
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.energy import COSTS_45NM, energy_of_rates, model_energy
from spiking_mamba.training.calibration import calibrate_levels, calibrate_thresholds
from tests.helpers.tiny import INTEGER, tiny_model, tokens

MLPS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "mlp", "mamba", "mlp"],
    "intermediate_size": 48,
}
WIDE = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 127}}


def projection(threshold=0.5, most=3, **fields):
    torch.manual_seed(0)
    encoder = SpikeEncoder(SILIFNode(max_spike_count=most), threshold=threshold, shifts=(10, 6), **fields)
    return SpikingProjection(torch.nn.Linear(10, 6), encoder)


def test_the_equation_by_hand():
    """y = V W S(x / V - r) + b + c, counted in float64."""
    layer = projection()
    with torch.no_grad():
        layer.spikes.level.normal_()
        layer.spikes.constant.normal_()
    x = 2 * torch.randn(2, 5, 10)
    u = (x.double().numpy() - layer.spikes.level.detach().double().numpy()) / 0.5
    s = np.clip(np.sign(u) * np.ceil(np.abs(u) - 0.5), -3, 3)
    weight, bias, constant = (
        t.detach().double().numpy() for t in (layer.weight, layer.linear.bias, layer.spikes.constant)
    )
    expected = 0.5 * s @ weight.T + bias + constant
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(s).max() >= 1


@pytest.mark.parametrize("learned", [False, True])
def test_what_rests_fires_nothing_and_changes_no_output(learned):
    layer, levels = projection(learn_threshold=learned), 3 * torch.randn(10)
    layer.rest_at(levels)
    spikes = layer.spikes(levels.expand(1, 4, 10))
    assert not spikes.emitted.any()
    dense = torch.nn.functional.linear(levels, layer.weight, layer.linear.bias)
    torch.testing.assert_close(layer(levels.expand(1, 4, 10)), dense.expand(1, 4, 6))
    near = levels + 0.1 * torch.randn(1, 4, 10)  # of fine steps, what is near is as dense
    fine = projection(threshold=1e-3, most=10_000)
    fine.rest_at(levels)
    dense = torch.nn.functional.linear(near, fine.weight, fine.linear.bias)
    torch.testing.assert_close(fine(near), dense, rtol=0, atol=5e-3)


def test_levels_stay_when_a_threshold_is_set():
    layer = projection()
    layer.rest_at(torch.ones(10))
    layer.spikes.fix_threshold(0.25)
    assert torch.equal(layer.spikes.level, torch.ones(10))
    assert torch.equal(layer.spikes.shift, torch.full((10,), 4.0))
    layer.spikes.reset_parameters()
    assert not layer.spikes.level.any()


@pytest.mark.parametrize("far", [0.0, 1.0, 1000.0])
def test_a_learned_threshold_moves_no_level(far):
    """Its gradient is the one of unshifted inputs, wherever channels rest, and they go on resting."""
    layer, plain = projection(learn_threshold=True), projection(learn_threshold=True)
    levels = far * torch.tensor([1.0, -1.0] * 5)
    layer.rest_at(levels)
    x, wanted = 2 * torch.randn(2, 5, 10), torch.randn(2, 5, 6)
    gradients = []
    for one, given in ((layer, x + levels), (plain, x)):
        (one(given) * wanted).sum().backward()
        gradients.append(one.spikes.log_threshold.grad)
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)  # x + 1000 has lost some of x
    with torch.no_grad():
        layer.spikes.log_threshold += 0.01
    assert not layer.spikes(levels.expand(1, 4, 10)).emitted.any()
    dense = torch.nn.functional.linear(levels, layer.weight, layer.linear.bias)
    torch.testing.assert_close(layer(levels.expand(1, 4, 10)), dense.expand(1, 4, 6))


@pytest.mark.parametrize("learned", [False, True])
def test_states_of_the_older_name_say_the_same(learned):
    """``shift`` was in units of the V_th beside it, learned or not, which is not always the reader's."""
    one, other = projection(learn_threshold=learned), projection(learn_threshold=learned)
    one.rest_at(3 * torch.randn(10))
    with torch.no_grad():
        one.spikes.constant.normal_()
        if learned:
            one.spikes.log_threshold += 0.7
    state = one.state_dict()
    state["spikes.shift"] = state.pop("spikes.level") / torch.as_tensor(one.threshold)
    other.load_state_dict(state)
    x = 2 * torch.randn(2, 5, 10)
    torch.testing.assert_close(other.spikes.level, one.spikes.level)
    torch.testing.assert_close(other(x), one(x))
    assert "spikes.shift" in state


def test_only_where_inputs_are_shifted():
    plain = tiny_model(neuron=INTEGER)
    with pytest.raises(ValueError, match="shift_inputs"):
        next(iter(plain.projections().values())).rest_at(torch.zeros(32))
    with pytest.raises(ValueError, match="shift_inputs"):
        tiny_model(shift_inputs=True)
    with pytest.raises(ValueError, match="finite"):
        projection().rest_at(torch.full((10,), float("nan")))
    assert "shifted" in repr(projection())
    assert not any(name.endswith(("level", "constant")) for name in plain.state_dict())


def test_a_student_that_is_exported_says_the_same(tmp_path):
    fields = {"shift_inputs": True, "learn_threshold": True, "threshold": 0.25}
    model, ids = tiny_model(neuron=INTEGER, **MLPS, **fields), tokens(2, 12)
    with torch.no_grad():
        for p in model.projections().values():
            p.rest_at(0.5 * torch.randn(p.in_features))
        expected = model(ids).logits
        export(model, tmp_path / "out")
        loaded = load_model(tmp_path / "out").eval()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    half = SpikingMambaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    kept = [t for name, t in half.state_dict().items() if name.endswith(("level", "constant"))]
    assert len(kept) == 16
    assert {t.dtype for t in kept} == {torch.float32}


def test_additions_are_counted():
    """An input more and an output more than the D additions of an input, of every projection and token."""
    plain, shifted = (tiny_model(neuron=INTEGER, **MLPS, shift_inputs=shift) for shift in (False, True))
    found, energies = [], []
    for model in (plain, shifted):
        with torch.no_grad(), count_spikes(model) as counts:
            model(tokens(2, 12))
        found.append((counts + counts).neuron_steps)
        energies.append(model_energy(counts, model.config)["operations_per_token"]["neurons"])
    numbers = sum(p.in_features + p.out_features for p in shifted.projections().values())
    assert found[1] - found[0] == 2 * 24 * numbers
    assert energies[1] - energies[0] == numbers


def test_levels_are_moved_by_the_spiking_model_alone():
    """They are weights that no dense model and no rival reads, once a pass."""
    plain, shifted = (tiny_model(neuron=INTEGER, **MLPS, shift_inputs=shift) for shift in (False, True))
    numbers = sum(p.in_features + p.out_features for p in shifted.projections().values())
    one, two = (
        energy_of_rates(m.config, 1.0, 0.5)["with_memory"]["decode"]["fp32"] for m in (plain, shifted)
    )
    fp32 = COSTS_45NM["fp32"]
    more = numbers * (fp32.width * fp32.byte + fp32.ac)
    assert two["spiking_pj_per_token"] - one["spiking_pj_per_token"] == pytest.approx(more)
    for rival in ("dense", "quantised", "quantised_sparse"):
        assert two[f"{rival}_pj_per_token"] == one[f"{rival}_pj_per_token"]


def teacher_of_offsets():
    """A dense model whose channels lie off zero, embeddings first."""
    teacher = tiny_model(**MLPS)
    with torch.no_grad():
        teacher.backbone.embeddings.weight += 3.0 * torch.randn(
            32, generator=torch.Generator().manual_seed(3)
        )
    return teacher


def test_levels_are_medians():
    teacher, ids = teacher_of_offsets(), tokens(3, 21)
    levels = calibrate_levels(teacher, ids, first=1)
    inputs = {}
    for name, p in spike_fed(teacher):
        p.linear.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.no_grad():
        teacher(ids, use_cache=False)
    assert levels.keys() == inputs.keys()
    for name, x in inputs.items():
        ordered = np.sort(x[:, 1:].reshape(60, -1).numpy(), axis=0)
        np.testing.assert_array_equal(levels[name].numpy(), ordered[29])
    with pytest.raises(ValueError, match="dense"):
        calibrate_levels(tiny_model(neuron=INTEGER), ids)
    with pytest.raises(ValueError, match="nothing is left"):
        calibrate_levels(teacher, ids[:, :1], first=1)
    with torch.no_grad():
        teacher.backbone.embeddings.weight[ids[1, 7]] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.in_proj has inputs .* not finite"):
        calibrate_levels(teacher, ids)


def test_shifted_inputs_lose_less_for_as_many_spikes():
    teacher, ids = teacher_of_offsets(), tokens(8, 64)
    found = []
    with torch.no_grad():
        right = teacher(ids, use_cache=False).logits.log_softmax(-1)
    for levels in (None, calibrate_levels(teacher, ids)):
        threshold = calibrate_thresholds(teacher, ids, 1.0, WIDE, levels=levels)
        shifted = {"shift_inputs": levels is not None}
        student = SpikingMambaForCausalLM.from_dense(teacher, WIDE, threshold=threshold, **shifted).eval()
        student.rest_at(levels or {})
        with torch.no_grad(), count_spikes(student) as counts:
            other = student(ids, use_cache=False).logits.log_softmax(-1)
        assert counts.mean_abs == pytest.approx(1.0, abs=0.02)
        found.append(float((right.exp() * (right - other)).sum(-1).mean()))
    assert found[1] < 0.5 * found[0]
