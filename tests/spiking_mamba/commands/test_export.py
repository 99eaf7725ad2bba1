"""A checkpoint in, another program's form out: the numbers stay."""

import pytest
import torch
from transformers import Mamba2ForCausalLM

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.commands.export import ExportSettings, export
from spiking_mamba.common.errors import RunError
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.tokenizer import has_tokenizer
from tests.helpers.commands import ROOT, run
from tests.storm.inputs import make_inputs

TOKENS = torch.arange(40)[None] % 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher with a tokenizer and its student."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_inputs(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_to_state_spaces_and_back(made, tmp_path):
    there, back = tmp_path / "there", tmp_path / "new/back"
    export(ExportSettings(str(made / "teacher"), str(there), "state-spaces"))
    assert {path.name for path in there.iterdir()} >= {"pytorch_model.bin", "config.json", "tokenizer.json"}
    export(ExportSettings(str(there), str(back)))
    expected = logits(load_model(made / "teacher"))
    torch.testing.assert_close(logits(load_model(there)), expected)
    torch.testing.assert_close(logits(load_model(back)), expected)
    # transformers' own, which never heard of this project
    torch.testing.assert_close(
        logits(Mamba2ForCausalLM.from_pretrained(back)), expected, atol=1e-4, rtol=1e-4
    )
    assert has_tokenizer(back)
    with pytest.raises(RunError, match="there already"):
        export(ExportSettings(str(there), str(back)))


def test_to_gguf(made, tmp_path):
    gguf = pytest.importorskip("gguf")
    export(ExportSettings(str(made / "teacher"), str(tmp_path / "a.gguf"), "gguf"))
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    kept = load_model(made / "teacher").state_dict()["backbone.layers.0.mixer.in_proj.weight"]
    assert (torch.from_numpy(found["blk.0.ssm_in.weight"].copy()) == kept).all()


def test_to_event_driven(made, tmp_path):
    export(ExportSettings(str(made / "student"), str(tmp_path / "a"), "event-driven", weights="int4"))
    model = load_model(tmp_path / "a")
    assert model.config.weights == "int4"
    assert has_tokenizer(tmp_path / "a")
    with pytest.raises(RunError, match="event-driven already"):
        export(ExportSettings(str(tmp_path / "a"), str(tmp_path / "b"), "event-driven"))


def test_what_a_form_has_not_is_one_line_and_leaves_nothing(made, tmp_path):
    assert isinstance(load_model(made / "student"), SpikingMambaForCausalLM)
    for form, said in (("transformers", "spiking"), ("gguf", "spikes"), ("ggml", "form must be")):
        done = run(
            ROOT / "spiking_mamba_console.py",
            "export", f"model={made / 'student'}", f"output={tmp_path / 'out'}", f"form={form}",
        )  # fmt: skip
        assert done.returncode
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []
