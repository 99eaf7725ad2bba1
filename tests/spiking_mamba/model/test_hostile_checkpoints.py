"""Checkpoint folders that name files elsewhere, promise sizes they have not, or hold no real numbers."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spiking_mamba  # noqa: F401 - registers the Auto classes
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.checkpoints import logits, state_spaces_folder
from tests.helpers.commands import ROOT
from tests.helpers.tiny import INTEGER, tiny_model

LAYER = "backbone.layers.1.mixer."


def teacher(folder):
    tiny_model().save_pretrained(folder)


def student(folder):
    tiny_model(neuron=INTEGER).save_pretrained(folder)


def state_spaces(folder):
    state_spaces_folder(folder)
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    save_file({k: w.clone() for k, w in weights.items()}, folder / "model.safetensors")


KINDS = pytest.mark.parametrize("make", [teacher, student, state_spaces])


def readers(make):
    """All that read such a folder."""
    return (
        [load_dense, load_model]
        if make is state_spaces
        else [load_model, AutoModelForCausalLM.from_pretrained]
    )


def shard(folder, name="model-00002-of-00002.safetensors"):
    """Split the weights; the second file's name as the index gives it."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", name]
    where = {key: names[index % 2] for index, key in enumerate(sorted(weights))}
    for each in names:
        target = folder / each
        if each not in ("", ".", ".."):
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: w for k, w in weights.items() if where[k] == each}, target)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- names ---


@KINDS
@pytest.mark.parametrize("kind", ["above", "absolute", "below", "far below", "dots", "nothing", "backslash"])
def test_an_index_names_files_beside_it_only(make, kind, tmp_path):
    """All of the files are there and right."""
    folder = tmp_path / "model"
    make(folder)
    name = {
        "above": "../other.safetensors",
        "absolute": str(tmp_path / "other.safetensors"),
        "below": "sub/other.safetensors",
        "far below": "sub/../sub/other.safetensors",
        "dots": "..",
        "nothing": "",
        "backslash": "..\\other.safetensors",
    }[kind]
    shard(folder, name)
    for read in readers(make):
        with pytest.raises(CheckpointError, match=r"index\.json does not map weights to files beside it"):
            read(folder)


@KINDS
@pytest.mark.parametrize("map_", [{"a": 1}, {"a": None}, {"a": ["model.safetensors"]}, [], None, "x"])
def test_an_index_that_is_none(make, map_, tmp_path):
    make(tmp_path)
    shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    for read in readers(make):
        with pytest.raises(CheckpointError, match=r"does not map weights"):
            read(tmp_path)


@KINDS
def test_shards_load(make, tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    shard(tmp_path / "b")
    for read in readers(make):
        assert torch.equal(logits(read(tmp_path / "a")), logits(read(tmp_path / "b")))


# --- links ---


@KINDS
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_links_that_leave_a_folder(make, name, tmp_path):
    folder = tmp_path / "model"
    make(folder)
    target = tmp_path / f"elsewhere-{name}"
    if (folder / name).exists():
        (folder / name).rename(target)
    else:
        target.write_text("{}")
    (folder / name).symlink_to(target)
    for read in readers(make)[:1] if make is state_spaces or name == "config.json" else readers(make):
        with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
            read(folder)
    (folder / name).unlink()
    (tmp_path / "snapshots").mkdir()  # beside it are no blobs of this repository
    target.rename(folder / f"kept-{name}")
    (folder / name).symlink_to(f"kept-{name}")
    readers(make)[0](folder)


def hub_cache(folder, make, sharded):
    """A snapshot as the hub's client lays it out: links into the repository's own blobs."""
    repository = folder / "models--owner--name"
    snapshot = repository / "snapshots/0123abcd"
    make(snapshot)
    if sharded:
        shard(snapshot)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / f"blobs/{number:040x}")
        path.symlink_to(f"../../blobs/{number:040x}")
    return snapshot


@KINDS
@pytest.mark.parametrize("sharded", [False, True])
def test_a_snapshot_in_the_hubs_cache_loads(make, sharded, tmp_path):
    make(tmp_path / "plain")
    snapshot = hub_cache(tmp_path / "cache", make, sharded)
    (tmp_path / "link").symlink_to(snapshot)  # a folder that is itself a link is the user's own choice
    for read in readers(make):
        expected = logits(read(tmp_path / "plain"))
        for folder in (snapshot, tmp_path / "link"):
            assert torch.equal(logits(read(folder)), expected)


