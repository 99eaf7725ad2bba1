"""Reports of finished runs, written anew."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from spiking_mamba.commands import report
from tests.helpers.commands import run

ROOT = Path(__file__).parents[3]
CONSOLE = ROOT / "spiking_mamba_console.py"


def test_of_a_quickstart(tmp_path, monkeypatch, capsys, drawn_nothing):
    shutil.copy(ROOT / "docs/results/quickstart.json", tmp_path / "results.json")
    before = json.loads((tmp_path / "results.json").read_text())
    monkeypatch.setattr(sys, "argv", ["spiking-mamba report", str(tmp_path)])
    report.main()
    said = capsys.readouterr().out
    table = said.split("\n\n")[0]
    assert table in (ROOT / "README.md").read_text()
    assert said.strip().endswith(f"Report: {tmp_path / 'report.md'}, {tmp_path / 'report.html'}")
    assert json.loads((tmp_path / "results.json").read_text()) == before


@pytest.fixture
def drawn_nothing(monkeypatch):
    """Without its picture, which tests/recipes looks at."""
    from spiking_mamba.reports import quickstart

    monkeypatch.setattr(quickstart, "write_png", lambda path, panels: path.write_bytes(b""))


def test_of_a_preference_optimisation(tmp_path):
    side = {"accuracy": None, "perplexity": 20.0, "mean_abs": None}
    results = {"before": side, "after": side | {"perplexity": 25.0}}
    results["change"] = {"accuracy": None, "perplexity_ratio": 1.25}
    (tmp_path / "results.json").write_text(json.dumps(results))
    line = report.report(tmp_path).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["perplexity", "20.00", "25.00", "+25.0%"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "There is no "),
        ("{", "is no JSON"),
        ("[]", "holds results of no quickstart"),
        ('{"change": {}}', "lacks what a report needs"),
        ('{"gap_closed": 0.5}', "lacks what a report needs"),
    ],
)
def test_no_results_are_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    done = run(CONSOLE, "report", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"results.json"}
