"""Students of a converted model: what they learn, how they go on, packing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spiking_mamba.common.errors import CheckpointError, DataError
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.spikes.counting import count_spikes
from tests.helpers.students import lines, prepare, run, settings


@pytest.fixture(scope="module")
def folder(convert, tmp_path_factory):
    return prepare(convert, tmp_path_factory.mktemp("students"))


def test_loss_and_gradients_by_hand(convert, folder):
    """KL without first tokens, plus the hinges, of the model's own logits and recorded spikes."""
    stage = convert.student.StudentStage(
        settings(convert, folder, output=str(folder / "hand"), rank=None, bits=0, zeros_weight=3.0)
    )
    student, dense = stage.student, load_dense(folder / "dense")
    ids = stage.batches(0)
    limits = (0.4, 0.7), (0.2, 3.0)
    match = convert.matching.SpikeMatching(convert.matching.Teacher(dense), student, False, 2, *limits)
    loss, kl, size, share = match(ids).tolist()

    with count_spikes(student) as counts:
        output = student(ids, use_cache=False, output_accumulations=True)
    log_p, log_q = output.logits.log_softmax(-1), dense(ids, use_cache=False).logits.log_softmax(-1).detach()
    by_hand = (log_q.exp() * (log_q - log_p)).sum(-1)[:, 1:].mean()
    assert kl == pytest.approx(by_hand.item(), rel=1e-4)
    weight = sum(p.in_features * p.out_features for p in student.projections().values())
    sizes, shares = (cost[:, 1:].mean() / weight for cost in (output.accumulations, output.fetches))
    assert (size, share) == pytest.approx((sizes.item(), shares.item()), rel=1e-5)
    everywhere = output.fetches.sum() / ids.numel() / weight
    assert counts.nonzero_share == pytest.approx(everywhere.item(), rel=1e-5)
    wanted = by_hand + 0.7 * (sizes - 0.4) + 3.0 * (shares - 0.2)
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in names} >= {"in_proj", "out_proj", "norm", "in_spikes"}
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(wanted, [parameters[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_low_rank_is_all_that_changes(convert):
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)) for _ in range(2)]
    before = [[p.detach().clone() for p in module.parameters()] for module in modules]
    flat = convert.flat.LowRankParameters(modules, 2, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(p, q)
        for module, own in zip(modules, before, strict=True)
        for p, q in zip(module.parameters(), own, strict=True)
    )
    x = torch.randn(7, 6)
    pairs = flat.pairs(flat.factors.data)
    with torch.no_grad():
        for _, b in pairs.values():
            b.normal_()
    flat.round()
    leaves = {
        name: (a[1].clone().requires_grad_(), b[1].clone().requires_grad_()) for name, (a, b) in pairs.items()
    }
    (w0, c0, w1, c1) = before[1]
    (a0, b0), (a1, b1) = leaves["0.weight"], leaves["1.weight"]
    y = (x @ (w0 + b0 @ a0).T + c0) @ (w1 + b1 @ a1).T + c1
    torch.testing.assert_close(modules[1](x), y)
    y.square().sum().backward()
    modules[1](x).square().sum().backward()
    flat.collect()
    for name, (a, b) in flat.pairs(flat.factors.grad).items():
        torch.testing.assert_close(a[1], leaves[name][0].grad)
        torch.testing.assert_close(b[1], leaves[name][1].grad)
        assert not a[0].any()
    flat.clear_gradients()
    assert not flat.matrices.grad.any()
    nothing = convert.flat.LowRankParameters(modules, 0, torch.Generator())
    nothing.round()
    torch.testing.assert_close(modules[1](x), y)


def test_a_student_learns(convert, folder, tmp_path):
    """The same rows before and after; a row's KL differs from another's more than few steps change it."""
    changed = {"steps": 30, "bits": 0, "rank": None, "learning_rate": 2e-3, "output": str(tmp_path / "run")}
    stage = convert.student.StudentStage(settings(convert, folder, **changed))
    ids = torch.cat([stage.batches(step) for step in range(8)])
    stage.folder.mkdir()
    before = stage.match(ids)[1]
    stage.run()
    assert stage.match(ids)[1] < 0.9 * before


