"""Distillation: the loss against plain Python, the trainer, whole runs that stop and go on."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.errors import CheckpointError, DataError, RunError
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.training.arguments import training_arguments
from spiking_mamba.training.calibration import calibrate_levels
from spiking_mamba.training.distillation import DistillationSettings, DistillationTrainer, distill
from spiking_mamba.training.distillation_loss import (
    TERMS,
    DistillationLoss,
    Term,
    compared_states,
    hidden_loss,
    token_mask,
)
from spiking_mamba.training.pretraining import PretrainingSettings, pretrain
from spiking_mamba.training.rows import collate
from tests.helpers.commands import torchrun
from tests.helpers.tiny import INTEGER, LEAKY, VOCABULARY, recorded_spikes, tiny_config, tiny_model, tokens

REPOSITORY = Path(__file__).parents[3]


# --- the loss, in plain Python ---


def softmax(row, temperature=1.0):
    row = [x / temperature for x in row]
    total = sum(math.exp(x - max(row)) for x in row)
    return [math.exp(x - max(row)) / total for x in row]


def plain_kl(student, teacher, temperature):
    """KL(teacher || student) of one position, times the temperature squared."""
    pairs = zip(softmax(teacher, temperature), softmax(student, temperature), strict=True)
    return temperature**2 * sum(p * math.log(p / q) for p, q in pairs)


def plain_hidden(student, teacher):
    pairs = zip(softmax(student), softmax(teacher), strict=True)
    return 0.5 * sum((p - q) ** 2 for p, q in pairs)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    teacher = tiny_model()
    student = tiny_model(neuron=INTEGER, threshold=0.7)
    return student, teacher


def batch(labelled=True):
    """Three rows: whole, left-padded and right-padded, some labels masked."""
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 7:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, 4] = -100
    return {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if labelled else {})


def counted(inputs):
    """(row, position) that count, spelled out: a token, and its successor has a label."""
    found = []
    for row in range(3):
        for t in range(9):
            if not inputs["attention_mask"][row, t]:
                continue
            if "labels" in inputs and (t == 8 or inputs["labels"][row, t + 1] == -100):
                continue
            found.append((row, t))
    return found


def outputs(student, teacher, inputs):
    arguments = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = teacher(**arguments, output_hidden_states=True)
    return student(**arguments, output_hidden_states=True), theirs


@pytest.mark.parametrize("labelled", [True, False])
def test_the_mask(labelled):
    inputs = batch(labelled)
    mask = token_mask(inputs["input_ids"], inputs["attention_mask"], inputs.get("labels"))
    assert [tuple(p) for p in mask.nonzero().tolist()] == counted(inputs)
    assert len(counted(inputs)) == (18 if labelled else 22)
    assert token_mask(inputs["input_ids"], None, None).all()


@pytest.mark.parametrize("states", ["block", "mixer"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_in_plain_python(pair, temperature, states):
    (student, teacher), inputs = pair, batch()
    ours, theirs = outputs(student, teacher, inputs)
    loss = DistillationLoss(temperature, kl=0.7, hidden=3.0, hidden_states=states, cross_entropy=0.4)
    total, parts = loss(student, teacher, ours, theirs, **inputs)
    where = counted(inputs)
    kl = ce = 0.0
    for row, t in where:
        own, other = ours.logits[row, t].tolist(), theirs.logits[row, t].tolist()
        kl += plain_kl(own, other, temperature) / len(where)
        ce -= math.log(softmax(own)[inputs["labels"][row, t + 1]]) / len(where)
    terms = []
    embedded = [model.backbone.embeddings(inputs["input_ids"]) for model in (student, teacher)]
    for layer in range(2):
        for row, t in where:
            pair_of_rows = []
            for output, embedding in zip((ours, theirs), embedded, strict=True):
                value = output.hidden_states[layer][row, t]
                if states == "mixer":
                    before = embedding if layer == 0 else output.hidden_states[layer - 1]
                    value = value - before[row, t]
                pair_of_rows.append(value.tolist())
            terms.append(plain_hidden(*pair_of_rows))
    hidden = sum(terms) / len(terms)
    assert min(kl, ce, hidden) > 1e-6
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert parts["ce"].item() == pytest.approx(ce, rel=1e-4)
    assert parts["hidden"].item() == pytest.approx(hidden, rel=1e-4)
    assert total.item() == pytest.approx(0.7 * kl + 3.0 * hidden + 0.4 * ce, rel=1e-4)


def test_mixer_states_are_what_the_mixers_give(pair):
    (student, teacher), inputs = pair, batch()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # padding would move
    given = []
    hooks = [b.mixer.register_forward_hook(lambda *a: given.append(a[-1])) for b in student.backbone.layers]
    ours, _ = outputs(student, teacher, inputs)
    for hook in hooks:
        hook.remove()
    compared = compared_states(student, ours, inputs["input_ids"], "mixer")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(compared, given, strict=True))


def test_hidden_losses_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 4.0]])
    assert hidden_loss(student, teacher, "mse").item() == pytest.approx((1 + 0 + 9 + 16) / 4 / (24 / 4))
    cosine = (1 - 6 / (5**0.5 * 8**0.5) + 1 - 0) / 2
    assert hidden_loss(student, teacher, "cosine").item() == pytest.approx(cosine)
    both = sum(plain_hidden(a, b) for a, b in zip(student.tolist(), teacher.tolist(), strict=True)) / 2
    assert hidden_loss(student, teacher).item() == pytest.approx(both)
    with pytest.raises(ValueError, match="Unknown hidden loss"):
        hidden_loss(student, teacher, "l1")


def test_a_copy_of_the_teacher_has_no_loss():
    teacher = tiny_model()
    student = SpikingMambaForCausalLM.from_dense(teacher, neuron=None).eval()
    inputs = batch()
    loss, parts = DistillationLoss(hidden=1.0)(student, teacher, *outputs(student, teacher, inputs), **inputs)
    assert abs(parts["kl"].item()) < 1e-6
    assert parts["hidden"].item() == 0.0
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("kind", ["softmax_mse", "mse", "cosine"])
def test_a_batch_of_nothing_but_padding(pair, kind):
    (student, teacher), inputs = pair, batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = DistillationLoss(hidden=1.0, hidden_kind=kind, cross_entropy=1.0)
    total, _ = loss(student, teacher, *outputs(student, teacher, inputs), **inputs)
    assert total.item() == 0.0
    student.zero_grad()
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"kl": -1.0}, "kl must be a number of at least 0"),
        ({"kl": 0.0}, "weights of the loss must be positive"),
        ({"hidden_kind": "l1"}, "'softmax_mse', 'mse' or 'cosine'"),
        ({"hidden_states": "logits"}, "'mixer' or 'block'"),
    ],
)
def test_bad_losses(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**fields)


def test_cross_entropy_needs_labels(pair):
    inputs = batch(labelled=False)
    with pytest.raises(ValueError, match="needs labels"):
        DistillationLoss(cross_entropy=1.0)(*pair, *outputs(*pair, inputs), **inputs)


# --- a term of one's own ---


def size_of_states(loss, batch):
    """Mean square of the last hidden states: needs no teacher."""
    part = batch.student_output.hidden_states[-1][batch.mask].square().mean()
    return loss.weight("size") * part, {"size": part}


@pytest.fixture
def own_term(monkeypatch):
    monkeypatch.setitem(TERMS, "size", Term(size_of_states, "size", teacher=False))


def test_a_term_of_ones_own_trains(own_term, tmp_path, capsys):
    """A function and an entry are all: settings, trainer, log and table know it."""
    settings = DistillationSettings(
        "", str(tmp_path / "run"), neuron=INTEGER, loss={"kl": 0.5, "weights": {"size": 0.25}},
        training={"max_steps": 4, "logging_steps": 1, "bf16": False, "learning_rate": 1e-2},
    )  # fmt: skip
    teacher = tiny_model()
    _, history = distill(settings, teacher, rows=rows())
    logged = [row for row in history if "loss" in row]
    for row in logged:
        assert row["loss"] == pytest.approx(0.5 * row["kl"] + 0.25 * row["size"], rel=1e-3)
    assert logged[-1]["size"] < logged[0]["size"]
    assert capsys.readouterr().out.split()[:4] == ["step", "loss", "KL", "size"]


def test_several_ends_of_text_are_refused(tmp_path):
    settings = DistillationSettings("", str(tmp_path / "run"), neuron=INTEGER, training={"bf16": False})
    with pytest.raises(ValueError, match=r"names \[0, 1\]: pass a tokenizer"):
        distill(settings, tiny_model(eos_token_id=[0, 1]), rows=rows())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_its_gradient_and_its_teacher(own_term, pair, kl):
    (student, teacher), inputs = pair, batch()
    ours, theirs = outputs(student, teacher, inputs)
    loss = DistillationLoss(kl=kl, weights={"size": 3.0})
    assert loss.needs_teacher == bool(kl)
    total, parts = loss(student, teacher, ours, theirs if kl else None, **inputs)
    assert list(parts) == ["kl", "size"][not kl :]
    rows_that_count = [ours.hidden_states[-1][row, t] for row, t in counted(inputs)]
    size = sum(float(x.detach().square().mean()) for x in rows_that_count) / len(rows_that_count)
    assert float(parts["size"]) == pytest.approx(size, rel=1e-5)
    assert float(total.detach()) == pytest.approx(kl * float(parts.get("kl", 0)) + 3 * size, rel=1e-5)
    total.backward()


def test_hidden_states_alone(pair):
    (student, teacher), inputs = pair, batch()
    ours, theirs = outputs(student, teacher, inputs)
    loss, parts = DistillationLoss(kl=0.0, hidden=2.0)(student, teacher, ours, theirs, **inputs)
    assert list(parts) == ["hidden"]
    assert float(loss.detach()) == 2 * float(parts["hidden"])
    loss.backward()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"sise": 1.0},
            "Unknown term 'sise' in loss.weights; known are kl, hidden, ce, spike_size, nonzero, size",
        ),
        ({"ce": 1.0}, "loss.cross_entropy, not loss.weights.ce"),
        ({"size": -1.0}, "weights must be a mapping to a number of at least 0"),
        (None, "weights must be a mapping to a number of at least 0"),
    ],
)
def test_wrong_weights_of_terms(own_term, weights, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(weights=weights)


# --- the trainer ---


def rows(count=16, length=12):
    return datasets.Dataset.from_dict({"input_ids": tokens(count, length, seed=5).tolist()})


def make_trainer(folder, student=None, teacher=None, freeze=True, loss=None, **arguments):
    torch.manual_seed(0)
    teacher = tiny_model(tie_word_embeddings=True) if teacher is None else teacher
    if student is None:
        student = SpikingMambaForCausalLM.from_dense(
            teacher, neuron=INTEGER, sgc={"mode": "blend", "lam": 0.8}, threshold=0.7, learn_threshold=True
        )
    arguments = (
        {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2, "learning_rate": 1e-2}
        | {"bf16": False, "save_strategy": "no", "disable_tqdm": True}
        | arguments
    )
    return DistillationTrainer(
        student,
        teacher,
        loss=loss or DistillationLoss(hidden=0.5, cross_entropy=0.1),
        freeze_embeddings=freeze,
        args=training_arguments(folder, arguments, seed=0),
        train_dataset=rows(),
        data_collator=collate,
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_what_is_trained_and_what_is_logged(freeze, tmp_path):
    trainer = make_trainer(tmp_path, freeze=freeze)
    student, teacher = trainer.student, trainer.teacher
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    teachers = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trainer.train()
    for name, parameter in student.named_parameters():
        frozen = freeze and name == "backbone.embeddings.weight"
        assert torch.equal(parameter, before[name]) is frozen, name
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, teachers[name]), name
        assert parameter.grad is None
    assert not teacher.training
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4]
    for row in logged:
        assert row["loss"] == pytest.approx(row["kl"] + 0.5 * row["hidden"] + 0.1 * row["ce"], rel=1e-3)
        assert 0 < row["mean_abs_spike"] < 4
    assert [row["sgc_lambda"] for row in logged] == pytest.approx(
        [0.8 * 0.75, 0.8 * 0.25]
    )  # of steps 1 and 3


def test_the_logged_mean_is_that_of_the_spikes(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, logging_steps=1)
    student = trainer.student
    with recorded_spikes(student) as spikes:
        trainer.train()
    weights = {name: p.out_features for name, p in student.projections().items()}
    total = sum(weights[n] * s[0].abs().sum().item() for n, s in spikes.items())
    dense = sum(weights[n] * s[0].numel() for n, s in spikes.items())
    assert {len(s) for s in spikes.values()} == {1}
    assert trainer.state.log_history[0]["mean_abs_spike"] == pytest.approx(total / dense, rel=1e-6)


def test_lambda_of_every_step(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(kwargs["model"].sgc_lambda)

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Watch())
    trainer.train()
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_weight_decay_spares_thresholds(tmp_path):
    trainer = make_trainer(tmp_path, freeze=False, weight_decay=0.1, use_cpu=True)
    names = {id(p): name for name, p in trainer.student.named_parameters()}
    decayed = set()
    for group in trainer.create_optimizer().param_groups:
        if group["weight_decay"]:
            decayed |= {names[id(p)] for p in group["params"]}
    assert any(name.endswith("in_proj.weight") for name in decayed)
    spared = ("log_threshold", "A_log", "dt_bias", ".D", ".norm.weight", "conv1d.bias")
    assert not [name for name in decayed if name.endswith(spared)]


def test_accumulated_gradients_equal_one_batch(tmp_path):
    found = []
    for size, pieces in ((4, 1), (2, 2)):
        trainer = make_trainer(
            tmp_path,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces,
            max_grad_norm=1e9,
            optim="sgd",
        )
        trainer.train()
        found.append((trainer.state.log_history[0], dict(trainer.student.named_parameters())))
    (one, weights), (two, others) = found
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-4)
    for name, parameter in weights.items():
        assert torch.allclose(parameter, others[name], atol=1e-6), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("freeze", [True, False])
def test_gradient_checkpointing_trains_alike(freeze, tmp_path):
    found = []
    for checkpointed in (False, True):
        trainer = make_trainer(tmp_path, freeze=freeze, gradient_checkpointing=checkpointed, max_steps=2)
        trainer.train()
        found.append((trainer.state.log_history[0], dict(trainer.student.named_parameters())))
    (row, weights), (other, others) = found
    assert other["mean_abs_spike"] == row["mean_abs_spike"]
    for name, parameter in weights.items():
        assert torch.allclose(parameter, others[name], atol=1e-6), name


def test_a_dense_copy_stays_at_no_loss(tmp_path):
    teacher = tiny_model()
    student = SpikingMambaForCausalLM.from_dense(teacher, neuron=None)
    trainer = make_trainer(tmp_path, student, teacher, loss=DistillationLoss(), max_steps=1, logging_steps=1)
    trainer.train()
    assert abs(trainer.state.log_history[0]["kl"]) < 1e-6


def test_a_teacher_with_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=f"teacher's vocabulary has 50 tokens, the student's {VOCABULARY}"):
        make_trainer(tmp_path / "run", tiny_model(neuron=INTEGER), tiny_model(vocab_size=50))


# --- whole runs ---

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2} | {
    "bf16": False,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Document {i}: {i * 7} lazy dogs met {i % 13} foxes." for i in range(300)))
    return path


@pytest.fixture(scope="module")
def teacher_folder(text, tmp_path_factory):
    settings = PretrainingSettings(
        output=str(tmp_path_factory.mktemp("runs") / "teacher"),
        data=str(text),
        length=16,
        vocab_size=300,
        model={"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 16, "head_dim": 16},
        training=TRAINING,
    )
    folder, history = pretrain(settings)
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4]
    return folder


@pytest.fixture
def settings(teacher_folder, text, tmp_path):
    return DistillationSettings(
        teacher=str(teacher_folder),
        output=str(tmp_path / "run"),
        data=str(text),
        length=16,
        neuron=LEAKY,
        membrane="sequence",
        sgc={"mode": "blend", "lam": 0.5},
        threshold=0.7,
        learn_threshold=True,
        loss={"hidden": 0.5, "cross_entropy": 0.1},
        training=TRAINING,
    )


def losses(history):
    kept = ("loss", "kl", "hidden", "ce", "mean_abs_spike", "sgc_lambda", "grad_norm", "learning_rate")
    return {row["step"]: [row[key] for key in kept] for row in history if "loss" in row}


def test_the_tokenizer_may_lie_elsewhere(settings, teacher_folder, tmp_path):
    """As for state-spaces' checkpoints, which come without one."""
    bare, elsewhere = tmp_path / "teacher", tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(elsewhere)
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(teacher_folder / name, bare)
    with pytest.raises(CheckpointError, match="tokenizer="):
        distill(replace(settings, teacher=str(bare)))
    assert not (tmp_path / "run").exists()
    _, expected = distill(settings)
    other = replace(settings, teacher=str(bare), tokenizer=str(elsewhere), output=str(tmp_path / "other"))
    folder, history = distill(other)
    assert losses(history) == losses(expected)
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_finished_run_that_is_resumed_stays_as_it_is(settings, schedule):
    settings = replace(settings, training=TRAINING | {"lr_scheduler_type": schedule})
    folder, expected = distill(settings)
    before = load_file(folder / "model.safetensors")
    checkpoints = sorted(path.name for path in folder.parent.glob("checkpoint-*"))
    for _ in range(2):
        _, history = distill(replace(settings, resume=True))
        assert losses(history) == losses(expected)
        after = load_file(folder / "model.safetensors")
        assert all(torch.equal(weight, after[name]) for name, weight in before.items())
        assert sorted(path.name for path in folder.parent.glob("checkpoint-*")) == checkpoints


