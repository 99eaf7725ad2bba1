"""Folders of runs: nothing foreign is removed, one process at a time, whole logs, finite numbers only."""

import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, make_dataclass, replace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from spiking_mamba.common.claims import ClaimedError, claim_folder
from spiking_mamba.common.errors import DivergedError, RunError
from spiking_mamba.training import checkpoints
from spiking_mamba.training.distillation import DistillationSettings, distill
from spiking_mamba.training.folder import run_folder, start_run
from tests.helpers.tiny import INTEGER, VOCABULARY, tiny_model

STEPS = 6


@pytest.fixture(scope="module")
def teacher():
    return tiny_model()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (40, 16), generator=generator)
    return datasets.Dataset.from_dict({"input_ids": ids.tolist()})


def settings(folder, loss=None, **training):
    training = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 4, "bf16": False} | {
        "save_steps": 1,
        **training,
    }
    loss = loss or {"kl": 1.0, "hidden": 1.0}
    return DistillationSettings("", str(folder), neuron=INTEGER, loss=loss, training=training)


@dataclass
class Other:
    """Settings of a run of another kind."""

    output: str
    number: int = 1


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- whose folder it is ---


@pytest.mark.parametrize("text", ["theme: dark", "", "output: here\nseed: 0\n", "# spiking_mamba\n", None])
@pytest.mark.parametrize("way", ["", "resume", "overwrite"])
def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path, text, way):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("precious")
    if text is not None:
        (tmp_path / "settings.yaml").write_text(text)
    before = content(tmp_path)
    with pytest.raises(RunError, match=r"already holds|holds no run|other settings"):
        start_run(Other(str(tmp_path)), way == "resume", way == "overwrite")
    assert content(tmp_path) == before


def test_overwriting_removes_what_runs_write_and_nothing_else(tmp_path, capsys):
    folder = tmp_path / "run"
    with run_folder(Other(str(folder)), False, False):
        pass
    for name in ("checkpoint-1", "checkpoint-2.part", "model", "notes"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    (folder / "download.part").touch()
    (folder / "log.json").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    (folder / "rows").symlink_to(tmp_path / "elsewhere")
    with run_folder(Other(str(folder), 2), False, True):
        pass
    assert sorted(content(folder)) == ["download.part", "notes/file", "settings.yaml"]
    assert "number: 2" in (folder / "settings.yaml").read_text()
    assert (tmp_path / "elsewhere/file").exists()
    assert "left as they are: notes" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [".", "model", "model/deeper"])
def test_the_working_directory_is_never_emptied(tmp_path, monkeypatch, inside):
    folder = tmp_path / "run"
    with run_folder(Other(str(folder)), False, False):
        pass
    (folder / "model/deeper").mkdir(parents=True)
    before = content(folder)
    monkeypatch.chdir(folder / inside)
    for output in (folder, os.path.relpath(folder)):
        with pytest.raises(RunError, match="in which this command was given"):
            start_run(Other(str(output), 2), False, True)
    assert content(folder) == before
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(RunError, match="in which this command was given"):
        start_run(Other(str(tmp_path / "link"), 2), False, True)


def test_a_run_of_another_kind_is_not_overwritten(tmp_path, teacher, rows):
    with run_folder(Other(str(tmp_path)), False, False):
        pass
    with pytest.raises(RunError, match="was written by Other"):
        distill(replace(settings(tmp_path), overwrite=True), teacher, rows=rows)


