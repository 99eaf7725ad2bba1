"""Thresholds that students begin with, steps of their rivals, and integers after training."""

import pytest
import torch

from spiking_mamba.model.checkpoint import load_dense
from tests.helpers.students import prepare, settings


@pytest.fixture(scope="module")
def folder(convert, tmp_path_factory):
    return prepare(convert, tmp_path_factory.mktemp("students"))


def test_thresholds_ask_for_what_is_wanted_without_first_tokens(convert, folder):
    stage = convert.student.StudentStage(
        settings(convert, folder, output=str(folder / "cal"), bits=0, rank=0)
    )
    ids = stage._calibration()
    assert ids.shape == (8, 32)
    with torch.no_grad():
        output = stage.student.eval()(ids, use_cache=False, output_accumulations=True)
    weight = sum(p.in_features * p.out_features for p in stage.student.projections().values())
    size, share = (float(c[:, 1:].mean()) / weight for c in (output.accumulations, output.fetches))
    assert max(size / 1.0, share / 0.5) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_thresholds_leave_no_more_than_a_share_cut_off(convert, folder, share):
    """By hand: every projection's inputs in a dense pass, without ends of text, over D + 1/2."""
    dense = load_dense(folder / "dense")
    ids = torch.randint(1, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    ids[:, [0, 9]] = 0
    given = [{"in_proj": 1e-3, "out_proj": 1e3} for _ in dense.backbone.layers]
    inputs = {}
    for k, block in enumerate(dense.backbone.layers):
        block.mixer.in_proj.register_forward_pre_hook(lambda _, args, k=k: inputs.__setitem__(k, args[0]))
    raised = convert.levels.uncut(given, dense, ids, 7, share)
    assert [layer["out_proj"] for layer in raised] == [1e3] * len(given)
    for k, layer in enumerate(raised):
        sizes = (inputs[k][ids != 0].abs() / layer["in_proj"]).flatten()
        beyond = (sizes > 7.5 * 1.001).float().mean()  # V_th has four digits
        assert beyond <= share
        assert (sizes > 7.5 * 0.98).float().mean() > share


def test_a_quantiser_s_steps_round_with_the_least_error(convert, folder):
    """Against every step of a fine grid, for inputs that the model was seen to have, ends of text apart."""
    dense = load_dense(folder / "dense")
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 7] = convert.tokens.END
    found = convert.levels.least_error(
        dense, ids, {"class": "neurons.SILIFNode", "args": {"max_spike_count": 3}}, 1
    )
    inputs = []
    handle = dense.backbone.layers[1].mixer.out_proj.register_forward_pre_hook(
        lambda m, a: inputs.append(a[0])
    )
    dense(ids, use_cache=False)
    handle.remove()
    x = inputs[0][:, [k for k in range(1, 16) if k != 7]].flatten().detach().double()

    def error(step):
        return float(((x / step).round().clamp(-3, 3) * step - x).square().mean())

    best = min(error(float(x.abs().max()) * k / 3000) for k in range(20, 1001))
    assert best <= error(found[1]["out_proj"]) < 1.25 * best


def test_either_side_alone_is_rounded(convert, folder):
    """A student's weights, a dense model's inputs; what a student gets is integers already."""
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    student = convert.student.make_student(settings(convert, folder), load_dense(folder / "dense")).eval()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    convert.quantise.quantise(student, 4, None, group=16)
    changed = 0
    for name, now in student.named_parameters():
        if name.endswith("proj.weight"):
            wanted = convert.rounding.rounded(before[name].view(-1, 16), 4)
            assert torch.equal(now.detach().view(-1, 16), wanted), name
            changed += not torch.equal(now, before[name])
        else:
            assert torch.equal(now, before[name]), name
    assert changed
    with pytest.raises(ValueError, match="inputs are integers as they are"):
        convert.quantise.quantise(student, None, 8)
    dense, rounded = (load_dense(folder / "dense") for _ in range(2))
    convert.quantise.quantise(rounded, None, 8)
    assert all(map(torch.equal, rounded.parameters(), dense.parameters()))
    with torch.no_grad():
        gap = (rounded(ids, use_cache=False).logits - dense(ids, use_cache=False).logits).abs().max()
    assert 0 < float(gap) < 0.3


def test_every_channel_is_looked_at(convert, folder):
    """Also where their number and the stride have a divisor in common."""
    dense = load_dense(folder / "dense")
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    width = dense.config.hidden_size
    with torch.no_grad():
        for block in dense.backbone.layers:
            block.norm.weight[: width // 2] *= 100  # large channels beside small ones
    found = convert.levels.recorded_inputs(dense, ids, most=8 * width)["backbone.layers.0.mixer.in_proj"]
    assert found.numel() == 8 * width
    large = found.view(-1, width).abs().mean(0)
    assert large[: width // 2].min() > large[width // 2 :].max()


def test_neither_ends_of_text_nor_first_places_are_looked_at(convert, folder):
    dense = load_dense(folder / "dense")
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[0, [0, 3, 9]] = ids[1, 0] = convert.tokens.END
    inputs = []
    handle = dense.backbone.layers[0].mixer.in_proj.register_forward_pre_hook(
        lambda m, a: inputs.append(a[0])
    )
    found = convert.levels.recorded_inputs(dense, ids, first=2)["backbone.layers.0.mixer.in_proj"]
    handle.remove()
    expected = [
        row[0, place] for row, kept in zip(inputs, ids, strict=True) for place in range(2, 16) if kept[place]
    ]
    assert len(expected) == 26
    assert torch.equal(found, torch.cat(expected))


def test_integers_after_training(convert, folder):
    """A token's largest value is the largest integer; weights of 8 bits have a scale for each output."""
    dense, plain = load_dense(folder / "dense"), load_dense(folder / "dense")
    x = torch.tensor([[1.27, -0.4, 0.004], [0.0, 0.0, 0.0]])
    wanted = torch.tensor([[1.27, -0.4, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(convert.quantise.rounded_tokens(x, 8), wanted)
    convert.quantise.quantise(dense, 8, 8)
    one, two = (model.backbone.layers[1].mixer.in_proj.weight for model in (dense, plain))
    assert max(len(row.unique()) for row in one) <= 255
    assert 0 < float((one - two).abs().max()) <= float(two.abs().amax(1).max()) / 127
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, right = (model(ids, use_cache=False).logits for model in (dense, plain))
    assert 0 < float((found - right).abs().max()) < 0.2 * float(right.std())
