"""The table that a training prints, and the bars."""

import io
import json
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from tqdm import tqdm

from spiking_mamba.common import progress
from spiking_mamba.common.progress import Stage, part_of, quiet, reporting, say
from spiking_mamba.training import log as training_log
from spiking_mamba.training.distillation import DistillationSettings, distill
from spiking_mamba.training.log import TrainingTable
from tests.helpers.tiny import INTEGER, VOCABULARY, tiny_model

STEPS = 6


@pytest.fixture(autouse=True)
def silent():
    """As in a recipe."""
    before = transformers.logging.get_verbosity()
    quiet()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextmanager
def terminal():
    """stderr is a terminal; what a bar draws there."""
    with redirect_stderr(Terminal()) as found:
        yield found
    assert not tqdm._instances  # none was left behind


@pytest.fixture(scope="module")
def teacher():
    return tiny_model()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return datasets.Dataset.from_dict(
        {"input_ids": torch.randint(VOCABULARY, (40, 16), generator=generator).tolist()}
    )


def settings(folder, **training):
    training = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 2, "bf16": False} | {
        "save_steps": 2,
        **training,
    }
    loss = {"kl": 1.0, "hidden": 1.0, "cross_entropy": 0.1}
    return DistillationSettings("", str(folder), neuron=INTEGER, loss=loss, training=training)


def table_of(out):
    """The lines of a table as cells by title, after checking how it looks."""
    header, *lines = out.splitlines()
    titles = header.replace("mean |s|", "mean_|s|").split()
    assert all(len(line) == len(header) for line in lines), out
    return [dict(zip(titles, line.split(), strict=True)) for line in lines]


def test_a_training_prints_one_table(teacher, rows, tmp_path, capsys):
    _, history = distill(settings(tmp_path / "run"), teacher, rows=rows)
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no bar
    assert "\r" not in out
    assert "\x1b" not in out
    assert "{" not in out
    *lines, summary = out.splitlines()
    found = table_of("\n".join(lines))
    assert list(found[0]) == ["step", "loss", "KL", "hidden", "CE", "mean_|s|", "tokens/s"]
    assert [row["step"] for row in found] == ["2", "4", "6"]
    logged = [row for row in history if "loss" in row]
    for row, kept in zip(found, logged, strict=True):
        for title, key in {"loss": "loss", "KL": "kl", "hidden": "hidden", "CE": "ce"}.items():
            assert float(row[title]) == pytest.approx(kept[key], abs=5e-5)
        assert float(row["mean_|s|"]) == pytest.approx(kept["mean_abs_spike"], abs=5e-4)
        assert int(row["tokens/s"].replace(",", "")) > 0
    assert summary.startswith("6 steps, 384 tokens in ")
    assert json.loads((tmp_path / "run/log.json").read_text()) == history
    assert not any("tokens" in key for row in history for key in row)


