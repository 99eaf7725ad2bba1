"""recipes/evaluate: its real command line on tiny models."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import spiking_mamba
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, evaluation
from spiking_mamba.commands import evaluate
from spiking_mamba.data.text import load_text
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.evaluation import measuring
from spiking_mamba.evaluation.cache import ResultsCache, TakenError
from spiking_mamba.evaluation.settings import Checkpoint
from tests.helpers import commands

ROOT = Path(__file__).parents[2]
SCRIPT = [ROOT / "recipes/evaluate/evaluate.py", ROOT / "recipes/evaluate/evaluate.yaml"]
SCHEMA = json.loads((Path(spiking_mamba.__file__).parent / "evaluation/evaluation.schema.json").read_text())
SIX = ["hellaswag", "piqa", "arc_easy", "arc_challenge", "boolq", "winogrande"]
SMALL = ["limit=3", "length=32", "tasks=[copa, lambada_openai]", "corpora=[openwebtext-passages]"]


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess:
    return commands.run(*SCRIPT, *arguments, **more)


@pytest.fixture
def call(monkeypatch, capsys):
    """The same without a process of its own, which takes seconds to import everything."""
    monkeypatch.setattr(evaluate, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(evaluate, "quiet", lambda: None)

    def call(*arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [*map(str, SCRIPT), *map(str, arguments)])
        code: int | str | None = 0
        try:
            evaluate.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        message = code if isinstance(code, str) else ""
        return subprocess.CompletedProcess([], 1 if message else int(code or 0), out, err + message)

    return call


def results_of(folder: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """`teacher`, its spiking students of seeds 0 and 1, and a teacher without a tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(load_text("openwebtext-passages")["text"][:100], vocab_size=512)
    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16}
    shape |= {"state_size": 8, "n_groups": 1, "chunk_size": 16, "initializer_range": 0.3}
    torch.manual_seed(0)
    teacher = SpikingMambaForCausalLM(SpikingMambaConfig(**shape))
    teacher.save_pretrained(root / "mute/model")
    models = {"teacher": teacher}
    for seed in (0, 1):
        student = SpikingMambaForCausalLM.from_dense(teacher, neuron={"class": "neurons.SILIFNode"})
        with torch.no_grad():
            student.lm_head.weight += 0.01 * (seed + 1)
        models[f"student{seed}"] = student
    for name, model in models.items():
        model.save_pretrained(root / name / "model")
        tokenizer.save_pretrained(root / name / "model")
    return root


