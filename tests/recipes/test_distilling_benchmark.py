"""What measures the 1.3B recipe on several GPUs: its plan, its tables, and small runs of it."""

from types import SimpleNamespace

import distilling
import pytest
from distilling_parts import LOGGED_EVERY, Part, plan
from distilling_tables import agreement, rate, report
from kernel_shares import Kernel, kernel_shares, kernels_of

from spiking_mamba.common.records import read_records
from tests.helpers.commands import ROOT, run

SCRIPT = ROOT / "recipes/benchmark/distilling.py"


def parts_of(gpus):
    return [part for stage in plan(gpus, 20, 12) for launch in stage for part in launch.parts]


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_the_plan(gpus):
    names = [part.name for part in parts_of(gpus)]
    assert len(set(names)) == len(names)
    assert names[0] == "whole"
    assert names.index("killed") < names.index("resumed")
    for stage in plan(gpus, 20, 12):
        used = [gpu for launch in stage for gpu in launch.gpus]
        assert len(set(used)) == len(used) <= gpus
        for launch in stage:
            assert max(launch.gpus) < gpus
            assert {part.gpus for part in launch.parts} == {len(launch.gpus)}
    whole, killed, resumed = (
        next(p for p in parts_of(gpus) if p.name == n) for n in ("whole", "killed", "resumed")
    )
    assert killed.save_at < killed.kill_at < killed.steps
    assert killed.save_at % LOGGED_EVERY == 0  # a row of the log holds no loss from before the checkpoint
    assert (resumed.resumes, resumed.save_at, resumed.kill_at) == ("killed", killed.save_at, 0)
    for name in ("size", "sharding", "gpus", "steps", "rows", "accumulated", "checkpointing"):
        assert getattr(whole, name) == getattr(killed, name) == getattr(resumed, name)
    rows = {part.rows * part.accumulated for part in parts_of(gpus)}
    assert rows == {8}


def test_steps_that_are_timed():
    part = Part("whole", "1.3b", "fsdp2", 4, 20, profiled=True)
    assert part.profiled_step == 19
    assert part.timed(logged=False) == [4, 6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18]
    assert part.timed(logged=True) == [10, 15]
    short = Part("filled", "1.3b", "fsdp2", 4, 12, profiled=True)
    assert short.profiled_step == 12
    assert (short.timed(logged=False), short.timed(logged=True)) == ([4, 6, 7, 8, 9, 11], [10])


def test_shares_of_a_step():
    kernels = [
        Kernel("ncclDevKernel_AllGather_RING_LL", 0.0, 2.0),
        Kernel("nvjet_tst_128x256", 1.0, 3.0),
        Kernel("triton_per_fused_norm", 2.5, 4.0),  # beside the one above
        Kernel("_chunk_scan_fwd_kernel", 5.0, 6.0),
        Kernel("ncclDevKernel_ReduceScatter", 5.5, 5.75),
    ]
    found = kernel_shares(kernels, 8.0)
    assert found["computing"] == pytest.approx(4 / 8)
    assert found["exposed_communication"] == pytest.approx(1 / 8)
    assert found["hidden_communication"] == pytest.approx(1.25 / 8)
    assert found["idle"] == pytest.approx(3 / 8)
    assert found["kinds"] == {
        "communication": pytest.approx(2.25 / 8),
        "matrix products": pytest.approx(2 / 8),
        "compiled (norms, gates, neurons, convolution, loss)": pytest.approx(1.5 / 8),
        "scan": pytest.approx(1 / 8),
    }


def test_kernels_among_the_events_of_a_profile():
    def event(name, device="CUDA", note=False):
        span = SimpleNamespace(start=1e6, end=2e6)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=note)

    marks = ["nccl:_all_gather_base", "FSDP::pre_forward", "Stream Wait Event", "Context Sync"]
    events = [event(name) for name in ("ncclDevKernel_AllGather", "Memcpy DtoD", *marks)]
    events += [event("aten::mm", "CPU"), event("step", note=True)]
    assert kernels_of(events) == [Kernel("ncclDevKernel_AllGather", 1, 2), Kernel("Memcpy DtoD", 1, 2)]


