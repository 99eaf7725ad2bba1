"""recipes/export by its command line: from one form to another and back, with the same logits."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2ForCausalLM

from spiking_mamba import event_driven
from spiking_mamba.data import load_text, tokenize
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.exporting import ExportSettings
from tests.helpers.checkpoints import logits, state_spaces_folder, transformers_folder
from tests.helpers.commands import run
from tests.helpers.tiny import INTEGER, tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = ("recipes/export/export.py", "recipes/export/export.yaml")


def exported(model, output, to, *more):
    found = run(*RECIPE, f"model={model}", f"output={output}", f"to={to}", *more)
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"Written: {output}\n"
    return output


@pytest.mark.parametrize("tied", [True, False])
def test_state_spaces_to_transformers_and_back(tied, tmp_path):
    theirs = state_spaces_folder(tmp_path / "first", tied)
    exported(tmp_path / "first", tmp_path / "second", "transformers")
    second = Mamba2ForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(second), logits(theirs))
    exported(tmp_path / "second", tmp_path / "third", "state-spaces")
    weights = [torch.load(tmp_path / name / "pytorch_model.bin") for name in ("first", "third")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert (logits(load_dense(tmp_path / "third")) - logits(theirs)).abs().max() <= 1e-5


def test_transformers_to_state_spaces_and_back_in_sixteen_bits(tmp_path):
    theirs = transformers_folder(tmp_path / "first")
    exported(tmp_path / "first", tmp_path / "second", "state-spaces", "dtype=bfloat16")
    exported(tmp_path / "second", tmp_path / "third", "transformers", "dtype=bfloat16")
    third = Mamba2ForCausalLM.from_pretrained(tmp_path / "third")
    assert third.dtype == torch.bfloat16
    assert torch.equal(logits(third), logits(theirs.bfloat16()))


def test_gguf_holds_the_weights(tmp_path):
    theirs = transformers_folder(tmp_path / "first")
    exported(tmp_path / "first", tmp_path / "new" / "model.gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "new" / "model.gguf").tensors}
    for layer, block in enumerate(theirs.backbone.layers):
        found = torch.from_numpy(tensors[f"blk.{layer}.ssm_in.weight"].data.copy())
        assert torch.equal(found, block.mixer.in_proj.weight)
    assert torch.equal(
        torch.from_numpy(tensors["token_embd.weight"].data.copy()), theirs.backbone.embeddings.weight
    )


def test_event_driven_with_a_tokenizer(tmp_path):
    student = tiny_model(neuron=INTEGER, vocab_size=300)
    student.save_pretrained(tmp_path / "student")
    train_tokenizer(["a cat sat on a mat"] * 9, 300).save_pretrained(tmp_path / "tokenizer")
    exported(
        tmp_path / "student", tmp_path / "made", "event-driven", "weights=int4",
        f"tokenizer={tmp_path / 'tokenizer'}",
    )  # fmt: skip
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(logits(made), logits(event_driven(student, "int4")))
    assert AutoTokenizer.from_pretrained(tmp_path / "made")("a cat")["input_ids"]


def test_four_bits_within_a_tolerance(tmp_path):
    """As by hand: the rows are the file's, and what costs too much is int8."""
    student = tiny_model(neuron=INTEGER, vocab_size=300)
    student.save_pretrained(tmp_path / "student")
    text = [f"{k} cats sat on {7 * k % 31} mats and {k * k} dogs on none" for k in range(300)]
    tokenizer = train_tokenizer(text, 300)
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("\n\n".join(text))
    exported(
        tmp_path / "student", tmp_path / "made", "event-driven", "weights=int4", "tolerance=0.0015",
        f"calibration={tmp_path / 'text.txt'}",
    )  # fmt: skip
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert 0 < len(made.config.int8_layers) < 5
    rows = tokenize(load_text(str(tmp_path / "text.txt"), split="train"), tokenizer, 256).shuffle(seed=0)
    seen = torch.tensor(rows["input_ids"])
    wanted = event_driven(student, "int4", calibration=seen, tolerance=0.0015)
    assert torch.equal(logits(made), logits(wanted))


def test_calibrations_that_cannot_be_are_refused():
    settings = {"model": "a", "output": "b", "to": "event-driven"}
    for more, said in (
        ({"calibration": "text.txt"}, "belongs to event-driven models with weights=int4"),
        ({"calibration": "text.txt", "weights": "int4", "to": "gguf"}, "belongs to event-driven"),
        ({"tolerance": 0.01, "weights": "int4"}, "wants calibration"),
    ):
        with pytest.raises(ValueError, match=said):
            ExportSettings(**settings | more)


def test_what_cannot_be_exported_is_refused_in_a_line(tmp_path):
    tiny_model(neuron=INTEGER).save_pretrained(tmp_path / "student")
    tiny_model(layers_block_type=["mamba", "mlp"], intermediate_size=48).save_pretrained(tmp_path / "mlps")
    (tmp_path / "file").write_text("")
    for model, output, to, said in (
        ("student", "new", "transformers", "spiking model, not a dense one"),
        ("student", "new", "gguf", "spiking model, not a dense one"),
        ("mlps", "new", "state-spaces", "has no MLP layers"),
        ("mlps", "new", "transformers", "has no MLP layers"),
        ("mlps", "file", "event-driven", "is there already"),
        ("mlps", "student", "event-driven", "is there already"),
        ("mlps", "student", "gguf", "is there already"),
        ("mlps", "file/below", "event-driven", "is a file, no folder"),
        ("mlps", "file/far/below", "gguf", "is a file, no folder"),
        ("nowhere", "new", "gguf", "nowhere"),
        ("mlps", "new", "onnx", "to must be"),
    ):
        found = run(*RECIPE, f"model={tmp_path / model}", f"output={tmp_path / output}", f"to={to}")
        assert found.returncode != 0, (model, to)
        assert said in found.stderr, (model, to, found.stderr)
        assert found.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mlps", "student"]


def test_the_console_command_is_the_same(tmp_path):
    transformers_folder(tmp_path / "first")
    options = f"model={tmp_path / 'first'}", f"output={tmp_path / 'second'}", "to=state-spaces"
    found = run(ROOT / "spiking_mamba_console.py", "export", *options)
    assert found.returncode == 0, found.stderr
    assert torch.equal(logits(load_dense(tmp_path / "second")), logits(load_dense(tmp_path / "first")))
