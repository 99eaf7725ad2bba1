"""Students of a converted model: what they learn, what their spikes cost, rivals, scores, packing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from spiking_mamba.common.errors import CheckpointError, DataError
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.records import read_records
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.evaluation.outcomes import read_outcomes, write_outcomes
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.spikes.counting import count_spikes
from tests.helpers.commands import run as run_command
from tests.helpers.converting import FOLDER, recipe_modules, transformer, write_prepared

ROOT = FOLDER.parents[1]
NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 16}}


@pytest.fixture(scope="module")
def convert():
    with recipe_modules() as modules:
        yield modules


@pytest.fixture(scope="module")
def folder(convert, tmp_path_factory):
    """A Transformer, data as prepare.py leaves them, and the Transformer's Mamba2 in 4 bits."""
    folder = tmp_path_factory.mktemp("students")
    model = transformer()
    model.save_pretrained(folder / "model")
    write_prepared(folder / "data")
    dense = convert.conversion.convert(convert.llama.Llama.from_transformers(model))
    with torch.no_grad():
        for block in dense.backbone.layers:  # mixers say other things than attention does
            block.mixer.in_proj.weight.mul_(1.1)
    convert.packing.pack_mixers(dense, folder / "dense", str(folder / "model"), 4, 16)
    return folder


def settings(convert, folder, **changed):
    defaults = {
        "output": str(folder / "63"),
        "start": str(folder / "dense"),
        "own_text": [],
        "package_text": [str(folder / "data" / "package_text.bin")],
        "neuron": NEURON,
        "mean_abs": 1.0,
        "nonzero": 0.5,
        "rank": 4,
        "group": 16,
        "rows": 4,
        "piece": 2,
        "length": 32,
        "steps": 12,
        "log_every": 3,
        "warmup": 2,
        "compiles": False,
        "learning_rate": 5e-3,
    }
    defaults |= {"shift_inputs": changed.get("neuron", NEURON) is not None}
    return convert.student.StudentSettings(**defaults | changed)


def run(convert, settings):
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    stage = convert.student.StudentStage(settings)
    stage.run()
    return stage


def lines(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


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


def test_ability_and_what_is_kept_of_it(convert, tmp_path):
    names = np.array(["piqa", "lambada_openai", "sciq"])
    rows = [[0, item, choice, item % 4 == 0, 1, 1, 1] for item in range(8) for choice in range(2)]
    rows += [[1, item, 0, -1, 1, 1, 1] for item in range(4)]
    rows += [[2, item, choice, 3, 1, 1, 1] for item in range(4) for choice in range(4)]
    guess = convert.ability.guessing({"names": names, "requests": np.array(rows, np.int32)})
    assert guess == {"piqa": 0.75, "lambada_openai": 0.0, "sciq": 0.25}
    random = np.random.default_rng(0)
    teacher = {n: {m: random.random(4000) < 0.9 for m in ("acc", "acc_norm")} for n in names}
    student = {n: {m: v & (random.random(4000) < 0.9) for m, v in ms.items()} for n, ms in teacher.items()}
    by_hand = [sum(each[n]["acc"].mean() - guess[n] for n in ("piqa", "sciq")) for each in (student, teacher)]
    assert convert.ability.ability(student, guess, ["piqa", "sciq"]) == pytest.approx(by_hand[0])
    found = convert.ability.relative_ability(student, teacher, guess, ["piqa", "sciq"])
    assert found["kept"]["share"] == pytest.approx(by_hand[0] / by_hand[1], abs=1e-4)
    gap = teacher["piqa"]["acc"].astype(float) - student["piqa"]["acc"]
    assert found["gap"]["gap"] == pytest.approx(100 * gap.mean(), abs=1e-2)
    half = 1.96 * gap.std() / np.sqrt(4000) * 100
    assert found["gap"]["high"] - found["gap"]["low"] == pytest.approx(2 * half, rel=0.1)
    write_outcomes(tmp_path / "items.npz", student)
    back = read_outcomes(tmp_path / "items.npz")
    assert all(np.array_equal(back[n][m], v) for n, ms in student.items() for m, v in ms.items())
    with pytest.raises(ValueError, match="piqa has 3 and 4000 items"):
        convert.ability.relative_ability(student, {"piqa": {"acc": np.ones(3, bool)}}, guess, ["piqa"])


def test_tokens_of_another_vocabulary(convert, tmp_path):
    np.array([3, 96], np.uint16).tofile(tmp_path / "large.bin")
    with pytest.raises(DataError, match=r"large.bin holds token 96, outside the vocabulary of 96"):
        convert.tokens.read_tokens([tmp_path / "large.bin"], 96)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="odd number of bytes"):
        convert.tokens.read_tokens([tmp_path / "odd.bin"])
    with pytest.raises(DataError, match=r"none.bin cannot be read"):
        convert.tokens.read_tokens([tmp_path / "none.bin"])


