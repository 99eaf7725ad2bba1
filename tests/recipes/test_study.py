"""The study's runner, on a teacher so small that a row takes a second."""

import importlib.util
import json
import math
import subprocess
import sys
import time

import pytest
import torch
import yaml

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, data
from spiking_mamba.model.checkpoint import export, load_model
from tests.helpers.commands import HELPERS, ROOT

SCRIPT = ROOT / "recipes/ablate/study.py"
SENTENCE = "the quick brown fox jumps over a lazy dog while seven small mice watch from under an old tree"
WORDS = SENTENCE.split()


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"recipes/ablate/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as for results.py, which imports its neighbour
    spec.loader.exec_module(module)
    return module


study = load("study")


def story(number):
    return " ".join(WORDS[(number * j + j * j) % len(WORDS)] for j in range(80))


@pytest.fixture
def folder(tmp_path):
    """A teacher, text to train and to measure on."""
    (tmp_path / "train.txt").write_text("\n\n".join(f"Story {i}: {story(i)}" for i in range(1, 120)))
    (tmp_path / "held_out.txt").write_text("\n\n".join(f"Tale {i}: {story(i)}" for i in range(200, 300)))
    tokenizer = data.train_tokenizer([story(i) for i in range(50)], 300)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "state_size": 8}
    config = SpikingMambaConfig(vocab_size=len(tokenizer), n_groups=1, chunk_size=16, **shape)
    export(SpikingMambaForCausalLM(config), tmp_path / "teacher", tokenizer)
    return tmp_path


def content(folder, rows, **others):
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "bf16": False}
    neuron = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
    return {
        "name": "small",
        "teacher": str(folder / "teacher"),
        "data": str(folder / "train.txt"),
        "held_out": str(folder / "held_out.txt"),
        "held_out_rows": 2,
        "results": str(folder / "results"),
        "output": str(folder / "runs"),
        "common": {"length": 32, "neuron": neuron, "training": training | {"disable_tqdm": True}},
        "rows": rows,
    } | others


def table(folder, rows, **others):
    return study.Table(**content(folder, rows, **others))


def result(folder, name):
    return json.loads((folder / "results/small" / f"{name}.json").read_text())


class Counted:
    """How often students were distilled, by threshold and seed."""

    def __init__(self, monkeypatch):
        self.rows, distill = [], study.distill

        def counting(settings, *args, **kwargs):
            self.rows.append((settings.threshold, settings.seed))
            return distill(settings, *args, **kwargs)

        monkeypatch.setattr(study, "distill", counting)

    def take(self):
        rows, self.rows[:] = list(self.rows), []
        return rows


def test_a_row_is_run_once(folder, monkeypatch, capsys):
    counted = Counted(monkeypatch)
    rows = [
        {"name": "a", "threshold": 0.5, "seeds": [0, 1], "checks": ["bf16", "int8", "spike_driven"]},
        {"name": "b", "threshold": 0.25},
        {"name": "only converted", "threshold": 0.5, "training.max_steps": 0},
        {"name": "dense", "neuron": None, "threshold": 1.0, "loss": {"kl": 0.0, "cross_entropy": 1.0}},
    ]
    assert study.study(table(folder, rows)) == 0
    assert counted.take() == [(0.5, 0), (0.25, 0), (1.0, 0), (0.5, 1)]  # first seeds come first
    found = result(folder, "a-0")
    assert (found["status"], found["seed"], found["tokens"]) == ("done", 0, 2 * 2 * 32)
    assert found["before"]["perplexity"] == result(folder, "only_converted-0")["after"]["perplexity"]
    assert found["after"]["perplexity"] != found["before"]["perplexity"] != found["teacher"]["perplexity"]
    assert found["after"]["gain"]["fp32"] == pytest.approx(4.6 / 0.9 / found["after"]["mean_abs"])
    driven = found["checks"]["spike_driven"]
    assert driven["perplexity"] == pytest.approx(driven["without"], rel=1e-5)
    rounded = found["checks"]["bf16"]
    assert rounded["perplexity"] != rounded["without"]
    assert rounded["perplexity"] == pytest.approx(rounded["without"], rel=0.05)
    assert found["checks"]["int8"]["perplexity"] != found["checks"]["int8"]["without"]
    assert found["checks"]["int8"]["without"] == pytest.approx(found["after"]["perplexity"], rel=1e-6)
    dense = result(folder, "dense-0")
    assert dense["after"]["mean_abs"] is None
    assert dense["before"] == dense["teacher"]
    assert dense["after"]["perplexity"] != dense["teacher"]["perplexity"]
    (student,) = (folder / "runs/small").glob("a-0-*/model")
    assert load_model(student).config.max_spike_count == 4

    assert study.study(table(folder, rows)) == 0
    assert counted.take() == []
    rows[1]["threshold"] = 0.3  # another row under the same name
    rows.append({"name": "new", "threshold": 0.7})
    study.study(table(folder, rows, only=["b", "n*"]))
    assert counted.take() == [(0.3, 0), (0.7, 0)]
    study.study(table(folder, rows, held_out_rows=3, only="b"))
    assert counted.take() == [(0.3, 0)]
    assert "teacher: perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["teacher", "data", "held_out"])
