"""The model as one file: in a process without this project, with its logits, its text and its scores."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.flattening import flatten
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.model.remote_code import FILE, remote_code, save_with_code
from tests.helpers import remote_process
from tests.helpers.commands import ROOT, run
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model

IDS = torch.arange(3, 15)[None]
MODELS = {
    "spiking": {
        "neuron": {
            "class": "neurons.SILIFNode",
            "args": {"surrogate_function": {"class": "neurons.DeadZoneSpikeCount", "args": {}}},
        },
        "threshold": 0.3,
        "layers_block_type": ["mamba", "mlp"],
        "intermediate_size": 48,
    },
    "sequence": {"neuron": LEAKY, "membrane": "sequence", "learn_threshold": True},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    endings = ["a cat", "a dog sat", "on a mat"]
    found = [
        {"question": f"{name} met", "choices": endings, "label": i % 3} for i, name in enumerate("abcdef")
    ]
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def without_the_project(folder, rows, cache):
    """What ``remote_process`` finds, in a process of its own."""
    output = cache / "found.pt"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/helpers/remote_process.py", folder, rows, output],
        env=environment, cwd=cache, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=False)


def test_a_process_without_the_project(rows, tmp_path):
    student = tmp_path / "student"
    tokenizer = train_tokenizer(["a cat met a dog on a mat"] * 9, 300)
    model = tiny_model(**MODELS["spiking"] | {"vocab_size": 300, "eos_token_id": 0, "bos_token_id": 0})
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    folder = tmp_path / "folder"
    command = ("recipes/export/export.py", "recipes/export/export.yaml")
    done = run(*command, f"model={student}", f"output={folder}", "to=remote-code")
    assert done.returncode == 0, done.stderr

    found = without_the_project(folder, rows, tmp_path)
    with torch.no_grad():
        logits = model(IDS).logits
    assert torch.equal(found["logits"], logits)
    assert torch.equal(found["again"], logits)
    assert torch.equal(found["text"], model.generate(IDS[:, :5], max_new_tokens=5, do_sample=False))
    assert tuple(found["scores"]) == (1, 3)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    assert torch.equal(found["loss"], loss)
    assert torch.equal(found["gradient"], model.backbone.layers[0].mixer.in_proj.weight.grad)
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4),
        tasks=[remote_process.task(str(rows))], log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    assert found["likelihoods"] == remote_process.likelihoods(results)
    assert len({tuple(row) for row in found["likelihoods"]}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_beside_the_project(name, tmp_path, monkeypatch):
    """Both may be in one process, and neither changes the other."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = tiny_model(**MODELS[name])
    save_with_code(model, tmp_path / name)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    # transformers takes what is imported, whatever is trusted, so the file is asked for
    cls = get_class_from_dynamic_module(f"{Path(FILE).stem}.SpikingMambaForCausalLM", str(tmp_path / name))
    theirs = cls.from_pretrained(tmp_path / name)
    assert type(ours) is SpikingMambaForCausalLM is not type(theirs)
    losses = [each.train()(IDS, labels=IDS).loss for each in (ours, theirs, ours)]
    for loss in losses[:2]:
        loss.backward()
    assert losses[0] == losses[1] == losses[2]
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, theirs.get_parameter(name).grad), name


def test_the_file_names_no_module_of_the_project(tmp_path):
    text = remote_code()
    save_with_code(tiny_model(neuron=INTEGER), tmp_path)
    assert (tmp_path / FILE).read_text() == text
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    others = {"torch", "transformers", "spikingjelly", "huggingface_hub", "safetensors"}
    assert imported - others <= set(sys.stdlib_module_names)
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F811,F401", tmp_path / FILE],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# --- the flattener ---

SOURCES = {
    "__init__.py": "from .one import first\n",
    "one.py": '''"""One."""
import math
from .two import helper as renamed
from . import two
from .left import kernel
VALUE = math.pi
def first(helper):
    VALUE = 2
    return renamed(helper) + VALUE + two.VALUE, [two for two in (1,)], lambda math: math
def unused(): return nothing
class Kept:
    VALUE = VALUE
    def method(self): return VALUE
    def dropped(self): return kernel
def values(two_VALUE=two): return two_VALUE.VALUE, f"{two.helper(1)}"
''',
    "two.py": "import os.path\nVALUE = 5\ndef helper(x): return x * VALUE\ndef _private(): return os.sep\n",
    "left.py": "kernel = 1\n",
}


def test_flattening(tmp_path):
    for name, text in SOURCES.items():
        (tmp_path / name).write_text(text)
    text, named = flatten(
        {"pack": tmp_path}, [("pack", "first"), ("pack.one", "Kept"), ("pack.one", "values")],
        ["pack.left"], ["Kept.dropped"],
    )  # fmt: skip
    assert "unused" not in text
    assert "dropped" not in text
    space = {"LeftOut": lambda name: name}
    exec(compile(text, "flat", "exec"), space)
    total, local, identity = space["first"](3)
    assert total == 3 * 5 + 2 + 5
    assert local == [1]
    assert identity("x") == "x"
    assert space["Kept"]().method() == space["Kept"].VALUE == pytest.approx(3.14159, abs=1e-5)
    assert space["values"]() == (5, "5")
    assert {entity.module for entity in named if entity.kind == "definition"} == {"pack.one", "pack.two"}
