"""Students side by side, of one evaluation and of several."""

import copy

import numpy as np

from spiking_mamba.evaluation.statistics import paired_gap
from spiking_mamba.reports.comparison import merged, side_by_side
from spiking_mamba.reports.document import Paragraph, Table
from spiking_mamba.reports.evaluation import write_evaluation_report
from tests.helpers.evaluations import evaluation_model, evaluation_results, seeds
from tests.helpers.pages import Page

SMALL = {"items": 50, "layers": 1, "tasks": ("piqa", "sciq")}


def rows_of(blocks):
    (table,) = (block for block in blocks if isinstance(block, Table))
    return {row[0]: list(row[1:]) for row in table.rows}


def test_two_students_and_their_difference():
    models = seeds(2, **SMALL)
    first, second = models[1:]
    second["spikes"]["mean_abs"] = 0.625
    rows = rows_of(side_by_side(models))
    items = [model["tasks"]["piqa"]["items"]["acc"] for model in (first, second)]
    gap = paired_gap({"piqa": items[0]}, {"piqa": items[1]})
    difference = 100 * (np.mean(items[1]) - np.mean(items[0]))
    values = [f"{100 * np.mean(scores):.2f}" for scores in items]
    interval = f"({-100 * gap['high']:+.2f} to {-100 * gap['low']:+.2f})"
    assert rows["piqa: acc %"] == [*values, f"{difference:+.2f} {interval}"]
    assert rows["mean |s|"] == ["0.500", "0.625", "+0.125"]
    losses = [model["perplexity"]["wikipedia-leads"]["perplexity"] for model in (first, second)]
    assert rows["wikipedia-leads: perplexity"][2] == f"{losses[1] - losses[0]:+.2f}"
    gain = second["energy"]["model"]["fp32"]["gain"]
    assert rows["energy against dense, whole model"][1] == f"{gain:.2f} times less"


def test_one_student_has_nobody_beside_it_and_three_have_no_difference():
    models = seeds(3, **SMALL)
    assert side_by_side(models[:2]) == []
    rows = rows_of(side_by_side(models))
    assert {len(cells) for cells in rows.values()} == {3}


def test_a_dense_model_beside_a_student():
    models = [evaluation_model("spiking", **SMALL), evaluation_model("dense", spiking=False, **SMALL)]
    rows = rows_of(side_by_side(models))
    assert rows["neuron"] == ["SILIFNode", "dense", ""]
    assert rows["mean |s|"] == ["0.500", "–", ""]
    assert rows["silent channels"] == ["6", "–", ""]
    assert rows["energy against dense, whole model"][1] == "–"


def test_other_items_are_not_compared_item_by_item():
    models = seeds(2, **SMALL)
    models[2]["tasks"]["piqa"]["data"]["sha256"] = "1" * 64
    blocks = side_by_side(models)
    assert rows_of(blocks)["piqa: acc %"][2] == "–"
    said = " ".join(block.text for block in blocks if isinstance(block, Paragraph))
    assert "not compared item by item" in said
    assert "other checksums" in said


def test_several_evaluations_as_one(tmp_path):
    one = evaluation_results(seeds(1, **SMALL), resamples=50)
    other = evaluation_results(seeds(1, rate=0.9, **SMALL), resamples=50)
    other["provenance"] = copy.deepcopy(other["provenance"])
    other["provenance"]["settings"]["limit"] = 50
    other["models"][0]["path"] = "elsewhere"
    before = copy.deepcopy((one, other))
    both = merged({"a": one, "b": other})
    assert (one, other) == before
    assert [model["name"] for model in both["models"]] == ["teacher", "student-seed0", "student-seed0 (b)"]
    assert list(both["groups"]) == ["teacher", "student", "student (b)"]
    assert {(gap["reference"], gap["model"]) for gap in both["gaps"]} == {
        ("teacher", "student-seed0"), ("teacher", "student-seed0 (b)")
    }  # fmt: skip
    (note,) = both["notes"]
    assert note.startswith("These evaluations differ in limit (a: None; b: 50)")

    write_evaluation_report(tmp_path, both)
    page = Page(tmp_path / "report.html")
    assert note in page.text
    assert page.titles.index("Side by side") < page.titles.index("Zero-shot accuracy")
    assert page.row("mean |s|")[1:] == ["0.500", "0.900", "+0.400"]
    commands = [row for table in page.tables for row in table if row[0].endswith(".command")]
    assert [row[0] for row in commands] == ["a.command", "b.command"]