@pytest.mark.parametrize("where", ["other repository", "blobs elsewhere", "outside"])
def test_a_snapshot_whose_links_leave_its_repository(where, tmp_path):
    snapshot = hub_cache(tmp_path / "cache", teacher, sharded=False)
    weights = snapshot / "model.safetensors"
    blob = weights.resolve()
    if where == "blobs elsewhere":
        blobs = blob.parent
        blobs.rename(tmp_path / "blobs")
        blobs.symlink_to(tmp_path / "blobs")
    else:
        other = tmp_path / ("cache/models--owner--other/blobs" if where == "other repository" else "x")
        other.mkdir(parents=True)
        blob.rename(other / "file")
        weights.unlink()
        weights.symlink_to(other / "file")
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        load_dense(snapshot)


def test_a_tokenizer_that_is_a_link(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        load_tokenizer(tmp_path / "model")


# --- sizes ---

SIZES = [
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "state_size",
    "n_groups",
    "conv_kernel",
    "head_dim",
]


@pytest.mark.parametrize("make", [teacher, student])
@pytest.mark.parametrize("factor", [10**3, 10**7])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_compared_before_memory_is_taken(make, name, factor, tmp_path):
    make(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[name] *= factor
    if name == "hidden_size":
        config["num_heads"] *= factor
    if name == "head_dim":
        config["expand"] *= factor
    (tmp_path / "config.json").write_text(json.dumps(config))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is|(mismatched|missing) keys|cannot be"):
        load_model(tmp_path)
    assert time.perf_counter() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("layers", [10**9, 10**30, 3])
def test_layers_that_the_weights_have_not(layers, tmp_path):
    teacher(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(CheckpointError, match=rf"num_hidden_layers is {layers}, .* are of 2 layers"):
        load_dense(tmp_path)


@pytest.mark.parametrize("layers", [10**9, 99_999])
def test_auto_classes_look_at_the_weights_first(layers, tmp_path):
    student(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="num_hidden_layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert time.perf_counter() - start < 3


def test_a_pickle_that_holds_less_than_is_promised(tmp_path):
    teacher(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    for zipped in (True, False):
        torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="mismatched keys"):
            load_dense(tmp_path)


# --- types ---


@KINDS
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("key", [LAYER + "in_proj.weight", LAYER + "D"])
def test_only_floating_point_weights_load(make, dtype, key, tmp_path):
    make(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[key] = weights[key].to(dtype)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for read in readers(make):
        with pytest.raises(CheckpointError, match=f"{key} is of type .*, no floating-point weight"):
            read(tmp_path)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_point_type_loads(make, dtype, tmp_path):
    make(tmp_path)
    weights = {k: w.to(dtype) for k, w in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(tmp_path).dtype is torch.float32


# --- pickles ---


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}q\x00X\x01", b"\x80\x04cos\nsystem\n(S'x'\ntR.", b"PK\x03\x04"]
)
@pytest.mark.parametrize("make", [teacher, state_spaces])
def test_a_broken_pickle_is_said_in_one_line_that_tells_nobody_to_switch_safety_off(make, content, tmp_path):
    make(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as raised:
        load_dense(tmp_path)
    said = str(raised.value)
    assert "\n" not in said
    assert "weights_only" not in said
    assert len(said) < 600


@pytest.mark.parametrize(
    "content", [[1], {"a": 1}, {1: torch.ones(1)}, torch.ones(2), {"a": {"b": torch.ones(1)}}]
)
def test_a_pickle_of_something_else(content, tmp_path):
    state_spaces(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        load_dense(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "\ufffe", '{"num_hidden_layers": ' + "9" * 5000 + "}"]
)
def test_a_configuration_beyond_reason(text, tmp_path):
    teacher(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON") as raised:
        load_dense(tmp_path)
    assert len(str(raised.value)) < 600


def test_a_billion_layers_cost_no_memory():
    """In a process that may take 4 GiB of addresses more than it has."""
    script = f"""
import json, resource, sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.spiking_mamba.model.test_hostile_checkpoints import *
folder = Path(tempfile.mkdtemp())
teacher(folder)
config = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps(config | {{"num_hidden_layers": 10**9}}))
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
try:
    load_model(folder)
except CheckpointError:
    print("refused")
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stdout == "refused\n", done.stderr[-2000:]
