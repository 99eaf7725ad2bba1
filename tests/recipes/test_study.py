"""The study's runner, on a teacher so small that a row takes a second."""

import json
import math
import time

import pytest
import study
import torch
import yaml
from table import Table

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, data
from spiking_mamba.common import provenance
from spiking_mamba.common.records import put_record, read_records
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.checkpoint import export, load_dense, load_model
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers import commands
from tests.helpers.commands import HELPERS, ROOT

SCRIPT = ROOT / "recipes/ablate/study.py"
SENTENCE = "the quick brown fox jumps over a lazy dog while seven small mice watch from under an old tree"
WORDS = SENTENCE.split()


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
    return Table(**content(folder, rows, **others))


def result(folder, row, seed=0):
    (found,) = [r for r in recorded(folder) if (r["row"], r["seed"]) == (row, seed)]
    return found


def recorded(folder):
    return read_records(folder / "results/small.jsonl")


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
    found = result(folder, "a")
    assert (found["status"], found["seed"], found["tokens"]) == ("done", 0, 2 * 2 * 32)
    assert found["before"]["perplexity"] == result(folder, "only converted")["after"]["perplexity"]
    assert found["after"]["perplexity"] != found["before"]["perplexity"] != found["teacher"]["perplexity"]
    assert found["after"]["gain"]["fp32"] == pytest.approx(4.6 / 0.9 / found["after"]["mean_abs"])
    driven = found["checks"]["spike_driven"]
    assert driven["perplexity"] == pytest.approx(driven["without"], rel=1e-5)
    rounded = found["checks"]["bf16"]
    assert rounded["perplexity"] != rounded["without"]
    assert rounded["perplexity"] == pytest.approx(rounded["without"], rel=0.05)
    assert found["checks"]["int8"]["perplexity"] != found["checks"]["int8"]["without"]
    assert found["checks"]["int8"]["without"] == pytest.approx(found["after"]["perplexity"], rel=1e-6)
    dense = result(folder, "dense")
    assert dense["after"]["mean_abs"] is None
    assert dense["before"] == dense["teacher"]
    assert dense["after"]["perplexity"] != dense["teacher"]["perplexity"]
    # what nothing reads stands beside the student, not in the table
    assert not {"log", "mean_abs_by_projection"} & {*found, *found["after"]}
    assert len(json.dumps(found | {"command": ""})) < 3000  # the command is pytest's, as long as may be
    (student,) = (folder / "runs/small").glob("a-0-*/model")
    assert (student.parent / "log.json").is_file()
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


def test_how_far_a_student_is_from_its_teacher(folder):
    """KL and the same likeliest token beside perplexity, against softmaxes in float64."""
    dense = {"name": "dense", "neuron": None, "threshold": 1.0, "loss": {"kl": 0.0, "cross_entropy": 1.0}}
    assert study.study(table(folder, [{"name": "a", "threshold": 0.5}, dense])) == 0
    held_out = read_text_rows(folder)
    teacher = load_dense(folder / "teacher")
    for name in ("a", "dense"):
        found = result(folder, name)
        assert not {"kl", "top1_agreement"} & {*found["teacher"]}
        (place,) = (folder / "runs/small").glob(f"{name}-0-*/model")
        with torch.no_grad():
            p, q = (m(held_out).logits[:, :-1].double().softmax(-1) for m in (teacher, load_model(place)))
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        # of models that hardly differ, float32 leaves some 1e-9 of it
        assert found["after"]["kl"] == pytest.approx(float(kl), rel=1e-4, abs=2e-8)
        same = (p.argmax(-1) == q.argmax(-1)).double().mean()
        assert found["after"]["top1_agreement"] == pytest.approx(float(same), abs=1e-9)
    assert result(folder, "a")["before"]["kl"] > result(folder, "dense")["after"]["kl"] > 0
    assert "kl" not in result(folder, "dense")["before"]  # which is the teacher itself


def read_text_rows(folder):
    """What ``held_out_rows`` leaves of the held-out text, as a study cuts it."""
    tokenizer = load_tokenizer(folder / "teacher")
    rows = data.tokenize(data.load_text(str(folder / "held_out.txt")), tokenizer, 512)
    return torch.tensor(rows[:2]["input_ids"])


def test_results_of_code_that_is_in_no_commit_are_renewed_if_asked(folder, monkeypatch):
    def of(commit):
        for module in (study, provenance):
            monkeypatch.setattr(module, "commit_of", lambda root: commit)

    saves = {"training.save_strategy": "steps", "training.save_steps": 1}
    rows = [{"name": "a", "threshold": 0.5} | saves, {"name": "b", "threshold": 0.25}]
    of("1234567-dirty")
    study.study(table(folder, rows[:1]))
    of("89abcde")
    study.study(table(folder, rows[1:]))
    counted = Counted(monkeypatch)
    study.study(table(folder, rows))
    assert counted.take() == []
    study.study(table(folder, rows, renew=True))
    assert counted.take() == [(0.5, 0)]
    assert result(folder, "a")["commit"] == "89abcde"
    assert "train_seconds" in result(folder, "a")  # from the start: not gone on with where the other stopped
    study.study(table(folder, rows, renew=True))
    assert counted.take() == []


