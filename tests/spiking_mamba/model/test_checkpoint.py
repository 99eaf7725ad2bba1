"""Checkpoints: dense ones of two formats, broken ones, exports."""

import contextlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from spikingjelly.activation_based import functional
from transformers import AutoModelForCausalLM

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.model.checkpoint import export, load_dense
from spiking_mamba.model.conversion import fold_thresholds
from tests.helpers.checkpoints import IDS, logits, state_spaces_folder, transformers_folder
from tests.helpers.tiny import (
    INTEGER,
    LEAKY,
    equal_tokens,
    joined,
    recorded_spikes,
    tiny_model,
)


def change_weights(folder, change):
    """Apply ``change`` to the state dict that a folder of either format holds."""
    if (folder / "model.safetensors").is_file():
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weights = torch.load(folder / "pytorch_model.bin")
        change(weights)
        torch.save(weights, folder / "pytorch_model.bin")


FORMATS = pytest.mark.parametrize("make", [transformers_folder, state_spaces_folder])
LAYER = "backbone.layers.1.mixer."


@pytest.mark.parametrize("fields", [{}, {"n_groups": 2, "tie_word_embeddings": True, "use_bias": True}])
def test_a_transformers_folder(fields, tmp_path):
    theirs = transformers_folder(tmp_path, **fields)
    ours = load_dense(tmp_path)
    assert not ours.training
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    student = SpikingMambaForCausalLM.from_dense(str(tmp_path), neuron=INTEGER)
    assert student.training
    for name, parameter in theirs.named_parameters():
        assert torch.equal(student.get_parameter(name), parameter)


@pytest.mark.parametrize("tied", [True, False])
def test_a_state_spaces_folder(tied, tmp_path):
    theirs = state_spaces_folder(tmp_path, tied)
    ours = load_dense(tmp_path)
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    assert ours.config.tie_word_embeddings is tied
    assert (ours.lm_head.weight is ours.backbone.embeddings.weight) is tied


@pytest.mark.parametrize(
    "wrong", [{"d_model": 48}, {"n_layer": 7}, {"vocab_size": 1000}, {"tie_embeddings": False}]
)
def test_weights_are_trusted_above_a_state_spaces_config(wrong, tmp_path):
    theirs = state_spaces_folder(tmp_path, **wrong)
    assert (logits(load_dense(tmp_path)) - logits(theirs)).abs().max() <= 1e-5


def test_a_tied_head_may_be_left_out(tmp_path):
    theirs = state_spaces_folder(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    assert (logits(load_dense(tmp_path)) - logits(theirs)).abs().max() <= 1e-5


def test_an_untied_head_may_not_be_left_out(tmp_path):
    state_spaces_folder(tmp_path, tied=False)
    change_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_dense(tmp_path)


def test_state_spaces_weights_in_half_precision_and_safetensors(tmp_path):
    theirs = state_spaces_folder(tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    save_file({k: v.half().clone() for k, v in weights.items()}, tmp_path / "model.safetensors")
    ours = load_dense(tmp_path)
    assert ours.dtype is torch.float32
    assert (logits(ours) - logits(theirs.half().float())).abs().max() <= 1e-5


# --- what is broken ---


@FORMATS
@pytest.mark.parametrize("key", ["A_log", "in_proj.weight", "norm.weight", "conv1d.weight"])
def test_a_missing_key(make, key, tmp_path):
    make(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop(LAYER + key))
    with pytest.raises(CheckpointError, match=(LAYER + key).replace(".", r"\.")):
        load_dense(tmp_path)


@FORMATS
@pytest.mark.parametrize("key", ["backbone.embeddings.weight", "backbone.layers.0.mixer.A_log"])
def test_a_missing_key_that_gives_a_size(make, key, tmp_path):
    make(tmp_path)
    stored = key.replace("embeddings", "embedding") if make is state_spaces_folder else key
    change_weights(tmp_path, lambda weights: weights.pop(stored))
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load_dense(tmp_path)


@FORMATS
@pytest.mark.parametrize("key", ["backbone.layers.1.mixer.surplus", "backbone.extra.weight", "stray"])
def test_an_extra_key(make, key, tmp_path):
    make(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({key: torch.ones(3)}))
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load_dense(tmp_path)


@FORMATS
@pytest.mark.parametrize("key", ["out_proj.weight", "conv1d.bias", "dt_bias"])
def test_a_wrong_shape(make, key, tmp_path):
    make(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({LAYER + key: weights[LAYER + key][:-1].clone()}))
    with pytest.raises(CheckpointError, match=(LAYER + key).replace(".", r"\.")):
        load_dense(tmp_path)


def test_a_config_that_disagrees_with_transformers_weights(tmp_path):
    transformers_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"state_size": 16}))
    with pytest.raises(CheckpointError, match=r"mismatched.*in_proj"):
        load_dense(tmp_path)


