"""A GGUF file, read back by the format's own reader."""

import pytest
import torch

from spiking_mamba.model.gguf import write_gguf
from tests.helpers.tiny import INTEGER, tiny_model

gguf = pytest.importorskip("gguf")


def test_read_back(tmp_path):
    model = tiny_model(n_groups=2)
    write_gguf(model, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    weights = model.state_dict()
    assert len(found) == 3 + 9 * model.config.num_hidden_layers
    assert torch.equal(found["token_embd.weight"], weights["backbone.embeddings.weight"])
    assert torch.equal(found["output.weight"], weights["lm_head.weight"])
    block = {name: weights[f"backbone.layers.1.mixer.{name}"] for name in ("A_log", "D", "norm.weight")}
    assert torch.equal(found["blk.1.ssm_a"], -torch.exp(block["A_log"])[:, None])
    assert torch.equal(found["blk.1.ssm_d"], block["D"][:, None])
    assert torch.equal(found["blk.1.ssm_norm.weight"], block["norm.weight"].view(2, -1))
    conv = weights["backbone.layers.0.mixer.conv1d.weight"]
    assert torch.equal(found["blk.0.ssm_conv1d.weight"], conv[:, 0])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "mamba2"
    assert fields["mamba2.ssm.time_step_rank"] == model.config.num_heads
    assert fields["mamba2.ssm.group_count"] == 2
    assert fields["mamba2.block_count"] == model.config.num_hidden_layers


def test_tied_embeddings_are_written_once(tmp_path):
    write_gguf(tiny_model(tie_word_embeddings=True), tmp_path / "model.gguf")
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}


def test_refusals(tmp_path):
    mlps = {"layers_block_type": ["mamba", "mlp"], "intermediate_size": 24}
    for fields, words in (
        ({"neuron": INTEGER}, "knows no spikes"),
        ({"use_bias": True}, "bias"),
        (mlps, "no MLP layers"),
    ):
        with pytest.raises(ValueError, match=words):
            write_gguf(tiny_model(**fields), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
