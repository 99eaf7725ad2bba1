"""What goes to the hub: a model, its tokenizer and a card whose metadata it reads."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.reports.hub_card import metadata, write_hub_card
from tests.helpers.commands import ROOT
from tests.helpers.hub import stand_in
from tests.helpers.tiny import INTEGER, tiny_model


def results():
    score = {"value": 0.35, "stderr": 0.02}
    data = {"source": "a package", "split": "test", "rows": 250, "sha256": "0" * 64, "note": None}
    arc = {"n": 250, "main": "acc", "chance": 0.25, "data": data}
    arc |= {"metrics": {"acc": score, "acc_norm": {"value": 0.4, "stderr": 0.03}}}
    entry = {"name": "student", "neuron": "SILIFNode", "tasks": {"arc_easy": arc}, "perplexity": {}}
    entry["perplexity"]["held_out"] = {"perplexity": 17.81, "tokens": 41234}
    entry["perplexity"]["endless"] = {"perplexity": None, "tokens": 7}
    return {"models": [entry, {"name": "teacher", "neuron": None, "tasks": {}, "perplexity": {}}]}


def test_the_hub_reads_what_was_recorded(tmp_path):
    data = metadata(results(), "student", "apache-2.0", "me/teacher", ["me/text"])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A student\n\nText.\n")
    for _ in range(2):  # again changes nothing
        write_hub_card(tmp_path, data)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.text.strip() == "# A student\n\nText."
    read = card.data
    assert (read.license, read.base_model, read.datasets) == ("apache-2.0", "me/teacher", ["me/text"])
    assert (read.pipeline_tag, read.library_name) == ("text-generation", "transformers")
    assert read.metrics == ["acc", "perplexity"]
    found = {(each.dataset_name, each.metric_type): each for each in read.eval_results}
    assert set(found) == {("arc_easy", "acc"), ("held_out", "perplexity")}
    arc = found["arc_easy", "acc"]
    assert arc.metric_value == 0.35
    # 0.35 - 1.96 * 0.02 and 0.35 + 1.96 * 0.02
    assert arc.metric_name == "acc, 95% interval 0.311 to 0.389, 250 items"
    assert found["held_out", "perplexity"].metric_value == 17.81


def test_a_card_of_nothing_measured(tmp_path):
    write_hub_card(tmp_path, metadata(results(), "teacher", "apache-2.0"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# teacher"
    assert card.data.tags == ["mamba2"]
    assert card.data.eval_results is None
    with pytest.raises(ValueError, match="no model 'pupil', only student, teacher"):
        metadata(results(), "pupil", "apache-2.0")


def test_push_and_load_again(tmp_path):
    folder, output = tmp_path / "student", tmp_path / "found.pt"
    model = tiny_model(neuron=INTEGER, vocab_size=300)
    model.save_pretrained(folder)
    train_tokenizer(["a cat met a dog on a mat"] * 9, 300).save_pretrained(folder)
    data = metadata(results(), "student", "apache-2.0", "me/teacher", ["me/text"])
    write_hub_card(folder, data)
    with stand_in() as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.hub_process", folder, "me/student", output],
            env=os.environ | environment | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}, cwd=ROOT,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        files = hub.repositories["me/student"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"])["neuron"] == INTEGER
    found = torch.load(output, weights_only=False)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(found["ids"]).logits)
    assert found["card"] == data.to_dict()