def test_a_config_that_contradicts_itself(tmp_path):
    transformers_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_heads": 5}))
    with pytest.raises(CheckpointError, match="num_heads"):
        load_dense(tmp_path)


@pytest.mark.parametrize("groups", [3, 0, "1"])
def test_a_state_spaces_config_with_impossible_groups(groups, tmp_path):
    state_spaces_folder(tmp_path, ssm_cfg={"layer": "Mamba2", "ngroups": groups})
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_dense(tmp_path)


def test_a_mamba1_checkpoint(tmp_path):
    """Its A_log has two dimensions and its layers an x_proj."""
    state_spaces_folder(tmp_path, ssm_cfg={})

    def to_mamba1(weights):
        for layer in ("backbone.layers.0.mixer.", LAYER):
            weights[layer + "A_log"] = torch.ones(64, 16)
            weights[layer + "x_proj.weight"] = torch.ones(34, 64)

    change_weights(tmp_path, to_mamba1)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_dense(tmp_path)


@FORMATS
def test_missing_files(make, tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_dense(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"incomplete.*model\.safetensors"):
        load_dense(tmp_path)
    for absent in (tmp_path / "absent", "./absent", "absent", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"no checkpoint folder {absent}"):
            load_dense(absent)


def test_an_index_without_its_weights(tmp_path):
    for make in (transformers_folder, state_spaces_folder):
        folder = tmp_path / make.__name__
        make(folder)
        for name in ("model.safetensors", "pytorch_model.bin"):
            (folder / name).unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"backbone.embeddings.weight": "model-1.safetensors"}})
        )
        with pytest.raises(CheckpointError, match=str(folder)):
            load_dense(folder)


@FORMATS
@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "null", '"mamba2"', '{"d_model": 32, "ssm_cfg": null}'])
def test_a_corrupt_config(make, text, tmp_path):
    make(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_dense(tmp_path)


@FORMATS
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02}q\x00X\x01"])
def test_corrupt_weights(make, content, tmp_path):
    make(tmp_path)
    file = next(tmp_path / n for n in ("model.safetensors", "pytorch_model.bin") if (tmp_path / n).exists())
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_dense(tmp_path)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@FORMATS
@pytest.mark.parametrize("save", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_a_pickle_with_code_is_not_executed(make, save, tmp_path):
    folder, trap = tmp_path / "model", tmp_path / "executed"
    make(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    save({"backbone.embedding.weight": Code(str(trap))}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=str(folder)):
        load_dense(folder)
    assert not trap.exists()
    with contextlib.suppress(RuntimeError):  # the trap works, where it is let
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.exists()


def test_models_of_other_kinds(tmp_path):
    tiny_model(neuron=INTEGER).save_pretrained(tmp_path / "spiking")
    with pytest.raises(CheckpointError, match="holds a spiking model"):
        load_dense(tmp_path / "spiking")
    transformers_folder(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="type 'llama'"):
        load_dense(tmp_path / "other")


@pytest.mark.parametrize("key", [LAYER + "A_log", LAYER + "in_spikes.log_threshold"])
def test_from_pretrained_with_a_missing_or_extra_key(key, tmp_path):
    tiny_model(neuron=INTEGER, learn_threshold=True).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"stray": weights.pop(key)}))
    for cls in (SpikingMambaForCausalLM, AutoModelForCausalLM):
        with pytest.raises(
            ValueError, match=f"missing keys: {key}; unexpected keys: stray".replace(".", r"\.")
        ):
            cls.from_pretrained(tmp_path)