@pytest.fixture(scope="module")
def evaluated(checkpoints, tmp_path_factory) -> tuple[Path, list[str], subprocess.CompletedProcess]:
    """All ten tasks: the group of two students against the teacher."""
    output = tmp_path_factory.mktemp("runs") / "evaluation"
    models = json.dumps([f"{checkpoints}/student{{seed}}/model", f"{checkpoints}/teacher/model"])
    arguments = [f"models={models}", "seeds=[0,1]", "reference=teacher", f"output={output}"]
    arguments += ["limit=3", "length=32"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return output, arguments, done


def test_results(evaluated, checkpoints):
    output, _, done = evaluated
    results = results_of(output)
    jsonschema.validate(results, SCHEMA)
    students, teacher = results["models"][:2], results["models"][2]
    assert [m["name"] for m in results["models"]] == ["student0", "student1", "teacher"]
    assert [m["group"] for m in results["models"]] == ["student{seed}", "student{seed}", "teacher"]
    assert [m["seed"] for m in results["models"]] == [0, 1, None]
    assert [m["reference"] for m in results["models"]] == [False, False, True]
    assert [m["neuron"] for m in results["models"]] == ["SILIFNode", "SILIFNode", None]
    assert [m["levels"] for m in results["models"]] == [9, 9, None]
    assert len({m["weights_sha256"] for m in results["models"]}) == 3
    for model in results["models"]:
        assert len(model["tasks"]) == 10
        main = [model["tasks"][task]["metrics"][model["tasks"][task]["main"]]["value"] for task in SIX]
        assert model["average"] == pytest.approx(sum(main) / 6)
        for task, found in model["tasks"].items():
            assert found["n"] == 3
            for metric in ("acc", "acc_norm"):
                if metric in found["metrics"]:
                    scores = found["items"][metric]
                    assert found["metrics"][metric]["value"] == pytest.approx(sum(scores) / 3), task
    assert teacher["spikes"] is None
    assert teacher["energy"] is None
    for text, found in teacher["perplexity"].items():
        assert found["compared"] is None, text
    for student in students:
        for found in student["perplexity"].values():
            assert found["compared"]["reference"] == "teacher"
            assert 0 < found["compared"]["kl"] < 10
            assert 0 < found["compared"]["top1_agreement"] < 1
        parts = [*student["tasks"].values(), *student["perplexity"].values()]
        for key in ("accumulations", "dense_macs"):
            whole = sum(row[key] for row in student["spikes"]["projections"].values())
            assert whole == pytest.approx(sum(part["spikes"][key] for part in parts))
        gain = student["energy"]["projections"]["fp32"]["gain"]
        assert gain == pytest.approx(4.6 / (0.9 * student["spikes"]["mean_abs"]))
        for found in student["perplexity"].values():
            assert found["spikes"]["tokens"] == 3 * 32
    lines = [
        [cell.strip() for cell in line.split("|")[1:3]] for line in done.stdout.splitlines() if "|" in line
    ]
    for row in (["hellaswag, acc_norm %", "yes"], ["hellaswag, acc %", ""], ["piqa, acc %", "yes"]):
        assert row in lines
    assert "average of the source's six tasks" in done.stdout
    assert "wikipedia-passages, KL to the reference, nats per token" in done.stdout
    assert "openwebtext-passages, same likeliest token, %" in done.stdout
    for name in ("report.md", "report.html", "gaps.png", "accuracy_energy.png"):
        assert (output / name).stat().st_size > 0
    assert set(results["groups"]["student{seed}"]) >= {"average", "piqa", "gain_fp32", "mean_abs"}
    assert {gap["task"] for gap in results["gaps"]} >= {"average", "piqa"}
    assert {gap["reference"] for gap in results["gaps"]} == {"teacher"}


def test_the_schema_refuses(evaluated):
    results = results_of(evaluated[0])

    def broken(change):
        changed = copy.deepcopy(results)
        change(changed)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, SCHEMA)

    broken(lambda r: r.pop("provenance"))
    broken(lambda r: r["models"][0].pop("weights_sha256"))
    broken(lambda r: r["models"][0]["tasks"]["copa"].update(main="f1"))
    broken(lambda r: r["models"][0]["tasks"]["copa"]["items"]["acc"].append(0.5))
    broken(lambda r: r["models"][0]["perplexity"]["wikipedia-passages"].update(perplexity="inf"))
    broken(lambda r: r.update(schema="spiking_mamba/evaluation/2"))


def test_a_second_run_measures_nothing_and_finds_the_same(evaluated, call):
    output, arguments, _ = evaluated
    before, files = results_of(output), {p: p.stat().st_mtime_ns for p in (output / "cache").iterdir()}
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    # three models on ten tasks and two texts, and on these two students compared with their teacher
    assert done.stdout.count(": measured before") == len(files) == 3 * 12 + 2 * 2
    assert {p: p.stat().st_mtime_ns for p in (output / "cache").iterdir()} == files
    after = results_of(output)
    assert after["models"] == before["models"]


def test_each_seed_is_compared_with_the_reference_of_its_seed():
    def checkpoint(name, seed=None, reference=False):
        return Checkpoint(name, name, seed, name, reference)

    ours = [checkpoint("a0", 0), checkpoint("a1", 1), checkpoint("b")]
    assert [measuring.reference_of(each, ours) for each in ours] == [None] * 3
    theirs = [checkpoint("t0", 0, True), checkpoint("t1", 1, True)]
    found = [measuring.reference_of(each, ours + theirs) for each in ours + theirs]
    assert [each and each.name for each in found] == ["t0", "t1", "t0", None, None]


def test_what_reads_other_tokens_is_not_compared(checkpoints, tmp_path, call):
    other = tmp_path / "other/model"
    shutil.copytree(checkpoints / "teacher/model", other)
    train_tokenizer(["some other text"], 300).save_pretrained(other)
    models = json.dumps([f"{checkpoints}/student0/model", str(other)])
    done = call(f"models={models}", f"reference={other}", f"output={tmp_path / 'run'}", *SMALL, "tasks=[]")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "run")
    jsonschema.validate(results, SCHEMA)
    assert [m["perplexity"]["openwebtext-passages"]["compared"] for m in results["models"]] == [None, None]
    assert "likeliest" not in done.stdout


