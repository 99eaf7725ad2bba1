"""Checkpoints in both published forms: read, refused by name, written, read by the forms' own programs."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.model.checkpoint import FORMS, export_dense, load_dense
from tests.helpers.checkpoints import logits, state_spaces_folder
from tests.helpers.commands import HELPERS
from tests.helpers.kernel_packages import mamba_ssm_wheel
from tests.helpers.tiny import INTEGER, tiny_config, tiny_model

# What state-spaces publishes: layers and width; the vocabulary of 50277 is padded to 50288 rows.
SIZES = {
    "130m": (24, 768),
    "370m": (48, 1024),
    "780m": (48, 1536),
    "1.3b": (48, 2048),
    "2.7b": (64, 2560),
}


def parameters(layers, width, vocabulary=50288, state=128, head=64, kernel=4):
    """mamba_ssm/modules/mamba2.py and mixer_seq_simple.py, counted by hand; the head is tied."""
    inner = 2 * width
    heads = inner // head
    in_proj = width * (2 * inner + 2 * state + heads)
    conv = (inner + 2 * state) * (kernel + 1)
    block = in_proj + conv + 3 * heads + inner + inner * width + width
    return vocabulary * width + layers * block + width


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_published_sizes(size):
    layers, width = SIZES[size]
    config = SpikingMambaConfig(
        vocab_size=50288,
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=2 * width // 64,
        n_groups=1,
        tie_word_embeddings=True,
        neuron=INTEGER,
    )
    with torch.device("meta"):
        model = SpikingMambaForCausalLM(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == parameters(layers, width)
    assert parameters(*SIZES["130m"]) == 128_989_632


# --- state-spaces' config.json, honoured or refused ---


@pytest.mark.parametrize(
    ("ssm", "fields"),
    [
        ({"dt_limit": [0.01, 0.05]}, {"time_step_limit": (0.01, 0.05)}),
        ({"chunk_size": 32}, {"chunk_size": 32}),
        ({"d_state": 8, "ngroups": 1, "headdim": 16, "expand": 2, "d_conv": 4}, {}),
        ({"d_state": 4, "ngroups": 2}, {"n_groups": 2, "state_size": 4}),
        ({"ngroups": 2}, {"n_groups": 2, "state_size": 4}),
        ({"headdim": 64, "expand": 3, "d_conv": 2, "bias": True}, {}),  # the shapes say otherwise
        ({"rmsnorm": True, "norm_before_gate": False, "use_mem_eff_path": False, "dt_min": 0.1}, {}),
    ],
)
def test_ssm_cfg_is_honoured(ssm, fields, tmp_path):
    theirs = state_spaces_folder(tmp_path, ssm_cfg={"layer": "Mamba2"} | ssm)
    loaded = load_dense(tmp_path)
    settings = theirs.config.to_dict() | fields
    same = Mamba2ForCausalLM(Mamba2Config(**{k: v for k, v in settings.items() if k != "model_type"}))
    same.load_state_dict(theirs.state_dict())
    assert (logits(loaded) - logits(same)).abs().max() <= 1e-5
    for name, value in fields.items():
        assert getattr(loaded.config, name) == value
    if "dt_limit" in ssm or ("ngroups" in ssm and ssm["ngroups"] == 2):  # and it matters
        assert (logits(loaded) - logits(theirs)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba1"}}, "layer is 'Mamba1'"),
        ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate is True"),
        ({"ssm_cfg": {"rmsnorm": False}}, "rmsnorm is False"),
        ({"ssm_cfg": {"D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm_cfg": {"d_ssm": 32}}, "d_ssm is 32"),
        ({"ssm_cfg": {"dt_limt": [0, 1]}}, "did you mean 'dt_limit'"),
        ({"ssm_cfg": {"dt_limit": [0.1]}}, "dt_limit"),
        ({"ssm_cfg": {"dt_limit": [0.2, 0.1]}}, "dt_limit"),
        ({"ssm_cfg": {"dt_limit": [math.nan, 0.1]}}, "dt_limit"),
        ({"ssm_cfg": {"d_state": 16}}, "d_state 16"),
        ({"ssm_cfg": {"ngroups": 3}}, "ngroups is 3"),
        ({"ssm_cfg": {"chunk_size": "many"}}, "chunk_size"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"surplus": 1}, "'surplus'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings, message, tmp_path):
    state_spaces_folder(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        load_dense(tmp_path)


def test_a_transformers_head_that_differs_is_not_tied(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    export_dense(model, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = load_dense(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.tie_word_embeddings is False


# --- shards ---


def shard(folder, parts=3):
    """Split a folder's pytorch_model.bin as transformers does."""
    weights = torch.load(folder / "pytorch_model.bin")
    where = {}
    for part in range(parts):
        name = f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
        piece = dict(list(weights.items())[part::parts])
        torch.save({k: v.clone() for k, v in piece.items()}, folder / name)
        where |= dict.fromkeys(piece, name)
    (folder / "pytorch_model.bin").unlink()
    write_index(folder, where)
    return where