def test_a_student_goes_on_as_if_never_stopped(convert, folder, tmp_path, monkeypatch):
    whole = run(convert, settings(convert, folder, output=str(tmp_path / "whole")))
    assert lines(tmp_path / "whole")[-1]["stage"] == "student"
    halves = settings(convert, folder, output=str(tmp_path / "halves"))
    monkeypatch.setattr(convert.train.Stage, "_over", lambda self, *_: self.progress.step == 6)
    assert run(convert, halves).progress.step == 6
    monkeypatch.undo()
    stage = run(convert, halves)
    for one, two in zip(stage.flat.tensors(), whole.flat.tensors(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(convert.train.RunError, match="other settings of nonzero"):
        convert.student.StudentStage(settings(convert, folder, output=halves.output, nonzero=0.4))


def test_a_student_that_is_older_than_shift_inputs_goes_on_without(convert, folder, tmp_path):
    about = {"output": str(tmp_path / "run"), "steps": 1}
    run(convert, settings(convert, folder, **about, shift_inputs=False))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    del state["progress"]["settings"]["shift_inputs"]
    torch.save(state, tmp_path / "run" / "state.pt")
    assert run(convert, settings(convert, folder, **about, shift_inputs=False)).progress.step == 1
    with pytest.raises(convert.train.RunError, match=r"other settings of .*shift_inputs"):
        convert.student.StudentStage(settings(convert, folder, **about))


def test_a_student_whose_levels_are_in_quanta_is_read_but_does_not_go_on(convert, folder, tmp_path):
    about = {"output": str(tmp_path / "run"), "steps": 1}
    run(convert, settings(convert, folder, **about))
    path = tmp_path / "run" / "state.pt"
    state = torch.load(path, weights_only=True)
    now, _ = convert.student.load_student(path)
    del state["progress"]["settings"]["levels_in"]
    torch.save(state, path)
    with pytest.raises(convert.train.RunError, match="other settings of levels_in"):
        convert.student.StudentStage(settings(convert, folder, **about))
    read, _ = convert.student.load_student(path)
    for one, two in zip(now.projections().values(), read.projections().values(), strict=True):
        assert torch.equal(two.spikes.level, one.spikes.level * one.threshold)
        assert torch.equal(two.spikes.constant, one.spikes.constant)


def test_a_packed_student_of_older_names_is_read(convert, folder, tmp_path):
    """Its levels were in units of V_th, and called so."""
    run(convert, settings(convert, folder, output=str(tmp_path / "run")))
    convert.pack_student.pack_student(tmp_path / "run" / "state.pt", tmp_path / "packed")
    now = load_model(tmp_path / "packed").state_dict()
    index = json.loads((tmp_path / "packed" / "mixers.json").read_text())
    for name in [*index["files"], index["student"]]:
        tensors = load_file(tmp_path / "packed" / name)
        for key in [key for key in tensors if key.endswith(".level")]:
            encoder = key.removesuffix("level")
            own = tensors.pop(key)
            assert own.abs().max() > 0
            tensors[f"{encoder}shift"] = own / tensors[f"{encoder}log_threshold"].exp()
        save_file(tensors, tmp_path / "packed" / name)
    del index["sha256"]
    (tmp_path / "packed" / "mixers.json").write_text(json.dumps(index))
    read = load_model(tmp_path / "packed").state_dict()
    assert read.keys() == now.keys()
    for name, tensor in now.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-6, atol=0)


def test_a_packed_student_is_what_was_trained(convert, folder, tmp_path):
    stage = run(convert, settings(convert, folder, output=str(tmp_path / "run")))
    files = convert.pack_student.pack_student(tmp_path / "run" / "state.pt", tmp_path / "packed")
    assert {path.name for path in files} == {"mixers.json", "mixers-00.safetensors", "student.safetensors"}
    packed = load_model(tmp_path / "packed")
    restored, _ = convert.student.load_student(tmp_path / "run" / "state.pt")
    assert {len(model.projections()) for model in (packed, restored)} == {8}
    for (name, one), two in zip(packed.named_parameters(), restored.parameters(), strict=True):
        exact = "mixer" not in name or "conv" in name or "threshold" in name
        torch.testing.assert_close(one, two, rtol=0, atol=0 if exact else 2e-3, msg=name)
    for (name, one), two in zip(restored.named_parameters(), stage.student.parameters(), strict=True):
        assert torch.equal(one, two), name
    dense = load_dense(folder / "dense")
    moved = [
        not torch.equal(p, dict(dense.named_parameters()).get(n, p)) for n, p in packed.named_parameters()
    ]
    assert sum(moved) > 20
    with pytest.raises(CheckpointError, match="holds a spiking model, not a dense one"):
        load_dense(tmp_path / "packed")
    whole = run(convert, settings(convert, folder, output=str(tmp_path / "whole"), rank=None, steps=1))
    with pytest.raises(convert.train.RunError, match="MLPs were trained whole"):
        convert.pack_student.pack_student(Path(whole.settings.output, "state.pt"), tmp_path / "none")
    own = bytearray((tmp_path / "packed" / "student.safetensors").read_bytes())
    own[-9] ^= 64  # of a number
    (tmp_path / "packed" / "student.safetensors").write_bytes(own)
    with pytest.raises(CheckpointError, match=r"damaged student: student\.safetensors has another sha256"):
        load_model(tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / "mixers.json").read_text())
    del index["sha256"]["student.safetensors"]  # as older ones lack it
    (tmp_path / "packed" / "mixers.json").write_text(json.dumps(index))
    load_model(tmp_path / "packed")
    (tmp_path / "packed" / "student.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged student"):
        load_model(tmp_path / "packed")


