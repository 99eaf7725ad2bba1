"""What the results page says of students of the converted model, from records of score_student.py."""

import json
import re
from pathlib import Path

import pytest
import results
import students
from pydantic import ValidationError

from spiking_mamba.reports.document import to_markdown
from tests.helpers.commands import ROOT

CONFIG = str(ROOT / "weights/smollm2-mamba2")
MAIN = {
    "hellaswag": "acc_norm", "piqa": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "boolq": "acc",
    "winogrande": "acc",
}  # fmt: skip


def record(name, shift=0.0, commit="a" * 40, **others):
    tasks = {
        task: {"acc": 0.5 + shift, "acc_norm": 0.5 + shift} | {metric: 0.4 + shift + 0.01 * number}
        for number, (task, metric) in enumerate(MAIN.items())
    }
    about = {"commit": commit, "date": "2026-12-01T10:00:00+00:00", "hardware": {"device": "one H200"}}
    return {"name": name, "tasks": tasks, "perplexity_web": 40.0, "provenance": about} | others


def spiking(name, mean_abs, nonzero, **others):
    both = {"mean_abs": mean_abs, "nonzero": nonzero, "tokens": 10}
    return record(
        name,
        -0.02,
        neuron={"class": "neurons.SILIFNode", "args": {"max_spike_count": 127}},
        spikes={"text": both, "first": both, "both": both},
        kept={"share": 0.93, "low": 0.91, "high": 0.95},
        gap={"gap": 2.0, "low": 1.5, "high": 2.5},
        teacher_kl_web=0.1,
        teacher_agreement_web=0.8,
        progress={"tokens": 22_000_000},
        **others,
    )


@pytest.fixture
def about(tmp_path):
    records = [
        record("teacher"),
        spiking("s63", 1.05, 0.62),
        record("w8a8", -0.001, commit="b" * 40 + "-dirty"),
    ]
    path = tmp_path / "students.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return students.About(
        title="Students",
        text="Of a teacher.",
        records=str(path),
        config=CONFIG,
        labels={"teacher": "dense", "s63": "student, 63%", "s40": "student, 40%", "w8a8": "int8"},
        findings=["Kept {s63.kept:.1f} % at {s63.nonzero:.2f}.", "Left out: {s40.kept:.1f} %."],
    )


def test_numbers_are_those_of_the_records():
    student = students.Student(spiking("s63", 1.05, 0.62), CONFIG)
    measures = {name: measure(student) for name, measure in students.MEASURES.items()}
    assert measures["six"] == pytest.approx(100 * sum(0.38 + 0.01 * n for n in range(6)) / 6)
    assert measures["kept"] == pytest.approx(93)
    assert measures["tokens"] == 22
    # a multiplication and addition of fp32 takes 4.6 pJ at 45 nm, an addition 0.9
    assert measures["projections"] == pytest.approx(4.6 / 0.9 / 1.05)
    assert (
        1
        < measures["decoding"]
        < measures["whole_model"]
        < measures["with_neurons"]
        < measures["projections"]
    )
    dense = students.Student(record("teacher"), CONFIG)
    assert students.MEASURES["projections"](dense) is None
    assert students.MEASURES["int8"](dense) > 0
    # at int8 a multiplication and addition takes 0.3 pJ, an addition of 32 bits 0.1: a count of 1 is cheaper
    assert measures["int8"] < students.MEASURES["int8"](dense)


def test_the_section(about):
    text = to_markdown(students.section(about))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "2.00 \\[1.50, 2.50\\]" in rows["student, 63%"] or "4.87" in rows["student, 63%"]
    assert [name for name in rows if "int8 †" in name]
    assert not [name for name in rows if "40%" in name]
    assert "Kept 93.0 % at 0.62." in text
    assert "Left out" not in text
    assert "one H200, 2026-12-01; commit aaaaaaa, bbbbbbb" in text
    accuracy = next(line for line in text.splitlines() if line.startswith("| student, 63%"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", accuracy)[2:-1]]
    assert cells == ["40.50", "2.00 \\[1.50, 2.50\\]", "93.0 \\[91.0, 95.0\\]", "0.100", "80.0", "40.00"]


def test_without_records_there_is_no_section(about, tmp_path):
    about.records = str(tmp_path / "none.jsonl")
    assert students.section(about) == []


def test_what_is_no_measure_is_named(about):
    about.findings = ["{s63.keptt:.1f}"]
    with pytest.raises(ValueError, match=r"keptt.*kept"):
        students.section(about)
    about.findings = ["{s64.kept:.1f}"]
    with pytest.raises(ValueError, match="s64"):
        students.section(about)


def test_the_page_takes_it(about, tmp_path):
    fields = {name: getattr(about, name) for name in ("title", "text", "records", "config", "labels")}
    page = tmp_path / "results.md"
    table = ROOT / "recipes/ablate/tables/dense.yaml"
    settings = results.ResultsSettings(
        tables=[str(table)], page=str(page), results=str(tmp_path), students=fields
    )
    results.write(settings)
    assert "## Students" in page.read_text()
    with pytest.raises((ValidationError, ValueError, TypeError)):
        results.ResultsSettings(tables=[str(table)], students=fields | {"lables": {}})
    assert Path(page).is_file()