@pytest.mark.parametrize("way", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("left", [["settings.yaml.part"], [".lock"], ["model.part"], []])
def test_a_half_started_run_is_begun_or_gone_on_with(tmp_path, left, way):
    """Of a kill before the settings were whole."""
    for name in left:
        (tmp_path / name).touch()
    with run_folder(Other(str(tmp_path)), *way):
        assert "settings.yaml" in content(tmp_path)
        assert "settings.yaml.part" not in content(tmp_path)


def test_a_run_of_an_earlier_version_is_gone_on_with_and_then_known(tmp_path):
    with run_folder(Other(str(tmp_path)), False, False):
        pass
    whole = (tmp_path / "settings.yaml").read_text()
    (tmp_path / "settings.yaml").write_text(whole.partition("\n")[2])  # without the mark
    with pytest.raises(RunError, match="left as it is"):
        start_run(Other(str(tmp_path), 2), False, True)
    with run_folder(Other(str(tmp_path)), True, False):
        pass
    with run_folder(Other(str(tmp_path), 2), False, True):
        pass


@pytest.mark.parametrize("text", ["- a", "a: [", "\x00", "[" * 10000])
def test_damaged_settings_are_no_run_to_resume(tmp_path, text):
    with run_folder(Other(str(tmp_path)), False, False):
        pass
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(RunError, match="holds no run to resume"):
        start_run(Other(str(tmp_path)), True, False)


def test_a_run_whose_folder_was_moved_is_gone_on_with(tmp_path):
    with run_folder(Other(str(tmp_path / "a")), False, False):
        pass
    (tmp_path / "a").rename(tmp_path / "b")
    with run_folder(Other(str(tmp_path / "b")), True, False):
        pass
    with pytest.raises(RunError, match=r"other settings of number \(it was 1\)\.$"):
        start_run(Other(str(tmp_path / "b"), 2), True, False)


@pytest.mark.parametrize(("off", "changed"), [(False, False), (True, True), (0, True), (None, False)])
def test_a_key_that_is_younger_than_a_run_is_off_in_it(tmp_path, off, changed):
    """Off is what the run did when there was no such key; on is another run."""
    with run_folder(Other(str(tmp_path)), False, False):
        pass
    younger = make_dataclass("Other", [("output", str), ("number", int, 1), ("younger", object, off)])
    with pytest.raises(RunError, match="settings of younger") if changed else nullcontext():
        start_run(younger(str(tmp_path)), True, False)


def test_a_run_that_begins_where_one_was_to_be_gone_on_with_says_so(tmp_path, capsys):
    for said in (f"{tmp_path} holds no run to go on with: one begins.\n", ""):
        with run_folder(Other(str(tmp_path)), True, False):
            pass
        assert capsys.readouterr().out == said


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        start_run(Other(str(tmp_path / "file")), False, True)


@pytest.mark.parametrize("way", ["", "resume", "overwrite"])
def test_a_folder_that_another_process_is_at_is_refused(tmp_path, way, teacher, rows):
    folder = tmp_path / "run"
    distill(settings(folder), teacher, rows=rows)
    before = content(folder)
    now = replace(settings(folder), resume=way == "resume", overwrite=way == "overwrite")
    with claim_folder(folder), pytest.raises(RunError) as refused:
        distill(now, teacher, rows=rows)
    assert isinstance(refused.value, ClaimedError) == bool(way)
    assert content(folder) == before


def test_start_run_can_be_called_again_by_the_same_process(tmp_path):
    for _ in range(2):
        start_run(Other(str(tmp_path / "run")), True, False)
    with pytest.raises(ClaimedError), claim_folder(tmp_path / "run"):
        pass


# --- checkpoints ---


def test_an_old_checkpoint_goes_when_the_new_one_is_marked(tmp_path, teacher, rows, monkeypatch):
    seen = []
    remove = checkpoints.remove_whole

    def look(old):
        whole = [path.parent.name for path in old.parent.glob("checkpoint-*/complete")]
        seen.append((old.name, sorted(whole)))
        remove(old)

    monkeypatch.setattr(checkpoints, "remove_whole", look)
    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", keep_all)
    distill(settings(tmp_path, save_total_limit=1), teacher, rows=rows)
    assert seen == [(f"checkpoint-{n}", [f"checkpoint-{n}", f"checkpoint-{n + 1}"]) for n in range(1, STEPS)]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def keep_all(*, save_total_limit=None, **others):
    """Of Trainer's rotation, which comes too early."""
    assert save_total_limit is None


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [1, 2, 3, 4, 5, 6]), (2, [5, 6]), (0, [1, 2, 3, 4, 5, 6])]
)
def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path, teacher, rows, limit, kept):
    distill(settings(tmp_path, save_total_limit=limit), teacher, rows=rows)
    assert sorted(int(p.name.rpartition("-")[2]) for p in tmp_path.glob("checkpoint-*")) == kept