@pytest.mark.parametrize("changed", ["teacher", "data", "held_out"])
def test_what_a_number_depends_on_is_run_again(folder, monkeypatch, changed):
    rows = [{"name": "a", "threshold": 0.5}]
    study.study(table(folder, rows))
    before = result(folder, "a")
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
    assert result(folder, "a")["key"] != before["key"]


def fail_at(monkeypatch, threshold):
    """Rows with this threshold fail."""
    distill = study.distill

    def failing(settings, *args, **kwargs):
        if settings.threshold == threshold:
            raise RuntimeError("out of luck")
        return distill(settings, *args, **kwargs)

    monkeypatch.setattr(study, "distill", failing)


def test_what_goes_wrong_is_recorded_and_the_rest_goes_on(folder, monkeypatch):
    rows = [
        {"name": "diverges", "training.learning_rate": 1e9, "training.max_steps": 30},
        {"name": "impossible", "threshold": 0.125},
        {"name": "fine"},
    ]
    fail_at(monkeypatch, 0.125)
    rows[0] |= {"training.max_grad_norm": 0.0, "training.logging_steps": 5}
    assert study.study(table(folder, rows)) == 1  # to diverge is a result
    assert result(folder, "diverges")["status"] == "diverged"
    assert result(folder, "impossible")["status"] == "failed"
    assert "out of luck" in result(folder, "impossible")["error"]
    assert result(folder, "fine")["status"] == "done"
    counted = Counted(monkeypatch)
    study.study(table(folder, rows))
    assert len(counted.take()) == 1  # to diverge is a result, to fail is not


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"training.per_device_train_batch_size": 10_000}, "b: data make .* fewer than one batch"),
        ({"threshold": [1.0, 1.0, 1.0]}, "b: threshold lists 3 layers"),
        ({"training.lr_scheduler_type": "cosine_with_min_lr"}, "b: training.lr_scheduler_type"),
    ],
)
def test_mistakes_of_all_rows_are_said_before_the_first(folder, wrong, said):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=said):
        study.study(table(folder, [{"name": "a"}, {"name": "b"} | wrong]))
    assert sorted(folder.rglob("*")) == before


def test_a_row_that_fails_takes_no_earlier_result_away(folder, monkeypatch):
    study.study(table(folder, [{"name": "a"}]))
    before = (folder / "results/small.jsonl").read_text()
    fail_at(monkeypatch, 0.125)
    impossible = {"name": "a", "threshold": 0.125}
    assert study.study(table(folder, [impossible])) == 1
    assert (folder / "results/small.jsonl").read_text() == before
    said = json.loads((folder / "runs/small/a-0.failed.json").read_text())
    assert "out of luck" in said["error"]
    # text that is missing is said at once, for all rows
    (folder / "train.txt").unlink()
    with pytest.raises(data.DataError, match=r"train\.txt"):
        study.study(table(folder, [{"name": "a"}]))
    assert (folder / "results/small.jsonl").read_text() == before
    assert study.study(table(folder, [{"name": "converted", "training.max_steps": 0}])) == 0  # wants none


def test_no_row_starts_that_would_end_too_late(folder, monkeypatch, capsys):
    rows = [{"name": "a"}, {"name": "long", "training.max_steps": 10**7}, {"name": "b", "threshold": 0.5}]
    monkeypatch.setattr(study, "_START", time.monotonic())
    study.study(table(folder, rows, minutes=5))
    assert [record["row"] for record in recorded(folder)] == ["a", "b"]
    assert "1 rows did not fit into 5 minutes" in capsys.readouterr().out
    monkeypatch.setattr(study, "_START", time.monotonic() - 299)
    study.study(table(folder, rows, minutes=5, only="b", held_out_rows=3))
    assert result(folder, "b")["held_out_tokens"] == 2 * 511


def test_ctrl_c_in_the_middle_of_a_row_and_continued(folder):
    training = {"training.max_steps": 6, "training.save_strategy": "steps", "training.save_steps": 2}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content(folder, [{"name": "a"}, {"name": "b"} | training])))
    done = commands.run(HELPERS / "interrupted.py", "step-3", SCRIPT, path)
    said = f"1 of 2 rows are finished and kept in {folder / 'results/small.jsonl'}; the same command goes on."
    assert (done.returncode, done.stderr) == (130, f"interrupted: {said}\n")
    assert [record["row"] for record in recorded(folder)] == ["a"]
    (run,) = (folder / "runs/small").glob("b-0-*")
    assert (run / "checkpoint-2").is_dir()
    kept = (folder / "results/small.jsonl").read_text()
    assert study.study(table(folder, [{"name": "a"}, {"name": "b"} | training])) == 0
    assert (folder / "results/small.jsonl").read_text().startswith(kept)
    continued = result(folder, "b")
    straight = folder / "straight"
    study.study(table(folder, [{"name": "b"} | training], results=str(straight), output=str(straight)))
    (expected,) = read_records(straight / "small.jsonl")
    assert continued["after"]["perplexity"] == pytest.approx(expected["after"]["perplexity"], rel=1e-6)
    assert "train_seconds" in expected
    assert "train_seconds" not in continued