def test_what_a_number_depends_on_is_run_again(folder, monkeypatch, changed):
    rows = [{"name": "a", "threshold": 0.5}]
    study.study(table(folder, rows))
    before = result(folder, "a-0")
    if changed == "teacher":
        teacher = load_model(folder / "teacher")
        with torch.no_grad():
            teacher.backbone.norm_f.weight += 0.5
        teacher.save_pretrained(folder / "teacher")
    else:
        path = folder / ("train.txt" if changed == "data" else "held_out.txt")
        path.write_text("An earlier story: " + path.read_text())
    counted = Counted(monkeypatch)
    study.study(table(folder, rows))
    assert len(counted.take()) == 1
    assert result(folder, "a-0")["key"] != before["key"]


def test_what_goes_wrong_is_recorded_and_the_rest_goes_on(folder, monkeypatch):
    rows = [
        {"name": "diverges", "training.learning_rate": 1e9, "training.max_steps": 30},
        {
            "name": "impossible",
            "neuron.args.max_spike_count": 4,
            "training.per_device_train_batch_size": 10_000,
        },
        {"name": "fine"},
    ]
    rows[0] |= {"training.max_grad_norm": 0.0, "training.logging_steps": 5}
    assert study.study(table(folder, rows)) == 1  # to diverge is a result
    assert result(folder, "diverges-0")["status"] == "diverged"
    assert result(folder, "impossible-0")["status"] == "failed"
    assert "fewer than one batch" in result(folder, "impossible-0")["error"]
    assert result(folder, "fine-0")["status"] == "done"
    counted = Counted(monkeypatch)
    study.study(table(folder, rows))
    assert len(counted.take()) == 1  # to diverge is a result, to fail is not


def test_a_row_that_fails_takes_no_earlier_result_away(folder):
    study.study(table(folder, [{"name": "a"}]))
    before = (folder / "results/small/a-0.json").read_text()
    impossible = {"name": "a", "training.per_device_train_batch_size": 10_000}
    assert study.study(table(folder, [impossible])) == 1
    assert (folder / "results/small/a-0.json").read_text() == before
    said = json.loads((folder / "runs/small/a-0.failed.json").read_text())
    assert "fewer than one batch" in said["error"]
    # text that is missing is said at once, for all rows
    (folder / "train.txt").unlink()
    with pytest.raises(data.DataError, match=r"train\.txt"):
        study.study(table(folder, [{"name": "a"}]))
    assert (folder / "results/small/a-0.json").read_text() == before
    assert study.study(table(folder, [{"name": "converted", "training.max_steps": 0}])) == 0  # wants none


def test_no_row_starts_that_would_end_too_late(folder, monkeypatch, capsys):
    rows = [{"name": "a"}, {"name": "long", "training.max_steps": 10**7}, {"name": "b", "threshold": 0.5}]
    monkeypatch.setattr(study, "_START", time.monotonic())
    study.study(table(folder, rows, minutes=5))
    assert sorted(p.stem for p in (folder / "results/small").iterdir()) == ["a-0", "b-0"]
    assert "1 rows did not fit into 5 minutes" in capsys.readouterr().out
    monkeypatch.setattr(study, "_START", time.monotonic() - 299)
    study.study(table(folder, rows, minutes=5, only="b", held_out_rows=3))
    assert result(folder, "b-0")["held_out_tokens"] == 2 * 511