def command(script, yaml, *arguments):
    return run_command(ROOT / script, ROOT / "recipes/distill" / yaml, *arguments)


def test_from_training_to_scores(folder, tmp_path):
    """The commands of the page, at a small size: train, pack, score the teacher, the student and rivals."""
    start, run = f"start={folder}/dense", tmp_path / "run"
    small = [
        start,
        "own_text=[]",
        f"package_text=[{folder}/data/package_text.bin]",
        "rows=4",
        "piece=2",
        "group=16",
    ]
    small += ["length=32", "steps=4", "log_every=2", "compiles=false", "rank=4", f"output={run}"]
    done = command("recipes/convert/student.py", "smollm2-40.yaml", *small)
    assert done.returncode == 0, done.stderr
    assert lines(run)[-1]["nonzero"] == pytest.approx(0.41, abs=0.03)
    packed = tmp_path / "packed"
    done = command(
        "recipes/convert/pack_student.py", "pack.yaml", f"state={run}/state.pt", f"output={packed}"
    )
    assert "bytes in all" in done.stdout, done.stderr
    scores = tmp_path / "scores"
    common = [f"source={folder}/model", f"teacher={folder}/dense", f"data={folder}/data", f"output={scores}"]
    common += ["passages=2", "sets=[piqa,lambada_openai]"]
    rows = {
        "teacher": [f"model={folder}/dense", "against=null"],
        "s63": [f"model={run}/state.pt", f"against={scores}/teacher.npz"],
        "packed": [f"model={packed}", f"against={scores}/teacher.npz", f"reference={packed}"],
        "w4a8": [f"model={folder}/dense", "weights=4", "activations=8", f"against={scores}/teacher.npz"],
    }
    for name, arguments in rows.items():
        done = command("recipes/convert/score_student.py", "score.yaml", f"name={name}", *common, *arguments)
        assert done.returncode == 0, done.stderr
    found = {
        entry["name"]: entry for entry in map(json.loads, (scores / "scores.jsonl").read_text().splitlines())
    }
    assert found["teacher"]["teacher_kl_web"] == pytest.approx(0, abs=1e-4)
    assert found["s63"]["teacher_kl_web"] > 0.01
    assert found["packed"]["teacher_kl_web"] == pytest.approx(found["s63"]["teacher_kl_web"], rel=0.02)
    assert found["w4a8"]["teacher_kl_web"] > 0
    assert found["packed"]["reference_kl_web"] == pytest.approx(0, abs=1e-4)
    assert not any(key.startswith("reference") for key in found["s63"])
    text, first, both = (found["s63"]["spikes"][key] for key in ("text", "first", "both"))
    assert first["tokens"] == 6 * 2 + 5  # a row for each choice, and for each continuation
    assert both["tokens"] == text["tokens"] + first["tokens"]
    assert 0.2 < text["nonzero"] < 0.6
    assert len(found["s63"]["projections"]) == 8
    assert found["s63"]["gap"]["low"] <= found["s63"]["gap"]["gap"] <= found["s63"]["gap"]["high"]


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


def test_the_shipped_student_is_the_one_that_was_scored(convert, monkeypatch):
    """Its index is of the run, its files are those of the index, and its card says what they scored."""
    monkeypatch.chdir(ROOT)
    settings = convert.student_card.parse_settings(
        convert.student_card.StudentCardSettings, ["recipes/convert/student_card.yaml"]
    )
    folder = Path(settings.model)
    (entry,) = [each for each in read_records(Path(settings.records)) if each["name"] == settings.name]
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == convert.student_card.head(entry, folder.name).to_dict()
    for task, found in entry["tasks"].items():
        assert f"| {task} | {BENCHMARK_SETS[task].main} | {found['items']:,} |" in card.text
    index = json.loads((folder / "mixers.json").read_text())
    files = [*index["files"], index["student"]]
    assert index["sha256"] == {name: file_sha256(folder / name) for name in files}
    log = Path(settings.records).with_name(f"{settings.name.removesuffix('-packed')}-training.jsonl")
    last = list(read_records(log))[-1]
    assert [last[key] for key in ("step", "tokens")] == [index["progress"][key] for key in ("step", "tokens")]
    assert f"{last['tokens'] / 1e6:.1f} million tokens in {last['seconds']:.0f} seconds on two" in card.text
    recipe = yaml.safe_load(Path("recipes/distill/smollm2-63.yaml").read_text())
    apart = ("own_text", "package_text", "levels_in")  # the last is no setting
    asked = {key: value for key, value in index["progress"]["settings"].items() if key not in apart}
    assert asked == {key: recipe[key] for key in asked}
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert max(sizes) <= 16e6
    assert sum(sizes) <= 64e6
    assert f"({sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.0f} MB)" in card.text