def record(name, plain, logged, **settings):
    part = {
        "size": "1.3b",
        "sharding": "fsdp2",
        "gpus": 4,
        "rows": 2,
        "accumulated": 4,
        "checkpointing": True,
    }
    part |= {"save_at": 0, "kill_at": 0, "resumes": ""} | settings
    tokens = 2048 * 8 * part["gpus"]
    found = {"part": name, "state": "done", "settings": part, "tokens": tokens, "peak_allocated_gib": 30.25}
    return found | {"step_seconds": plain, "logged_step_seconds": logged, "log": []}


def test_tables(tmp_path):
    whole = record("whole", 1.0, 2.0)
    one = record("one", 0.9, 1.9, gpus=1, sharding="alone")
    assert rate(whole) == pytest.approx(4 * 16384 / 1.1)
    whole["log"] = [{"step": 15, "loss": 2.0, "kl": 1.0}, {"step": 20, "loss": 1.0, "kl": 0.5}]
    resumed = record("resumed", 1.0, 2.0, save_at=10, resumes="killed")
    resumed["log"] = [{"step": 15, "loss": 2.001, "kl": 1.0}, {"step": 20, "loss": 1.0, "kl": 0.5002}]
    failed = record("ddp", 1.0, 2.0, sharding="ddp") | {"state": "failed"}
    del failed["step_seconds"]
    records = [whole, one, resumed, failed]
    found = agreement({r["part"]: r for r in records})
    assert found == {"from": 10, "to": 20, "loss": pytest.approx(5e-4), "kl": pytest.approx(4e-4)}
    file = tmp_path / "speeds.jsonl"
    text = report(records, file)
    assert "ddp: failed" in text
    first, second, third = read_records(file)
    assert first["table"] == "Four GPUs#1"
    assert first["rows"] == [
        ["1.3B, FSDP2 on 4, 4 x 2 rows", "59578", "3.64", "1000", "2000", "30.2"],
        ["1.3B, one GPU, 4 x 2 rows", "16384", "1.00", "900", "1900", "30.2"],
    ]
    hours = 20_000 * 131_072 / (4 * 16384 / 1.1) / 3600
    assert second["rows"] == [["1.3B, FSDP2 on 4, 4 x 2 rows", f"{hours:.2f}", f"{4 * hours:.1f}"]]
    assert third["table"] == "Four GPUs#4"
    assert third["rows"] == [["loss", "0.500"], ["KL", "0.400"]]
    report(records, file)
    assert len(read_records(file)) == 3


def test_a_part_that_works_and_one_that_fails(tmp_path):
    through = tmp_path / "through.py"
    through.write_text(
        "import json, runpy, sys\n"
        "plan = json.load(open(sys.argv[2]))\n"
        "if plan['parts'][0]['name'] == 'one 2.7b': sys.exit('no')\n"
        "del sys.argv[0]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    out = tmp_path / "out"
    small = ["--rehearse", "--gpus", "2", "--short", "10", "--only", "one", "one 2.7b"]
    done = run(SCRIPT, *small, "--out", out, "--through", through)
    assert done.returncode == 0, done.stderr
    found = {r["part"]: r for r in read_records(out / "distilling.jsonl")}
    assert {name: r["state"] for name, r in found.items()} == {"one": "done", "one 2.7b": "failed"}
    one = found["one"]
    assert [row["step"] for row in one["log"]] == [5, 10]
    assert all(row["kl"] > 0 for row in one["log"])
    assert len(one["seconds"]) == 10
    assert one["tokens"] == 64 * 8
    assert "one 2.7b: failed" in done.stdout
    assert "1.3B, one GPU, 4 x 2 rows" in run(SCRIPT, "--report", out).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "3"], "even number"),
        (["--gpus", "2", "--short", "4"], "at least 10"),
        (["--gpus", "2", "--only", "tree"], "knows no tree"),
        (["--gpus", "2", "--out", "FOLDER"], "already holds files"),
    ],
)
def test_what_cannot_be_measured(arguments, said, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    given = [str(tmp_path) if a == "FOLDER" else a for a in arguments]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *given])
    with pytest.raises(SystemExit, match=said):
        distilling.main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