# --- students, exports ---


@pytest.mark.parametrize("neuron", [None, INTEGER])
def test_from_dense_copies(neuron):
    dense = tiny_model()
    student = SpikingMambaForCausalLM.from_dense(dense, neuron=neuron)
    for name, parameter in dense.named_parameters():
        other = student.get_parameter(name)
        assert torch.equal(other, parameter)
        assert other.data_ptr() != parameter.data_ptr()
    assert dense.config.neuron is None
    if neuron is None:
        assert torch.equal(logits(student), logits(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_threshold_stays_float32(dtype, tmp_path):
    student = SpikingMambaForCausalLM.from_dense(
        tiny_model().to(dtype), neuron=INTEGER, threshold=0.3, learn_threshold=True
    )
    student.save_pretrained(tmp_path)
    loaded = SpikingMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype is torch.bfloat16
    for model in (student, loaded):
        for projection in model.projections().values():
            assert projection.spikes.log_threshold.dtype is torch.float32
            assert projection.threshold.item() == pytest.approx(0.3, rel=1e-6)
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_folding_powers_of_two_is_exact(membrane):
    threshold = [{"in_proj": 0.5, "out_proj": 0.25}, 2.0]
    model = tiny_model(neuron=LEAKY, membrane=membrane, threshold=threshold)
    folded = fold_thresholds(model)
    with recorded_spikes(model) as before, recorded_spikes(folded) as after:
        assert torch.equal(logits(model), logits(folded))
    before, after = joined(before), joined(after)
    assert len(before) == 4
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert folded.config.threshold == 1.0
    assert model.config.threshold == threshold
    assert [p.threshold for p in model.projections().values()] == [0.5, 0.25, 2.0, 2.0]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_folding_other_thresholds_is_close(membrane, learned):
    threshold = [{"in_proj": 0.7, "out_proj": 0.3}, 1.3]
    model = tiny_model(
        neuron=LEAKY, membrane=membrane, threshold=threshold, learn_threshold=learned, use_bias=True
    )
    folded = fold_thresholds(model)
    with recorded_spikes(model) as before, recorded_spikes(folded) as after:
        expected, found = logits(model), logits(folded)
    equal = equal_tokens(joined(before), joined(after))
    assert equal.sum() >= 0.75 * IDS.numel()
    for row, count in enumerate(equal):
        assert (found[row, :count] - expected[row, :count]).abs().max() <= 1e-4
    assert not any(name.endswith("log_threshold") for name, _ in folded.named_parameters())
    assert any(name.endswith("log_threshold") for name, _ in model.named_parameters()) is learned


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_an_export_has_no_trace_of_training(membrane, learned, tmp_path):
    model = tiny_model(
        neuron=LEAKY,
        membrane=membrane,
        threshold=0.5,
        learn_threshold=learned,
        sgc={"mode": "blend", "lam": 0.5},
    ).train()
    export(model, tmp_path)
    assert model.training
    assert model.config.sgc["mode"] == "blend"
    assert model.sgc_lambda == 0.5
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["sgc"], config["threshold"], config["learn_threshold"]) == (None, 1.0, False)
    assert not any("threshold" in key for key in load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-4
    with torch.no_grad():
        assert torch.equal(loaded.train()(IDS).logits, logits(loaded))  # nothing differs in training
    functional.set_step_mode(loaded, "s")
    assert loaded.generate(IDS, max_new_tokens=3).shape == (2, 15)