def write_index(folder, where):
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_of_state_spaces(tmp_path):
    theirs = state_spaces_folder(tmp_path)
    shard(tmp_path)
    assert (logits(load_dense(tmp_path)) - logits(theirs)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_of_transformers(kind, tmp_path):
    model = tiny_model()
    if kind == "safetensors":
        export_dense(model, tmp_path / "a")
        Mamba2ForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(
            tmp_path / "b", max_shard_size="9KB"
        )
        assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    else:
        export_dense(model, tmp_path / "b")
        (tmp_path / "b/model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "b/pytorch_model.bin")
        shard(tmp_path / "b")
    assert torch.equal(logits(load_dense(tmp_path / "b")), logits(model))


@pytest.mark.parametrize("fault", ["absent", "elsewhere", "unlisted", "stranger", "no map"])
def test_broken_shards(fault, tmp_path):
    state_spaces_folder(tmp_path / "a")
    where = shard(tmp_path / "a")
    key, name = next(iter(where.items()))
    if fault == "absent":
        (tmp_path / "a" / name).unlink()
    elif fault == "elsewhere":
        (tmp_path / "a" / name).rename(tmp_path / name)
        write_index(tmp_path / "a", {k: f"../{v}" if v == name else v for k, v in where.items()})
    elif fault == "unlisted":
        write_index(tmp_path / "a", {k: v for k, v in where.items() if k != key})
    elif fault == "stranger":
        write_index(tmp_path / "a", where | {"stranger": name})
    else:
        write_index(tmp_path / "a", [1])
    with pytest.raises(CheckpointError, match=str(tmp_path / "a")):
        load_dense(tmp_path / "a")


# --- export ---

MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "groups": {"n_groups": 2, "state_size": 4, "use_bias": True, "tie_word_embeddings": True},
    "limited": {"time_step_limit": (0.01, 0.05), "use_conv_bias": False, "residual_in_fp32": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_an_export_comes_back_bit_for_bit(form, fields, tmp_path):
    model = tiny_model(**fields)
    export_dense(model, tmp_path / "there", form)
    loaded = load_dense(tmp_path / "there")
    export_dense(loaded, tmp_path / "back", "transformers")
    again = load_dense(tmp_path / "back")
    for other in (loaded, again):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(other.state_dict()[k], w) for k, w in model.state_dict().items())
        assert torch.equal(logits(other), logits(model))
        for name in ("tie_word_embeddings", "n_groups", "state_size", "chunk_size", "residual_in_fp32"):
            assert getattr(other.config, name) == getattr(model.config, name)
        assert tuple(other.config.time_step_limit) == tuple(model.config.time_step_limit)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_stock_transformers_reads_an_export(fields, tmp_path):
    model = tiny_model(**fields)
    export_dense(model, tmp_path / "out")
    stock, report = Mamba2ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock) is Mamba2ForCausalLM
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(stock) - logits(model)).abs().max() <= 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "mamba2"
    assert not {"neuron", "sgc", "membrane", "threshold", "spike_driven"} & config.keys()


def test_a_model_of_transformers_goes_into_each_form(tmp_path):
    export_dense(tiny_model(), tmp_path / "ours")
    stock = Mamba2ForCausalLM.from_pretrained(tmp_path / "ours")
    for form in FORMS:
        export_dense(stock, tmp_path / form, form)
        assert torch.equal(logits(load_dense(tmp_path / form)), logits(load_dense(tmp_path / "ours")))


