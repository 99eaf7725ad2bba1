"""The distill recipe on several processes, rehearsed, and killed: real command lines."""

import json
import os
import shutil

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import spiking_mamba  # noqa: F401  (registers the model)
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.training.distillation import DistillationSettings
from spiking_mamba.training.pretraining import PretrainingSettings, pretrain
from tests.helpers.commands import HELPERS, ROOT, run, torchrun

RECIPE = ROOT / "recipes/distill"
SIZES = ("130m", "1.3b")
STEPS = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Document {i}: {i * 7} lazy dogs met {i % 13} foxes." for i in range(300)))
    return path


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    model = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 16, "head_dim": 16}
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "disable_tqdm": True}
    output = str(tmp_path_factory.mktemp("runs") / "teacher")
    folder, _ = pretrain(PretrainingSettings(output, str(text), 16, 300, model=model, training=training))
    return folder


@pytest.fixture(scope="module")
def arguments(teacher, text):
    """Of the recipe, for four rows a step wherever it runs."""
    return [
        RECIPE / "distill.py",
        RECIPE / "tiny.yaml",
        f"teacher={teacher}",
        f"data={text}",
        "length=16",
        "sgc={mode: blend}",
        "learn_threshold=true",
        "loss={kl: 1.0, hidden: 1.0, cross_entropy: 0.1}",
        f"training.max_steps={STEPS}",
        "training.logging_steps=1",
        "training.save_steps=2",
        "training.save_total_limit=3",
        "training.bf16=false",
        "training.warmup_steps=0",
    ]


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    done = run(*arguments, f"output={folder}", "training.per_device_train_batch_size=4")
    assert done.returncode == 0, done.stderr
    return folder


def log(folder):
    kept = ("loss", "kl", "hidden", "ce", "mean_abs_spike", "sgc_lambda", "grad_norm", "learning_rate")
    rows = json.loads((folder / "log.json").read_text())
    return {row["step"]: {key: row[key] for key in kept if key in row} for row in rows if "kl" in row}


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def assert_alike(folder, other):
    for step, row in log(other).items():
        assert log(folder)[step] == pytest.approx(row, rel=1e-4, abs=1e-6), step
    for name, weight in weights(other).items():
        assert torch.allclose(weights(folder)[name], weight, atol=1e-5), name
    assert (
        AutoModelForCausalLM.from_pretrained(folder / "model").config.neuron["class"] == "neurons.SILIFNode"
    )


def assert_equal(folder, other):
    assert log(folder) == log(other)
    assert len(log(folder)) == STEPS
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- several processes ---


def fsdp_environment():
    """What `accelerate launch` makes of fsdp2.yaml."""
    config = yaml.safe_load((RECIPE / "fsdp2.yaml").read_text())["fsdp_config"]
    assert all(key.startswith("fsdp_") for key in config)
    return {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value) for key, value in config.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_resume(kind, arguments, one_process, tmp_path):
    launcher, environment = ([], {}) if kind == "ddp" else ([HELPERS / "fsdp_on_cpu.py"], fsdp_environment())
    command = [*arguments, f"output={tmp_path / 'run'}", "training.per_device_train_batch_size=2"]
    done = torchrun(*launcher, *command, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The student is in ") == 1
    sharded = list((tmp_path / "run/checkpoint-4").glob("pytorch_model_fsdp_0/*.distcp"))
    assert len(sharded) == (0 if kind == "ddp" else 2)
    assert_alike(tmp_path / "run", one_process)
    before = log(tmp_path / "run"), weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-5")
    (tmp_path / "run/checkpoint-4/complete").unlink()  # as of a run that was killed while it wrote
    (tmp_path / "run/log.json").unlink()
    done = torchrun(*launcher, *command, "resume=true", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("checkpoint-4 is incomplete") == 1
    assert log(tmp_path / "run") == before[0]
    assert all(torch.equal(w, before[1][name]) for name, w in weights(tmp_path / "run").items())


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_its_files(name):
    config = load_config_from_file(str(RECIPE / f"{name}.yaml"))
    assert config.num_processes == 8
    assert config.distributed_type == ("MULTI_GPU" if name == "ddp" else "FSDP")


# --- killed ---


@pytest.mark.parametrize("moment", ["step", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(moment, arguments, one_process, tmp_path):
    command = [*arguments, f"output={tmp_path / 'run'}", "training.per_device_train_batch_size=4"]
    done = run(HELPERS / "killed.py", moment, *command)
    assert done.returncode == -9
    assert not (tmp_path / "run/model").exists()
    assert (tmp_path / "run/checkpoint-4").exists() is (moment != "step")
    done = run(*command, "resume=true")
    assert done.returncode == 0, done.stderr
    assert ("checkpoint-4 is incomplete" in done.stderr) is (moment != "step")
    assert_equal(tmp_path / "run", one_process)


# --- interrupted ---


def test_ctrl_c_at_any_moment_says_how_to_go_on(arguments, one_process, tmp_path):
    folder = tmp_path / "run"
    command = [*arguments, f"output={folder}", "training.per_device_train_batch_size=4"]
    for moment, extra, sentence in (
        ("data", [], "nothing was written."),
        ("step-1", [], f"nothing trained is kept in {folder}; start again with overwrite=true."),
        (
            "step-3",
            ["overwrite=true"],
            f"{folder} holds the checkpoint of step 2; resume=true goes on from there.",
        ),
    ):
        done = run(HELPERS / "interrupted.py", moment, *command, *extra)
        assert (done.returncode, done.stderr) == (130, f"interrupted: {sentence}\n")
        assert folder.exists() is (moment != "data")
    done = run(*command, "resume=true")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()]
    assert rows[:5] == ["Text", "step", "3", "4", "5"]
    assert_equal(folder, one_process)


# --- the files for large models, rehearsed ---


@pytest.mark.parametrize("size", SIZES)
def test_large_settings_are_the_sources(size):
    settings = parse_settings(DistillationSettings, [str(RECIPE / f"mamba2-{size}.yaml")])
    arguments = settings.make_arguments()
    assert (settings.teacher, settings.length) == (f"state-spaces/mamba2-{size}", 2048)
    assert settings.freeze_embeddings
    assert settings.tokenizer  # the checkpoints have none of their own
    assert arguments.get_warmup_steps(1000) == 10
    assert arguments.lr_scheduler_type == "cosine"
    assert "adamw" in arguments.optim


OFFLINE = """
import socket
def refuse(*args):
    raise OSError("a dry run needs no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def test_a_dry_run_needs_no_network(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    done = run(
        RECIPE / "distill.py",
        RECIPE / "mamba2-1.3b.yaml",
        "dry_run=true",
        f"output={tmp_path / 'run'}",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
    )
    assert done.returncode == 0, done.stderr
    assert "1,343,757,312 parameters" in done.stdout
    assert "GiB" in done.stdout
    assert len(log(tmp_path / "run-dry-run")) == 3
    assert not (tmp_path / "run").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-dry-run/model")
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["dry_run=maybe"], "true, false or 'full'"), (["dry_run=true", "teacher=a/b"], "knows no a/b")],
)
def test_a_dry_run_that_cannot_be(extra, message, tmp_path):
    done = run(RECIPE / "distill.py", RECIPE / "mamba2-130m.yaml", f"output={tmp_path / 'run'}", *extra)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
