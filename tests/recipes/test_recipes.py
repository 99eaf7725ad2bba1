"""The recipes' real command lines, on tiny text files."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.commands import HELPERS, ROOT

WORDS = "the quick brown fox jumps over a lazy dog while seven small mice watch from under an old tree"
SMALL = [
    "length=32",
    "vocab_size=300",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.state_size=8",
    "model.chunk_size=16",
]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return commands.run(ROOT / "recipes" / script, *arguments, timeout=900)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = WORDS.split()
    documents = [
        f"Story {i}: " + " ".join(words[(i * j + j * j) % len(words)] for j in range(80))
        for i in range(1, 150)
    ]
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    done = run(
        "teacher/train.py",
        ROOT / "recipes/teacher/tiny.yaml",
        f"data={text}",
        f"output={folder}",
        *SMALL,
        "training.max_steps=4",
        "--training.per_device_train_batch_size",
        "2",
    )
    assert done.returncode == 0, done.stderr
    return folder


def distill(teacher: Path, text: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run(
        "distill/distill.py",
        ROOT / "recipes/distill/tiny.yaml",
        f"teacher={teacher / 'model'}",
        f"data={text}",
        f"output={output}",
        "length=32",
        "training.max_steps=4",
        "training.per_device_train_batch_size=2",
        "training.logging_steps=1",
        *arguments,
    )


def test_teacher_and_student_load_with_the_auto_classes(teacher, text, tmp_path):
    done = distill(teacher, text, tmp_path / "student", "sgc={mode: blend}", "learn_threshold=true")
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, spiking_mamba, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    prompt = AutoTokenizer.from_pretrained(folder)('the quick', return_tensors='pt')\n"
        "    ids = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)\n"
        "    print(ids.shape[1] - prompt['input_ids'].shape[1])\n"
    )
    folders = [teacher / "model", tmp_path / "student/model"]
    loaded = commands.run("-c", code, *folders, cwd=tmp_path, fresh=True)
    assert loaded.stdout.split() == ["3", "3"], loaded.stderr
    exported = json.loads((tmp_path / "student/model/config.json").read_text())
    assert exported["sgc"] is None
    assert exported["threshold"] == 1.0
    assert exported["neuron"]["class"] == "neurons.SILIFNode"
    log = json.loads((tmp_path / "student/log.json").read_text())
    assert [row["sgc_lambda"] for row in log if "kl" in row] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_tensorboard_gets_every_row_of_the_log(teacher, text, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = distill(teacher, text, tmp_path / "student", "training.report_to=tensorboard")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "student/runs").iterdir()
    reader = events.EventAccumulator(str(folder))
    reader.Reload()
    log = json.loads((tmp_path / "student/log.json").read_text())
    for name in ("loss", "kl", "mean_abs_spike"):
        shown = {event.step: event.value for event in reader.Scalars(f"train/{name}")}
        assert shown == pytest.approx({row["step"]: row[name] for row in log if name in row})
        assert list(shown) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenght=32"], "did you mean 'length'"),
        (["training.learning_rat=1"], "did you mean 'learning_rate'"),
        (["loss.temprature=1"], "did you mean 'temperature'"),
        (["neuron.args.max_spike_count=0"], "at least 1"),
        (["neuron.class=os.system"], "Unknown neuron"),
        (["neuron.args.max_spikes=3"], "max_spike_count"),
        (["threshold=0"], "positive"),
        (["membrane=tokens"], "membrane"),
        (["data=/nowhere/text.txt"], "text.txt"),
        (["data=wikipedia-leeds"], "wikipedia-leads"),
        (["teacher=/nowhere/model"], "/nowhere/model"),
        (["training.max_steps=4", "length=100000"], "tokens"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(teacher, text, tmp_path, arguments, message):
    done = distill(teacher, text, tmp_path / "student", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "student").exists()


def test_a_folder_with_another_run_is_left_alone(teacher, text, tmp_path):
    output = tmp_path / "student"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    for extra in ([], ["overwrite=true"], ["resume=true"]):
        done = distill(teacher, text, output, *extra)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_a_killed_run_resumes_to_the_same_student(teacher, text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["training.save_steps=1", "sgc={mode: blend}"]
    assert distill(teacher, text, whole, *arguments).returncode == 0
    done = distill(teacher, text, killed, *arguments)
    assert done.returncode == 0, done.stderr
    # what is left of a run that was killed after its third step
    shutil.rmtree(killed / "model")
    (killed / "log.json").unlink()
    shutil.rmtree(killed / "checkpoint-4")
    assert (
        "other settings of loss"
        in distill(teacher, text, killed, *arguments, "resume=true", "loss.kl=2").stderr
    )
    done = distill(teacher, text, killed, *arguments, "resume=true")
    assert done.returncode == 0, done.stderr
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
    last = [json.loads((folder / "log.json").read_text())[3] for folder in (whole, killed)]
    assert {k: last[0][k] for k in ("loss", "kl", "sgc_lambda")} == {
        k: last[1][k] for k in ("loss", "kl", "sgc_lambda")
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("neuron.args.max_spike_cont=8", "did you mean 'max_spike_count'"),
        ("training.max_stepz=4", "did you mean 'max_steps'"),
        ("loss.temprature=1", "did you mean 'temperature'"),
        ("sgc={mode: blnd}", "sgc.mode"),
        ("threshold=0", "positive"),
        ("held_out=wikipedia-pasages", "wikipedia-passages"),
        ("teacher=/nowhere/model", "/nowhere/model"),
        ("tasks=[picqa]", "Did you mean piqa"),
        ("limit=0", "limit must be an integer of at least 1"),
        ("held_out_rows=0", "held_out_rows must be an integer of at least 1"),
    ],
)
def test_quickstart_checks_everything_before_it_trains(text, tmp_path, argument, message):
    yaml_file = ROOT / "recipes/quickstart/quickstart.yaml"
    output = f"output={tmp_path / 'run'}"
    texts = [f"data={text}", f"held_out={text}"]
    done = run("quickstart/quickstart.py", yaml_file, *texts, output, "length=32", argument)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_quickstart_of_another_neuron_at_calibrated_thresholds(teacher, text, tmp_path):
    done = run(
        ROOT / "recipes/quickstart/quickstart.py",
        ROOT / "recipes/quickstart/quickstart.yaml",
        *(f"teacher={teacher / 'model'}", f"data={text}", f"held_out={text}", f"output={tmp_path / 'run'}"),
        *("length=32", "held_out_rows=2", "tasks=[sciq]", "limit=1", "threshold={mean_abs: 0.4}"),
        "neuron={class: spikingjelly.activation_based.neuron.ILIFNode, args: {}}",
        "training={max_steps: 1, per_device_train_batch_size: 2}",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["levels"] == 5  # 0 to 4
    assert "a spiking student of 5 levels" in (tmp_path / "run/report.md").read_text()
    # before and after one step it spikes as was asked for
    assert results["after"]["perplexity"] == pytest.approx(results["before"]["perplexity"], rel=0.2)


def test_quickstart(teacher, text, tmp_path):
    """With Ctrl-C in its evaluation, and gone on with."""
    folder = tmp_path / "run"
    arguments = [
        ROOT / "recipes/quickstart/quickstart.py",
        ROOT / "recipes/quickstart/quickstart.yaml",
        f"teacher={teacher / 'model'}",
        f"data={text}",
        f"held_out={text}",
        f"output={folder}",
        "length=32",
        "training={max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1}",
        "held_out_rows=2",
        "tasks=[sciq, piqa, copa]",
        "limit=1",
    ]
    done = run(HELPERS / "interrupted.py", "evaluation", *arguments)
    assert done.returncode == 130, done.stderr
    said = f"interrupted: {folder / 'student/model'} is trained and stays; resume=true does the rest.\n"
    *packages, last = done.stderr.splitlines(keepends=True)
    assert last == said
    assert all(line.startswith("PyPI ") for line in packages)  # no bar where there is no terminal
    first, *table, summary, stage = done.stdout.splitlines()
    assert first.startswith("1/3")
    assert [line.split()[0] for line in table] == ["Text", "step", "1", "2", "3"]
    assert summary.startswith("3 steps, 192 tokens in ")
    assert stage.startswith("2/3")
    weights = (folder / "student/model/model.safetensors").read_bytes()
    done = run(*arguments, "resume=true")
    assert done.returncode == 0, done.stderr
    assert (folder / "student/model/model.safetensors").read_bytes() == weights
    results = json.loads((folder / "results.json").read_text())
    assert results["after"]["perplexity"] > 1
    assert results["provenance"]["settings"]["limit"] == 1
    assert set(results["after"]["zero_shot"]) == {"sciq", "piqa", "copa"}
    assert "closed" in done.stdout
    assert "energy gain" in (folder / "report.md").read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "energy gain" in (folder / "report.html").read_text()
    spikes = results["spikes"]["projections"]
    assert sum(spikes["backbone.layers.0.mixer.in_proj"]["histogram"]) == results["held_out_rows"] * 32 * 32