def test_ctrl_c_in_the_middle_of_a_row_and_continued(folder):
    training = {"training.max_steps": 6, "training.save_strategy": "steps", "training.save_steps": 2}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content(folder, [{"name": "a"}, {"name": "b"} | training])))
    command = [sys.executable, HELPERS / "interrupted.py", "step-3", SCRIPT, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = f"1 of 2 rows are finished and kept in {folder / 'results/small'}; the same command goes on."
    assert (done.returncode, done.stderr) == (130, f"interrupted: {said}\n")
    assert [p.name for p in (folder / "results/small").iterdir()] == ["a-0.json"]
    (run,) = (folder / "runs/small").glob("b-0-*")
    assert (run / "checkpoint-2").is_dir()
    kept = (folder / "results/small/a-0.json").read_text()
    assert study.study(table(folder, [{"name": "a"}, {"name": "b"} | training])) == 0
    assert (folder / "results/small/a-0.json").read_text() == kept
    continued = result(folder, "b-0")
    straight = folder / "straight"
    study.study(table(folder, [{"name": "b"} | training], results=str(straight), output=str(straight)))
    expected = json.loads((straight / "small/b-0.json").read_text())
    assert continued["after"]["perplexity"] == pytest.approx(expected["after"]["perplexity"], rel=1e-6)
    assert "train_seconds" in expected
    assert "train_seconds" not in continued


def test_two_processes_share_a_table(folder, monkeypatch, capsys):
    counted = Counted(monkeypatch)
    lock = folder / "runs/small/a-0.lock"
    with study.claimed(lock) as free:
        assert free
        study.study(table(folder, [{"name": "a", "threshold": 0.5}, {"name": "b", "threshold": 0.25}]))
    assert counted.take() == [(0.25, 0)]
    assert "a, seed 0: in another process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rows": [{"name": "a", "treshold": 0.5}]}, "did you mean 'threshold'"),
        ({"rows": [{"name": "a", "loss.sparsty": 0.5}]}, "did you mean 'sparsity'"),
        ({"rows": [{"name": "a", "checks": ["int4"]}]}, "did you mean 'int8'"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "name of its own"),
        ({"rows": []}, "has no rows"),
        ({"only": "c*"}, "none of the rows"),
        ({"rows": [{"name": "a", "training.learning_rte": 1e-3}]}, "did you mean 'learning_rate'"),
        ({"only": {"a": "b*"}}, "quote one with a colon"),
        ({"only": 3}, "only takes names"),
        ({"minutes": "abc"}, "minutes must be a positive number"),
        ({"minutes": True}, "minutes must be a positive number"),
        ({"minutes": 0}, "minutes must be a positive number"),
        ({"seeds": "abc"}, "seeds must be a list of integers"),
        ({"rows": [{"name": "a", "seeds": 1}]}, "seeds must be a list of integers"),
        ({"claims": [{"claim": "so", "rows": ["c"]}]}, "Unknown key 'c'"),
        ({"levers": [{"change": "so", "row": "a", "against": "c"}]}, "Unknown key 'c'"),
        ({"levers": [{"change": "so", "row": "a"}]}, "must set against"),
        ({"levers": {"change": "so"}}, "a list of mappings"),
        ({"findings": [{"text": "so", "rows": ["c"]}]}, "Unknown key 'c'"),
        ({"findings": [{"rows": ["a"]}]}, "must set text"),
        ({"findings": [{"text": "so", "rows": "a"}]}, "a list of names"),
        ({"findings": None}, "a list of mappings"),
    ],
)
def test_bad_tables(folder, wrong, said):
    with pytest.raises(ValueError, match=said):
        study.Table(**content(folder, [{"name": "a"}]) | wrong)


def test_rehearsal_touches_no_result(folder):
    rows = [{"name": "a", "seeds": [0, 1], "training.max_steps": 10**6, "threshold": 0.5}]
    assert study.study(table(folder, rows, rehearse=True)) == 0
    assert not (folder / "results").exists()
    (made,) = (folder / "runs/rehearsal/results/small").iterdir()
    assert math.isfinite(json.loads(made.read_text())["after"]["perplexity"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/ablate/tables").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_tables_are_well_formed(path):
    made = study.parse_settings(study.Table, [str(path)])
    assert made.name == path.stem
    assert made.title
    teacher = SpikingMambaConfig.from_pretrained(ROOT / made.teacher)
    for row, seed in made.runs():
        made.settings(row, seed).check(teacher)


def test_uncompiled_rows_are_the_same_rows(folder, monkeypatch):
    study.study(table(folder, [{"name": "a"}]))
    counted = Counted(monkeypatch)
    study.study(table(folder, [{"name": "a", "compile": False}]))
    assert counted.take() == []