def test_without_the_cache_it_finds_the_same(evaluated, checkpoints, tmp_path, call):
    output, _, _ = evaluated
    done = call(f"models={checkpoints}/student0/model", f"output={tmp_path / 'again'}", *SMALL)
    assert done.returncode == 0, done.stderr
    [again], first = results_of(tmp_path / "again")["models"], results_of(output)["models"][0]
    assert again["average"] is None
    assert again["name"] == "student0"
    for task in ("copa", "lambada_openai"):
        assert again["tasks"][task] == first["tasks"][task]


def test_a_killed_run_goes_on(checkpoints, tmp_path, call):
    output = tmp_path / "killed"
    models = json.dumps([f"{checkpoints}/student0/model", f"{checkpoints}/teacher/model"])
    arguments = [f"models={models}", f"output={output}", *SMALL]
    killed = run(*arguments, kill_when=lambda: bool(list((output / "cache").glob("*.json"))))
    assert killed.returncode == -signal.SIGKILL
    kept = list((output / "cache").glob("*.json"))
    assert 0 < len(kept) < 6
    assert not (output / "results.json").exists()

    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": measured before") == len(kept)
    whole = call(f"models={models}", f"output={tmp_path / 'whole'}", *SMALL)
    assert whole.returncode == 0, whole.stderr
    assert results_of(output)["models"] == results_of(tmp_path / "whole")["models"]


def test_processes_share_the_measurements_and_find_the_same(evaluated, checkpoints, tmp_path):
    output, arguments, _ = evaluated  # all ten tasks, by one process
    shared = tmp_path / "shared"
    done = commands.torchrun(*SCRIPT, *arguments[:3], f"output={shared}", *arguments[4:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    wanted, found = results_of(output), results_of(shared)
    for key in ("models", "groups", "gaps"):
        assert found[key] == wanted[key]
    kept = [path.name for path in (shared / "cache").iterdir()]
    assert sorted(kept) == sorted(path.name for path in (output / "cache").iterdir())  # no lock is left


@pytest.mark.parametrize("changed", ["length=16", "tasks=[nothing]"])
def test_what_one_process_refuses_ends_all(evaluated, checkpoints, tmp_path, changed):
    _, arguments, _ = evaluated
    shutil.copytree(evaluated[0], tmp_path / "there")
    done = commands.torchrun(*SCRIPT, *arguments[:3], f"output={tmp_path / 'there'}", *arguments[4:], changed)
    assert done.returncode != 0
    assert ("with another length" if changed == "length=16" else "Unknown task") in done.stderr
    assert results_of(tmp_path / "there") == results_of(evaluated[0])


def test_a_process_takes_what_no_other_is_at(tmp_path):
    made = []

    def measure(name):
        made.append(name)
        return {"of": name}

    cache = ResultsCache(tmp_path, waits=False)
    assert cache.get("a", {"k": 1}, lambda: measure("a")) == ({"of": "a"}, False)
    assert cache.get("a", {"k": 1}, lambda: measure("a")) == ({"of": "a"}, True)
    other = ResultsCache(tmp_path, waits=False)

    def meanwhile():
        with pytest.raises(TakenError):
            other.get("b", {"k": 1}, lambda: measure("b, twice"))
        return measure("b")

    assert cache.get("b", {"k": 1}, meanwhile) == ({"of": "b"}, False)
    assert made == ["a", "b"]
    waiting = ResultsCache(tmp_path, waits=True)
    with ThreadPoolExecutor(1) as pool:

        def slowly():
            late = pool.submit(waiting.get, "c", {"k": 1}, lambda: measure("c, twice"))
            time.sleep(0.2)
            assert not late.done()
            slowly.late = late
            return measure("c")

        cache.get("c", {"k": 1}, slowly)
        assert slowly.late.result(10) == ({"of": "c"}, True)
    cache.tidy_up()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_ctrl_c_keeps_what_is_measured(checkpoints, tmp_path, call, monkeypatch):
    output = tmp_path / "stopped"
    arguments = [f"models={checkpoints}/student0/model", f"output={output}", *SMALL]
    measure = measuring.score

    def interrupt(lm, task, *others):
        if task.config.task != "copa":
            raise KeyboardInterrupt
        return measure(lm, task, *others)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "score", interrupt)
        done = call(*arguments)
    said = f"the cache {output / 'cache'} keeps what is measured (1 so far); the same command goes on."
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, f"interrupted: {said}")
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": measured before") == 1