class Stop(TrainerCallback):
    """The power fails one step after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_that_is_killed_and_resumed_ends_like_one_that_was_not(settings, monkeypatch, tmp_path):
    whole, expected = distill(settings)
    assert whole == tmp_path / "run" / "model"
    assert json.loads((tmp_path / "run" / "log.json").read_text()) == expected
    again = replace(settings, output=str(tmp_path / "again"))
    make = DistillationTrainer.__init__

    def with_stop(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.add_callback(Stop())

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "__init__", with_stop)
        with pytest.raises(KeyboardInterrupt):
            distill(again)
    assert not (tmp_path / "again" / "model").exists()
    assert (tmp_path / "again" / "checkpoint-2").is_dir()
    with pytest.raises(RunError, match="already holds"):
        distill(again)
    resumed, history = distill(replace(again, resume=True))
    assert losses(history) == losses(expected)
    assert len(losses(history)) == 4
    weights, others = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    student = SpikingMambaForCausalLM.from_pretrained(resumed)
    assert student.config.membrane == "sequence"
    tokenizer = AutoTokenizer.from_pretrained(resumed)
    ids = tokenizer("Document 7", return_tensors="pt").input_ids
    assert (
        student.generate(ids, min_new_tokens=4, max_new_tokens=4, do_sample=False).shape[1]
        == ids.shape[1] + 4
    )


def test_a_finished_run_resumes_to_the_same(settings, tmp_path):
    settings = replace(settings, training=TRAINING | {"max_steps": 2})
    folder, _ = distill(settings)
    before = (folder / "model.safetensors").read_bytes()
    distill(replace(settings, resume=True))
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"neuron": {"class": "neurons.SILIFNode", "args": {"max_spike_count": 0}}},
            ValueError,
            "at least 1",
        ),
        ({"neuron": {"class": "os.system"}}, ValueError, "Unknown neuron"),
        ({"threshold": 0.0}, ValueError, "positive"),
        ({"membrane": "x"}, ValueError, "membrane"),
        ({"sgc": {"mode": "x"}}, ValueError, "sgc.mode"),
        ({"loss": {"tempreature": 2.0}}, ValueError, "did you mean 'temperature'"),
        ({"loss": {"temperature": -2.0}}, ValueError, "must be a number above 0"),
        ({"training": {"learning_rat": 1}}, ValueError, "did you mean 'learning_rate'"),
        ({"training": {"max_steps": "abc"}}, ValueError, "max_steps must be a positive integer"),
        ({"teacher": "/absent"}, ValueError, "no checkpoint folder"),
        ({"data": "/absent.txt"}, DataError, "No such file"),
        ({"length": 10**6}, DataError, "more text"),
        (
            {"training": {"per_device_train_batch_size": 10**5, "max_steps": 1}},
            RunError,
            "fewer than one batch",
        ),
    ],
)
def test_bad_settings_write_nothing(settings, tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        distill(replace(settings, **fields))
    assert not (tmp_path / "run").exists()


def test_numbers_that_yaml_takes_for_text(tmp_path):
    arguments = training_arguments(tmp_path, {"learning_rate": "2e-3", "max_steps": "1e3", "bf16": False}, 0)
    assert (arguments.learning_rate, arguments.max_steps) == (0.002, 1000)


def test_an_empty_training_file_writes_nothing(settings, tmp_path):
    for content in ("", "\n \n\n"):
        (tmp_path / "empty.txt").write_text(content)
        with pytest.raises(DataError, match="holds no document"):
            distill(replace(settings, data=str(tmp_path / "empty.txt")))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_larger_than_the_teacher_writes_nothing(settings, teacher_folder, tmp_path):
    teacher = SpikingMambaForCausalLM(tiny_config(vocab_size=200))
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    with pytest.raises(RunError, match=r"token id .* outside the vocabulary of 200"):
        distill(settings, teacher, tokenizer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model", [{}, {"hidden_size": 32, "neurons": 1}, {"hidden_size": 33, "head_dim": 16}]
)
def test_bad_models_write_nothing(model, text, tmp_path):
    with pytest.raises(ValueError, match=r"must set hidden_size|did you mean 'neuron'|must equal num_heads"):
        pretrain(
            PretrainingSettings(str(tmp_path / "run"), str(text), 16, 300, model=model, training=TRAINING)
        )
    assert not (tmp_path / "run").exists()


def test_two_processes(settings, tmp_path):
    """Data parallel over gloo: one folder, one student, and every process ends well, with the first one's
    thresholds."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from spiking_mamba.training.distillation import DistillationSettings, distill\n"
        "if __name__ == '__main__':\n"
        "    import spiking_mamba.training.distillation as module\n"
        "    made = module.SpikingMambaForCausalLM.from_dense\n"
        "    def watched(*args, **more):\n"
        "        os.write(1, f\"V_th {more.get('threshold')}\\n\".encode())\n"  # whole
        "        return made(*args, **more)\n"
        "    module.SpikingMambaForCausalLM.from_dense = watched\n"
        "    folder, history = distill(DistillationSettings(**json.loads(sys.argv[1])))\n"
        "    print('ended', folder)\n"
    )
    fields = {**settings.__dict__, "training": TRAINING | {"ddp_backend": "gloo", "max_steps": 2}}
    fields |= {"threshold": {"mean_abs": 0.5}, "shift_inputs": True}
    done = torchrun(script, json.dumps(fields))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ended") == 2
    thresholds = [line for line in done.stdout.splitlines() if line.startswith("V_th [{'in_proj': ")]
    assert len(thresholds) == 2
    assert len(set(thresholds)) == 1
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"settings.yaml", "log.json", "model"}
    assert not any(name.endswith(".part") for name in names)
    student = SpikingMambaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("threshold", [0.5, {"mean_abs": 1.0}])
def test_inputs_rest_at_their_medians_at_first(tmp_path, threshold):
    """Trained at next to no rate: the levels are those of the first rows, and they are exported."""
    teacher, rows = tiny_model(), datasets.Dataset.from_dict({"input_ids": tokens(8, 32).tolist()})
    settings = DistillationSettings(
        teacher="none",
        output=str(tmp_path / "run"),
        threshold=threshold,
        shift_inputs=True,
        training={"max_steps": 1, "learning_rate": 1e-12, "per_device_train_batch_size": 2},
    )
    folder, _ = distill(settings, teacher, rows=rows)
    levels = calibrate_levels(teacher, tokens(8, 32))
    student = load_model(folder)
    assert student.config.shift_inputs
    for name, projection in student.projections().items():
        product = dict(teacher.named_modules())[name].weight @ levels[name]
        torch.testing.assert_close(projection.spikes.constant, product, rtol=1e-4, atol=1e-5)
        assert projection.spikes.shift.count_nonzero() > 0
    with pytest.raises(ValueError, match="shift_inputs"):
        DistillationSettings(teacher="none", output="x", neuron=None, shift_inputs=True)
