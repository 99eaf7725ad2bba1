"""Reports of finished runs, written anew."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from spiking_mamba.commands import report
from spiking_mamba.common.errors import DataError
from tests.helpers.commands import run
from tests.helpers.evaluations import evaluation_results, seeds
from tests.helpers.pages import Page

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


def quickstart_of(folder, **changes):
    results = json.loads((ROOT / "docs/results/quickstart.json").read_text()) | changes
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return results


def test_quickstarts_side_by_side(tmp_path, monkeypatch, capsys):
    first = quickstart_of(tmp_path / "runs/a")
    after = first["after"] | {"perplexity": 51.25}
    energy = first["energy"] | {"with_neurons": 3.5, "quantised": 2.0}
    quickstart_of(tmp_path / "runs/b", after=after, energy=energy, levels=9, held_out_tokens=40)
    words = [str(tmp_path / "runs/a"), str(tmp_path / "runs/b"), f"output={tmp_path / 'ab'}"]
    monkeypatch.setattr(sys, "argv", ["spiking-mamba report", *words])
    report.main()
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert lines[0] == ["", "a", "b"]
    assert ["levels", "17", "9"] in lines
    assert ["perplexity, held-out text", "57.10", "51.25"] in lines
    assert ["energy gain of the projections with their neurons, 45 nm fp32", "5.84x", "3.50x"] in lines
    assert ["against a quantised network, int8", "3.49x", "2.00x"] in lines

    page = Page(tmp_path / "ab/report.html")
    assert page.said() == {
        "Measured": "2 students, each against its own dense teacher: a, b.",
        "Keeps": "b is the nearest to its teacher in perplexity, 51.25 against 48.62.",
        "Costs": "a takes the least energy in its projections with their neurons, 5.84 times less than its "
        "teacher, estimated from counted operations (at 45 nm, fp32).",
    }
    assert "a: 51,000 tokens of wikipedia-passages; b: 40 tokens" in page.text
    assert len(page.pictures()) == 2 + 2 * 2  # overview, learning; both projections of both
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == [
        "report.html", "report.md", "report.png"
    ]  # fmt: skip


def test_evaluations_side_by_side(tmp_path):
    for name, rate in (("a", 0.5), ("b", 0.75)):
        results = evaluation_results(seeds(1, items=20, layers=1, rate=rate), resamples=20)
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    report.report_together([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    page = Page(tmp_path / "ab/report.html")
    assert page.row("mean |s|")[1:] == ["0.500", "0.750", "+0.250"]


@pytest.mark.parametrize(
    ("runs", "output", "said"),
    [
        (["a", "c"], "out", "compared with evaluations"),
        (["c", "d"], "out", "compared with evaluations"),
        (["a", "b"], "a", "folder of a run"),
        (["a", "a"], "out", "named twice"),
        (["a", "x"], "out", "There is no "),
    ],
)
def test_what_cannot_be_put_side_by_side(tmp_path, runs, output, said):
    for name in "ab":
        quickstart_of(tmp_path / name)
    for name in "cd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('{"change": {}}')
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(DataError, match=said):
        report.report_together([tmp_path / run for run in runs], tmp_path / output)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_several_runs_want_a_folder_of_their_own():
    done = run(CONSOLE, "report", "a", "b")
    assert done.returncode == 2
    assert "output" in done.stderr
    assert len(done.stderr.splitlines()) == 1