def test_a_folder_grows_but_does_not_shrink_or_change(checkpoints, tmp_path, call):
    one, two = f"{checkpoints}/student0/model", f"{checkpoints}/teacher/model"
    output = tmp_path / "growing"
    small = [f"output={output}", "limit=2", "corpora=[]"]
    assert call(f"models={one}", "tasks=[copa]", *small).returncode == 0
    done = call(f"models=[{one}, {two}]", "tasks=[copa, winogrande]", *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": measured before") == 1
    before = (output / "results.json").read_bytes()
    for arguments, reason in (
        ([f"models={two}", "tasks=[copa, winogrande]", *small], f"of {one} too"),
        ([f"models=[{one}, {two}]", "tasks=[copa]", *small], "of winogrande too"),
        ([f"models=[{one}, {two}]", "tasks=[copa, winogrande]", *small, "limit=3"], "another limit"),
    ):
        done = call(*arguments)
        assert done.returncode != 0
        assert reason in done.stderr
        assert "overwrite=true" in done.stderr
        assert (output / "results.json").read_bytes() == before
    (output / "results.json").write_bytes(before[:-9])
    done = call(f"models=[{one}, {two}]", "tasks=[copa, winogrande]", *small)
    assert done.returncode != 0
    assert "results.json cannot be read" in done.stderr
    done = call(f"models={two}", "tasks=[copa]", *small, "overwrite=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": measured before") == 1
    assert [model["name"] for model in results_of(output)["models"]] == ["teacher"]
    assert len(list((output / "cache").iterdir())) == 4
    for change in ("limit=1", "batch_size=3", "dtype=bfloat16", "limit_seed=1"):
        done = call(f"models={two}", "tasks=[copa]", *small, "overwrite=true", change)
        assert done.returncode == 0, done.stderr
        assert ": measured before" not in done.stdout


def test_nan_is_named_and_spoils_nothing(checkpoints, tmp_path, call):
    good, output = checkpoints / "teacher/model", tmp_path / "evaluation"
    arguments = [f"output={output}", "limit=2", "corpora=[openwebtext-passages]", "length=32"]
    assert call(f"models={good}", "tasks=[copa]", *arguments).returncode == 0
    before = {path: path.read_bytes() for path in output.rglob("*.json")}
    broken = SpikingMambaForCausalLM.from_pretrained(good)
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/tokenizer.json").write_bytes((good / "tokenizer.json").read_bytes())
    (tmp_path / "broken/tokenizer_config.json").write_bytes((good / "tokenizer_config.json").read_bytes())
    drawn = results_of(output)["models"][0]["tasks"]["copa"]["drawn"]
    assert (drawn["seed"], drawn["of"], drawn["sources"]) == (0, 100, {})
    for tasks, place in (("[copa]", f"NaN in copa, item {drawn['items'][0]}."), ("[]", "NaN in row 0")):
        models = [f"models=[{good}, {tmp_path / 'broken'}]", f"tasks={tasks}"]
        done = call(*models, *arguments, *(["overwrite=true"] if tasks == "[]" else []))
        assert done.returncode != 0
        assert place in done.stderr
        assert "broken" in done.stderr
        assert "Traceback" not in done.stderr
        assert {path: path.read_bytes() for path in output.rglob("*.json") if path in before} == before
        assert not any("broken" in path.read_text() for path in output.rglob("*.json"))
    done = call(f"models={good}", "tasks=[copa]", *arguments)  # the broken one may be dropped again
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": measured before") == 2


