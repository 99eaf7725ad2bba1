"""Decoding timed by a real command line; what a table and an interval say, worked out by hand."""

import json
import re
import sys
from math import comb
from types import SimpleNamespace

import pytest

import neurons
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, event_driven
from spiking_mamba.commands.bench import BenchSettings, bench, without_neurons
from spiking_mamba.common.errors import DataError
from spiking_mamba.evaluation.cpu_speed import llama_ways
from spiking_mamba.evaluation.statistics import median_interval
from spiking_mamba.reports.decoding import draw_speeds, speed_table
from tests.helpers.commands import ROOT, run
from tests.helpers.pictures import Drawn

CONSOLE = ROOT / "spiking_mamba_console.py"
SHORT = {"tokens": 4, "repeats": 1, "threads": 1}


@pytest.fixture(scope="module")
def dense() -> SpikingMambaForCausalLM:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32, "state_size": 16}
    return SpikingMambaForCausalLM(SpikingMambaConfig(vocab_size=300, n_groups=1, **shape)).eval()


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_a_line_of_the_console(tmp_path):
    pytest.importorskip("numba")
    done = run(
        CONSOLE, "bench", "ways=[dense float32, spiking float32, dense int8, event-driven int8]", "threads=1",
        "tokens=8", "repeats=6", "over=dense int8", "output=found", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found/results.json").read_text())
    rows = {row["way"]: row for row in results["decoding"]}
    assert list(rows) == ["dense float32", "spiking float32", "dense int8", "event-driven int8"]
    assert all(len(row["times"]) == 6 and min(row["times"]) > 0 for row in rows.values())
    assert rows["dense int8"]["share"] == 1
    assert 0.5 < rows["event-driven int8"]["share"] < 0.75  # its card says 0.63
    assert rows["event-driven int8"]["bytes"] < rows["dense int8"]["bytes"]
    table = (tmp_path / "found/table.md").read_text()
    assert table.strip() in done.stdout
    assert re.search(r"^\| dense int8 .*\| +1.00 \| +\| +100% \|", table, re.MULTILINE)
    assert (tmp_path / "found/speed.png").stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {"found"}
    again = run(CONSOLE, "report", "found", cwd=tmp_path)
    assert table.strip() == again.stdout.strip()
    assert "holds files already" in run(CONSOLE, "bench", "output=found", cwd=tmp_path).stderr


def test_a_table_by_hand(tmp_path, monkeypatch):
    rows = [
        {"way": "dense int8", "times": [4.0, 2.0, 6.0], "joules": 0.5},
        {"way": "event-driven int8", "times": [2.0, 2.0, 2.0], "share": 0.625},
    ]
    rows = [{"prompt_tokens_per_second": 100.0, "seconds": sorted(row["times"])[1]} | row for row in rows]
    rows[1]["joules"] = 0.25
    said = speed_table({"title": "Here", "over": "dense int8", "decoding": rows}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said[2:]]
    assert cells[0][3:] == [
        "over dense int8",
        "95% interval",
        "weights fetched",
        "prompt tokens/s",
        "mJ a token",
    ]
    assert cells[2] == ["dense int8", "0.2", "4000.000", "1.00", "", "", "100", "500.0"]
    # 2, 1 and 3 times as fast in its three repeats: too few for an interval
    assert cells[3] == ["event-driven int8", "0.5", "2000.000", "2.00", "", "62%", "100", "250.0"]
    drawn = Drawn(monkeypatch)
    draw_speeds(rows, "Here", tmp_path / "speed.png")
    drawn.check()
    assert {"event-driven int8", "Here", "tokens a second"} <= set(drawn.text_of("speed.png").splitlines())


@pytest.mark.parametrize("count", [5, 6, 9, 20])
def test_the_interval_of_a_median(count):
    """Value k and value n + 1 - k enclose the median unless fewer than k of n coins fall on one side."""
    misses = [2 * sum(comb(count, i) for i in range(k)) / 2**count for k in range(1, count // 2)]
    k = sum(miss <= 0.05 for miss in misses)
    found = median_interval([float(value) for value in range(count, 0, -1)])
    assert found == (None if k == 0 else (k, count + 1 - k))


def test_neurons_away_leave_the_product():
    torch_model = SpikingMambaForCausalLM(
        SpikingMambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_heads=2, head_dim=16)
    )
    student = SpikingMambaForCausalLM.from_dense(
        torch_model, neuron=neurons.SILIFNode(), threshold=0.3, learn_threshold=True
    )
    found = without_neurons(student)
    assert found.config.neuron is None
    ours, theirs = found.state_dict(), torch_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_what_a_checkpoint_has_not(dense, tmp_path, capsys):
    pytest.importorskip("numba")
    folder = saved(dense, tmp_path / "dense")
    found = bench(BenchSettings(model=folder, **SHORT))
    assert [row["way"] for row in found["decoding"]][:4] == [
        "dense float32", "dense bfloat16", "dense int8", "dense int4",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "spiking float32, spiking bfloat16, event-driven int8, event-driven int4: left out: the" in said
    with pytest.raises(DataError, match="event-driven int8 cannot be timed here: the checkpoint is dense"):
        bench(BenchSettings(model=folder, ways=["dense int8", "event-driven int8"], **SHORT))
    with pytest.raises(DataError, match="event-driven int4 cannot be timed here: the checkpoint is dense"):
        bench(BenchSettings(model=folder, over="event-driven int4", **SHORT))


def test_integers_alone(dense, tmp_path):
    pytest.importorskip("numba")
    student = SpikingMambaForCausalLM.from_dense(dense, neuron=neurons.SILIFNode())
    folder = saved(event_driven(student, "int4"), tmp_path / "integers")
    (row,) = bench(BenchSettings(model=folder, **SHORT))["decoding"]
    assert row["way"] == "event-driven int4"
    with pytest.raises(DataError, match="int8 cannot be timed here: the checkpoint is event-driven int4"):
        bench(BenchSettings(model=folder, ways=["dense int8"], **SHORT))


def test_a_llama_that_would_die_is_not_tried(dense, tmp_path, monkeypatch):
    """llama.cpp built with AMX ends the process at a quantised head that is tied to the embeddings."""
    built = SimpleNamespace(llama_print_system_info=lambda: b"CPU : AVX512 = 1 | AMX_INT8 = 1 | ")
    monkeypatch.setitem(sys.modules, "llama_cpp", built)
    with pytest.raises(RuntimeError, match="built with AMX"):
        llama_ways(dense, tmp_path, 1)
