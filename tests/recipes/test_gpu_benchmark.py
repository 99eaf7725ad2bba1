"""The benchmark of decoding on a GPU: it runs small on a processor; its tables say what was measured."""

import json

import gpu_decoding
import gpu_tables
import pytest

from spiking_mamba.common.records import read_records
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


def test_what_cannot_run_is_said(tmp_path):
    done = run(SCRIPT, "--out", tmp_path)
    assert done.returncode != 0
    assert "--smoke runs anywhere" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "size", "commit"),
    [
        ("On a GPU#1", "1.3b", "22f4f99"),
        ("On a GPU, an earlier run#1", "1.3b", "35c2b38"),
        ("On a GPU#2", "130m", "35c2b38"),
    ],
)
def test_the_pages_tables_are_those_of_their_records(table, size, commit):
    results = ROOT / "docs/results"
    records = [
        json.loads(line) for line in (results / "gpu_decoding.jsonl").read_text().splitlines()
    ]  # of a way, two runs
    own = [r for r in records if r["size"] == size and r["provenance"]["commit"].startswith(commit)]
    (printed,) = [r for r in read_records(results / "speeds.jsonl") if r["table"] == table]
    text = gpu_tables.table(own).split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    header, *rows = [row for row in cells if set("".join(row)) - set("-: ")]
    assert printed["rows"] == rows
    assert printed["header"][1:] == header[1:]
    assert printed["header"][0].startswith(header[0])


def test_every_record_is_on_the_page():
    records = (ROOT / "docs/results/gpu_decoding.jsonl").read_text().splitlines()
    runs = {(r["size"], r["provenance"]["commit"][:7]) for r in map(json.loads, records)}
    assert runs == {("1.3b", "22f4f99"), ("1.3b", "35c2b38"), ("130m", "35c2b38")}