def test_an_error_of_the_command_is_one_line(checkpoints, tmp_path):
    done = run(f"models={checkpoints}/mute/model", *SMALL, f"output={tmp_path / 'out'}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "holds no tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=[copaa]"], "Did you mean copa"),
        (["tasks=[]", "corpora=[]"], "nothing to evaluate"),
        (["corpora=[wikipedia-passage]"], "wikipedia-passages"),
        (["models=/nowhere/model"], "/nowhere/model"),
        (["models=[]"], "at least one"),
        (["models=[{0}/mute/model]"], "holds no tokenizer"),
        (["models=[{0}/teacher/model, {0}/teacher/model]"], "twice"),
        (["models={0}/student{{seed}}/model"], "needs seeds"),
        (["seeds=[0,1]"], "no model has {seed}"),
        (["tokenizer=/nowhere/at", "models={0}/mute/model"], "that a tokenizer could be loaded from"),
        (["reference=student9"], "none of the models"),
        (["limit=0"], "limit"),
        (["limit_sed=1"], "did you mean 'limit_seed'"),
        (["dtype=float16"], "dtype"),
        (["data=web"], "'packages' or 'hub'"),
        (["batchsize=4"], "did you mean 'batch_size'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(checkpoints, tmp_path, arguments, message, call):
    given = [argument.format(checkpoints) for argument in arguments]
    done = call(f"models={checkpoints}/teacher/model", *SMALL, f"output={tmp_path / 'out'}", *given)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_folder_is_left_alone(checkpoints, tmp_path, call):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "settings.yaml").write_text("learning_rate: 1")
    for extra in ([], ["overwrite=true"]):
        done = call(f"models={checkpoints}/teacher/model", *SMALL, f"output={tmp_path}", *extra)
        assert done.returncode != 0
        assert "left as it is" in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "settings.yaml"}


def test_a_tokenizer_of_another_folder(checkpoints, tmp_path, call):
    done = call(
        f"models=[{checkpoints}/mute/model, {checkpoints}/teacher/model]",
        f"tokenizer={checkpoints}/student0/model",
        f"output={tmp_path / 'out'}",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    mute, teacher = results_of(tmp_path / "out")["models"]
    assert mute["tasks"] == teacher["tasks"]
    assert mute["weights_sha256"] == teacher["weights_sha256"]


def test_the_same_weights_with_another_neuron_are_measured_anew(checkpoints, tmp_path, call):
    """The file of weights is the same: the cache must tell them apart."""
    student = checkpoints / "student0/model"
    other = tmp_path / "other"
    other.mkdir()
    for path in student.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["neuron"] = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 1}}
    (other / "config.json").write_text(json.dumps(config))
    done = call(
        f"models=[{student}, {other}]",
        f"output={tmp_path / 'out'}",
        "limit=2",
        "tasks=[copa]",
        "corpora=[]",
    )
    assert done.returncode == 0, done.stderr
    four, one = results_of(tmp_path / "out")["models"]
    assert four["weights_sha256"] == one["weights_sha256"]
    assert (four["levels"], one["levels"]) == (9, 3)
    assert four["spikes"]["mean_abs"] > one["spikes"]["mean_abs"]


class TestSettings:
    def settings(self, models, **others):
        return evaluation.EvaluationSettings(models=models, **others).checkpoints()

    def test_names(self):
        assert [c.name for c in self.settings("runs/a/student/model")] == ["student"]
        found = self.settings(["runs/a/student/model", "runs/b/student/model", "state-spaces/mamba2-130m"])
        assert [c.name for c in found] == ["runs/a/student", "runs/b/student", "state-spaces/mamba2-130m"]
        assert [c.name for c in self.settings(["runs/a/model", "runs/a"])] == ["runs/a/model", "runs/a"]
        assert [c.name for c in self.settings(["/data/a", "runs/b"])] == ["/data/a", "runs/b"]
        assert [c.name for c in self.settings({"D=4": "x/y", "D=8": "x/z"})] == ["D=4", "D=8"]

    def test_seeds(self):
        found = self.settings({"ours": "runs/q{seed}/model"}, seeds=[0, 2], reference="ours")
        assert [(c.name, c.group, c.seed, c.path, c.reference) for c in found] == [
            ("ours seed 0", "ours", 0, "runs/q0/model", True),
            ("ours seed 2", "ours", 2, "runs/q2/model", True),
        ]
        with pytest.raises(ValueError, match="integers"):
            self.settings("runs/q{seed}", seeds=["zero"])

    @pytest.mark.parametrize("reference", ["b", "runs/b/model"])
    def test_reference(self, reference):
        found = self.settings(["runs/a/model", "runs/b/model"], reference=reference)
        assert [c.reference for c in found] == [False, True]


def test_a_world_without_a_launcher_is_one_process(checkpoints, tmp_path):
    arguments = [f"models={checkpoints}/student0/model", f"output={tmp_path / 'run'}", "tasks=[copa]"]
    done = run(*arguments, "limit=2", "corpora=[]", WORLD_SIZE="4")
    assert done.returncode == 0, done.stderr
    assert "Report: " in done.stdout
