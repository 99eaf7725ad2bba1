"""The benchmark of decoding on a GPU: it runs small on a processor; its tables say what was measured."""

import argparse
import importlib
import random

import decoding
import gpu_decoding
import gpu_models
import gpu_tables
import pytest
import torch

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.records import read_records
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.modes import hooked
from spiking_mamba.model.projection import SpikeEncoder
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.commands import ROOT, run

SCRIPT = ROOT / "recipes/benchmark/gpu_decoding.py"


def record(way, batch, seconds, **others):
    return {"size": "1.3b", "batch": batch, "way": way, "seconds": seconds, "bytes": 3e8, "share": None,
            "copy_bytes_per_second": 3e12} | others  # fmt: skip


def test_the_table():
    records = [
        record("dense bf16", 1, 2e-3, bytes=2.7e9, mJ=700.0, mJ_net=500.0, idle_watts=73.0),
        record("dense int8", 1, 1e-3),
        record("event-driven, 63%", 1, 8e-4, share=0.63, replay_ms=0.7),
        record("event-driven, 100%", 1, 9e-4, share=1.0),
        record("event-driven, 63%", 8, 2e-3, share=0.9),
        record("dense int4", 1, 8e-4),
        record("event-driven int4, 63%", 1, 6e-4, share=0.64),
    ]
    text = gpu_tables.table(records)
    first, second, last = text.split("\n\n")
    cells = next(line.split("|") for line in first.splitlines() if line.startswith("| event"))
    assert [cell.strip() for cell in cells[2:-1]] == [
        "1250", "0.800", "0.700", "2.50", "0.63", "300", "12%", "-", "-", "-",
    ]  # fmt: skip
    cells = next(line.split("|") for line in first.splitlines() if line.startswith("| dense bf16"))
    assert [cell.strip() for cell in cells[-4:-1]] == ["700", "500", "73"]
    grown = next(line.split("|") for line in second.splitlines() if line.startswith("| event"))
    assert [cell.strip() for cell in grown[2:-1]] == ["1250", "4000"]
    assert last == (
        "Integers and fewer launches give 2.00 times dense bf16's speed. "
        "Zeros, over the same kernels where all inputs fire: 63%: 1.12."
    )


def test_joules_are_medians_and_idle_power_is_taken_off_once():
    found = gpu_decoding.in_millijoules([(0.3, 1e-3), (0.5, 1e-3), (0.4, 2e-3)], idle=100.0)
    assert found["mJ"] == pytest.approx(400)
    assert found["mJ_net"] == pytest.approx(200)  # of 200, 400 and 200
    assert found["watts"] == pytest.approx(300)  # of 300, 500 and 200
    assert found["idle_watts"] == 100
    assert found["mJ_each"] == pytest.approx([300, 500, 400])