def test_a_packed_dense_control_is_dense(convert, folder, tmp_path):
    about = {"neuron": None, "mean_abs": None, "nonzero": None, "shift_inputs": False}
    about["teacher"] = str(folder / "model")  # from its own logits it would learn nothing
    run(convert, settings(convert, folder, output=str(tmp_path / "run"), **about))
    convert.pack_student.pack_student(tmp_path / "run" / "state.pt", tmp_path / "packed")
    restored, _ = convert.student.load_student(tmp_path / "run" / "state.pt")
    for packed in (load_dense(tmp_path / "packed"), load_model(tmp_path / "packed")):
        assert packed.config.neuron is None
        for (name, one), two in zip(packed.named_parameters(), restored.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=2e-3, msg=name)
    start = dict(load_dense(folder / "dense").named_parameters())
    assert any(not torch.equal(p, start[n]) for n, p in packed.named_parameters())


def test_tokens_of_another_vocabulary(convert, tmp_path):
    np.array([3, 96], np.uint16).tofile(tmp_path / "large.bin")
    with pytest.raises(DataError, match=r"large.bin holds token 96, outside the vocabulary of 96"):
        convert.tokens.read_tokens([tmp_path / "large.bin"], 96)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="odd number of bytes"):
        convert.tokens.read_tokens([tmp_path / "odd.bin"])
    with pytest.raises(DataError, match=r"none.bin cannot be read"):
        convert.tokens.read_tokens([tmp_path / "none.bin"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"neuron": None}, "a dense control has no spikes to ask for"),
        ({"piece": 3}, "piece must divide rows=4"),
        ({"package_text": []}, "must name files"),
        ({"bits": 1}, "bits must be 0 or 2 to 8"),
    ],
)
def test_settings_that_make_no_student(convert, folder, changed, said):
    with pytest.raises(ValueError, match=said):
        settings(convert, folder, **changed)


def test_rivals(convert, folder, tmp_path):
    """A dense control learns from the Transformer; a quantiser of as many levels has no penalty."""
    dense = {"neuron": None, "mean_abs": None, "nonzero": None, "teacher": str(folder / "model")}
    stage = run(convert, settings(convert, folder, output=str(tmp_path / "dense"), **dense))
    assert not stage.student.projections()
    entries = lines(tmp_path / "dense")
    assert all(entry["loss"] == entry["kl"] > 0 for entry in entries)
    levels = {"mean_abs": None, "nonzero": None}
    stage = run(convert, settings(convert, folder, output=str(tmp_path / "levels"), steps=3, **levels))
    (entry,) = lines(tmp_path / "levels")
    assert entry["loss"] == entry["kl"]
    assert entry["nonzero"] > 0.75
