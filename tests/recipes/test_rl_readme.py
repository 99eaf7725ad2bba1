"""The table over seeds in recipes/rl/README.md, recomputed from docs/results/preference.jsonl."""

import importlib
import importlib.util
import json
import re
import sys

import pytest

from spiking_mamba.common.provenance import is_clean
from spiking_mamba.common.records import read_records
from spiking_mamba.evaluation.statistics import interval
from tests.helpers.commands import ROOT

pytest.importorskip("trl")

README = (ROOT / "recipes/rl/README.md").read_text()
RECORDS = read_records(ROOT / "docs/results/preference.jsonl")
COLUMNS = ("student", "DPO", "KTO", "teacher", "teacher, DPO")
START = {"DPO": "student", "KTO": "student", "teacher, DPO": "teacher"}
# of the README's rows: quantity, and items of each set
QUANTITIES = {
    "Social IQA, trained on": ("social_iqa", None),
    "HellaSwag, 1994": ("hellaswag", 1994),
    "PIQA, 1825": ("piqa", 1825),
    "WinoGrande, 1267": ("winogrande", 1267),
    "average": ("average", None),
    "zero-shot: ARC-E, 2376": ("arc_easy", 2376),
    "ARC-C, 1172": ("arc_challenge", 1172),
    "BoolQ, 3270": ("boolq", 3270),
    "OpenBookQA, 500": ("openbookqa", 500),
    "LAMBADA, 5153": ("lambada_openai", 5153),
}


@pytest.fixture
def table(monkeypatch):
    spec = importlib.util.spec_from_file_location("rl_table", ROOT / "recipes/rl/table.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def runs(column):
    found = [record for record in RECORDS if record["kind"] == "run" and record["group"] == column]
    assert [record["seed"] for record in found] == [0, 1, 2]
    return found


def models(group):
    return [record for record in RECORDS if record["kind"] == "model" and record["group"] == group]


def row(label):
    """The README's cells by column."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", README, flags=re.MULTILINE)
    return dict(zip(COLUMNS, (cell.strip() for cell in line.split("|")), strict=True))


def cell(values, form, unit=""):
    found = interval(values)
    text = f"{found['mean']:{form}}{unit}"
    return text if found["low"] is None else f"{text} ({found['low']:{form}} to {found['high']:{form}})"


@pytest.mark.parametrize("label", QUANTITIES)
def test_accuracies(label, table):
    name, items = QUANTITIES[label]
    found = table.quantities([record for record in RECORDS if record["group"] in COLUMNS])
    values = found.get(f"preference accuracy, {name}") or found[name]
    assert row(label) == {column: table.cell(values[column]) for column in COLUMNS}
    for record in RECORDS:
        if items and record["group"] in COLUMNS:
            sets = record["tasks"] if record["kind"] == "model" else record["change"]["accuracy"]["sum"]
            assert {n for key in ("n", "items") if (n := sets.get(name, {}).get(key))} <= {items}


def test_what_was_gained_on_what_was_trained_on():
    gains = {column: [r["change"]["accuracy"]["sum"]["social_iqa"] for r in runs(column)] for column in START}
    expected = {column: cell([gain["gain"] for gain in found], ".3f") for column, found in gains.items()}
    assert row("gained there") == dict.fromkeys(COLUMNS, "") | expected
    assert all(gain["low"] > 0 for found in gains.values() for gain in found)
    assert "in each of the nine runs the interval over questions excludes 0" in README.replace("\n", " ")


def test_perplexities():
    found = row("perplexity, 200 rows of Wikipedia, bf16, by the runs")
    rises = {column: [100 * (r["change"]["perplexity_ratio"] - 1) for r in runs(column)] for column in START}
    for column, start in START.items():
        assert {f"{r['before']['perplexity']:.2f}" for r in runs(column)} == {found[start]}
        assert found[column] == cell(rises[column], "+.1f", "%")
    worst = max(rise for values in rises.values() for rise in values)
    assert f"perplexity rises by {worst:.1f}% at most in these nine" in README.replace("\n", " ")
    found = row("perplexity, OpenWebText, float32")
    for column, start in START.items():
        (before,) = (model["perplexity"]["openwebtext-passages"]["perplexity"] for model in models(start))
        after = [model["perplexity"]["openwebtext-passages"]["perplexity"] for model in models(column)]
        assert found[start] == f"{before:.2f}"
        assert found[column] == cell([100 * (value / before - 1) for value in after], "+.1f", "%")


@pytest.mark.parametrize(
    ("label", "path", "form"),
    [
        ("mean abs s", ("mean_abs",), ".3f"),
        ("energy gain of the projections, fp32", ("energy", "fp32"), ".2f"),
    ],
)
def test_spikes_and_energy(label, path, form):
    def value(side):
        for key in path:
            side = side[key]
        return side

    expected = {column: cell([value(r["after"]) for r in runs(column)], form) for column in ("DPO", "KTO")}
    (student,) = {f"{value(r['before']):{form}}" for r in runs("DPO") + runs("KTO")}
    assert row(label) == {"student": student, "teacher": "", "teacher, DPO": ""} | expected


def test_what_was_chosen_is_the_table_of_its_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/rl"))
    choose = importlib.import_module("choose")
    records = read_records(ROOT / "docs/results/choice.jsonl")
    assert choose.choose(records, 0.05) == records
    assert all(is_clean(record["provenance"]["commit"]) for record in records)
    assert choose.table(records) in README
    for commit in {record["provenance"]["commit"][:7] for record in records}:
        assert commit in README
    seeds = {record["provenance"]["settings"]["seed"] for record in records if record["chosen"]}
    assert seeds == {0, 1, 2}


def test_the_run_on_two_processes_is_marked():
    (run,) = [record for record in RECORDS if record["group"] == "DPO, two processes"]
    gain = run["change"]["accuracy"]["sum"]["social_iqa"]
    said = f"{gain['gain']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f}) on {gain['items']} questions"
    assert f"{said} †." in README
    assert [r for r in RECORDS if not is_clean(r["provenance"]["commit"])] == [run]


def test_marked_columns(table):
    records = json.loads(json.dumps([record for record in RECORDS if record["group"] in COLUMNS]))
    assert table.MARK not in table.to_markdown(records)
    for record in records:
        if record["kind"] == "run" and (record["group"], record["seed"]) == ("KTO", 1):
            record["provenance"]["commit"] += "-dirty"
    header, *_, last = table.to_markdown(records).splitlines()
    columns = [column.strip() for column in header.strip("|").split("|")]
    assert columns[1:] == ["teacher", "student †", "DPO", "KTO †", "teacher, DPO"]
    assert last == "†: from code that differed from its commit, or had none."