def test_what_another_process_records_meanwhile_stays(folder, monkeypatch):
    distill, theirs = study.distill, {"row": "theirs", "seed": 0, "key": "k", "status": "done"}

    def busy(*args, **kwargs):
        put_record(folder / "results/small.jsonl", theirs, study.IDENTITY)
        return distill(*args, **kwargs)

    monkeypatch.setattr(study, "distill", busy)
    study.study(table(folder, [{"name": "a"}]))
    assert [record["row"] for record in recorded(folder)] == ["theirs", "a"]
    assert recorded(folder)[0] == theirs


def test_a_damaged_table_is_told_before_the_first_row(folder, monkeypatch):
    (folder / "results").mkdir()
    (folder / "results/small.jsonl").write_text('{"row": "a", "se')
    counted = Counted(monkeypatch)
    with pytest.raises(ValueError, match=r"small\.jsonl, line 1 is no record"):
        study.study(table(folder, [{"name": "a"}]))
    assert counted.take() == []


@pytest.mark.parametrize("commit", ["1234567", "1234567-dirty", None])
def test_changed_code_is_said_at_once_and_in_the_record(folder, monkeypatch, capsys, commit):
    monkeypatch.setattr(study, "commit_of", lambda root: commit)
    monkeypatch.setattr(provenance, "commit_of", lambda root: commit)
    study.study(table(folder, [{"name": "a", "training.max_steps": 0}]))
    assert result(folder, "a")["commit"] == commit
    assert ("mark these results" in capsys.readouterr().out) is (commit != "1234567")


def test_two_processes_share_a_table(folder, monkeypatch, capsys):
    counted = Counted(monkeypatch)
    lock = folder / "runs/small/a-0.lock"
    lock.parent.mkdir(parents=True)
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
        ({"rows": [{"name": "a", "checks": ["int4"]}]}, "must be a list, each 'bf16', 'int8'"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "name of its own"),
        ({"rows": []}, "rows must be a list"),
        ({"only": "c*"}, "none of the rows"),
        ({"rows": [{"name": "a", "training.learning_rte": 1e-3}]}, "did you mean 'learning_rate'"),
        ({"only": {"a": "b*"}}, "quote one with a colon"),
        ({"only": 3}, "only must be a pattern"),
        ({"minutes": "abc"}, "minutes must be a number above 0"),
        ({"minutes": True}, "minutes must be a number above 0"),
        ({"minutes": 0}, "minutes must be a number above 0"),
        ({"seeds": "abc"}, "seeds must be a list of integers"),
        ({"rows": [{"name": "a", "seeds": 1}]}, "seeds must be a list of integers"),
        ({"claims": [{"claim": "so", "rows": ["c"]}]}, "Unknown key 'c'"),
        ({"levers": [{"change": "so", "row": "a", "against": "c"}]}, "Unknown key 'c'"),
        ({"levers": [{"change": "so", "row": "a"}]}, "must set against"),
        ({"levers": {"change": "so"}}, "a list of mappings"),
        ({"findings": [{"text": "so", "rows": ["c"]}]}, "Unknown key 'c'"),
        ({"findings": [{"rows": ["a"]}]}, "must set text"),
        ({"findings": [{"text": "{gain[c]:.2f}"}]}, "Unknown key 'c'"),
        ({"findings": [{"text": "{gian[a]:.2f}"}]}, "did you mean 'gain'"),
        ({"claims": [{"claim": "so", "verdict": "{gain[a | c]:.2f}"}]}, "Unknown key 'c'"),
        ({"findings": [{"text": "so", "rows": "a"}]}, "a list of strings"),
        ({"findings": None}, "a list of mappings"),
    ],
)
def test_bad_tables(folder, wrong, said):
    with pytest.raises(ValueError, match=said):
        Table(**content(folder, [{"name": "a"}]) | wrong)


def test_rehearsal_touches_no_result(folder):
    rows = [{"name": "a", "seeds": [0, 1], "training.max_steps": 10**6, "threshold": 0.5}]
    assert study.study(table(folder, rows, rehearse=True)) == 0
    assert not (folder / "results").exists()
    (made,) = read_records(folder / "runs/rehearsal/results/small.jsonl")
    assert math.isfinite(made["after"]["perplexity"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/ablate/tables").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_tables_are_well_formed(path):
    made = parse_settings(Table, [str(path)])
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