def test_an_export_keeps_its_dtype_and_the_model(tmp_path):
    model = tiny_model(tie_word_embeddings=True).bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for form in FORMS:
        export_dense(model, tmp_path / form, form)
        loaded = load_dense(tmp_path / form)
        assert all(torch.equal(w.bfloat16(), before[k]) for k, w in loaded.state_dict().items())
    assert torch.load(tmp_path / "state-spaces/pytorch_model.bin")["lm_head.weight"].dtype is torch.bfloat16
    assert model.dtype is torch.bfloat16
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("fields", "form", "message"),
    [
        ({"neuron": INTEGER}, "transformers", "spiking"),
        ({"neuron": INTEGER}, "state-spaces", "spiking"),
        ({"layer_norm_epsilon": 1e-6}, "state-spaces", "epsilon"),
        ({"hidden_act": "gelu"}, "state-spaces", "gelu"),
        ({"layers_block_type": ["mamba", "mlp"], "intermediate_size": 24}, "transformers", "no MLP layers"),
        ({"layers_block_type": ["mamba", "mlp"], "intermediate_size": 24}, "state-spaces", "no MLP layers"),
        ({}, "safetensors", "form must be one of"),
    ],
)
def test_what_a_form_has_not_is_refused(fields, form, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_dense(SpikingMambaForCausalLM(tiny_config(**fields)), tmp_path / "out", form)
    assert not list(tmp_path.iterdir())


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for form in FORMS:
        with pytest.raises(FileExistsError, match="already holds"):
            export_dense(tiny_model(), tmp_path, form)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- mamba-ssm itself ---


@pytest.fixture(scope="module")
def mamba_ssm(tmp_path_factory):
    """Runs jobs with mamba-ssm's own code, from its wheel as pip makes it without CUDA."""
    folder = tmp_path_factory.mktemp("mamba-ssm")
    wheel = mamba_ssm_wheel(folder)

    def run(*jobs):
        (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
        script = HELPERS / "mamba_ssm_process.py"
        command = [sys.executable, str(script), str(folder / "jobs.json"), str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


SMALL = {"d_model": 32, "n_layer": 2, "vocab_size": 59, "pad_vocab_size_multiple": 8}
WRITTEN = {
    "plain": SMALL | {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8}},
    "untied": SMALL
    | {"tie_embeddings": False, "ssm_cfg": {"layer": "Mamba2", "headdim": 32, "d_state": 8, "bias": True}},
    "groups": SMALL
    | {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 4, "ngroups": 2, "dt_limit": [0.01, 0.1]}},
}


def test_mamba_ssm_writes_and_reads_our_folders(mamba_ssm, tmp_path):
    mamba_ssm(*[["write", config, tmp_path / name] for name, config in WRITTEN.items()])
    jobs = []
    for name, config in WRITTEN.items():
        model = load_dense(tmp_path / name)
        ssm = config["ssm_cfg"]
        assert model.config.vocab_size == 64  # 59, padded
        assert (model.config.head_dim, model.config.state_size) == (ssm["headdim"], ssm["d_state"])
        assert model.config.n_groups == ssm.get("ngroups", 1)
        assert list(model.config.time_step_limit) == ssm.get("dt_limit", [0.0, math.inf])
        assert model.config.tie_word_embeddings is config.get("tie_embeddings", True)
        export_dense(model, tmp_path / f"{name}-out", "state-spaces")
        jobs.append(["read", tmp_path / f"{name}-out", tmp_path / f"{name}.bin"])
    mamba_ssm(*jobs)
    for name in WRITTEN:
        first = torch.load(tmp_path / name / "pytorch_model.bin")
        again = torch.load(tmp_path / f"{name}.bin")
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("form", ["spiking", *FORMS])
def test_weights_are_as_readable_as_their_config(umask, form, tmp_path):
    model = tiny_model(**({"neuron": INTEGER} if form == "spiking" else {}))
    before = os.umask(umask)
    try:
        if form == "spiking":
            model.save_pretrained(tmp_path / "m")
        else:
            export_dense(model, tmp_path / "m", form)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert len(modes) >= 2
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "m").write_text("x")
    with pytest.raises(NotADirectoryError, match="a folder is wanted"):
        tiny_model().save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "x"
