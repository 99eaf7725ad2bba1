"""The tables of docs/results/speeds.jsonl whose own records are kept say what these say."""

import json
import re

import pytest

from spiking_mamba.common.records import read_records
from tests.helpers.commands import ROOT

RESULTS = ROOT / "docs/results"
COLUMNS = {
    "floor": None,
    "SI-LIF, cupy": "SI-LIF, cupy",
    "SI-LIF, torch": "SI-LIF, torch",
    "ILIFNode": "spikingjelly ILIFNode",
    "ILIF, V in fp32": "spikingjelly ILIF, fused",
    "LIFNode": "spikingjelly LIFNode",
    "LIF, V in fp32": "spikingjelly LIF, fused",
    "TernaryLIFNode": "spikingjelly TernaryLIFNode",
    "compiled clamp and round": "compiled clamp and round",
    "one fused pass (cupy)": "SI-LIF, cupy",
    "cupy spikes, mixed by torch": "cupy, mixed by torch",
    "torch": "SI-LIF, torch",
    "torch, compiled": "compiled",
}


def printed(name):
    (table,) = [r for r in read_records(RESULTS / "speeds.jsonl") if r["table"] == name]
    return table, {row[0]: dict(zip(table["header"][1:], row[1:], strict=True)) for row in table["rows"]}


def same_figure(cell, number):
    """A printed cell is the number, to its last digit."""
    digits = len(cell.partition(".")[2])
    return float(cell) == pytest.approx(number, abs=0.51 * 10**-digits)


@pytest.mark.parametrize("name", ["Neurons#1", "Neurons#2"])
def test_neurons(name):
    record = json.loads((RESULTS / "neuron_speed.json").read_text())
    table, rows = printed(name)
    assert f"commit {record['commit'][:7]}, {record['date']}" in table["record"]
    kept = {row["name"].replace(" blend", ""): row for row in record["rows"]}
    for row, cells in rows.items():
        (own,) = [kept[key] for key in kept if key.startswith(row)]
        for column, key in COLUMNS.items():
            if (cell := cells.get(column)) is None:
                continue
            number = own["floor_ms"] if key is None else own["results"].get(key, {}).get("ms")
            assert cell == "-" if number is None else same_figure(cell, number), (row, column)


def test_neurons_one_call_after_another():
    """What the head of docs/benchmarks.md says of them looped, over ours."""
    record = json.loads((RESULTS / "neuron_speed.json").read_text())
    kept = {row["name"]: row["results"] for row in record["rows"]}
    wanted = {
        ("node, fp32, T=1, N=64Mi", "spikingjelly ILIFNode"): "1.8",
        ("node, fp32, T=2048, N=24576", "spikingjelly ILIFNode"): "5.4",
        ("node, bf16, T=2048, N=24576", "spikingjelly ILIF, fused"): "3.2",
        ("node, bf16, T=2048, N=24576", "spikingjelly LIF, fused"): "2.5",
        ("node, bf16, T=1, N=64Mi", "compiled clamp and round"): "0.66",
        ("SGC blend, bf16, T=1, N=64Mi", "compiled"): "0.57",
    }
    page = (ROOT / "docs/benchmarks.md").read_text()
    for (row, rival), ratio in wanted.items():
        assert same_figure(ratio, kept[row][rival]["looped_ms"] / kept[row]["SI-LIF, cupy"]["looped_ms"])
        assert f"; looped {ratio}x |" in page
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    first = kept["stateless, bf16, T=1, N=64Mi"]["SI-LIF, cupy"]["looped_ms"]
    assert f"called one after another: {first:.3f})" in readme
    long = kept["node, bf16, T=2048, N=24576"]
    ours, theirs = (long[name]["looped_ms"] for name in ("SI-LIF, cupy", "spikingjelly ILIF, fused"))
    assert f"one after another {ours:.3f} and {theirs:.2f}" in readme


@pytest.mark.parametrize(
    ("row", "size", "said"), [("bf16", 2, "0.032 of the 0.057"), ("fp32", 4, "0.063 of 0.075")]
)
def test_what_writing_the_spikes_explains(row, size, said):
    record = json.loads((RESULTS / "neuron_speed.json").read_text())
    (kept,) = [r["results"] for r in record["rows"] if r["name"].startswith(f"SGC blend, {row}")]
    written = size * 64 * 2**20 / record["copy_TB_per_s"] / 1e9
    gap = kept["SI-LIF, cupy"]["ms"] - kept["compiled"]["ms"]
    explained, of = re.findall(r"[\d.]+", said)
    assert same_figure(explained, written)
    assert same_figure(of, gap)
    assert said in (ROOT / "docs/benchmarks.md").read_text()


def test_a_training_step():
    record = json.loads((RESULTS / "training_step.json").read_text())
    table, rows = printed("Training step on a GPU#1")
    assert f"commit {record['commit'][:7]}, {record['date']}" in table["record"]
    (run,) = record["runs"]
    found = run["found"]
    assert rows.keys() == found.keys()
    for way, cells in rows.items():
        seconds = found[way]["seconds"]
        assert same_figure(cells["tokens/s"], run["batch"] * run["length"] / seconds)
        assert same_figure(cells["time / mamba-ssm"], seconds / found["mamba-ssm"]["seconds"])
        assert same_figure(cells["time / dense"], seconds / found["dense"]["seconds"])
        assert same_figure(cells["peak GiB of a step"], found[way]["peak"] / 2**30)