def test_own_text_and_passages_as_text(convert, folder, tmp_path, monkeypatch, capsys):
    """What stands between ends of text, and rows of passages, by a tokenizer whose tokens are words."""

    class Words:
        def batch_decode(self, rows):
            return [" ".join(map(str, row)) for row in rows]

    np.array([0, 5, 6, 0, 0, 7, 0], dtype=np.uint16).tofile(tmp_path / "own-0.bin")
    np.array([8, 9], dtype=np.uint16).tofile(tmp_path / "own-1.bin")
    monkeypatch.setattr(convert.decode_text, "load_source_tokenizer", lambda name: Words())
    own = f"own_text=[{tmp_path}/own-0.bin,{tmp_path}/own-1.bin]"
    given = [str(FOLDER / "decode_text.yaml"), "source=any", own]
    given += [f"data={folder / 'data'}", f"output={tmp_path / 'text'}"]
    monkeypatch.setattr("sys.argv", ["decode_text.py", *given])
    convert.decode_text.main()
    own = list(read_records(tmp_path / "text" / "train.jsonl"))
    assert own == [{"text": text, "source": "own"} for text in ("5 6", "7", "8 9")]
    kept = np.load(folder / "data" / "evaluated.npz")
    rows = list(read_records(tmp_path / "text" / "held_out.jsonl"))
    for name in ("openwebtext", "wikipedia"):
        tokens = kept[f"{name}-passages"]
        texts = [row["text"] for row in rows if row["source"] == name]
        assert texts == [
            " ".join(map(str, tokens[k * 511 : k * 511 + 511])) for k in range(len(tokens) // 511)
        ]
    assert "3 documents, 5 tokens" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["decode_text.py", *given, "documents=2"])
    convert.decode_text.main()
    assert [row["text"] for row in read_records(tmp_path / "text" / "train.jsonl")] == ["5 6", "7"]
    assert list(read_records(tmp_path / "text" / "held_out.jsonl")) == rows


def test_what_hardly_changes_weights_hardly_moves_a_dense_model(convert, folder, tmp_path):
    """Against logits worked out here; the noise is of the size asked for, and nothing else is changed."""
    dense = load_dense(folder / "dense")
    ids = convert.perturb.passages(str(folder / "data" / "evaluated.npz"), 1)
    kept = np.load(folder / "data" / "evaluated.npz")
    assert ids[:, 0].tolist() == [0, 0]
    assert ids[1, 1:].tolist() == kept["wikipedia-passages"][:511].tolist()
    changed = convert.perturb.perturbed(dense, 1e-3, 0)
    ratios = []
    for (name, one), two in zip(changed.named_parameters(), dense.parameters(), strict=True):
        if name.endswith("proj.weight"):
            ratios.append((one / two)[two != 0].detach() - 1)
        else:
            assert torch.equal(one, two), name
    assert float(torch.cat([r.flatten() for r in ratios]).std()) == pytest.approx(1e-3, rel=0.05)
    own, moved = (convert.perturb.all_logits(model, ids, "") for model in (dense, changed))
    with torch.no_grad():
        wanted = [model(input_ids=ids, use_cache=False).logits[:, 1:].double() for model in (dense, changed)]
    torch.testing.assert_close(own.double(), wanted[0], rtol=1e-4, atol=1e-4)
    p, q = (logits.log_softmax(-1) for logits in wanted)
    found = convert.perturb.measures(moved, own, own, ids)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05, abs=1e-6)
    assert found["kl"] == found["teacher_kl"]
    nats = torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), ids[:, 2:].flatten())
    assert found["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-4)
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    with pytest.raises(convert.perturb.RunError, match="no 1000 rows"):
        convert.perturb.passages(str(folder / "data" / "evaluated.npz"), 1000)
