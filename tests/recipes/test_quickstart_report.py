"""The quickstart's report, from results written by hand."""

import copy
import importlib.util
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.pages import Page

ROOT = Path(__file__).parents[2]
LAYERS, LEVELS = 14, 17


def _module():
    spec = importlib.util.spec_from_file_location("quickstart_report", ROOT / "recipes/quickstart/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = _module()


def scores(*values):
    tasks = zip(("arc_easy", "piqa", "sciq"), (0.25, 0.5, 0.25), values, strict=True)
    return {
        task: {"acc": acc, "acc_stderr": math.sqrt(acc * (1 - acc) / 99), "chance": chance, "n": 100}
        for task, chance, acc in tasks
    }


@pytest.fixture
def results():
    """Those of the README's run, as far as it shows them; spikes by layer are made up."""
    random = np.random.default_rng(0)
    rows = {}
    for layer in range(LAYERS):
        for name in ("in_proj", "out_proj"):
            distance = np.abs(np.arange(LEVELS) - LEVELS // 2)
            histogram = (1e7 * np.exp(-distance * random.uniform(1.0, 3.0))).astype(int)
            rows[f"backbone.layers.{layer}.mixer.{name}"] = {"histogram": histogram.tolist()}
    return {
        "teacher": {"perplexity": 48.621, "zero_shot": scores(0.26, 0.56, 0.52)},
        "before": {"perplexity": 101.04, "zero_shot": scores(0.28, 0.52, 0.50)},
        "after": {"perplexity": 57.699, "zero_shot": scores(0.29, 0.51, 0.53)},
        "gap_closed": (101.04 - 57.699) / (101.04 - 48.621),
        "spikes": {"mean_abs": 0.8596, "nonzero_share": 0.5604, "projections": rows},
        "energy": {"fp32": 5.946, "fp16": 4.36, "int8": 8.919, "quantised": 8.919, "quantised_sparse": 4.998},
        "levels": LEVELS,
        "held_out": "wikipedia-passages",
        "held_out_tokens": 51000,
        "prompt": "The city of",
        "sample": "The city of *Rome* <is> a _place_.",
        "log": [{"step": 25 * i, "kl": 0.7 / i} for i in range(1, 17)] + [{"step": 400, "seconds": 1.0}],
        "seed": 0,
        "seconds": 390.4,
        "device": "2 CPU threads",
        "versions": {"torch": "2.14.1", "lm-eval": "0.4.13"},
    }


def test_the_terminal_shows_the_readmes_tables(results):
    shown = [block for block in re.findall(r"```text\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)]
    assert report.summary(results) in shown


def test_both_reports_have_the_terminals_tables(results, tmp_path):
    before = copy.deepcopy(results)
    summary = report.write_report(tmp_path, results)
    assert results == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html", "report.md", "report.png", "results.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == results
    quality, closed, costs = summary.split("\n\n")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(f"# Distilling a spiking Mamba2\n\n{quality}\n\n{closed}\n\n{costs}\n\n![")
    assert "](report.png)" in text
    page = Page(tmp_path / "report.html")
    for table, lines in zip(page.tables, (quality, costs), strict=True):
        header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
        assert table == [header, *rows]
    for said in (closed, results["sample"], "51000 tokens of wikipedia-passages", "390 s", "torch 2.14.1"):
        assert said in page.text
    assert page.tags.count("img") == 1


def test_an_unknown_error_and_a_task_without_chance(results):
    for model in ("teacher", "before", "after"):
        results[model]["zero_shot"] = {"lambada": {"acc": 0.5, "acc_stderr": None, "chance": None, "n": 1}}
    line = report.summary(results).splitlines()[3]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["lambada, 1 items", *["0.500 ± ?"] * 3, ""]


@pytest.mark.parametrize("layers", [1, LAYERS, 48])
def test_the_picture(results, tmp_path, drawn, layers):
    rows = list(results["spikes"]["projections"].values())
    results["spikes"]["projections"] = {
        f"backbone.layers.{layer}.mixer.{name}": rows[layer % len(rows)]
        for layer in range(layers)
        for name in ("in_proj", "out_proj")
    }
    report.write_report(tmp_path, results)
    drawn.check()
    (figure,) = drawn.figures
    losses, spikes, energy = figure.axes[:3]
    assert losses.lines[0].get_xydata().tolist() == [
        [row["step"], row["kl"]] for row in results["log"] if "kl" in row
    ]
    shares = spikes.images[0].get_array()
    assert shares.shape == (2 * layers, LEVELS)
    histogram = rows[0]["histogram"]
    np.testing.assert_allclose(shares[0].filled(0), np.array(histogram) / sum(histogram))
    assert [bar.get_width() for bar in energy.patches] == [5.946, 8.919, 4.998]


def test_a_student_that_never_spikes(results, tmp_path, drawn):
    results["energy"] = dict.fromkeys(results["energy"], math.inf)
    for row in results["spikes"]["projections"].values():
        row["histogram"] = [0] * (LEVELS // 2) + [1000] + [0] * (LEVELS // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.write_report(tmp_path, results).count("infinite") == 4
    drawn.check()
    assert drawn.text_of("report.png").count("infinite") == 3
