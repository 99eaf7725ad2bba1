"""Pretraining with held-out text, its record, and the teacher that comes with the quickstart."""

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from spiking_mamba import data
from spiking_mamba.common import provenance
from spiking_mamba.evaluation.scoring import perplexity
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.training.arguments import training_arguments
from spiking_mamba.training.pretraining import PretrainingSettings, pretrain

ROOT = Path(__file__).parents[3]
TEACHER = ROOT / "recipes/quickstart/teacher"
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 16, "head_dim": 16}


@pytest.fixture
def settings(tmp_path):
    for name, start in (("train", 0), ("held", 500)):
        lines = [f"Document {i}: {i * 7} lazy dogs met {i % 13} foxes." for i in range(start, start + 200)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    training = {
        "max_steps": 4, "eval_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False,
        "learning_rate": 1e-2, "disable_tqdm": True,
    }  # fmt: skip
    return PretrainingSettings(
        str(tmp_path / "run"), str(tmp_path / "train.txt"), 16, 300, held_out=str(tmp_path / "held.txt"),
        model=MODEL, training=training, save_dtype="bfloat16",
    )  # fmt: skip


def test_the_log_has_the_held_out_loss_and_the_record_says_how_it_came_to_be(settings):
    folder, log = pretrain(settings)
    model, tokenizer = load_dense(folder), AutoTokenizer.from_pretrained(folder)
    held_out = data.tokenize(data.load_text(settings.held_out), tokenizer, 16)
    held_out = held_out.select(range(len(held_out) // 4 * 4))  # whole batches
    losses = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    assert losses.keys() == {2, 4}
    expected = perplexity(model, held_out, progress=False)["nll_per_token"]
    assert losses[4] == pytest.approx(expected, rel=5e-3)  # the weights were rounded to bfloat16 since
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert model.config.use_cache

    record = json.loads((folder / "training.json").read_text())
    rows = data.tokenize(data.load_text(settings.data), tokenizer, 16)
    assert record["corpus_tokens"] == len(rows) * 16
    assert record["tokens_seen"] == 4 * 4 * 2 * 16
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    content = Path(settings.data).read_bytes()
    assert record["data_sha256"] == {settings.data: hashlib.sha256(content).hexdigest()}
    assert record["settings"]["seed"] == 0
    assert torch.__version__.startswith(record["versions"]["torch"])


def test_all_of_the_data_is_trained_on_where_the_held_out_text_is_another(settings):
    folder, _ = pretrain(settings)
    whole = json.loads((folder / "training.json").read_text())["corpus_tokens"]
    settings.held_out, settings.overwrite = None, True
    folder, log = pretrain(settings)
    assert json.loads((folder / "training.json").read_text())["corpus_tokens"] < whole
    assert not any("eval_loss" in row for row in log)


def test_what_is_held_out_must_not_be_trained_on(settings):
    shared = data.load_text(settings.data)["text"][7]
    with Path(settings.held_out).open("a") as file:
        file.write("\n\n" + shared)
    with pytest.raises(data.DataError, match="held_out"):
        pretrain(settings)
    assert not Path(settings.output).exists()


def test_a_model_takes_what_every_choice_of_neurons_takes(settings):
    neuron = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
    chosen = {"neuron": neuron, "learn_threshold": True, "shift_inputs": True}
    changed = dataclasses.replace(settings, model=MODEL | chosen)
    assert changed.model["shift_inputs"]


def test_an_unknown_dtype(settings):
    with pytest.raises(ValueError, match="int4"):
        settings.save_dtype = "int4"
    assert not Path(settings.output).exists()


def test_one_process_uses_one_gpu(tmp_path, monkeypatch, capsys):
    """Trainer's threads, one a GPU, would meet in Triton's tuning."""
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 4)))
    monkeypatch.setattr(TrainingArguments, "_setup_devices", None)
    arguments = training_arguments(tmp_path, {"bf16": False}, 0)
    assert arguments.n_gpu == 1
    assert "torchrun" in capsys.readouterr().err


def test_the_command_in_a_record_names_no_folder_above_the_checkout(monkeypatch):
    for program, said in (
        (ROOT / "recipes/x.py", "python recipes/x.py"),
        (ROOT / "spiking_mamba/commands/x.py", "python -m spiking_mamba.commands.x"),
        ("spiking-mamba x", "spiking-mamba x"),
    ):
        monkeypatch.setattr(sys, "argv", [str(program), "data=a b", "/elsewhere/x.yaml"])
        command = provenance.provenance(PretrainingSettings("out"))["command"]
        assert command == f"{said} 'data=a b' /elsewhere/x.yaml"


def test_a_version_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no-such-package"))
    versions = provenance.package_versions()
    assert versions["no-such-package"] is None
    assert versions["torch"]


# --- the quickstart's teacher ---

# Written for this test; nobody has trained on it.
PASSAGE = (
    "The committee met in the old library on Thursday to discuss the future of the railway station. Several "
    "members of the council argued that the building should be restored, because it was the first in the "
    "county to be built of local stone. Others said that the cost was too high, and that the money would be "
    "better spent on schools and roads. After a debate of almost three hours they agreed to ask the public."
)


def test_the_shipped_teacher_is_small_and_says_where_it_comes_from():
    assert (TEACHER / "model.safetensors").stat().st_size <= 16e6
    record = json.loads((TEACHER / "training.json").read_text())
    model = load_dense(TEACHER)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert record["corpus_tokens"] >= 20e6
    assert not any(str(value).startswith("/") for value in record["command"].split())


def test_the_shipped_teacher_knows_english():
    """Fewer bits a byte than the 5-gram needs on Wikipedia (2.29), far fewer than for words in disorder."""
    model, tokenizer = load_dense(TEACHER), AutoTokenizer.from_pretrained(TEACHER)

    def bits_per_byte(text):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            loss = model(ids, labels=ids).loss * (ids.shape[1] - 1)
        return float(loss) / math.log(2) / len(text.encode())

    words = sorted(PASSAGE.split(), key=lambda word: hashlib.sha256(word.encode()).digest())
    assert bits_per_byte(PASSAGE) < 2.0
    assert bits_per_byte(" ".join(words)) > 1.2 * bits_per_byte(PASSAGE)
