"""The notebook runs, cell after cell, and prints and draws what it shows."""

import contextlib
import io
import json
import re

import pytest

from tests.helpers.commands import ROOT

NOTEBOOK = ROOT / "docs/notebooks/student.ipynb"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_the_notebook_runs_and_prints_what_it_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    plt.close("all")
    names = {"__name__": "notebook"}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        source, printed = "".join(cell["source"]), io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, NOTEBOOK.name, "exec"), names)
        pictures = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert pictures == len(plt.get_fignums()) == ("plt.subplots" in source)
        assert bool(pictures) == bool(cell["metadata"].get("alt"))
        plt.close("all")
        shown = "".join(line for output in cell["outputs"] for line in output.get("text", []))
        if "varies" not in cell["metadata"].get("tags", []):
            same_but_for_rounding(printed.getvalue(), shown)


def same_but_for_rounding(printed, shown):
    """Float sums of another processor may move a spike, and so the last digit."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    found, expected = ([float(n) for n in NUMBER.findall(text)] for text in (printed, shown))
    assert found == pytest.approx(expected, rel=0.03, abs=0.011)


def test_the_notebook_was_filled_in_one_go():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