# --- the log of a run that was stopped ---


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


TIMED = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def untimed(history):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in history]


SCHEDULES = {
    "steps": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "logging_steps": 3},
    "no checkpoint at the end": {"save_steps": 4},
}


@pytest.mark.parametrize("training", SCHEDULES.values(), ids=SCHEDULES)
def test_a_stopped_run_logs_what_one_that_was_not_logs(tmp_path, teacher, rows, training):
    _, expected = distill(settings(tmp_path / "whole", **training), teacher, rows=rows)
    assert "train_loss" in expected[-1]
    stopped = replace(settings(tmp_path / "stopped", **training), resume=True)
    for step in (2, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            distill(stopped, teacher, rows=rows, callbacks=[Stop(step)])
    for _ in range(3):  # finished, and finished again
        _, history = distill(stopped, teacher, rows=rows)
        assert untimed(history) == untimed(expected)
        assert json.loads((tmp_path / "stopped/log.json").read_text()) == history
        assert set(TIMED) <= history[-1].keys()
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    kept = [sorted(p.name for p in (tmp_path / name).glob("checkpoint-*")) for name in ("whole", "stopped")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("lost", [["log.json", "model"], ["model"], ["log.json"]])
def test_a_run_killed_after_its_last_checkpoint_finishes(tmp_path, teacher, rows, lost):
    _, expected = distill(settings(tmp_path), teacher, rows=rows)
    for name in lost:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, history = distill(replace(settings(tmp_path), resume=True), teacher, rows=rows)
    assert untimed(history) == untimed(expected)
    assert history[-1]["train_runtime"] > 0
    if "log.json" not in lost:
        assert history == expected


# --- not finite ---


def spoil(model, what=math.nan):
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight[0, 0] = what
    return model


def test_nan_in_the_teacher_stops_the_first_step(tmp_path, rows):
    with pytest.raises(DivergedError, match=r"in step 1: the teacher's weights .*out_proj\.weight of"):
        distill(settings(tmp_path / "run"), spoil(tiny_model()), rows=rows)
    assert not list((tmp_path / "run").glob("model*"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


class Explode(TrainerCallback):
    """A learning rate that no setting may have."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = math.inf


@pytest.mark.parametrize("training", [{}, {"save_steps": 100}, {"gradient_accumulation_steps": 2}])
def test_an_infinite_learning_rate_ends_in_an_error(tmp_path, teacher, rows, training):
    """The first loss is finite, the weights after it are not."""
    bad = settings(tmp_path, **training)
    with pytest.raises(DivergedError, match=r"step (1|2)"):
        distill(bad, teacher, rows=rows, callbacks=[Explode()])
    assert not list(tmp_path.glob("model*"))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_one_infinite_step_exports_nothing(tmp_path, teacher, rows):
    bad = settings(tmp_path, max_steps=1, save_strategy="no")
    with pytest.raises(DivergedError, match="after step 1 weights are not finite"):
        distill(bad, teacher, rows=rows, callbacks=[Explode()])
    assert not (tmp_path / "model").exists()


def test_a_loss_of_nan_names_the_settings(tmp_path, teacher, rows):
    with pytest.raises((DivergedError, ValueError), match=r"settings of the loss|loss"):
        distill(settings(tmp_path, loss={"kl": math.nan, "hidden": 1.0}), teacher, rows=rows)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_such_step_is_named_and_checkpoints_before_it_are_finite(
    tmp_path, teacher, rows, monkeypatch, bad
):
    compute = Trainer.training_step

    def training_step(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * bad if self.state.global_step == 3 else loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(DivergedError, match="not finite in step 4"):
        distill(settings(tmp_path), teacher, rows=rows)
    assert not (tmp_path / "model").exists()
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-3"]
    for path in kept:
        assert all(w.isfinite().all() for w in load_file(path / "model.safetensors").values())


# --- a disk that is full ---


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at inline_container.cc:664]"), OSError(28, "x")]
)
def test_a_full_disk_is_said_in_one_line(tmp_path, teacher, rows, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    monkeypatch.setattr("spiking_mamba.training.run.full", lambda folder: "No space left on device")
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        distill(settings(tmp_path), teacher, rows=rows)