def test_a_resumed_run_continues_the_table_and_a_finished_one_has_none(teacher, rows, tmp_path, capsys):
    stopped = replace(settings(tmp_path / "run"), resume=True)

    class Stop(training_log.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        distill(stopped, teacher, rows=rows, callbacks=[Stop()])
    expected = f"{tmp_path / 'run'} holds the checkpoint of step 2; resume=true goes on from there."
    assert caught.value.__notes__ == [expected]
    said, _, table = capsys.readouterr().out.partition("\n")
    assert said == f"{tmp_path / 'run'} holds no run to go on with: one begins."
    assert [row["step"] for row in table_of(table)] == ["2"]
    distill(stopped, teacher, rows=rows)
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [row["step"] for row in table_of("\n".join(lines))] == ["4", "6"]
    assert summary.startswith("4 steps from step 2 on, 256 tokens in ")
    distill(stopped, teacher, rows=rows)
    assert capsys.readouterr().out == "All 6 steps were done before.\n"


def test_the_bar_is_below_the_table_and_gone_at_the_end(teacher, rows, tmp_path, capsys):
    with terminal() as found:
        distill(settings(tmp_path / "run", logging_steps=3), teacher, rows=rows)
    drawn = found.getvalue().split("\r")
    assert any(frame.startswith("training:") and "/6" in frame for frame in drawn)
    assert drawn[-1] == ""
    assert not drawn[-2].strip()
    out = capsys.readouterr().out
    assert "\r" not in out
    assert len(out.splitlines()) == 4


def test_a_resumed_bar_starts_where_the_run_was():
    table, args = TrainingTable(64), SimpleNamespace(disable_tqdm=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=6)
    with terminal() as found:
        table.on_train_begin(args, state, None)
        table.close()
    assert "4/6" in found.getvalue()


def test_disable_tqdm_leaves_the_rows(teacher, rows, tmp_path, capsys):
    with terminal() as found:
        distill(settings(tmp_path / "run", disable_tqdm=True, save_strategy="no"), teacher, rows=rows)
    assert found.getvalue() == ""
    assert len(capsys.readouterr().out.splitlines()) == 5


class Log:
    """A training of three steps, one log after another."""

    def __init__(self, monkeypatch, first=True, eval_strategy="no", **table):
        self.seconds, self.table = 0.0, TrainingTable(**table)
        monkeypatch.setattr(training_log.time, "perf_counter", lambda: self.seconds)
        self.state = SimpleNamespace(is_world_process_zero=first, global_step=0, max_steps=3)
        self.args = SimpleNamespace(disable_tqdm=True, eval_strategy=eval_strategy)
        self.table.on_train_begin(self.args, self.state, None)

    def step(self, seconds=1.0, micro_steps=1, **logs):
        self.table.on_step_begin(self.args, self.state, None)
        for _ in range(micro_steps - 1):
            self.table.on_substep_end(self.args, self.state, None)
        self.seconds += seconds
        self.state.global_step += 1
        self.table.on_step_end(self.args, self.state, None)
        self.log(**logs)

    def log(self, **logs):
        if logs:
            self.table.on_log(self.args, self.state, None, logs=logs)


def test_tokens_are_those_since_the_last_row(monkeypatch, capsys):
    log = Log(monkeypatch, batch_tokens=1000)
    log.seconds += 100  # spent on the way to where a run goes on
    log.step(2.0, micro_steps=3, loss=2.0)
    log.step(1.0)
    log.step(1.0, loss=1.0, learning_rate=0.1)
    log.log(train_runtime=3725.4, train_loss=1.5)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [["step", "loss", "tokens/s"], ["1", "2.0000", "1,500"], ["3", "1.0000", "1,000"]]
    assert " ".join(lines[3]) == "3 steps, 5,000 tokens in 1 h 2 min"


def test_evaluations_have_a_column_and_no_part_in_the_speed(monkeypatch, capsys):
    log = Log(monkeypatch, eval_strategy="steps", batch_tokens=500)
    log.step(loss=2.0)
    log.seconds += 60
    log.log(eval_loss=1.75, eval_runtime=60.0)
    log.step(loss=float("nan"))
    expected = """
step       loss  held-out loss    tokens/s
   1     2.0000                        500
   1                    1.7500
   2        nan                        500"""
    assert capsys.readouterr().out == expected[1:] + "\n"


def test_numbers_that_come_late_get_a_column(monkeypatch, capsys):
    log = Log(monkeypatch, spiking=True)
    log.step(loss=1e-5)
    log.step(loss=123456.0, mean_abs_spike=0.5)
    log.step(**{"loss": -0.5, "rewards/margins": 0.25, "num_tokens": 30.0})
    lines = [line.split() for line in capsys.readouterr().out.replace("mean |s|", "|s|").splitlines()]
    assert lines == [
        ["step", "loss", "|s|"],
        ["1", "1.00e-05"],
        ["2", "1.23e+05", "0.500"],
        ["step", "loss", "margin", "|s|", "tokens/s"],
        ["3", "-0.5000", "0.2500", "30"],
    ]


def test_other_processes_are_silent(monkeypatch, capsys):
    log = Log(monkeypatch, first=False, batch_tokens=1)
    log.step(loss=1.0)
    log.log(train_runtime=1.0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "tokens", "expected"),
    [
        (9.44, 640, "9.4 s, 640"),
        (59.6, 99_999, "1 min 0 s, 99,999"),
        (192, 409_600, "3 min 12 s, 0.4 million"),
        (7322, 75e6, "2 h 2 min, 75.0 million"),
        (5, 328e9, "5.0 s, 328.0 billion"),
    ],
)
def test_amounts(seconds, tokens, expected):
    assert f"{training_log._duration(seconds)}, {training_log._amount(int(tokens))}" == expected


# --- the bar of a stage ---


def test_a_stage_moves_through_its_parts(capsys):
    with terminal() as found, Stage(2, "evaluating") as stage:
        stage._bar.mininterval = 0
        stage.label = "student"
        with stage.part("piqa") as share:
            share(0.5)
            share(0.25)  # a task that asks twice
            assert stage._bar.n == 0.5
        say("a line")
        with part_of(stage, "copa") as share, reporting(share, "nothing of its own") as same:
            assert same is share
            share(2.0)
            assert stage._bar.n == 2
    drawn = found.getvalue()
    assert "student: piqa:  25%" in drawn
    assert "student: copa: 100%" in drawn
    assert "nothing" not in drawn
    assert capsys.readouterr().out == "a line\n"


def test_without_a_stage_a_measurement_has_a_bar_of_its_own_or_none():
    with terminal() as found, part_of(None, "piqa") as wanted, reporting(wanted, "piqa") as share:
        share(0.5)
    assert "piqa" in found.getvalue()
    with terminal() as found, reporting(False, "piqa") as share:
        share(0.5)
    assert found.getvalue() == ""


def test_no_bar_without_a_terminal(capsys):
    with progress.Stage(1, "evaluating") as stage, stage.part("piqa") as share:
        share(1.0)
    assert capsys.readouterr() == ("", "")