def test_all_of_it_runs_small(tmp_path):
    asked = ["--rival", "--generate", "--batches", "1", "2", "--weights", "int8", "int4"]
    done = run(SCRIPT, "--smoke", *asked, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_records(tmp_path / gpu_decoding.RECORDS)
    assert [r["way"] for r in found if r["batch"] == 1] == [
        "dense bf16", "dense int8", "event-driven, 100%", "event-driven, 100%, generate()",
        "event-driven, 63%", "event-driven, 63%, generate()",
        "event-driven, 42%", "event-driven, 42%, generate()",
        "dense int4", "event-driven int4, 100%", "event-driven int4, 100%, generate()",
        "event-driven int4, 63%", "event-driven int4, 63%, generate()",
        "event-driven int4, 42%", "event-driven int4, 42%, generate()",
    ]  # fmt: skip
    by_share = {r["way"]: r["share"] for r in found if r["batch"] == 1}
    assert by_share["event-driven, 63%"] == pytest.approx(0.63, abs=0.1)
    assert by_share["event-driven, 42%"] == pytest.approx(0.42, abs=0.1)
    assert by_share["dense int8"] > 0.9
    assert by_share["event-driven, 100%"] == pytest.approx(1.0, abs=0.02)
    bytes_of = {r["way"]: r["bytes"] for r in found if r["batch"] == 1}
    assert bytes_of["event-driven, 42%"] < bytes_of["event-driven, 63%"] < bytes_of["dense int8"]
    assert bytes_of["dense int8"] < bytes_of["dense bf16"]  # float32 on a processor
    for way in ("dense int8", "event-driven, 63%", "event-driven, 42%"):
        other = way.replace("int8", "int4").replace("driven,", "driven int4,")
        assert bytes_of[other] < bytes_of[way]
    assert (tmp_path / "smoke.png").stat().st_size > 1000
    assert "its floor" in (tmp_path / "smoke.md").read_text()


def test_a_prompt_s_scatter_does_not_move_what_a_token_takes(monkeypatch):
    """A clock on which a token takes 1 ms and a prompt 50 ms, now and then 150."""
    now, calls = [0.0], [0]

    def decode(count):
        calls[0] += 1
        now[0] += 1e-3 * count + (0.15 if calls[0] % 5 == 2 else 0.05)

    monkeypatch.setattr(gpu_decoding.time, "perf_counter", lambda: now[0])
    way = gpu_decoding.Way(decode, bytes=1.0, prompts=True)
    assert [gpu_decoding.seconds_a_token(way, 40) for _ in range(5)] == pytest.approx([1e-3] * 5)
    args = argparse.Namespace(repeats=5, tokens=40, device="cpu")
    times = decoding.seconds_a_token(
        {"dense": lambda prompt, tokens: decode(tokens)}, torch.zeros(1, 4), args
    )
    assert times["dense"] == pytest.approx([1e-3] * 5)
    draw = random.Random(0)

    def restless(count):  # 20 ms up or down each time, as on a machine with neighbours
        now[0] += 1e-3 * count + draw.uniform(0.03, 0.07)

    way = gpu_decoding.Way(restless, bytes=1.0, prompts=True)
    found = [gpu_decoding.seconds_a_token(way, 60) for _ in range(50)]
    assert found == pytest.approx([1e-3] * 50, rel=0.08)
    alone = gpu_decoding.Way(lambda count: now.__setitem__(0, now[0] + 2e-3 * count), bytes=1.0)
    assert gpu_decoding.seconds_a_token(alone, 40) == pytest.approx(2e-3)


def test_a_student_as_it_was_trained(tmp_path):
    """Its share is that of its own spikes on the text, counted in the model itself."""
    folder = "recipes/quickstart/student"
    both = ["--student", folder, "--teacher", "recipes/quickstart/teacher"]
    done = run(SCRIPT, "--smoke", *both, "--batches", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = {r["way"]: r for r in read_records(tmp_path / gpu_decoding.RECORDS)}
    assert list(found) == ["dense bf16", "dense int8", "event-driven, as trained"]
    assert {r["size"] for r in found.values()} == {"student"}
    model, tokenizer = load_model(ROOT / folder), load_tokenizer(ROOT / folder)
    ids = tokenizer(gpu_models.TEXT, return_tensors="pt")["input_ids"][:, : gpu_models.PROMPT]
    fired = {}
    hooks = [
        encoder.register_forward_hook(lambda m, a, out, n=name: fired.__setitem__(n, out.fed[0, -32:] != 0))
        for name, encoder in model.named_modules()
        if isinstance(encoder, SpikeEncoder)
    ]
    with torch.no_grad(), hooked(hooks):
        model(ids)
    outputs = {
        f"{name.removesuffix('_proj')}_spikes": projection.out_features
        for name, projection in model.backbone.layers[0].mixer.named_children()
        if name in ("in_proj", "out_proj")
    }
    size = {name: outputs[name.rpartition(".")[2]] for name in fired}
    asked = sum(size[name] * each.float().mean(0).sum() for name, each in fired.items())
    whole = sum(size[name] * each.shape[1] for name, each in fired.items())
    assert found["event-driven, as trained"]["share"] == pytest.approx(float(asked / whole), abs=0.02)
    alone = run(SCRIPT, "--smoke", *both[:2], "--out", tmp_path / "none")
    assert alone.returncode != 0
    assert "go together" in alone.stderr


def test_what_cannot_run_is_said(tmp_path):
    done = run(SCRIPT, "--out", tmp_path)
    assert done.returncode != 0
    assert "--smoke runs anywhere" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpu_decoding", "decoding", "training_step"])
def test_a_benchmark_of_which_nothing_runs_says_so(name, tmp_path, monkeypatch):
    """As where a library is too old for all of it: no table of nothing, and no traceback."""

    def broken(*_):
        raise AttributeError("'DynamicCache' object has no attribute 'get_recurrent_state'")

    module = importlib.import_module(name)
    args = argparse.Namespace(repeats=1, tokens=4, device="cpu", size="none", batches=[1], out=tmp_path)
    calls = {
        "gpu_decoding": lambda: module.show(args, {"copy_bytes_per_second": None}),
        "decoding": lambda: module.seconds_a_token({"dense": broken}, torch.zeros(1, 4), args),
        "training_step": lambda: module.measure(argparse.Namespace(vocab_size=9), args, 1, 4),
    }
    if name == "training_step":
        monkeypatch.setattr(module, "contenders", lambda *_: {"dense": broken})
    with pytest.raises(RunError, match="Nothing runs here"):
        calls[name]()
    assert not list(tmp_path.iterdir())
