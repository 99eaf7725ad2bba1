"""What the results page says of preference optimisation, of a student and of its teacher."""

import json
import re
from pathlib import Path

import alignment
import numpy as np
import pytest
import results
import students
import students_section
from pydantic import ValidationError

from spiking_mamba.common.records import read_records
from spiking_mamba.evaluation.outcomes import write_outcomes
from spiking_mamba.reports.document import to_markdown
from tests.helpers.commands import ROOT
from tests.helpers.student_records import CONFIG, MAIN, record, spiking

RECORDS = ROOT / "docs/results/smollm2"
KNOWN = {"sets": ["piqa", "sciq"], "ability": 0.72, "kept": {"share": 0.9, "low": 0.8, "high": 1.0}}


def run(name, gained, start, model, before=0.5):
    def accuracy(value):
        return {"accuracy": {"sum": {"average": value}}}

    change = {"gain": gained, "low": gained - 0.01, "high": gained + 0.01}
    about = {"settings": {"model": start}}
    return {"name": name, "model": model, "before": accuracy(before), "after": accuracy(before + gained),
            "change": accuracy(change), "provenance": about}  # fmt: skip


@pytest.fixture
def about(tmp_path):
    """Four models, what is right of each by chance; two runs of the student's, one of the teacher's."""
    random = np.random.default_rng(0)
    chances = {"teacher": 0.6, "student": 0.5, "teacher-dpo": 0.8, "student-dpo": 0.7}
    right = {}
    for name, chance in chances.items():
        right[name] = {
            task: {metric: random.random(300) < chance for metric in ("acc", "acc_norm")}
            for task in (*MAIN, "sciq")
        }
        write_outcomes(tmp_path / f"{name}.npz", right[name])
    made = {"model": "runs/dpo/model", "reference_kl_web": 0.25}
    records = [
        record("teacher", **KNOWN),
        spiking("student", 1.05, 0.62) | KNOWN | {"model": "student/model"},
        record("teacher-dpo", **KNOWN) | made,
        spiking("student-dpo", 1.1, 0.63) | KNOWN | made,
    ]
    runs = [
        run("student-dpo", 0.09, "weights/student", "runs/dpo/model"),
        run("student-dpo", 0.07, "weights/student", "runs/dpo/model"),  # again
        run("teacher-dpo", 0.11, "weights/teacher", "runs/dense-dpo/model", before=0.51),
    ]
    longer = {"gap": 4.0, "low": -1.0, "high": 9.0}
    answers = [
        {"model": "weights/student", "tokens": [2, 4], "ended": [True, True], "change": longer},
        {"model": "runs/dpo/model", "tokens": [6, 8], "ended": [True, False], "change": longer},
    ]
    for name, lines in (("students", records), ("runs", runs), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = students_section.About(
        title="Students",
        text="",
        records=str(tmp_path / "students.jsonl"),
        config=CONFIG,
        labels={name: name for name in chances},
        alignment={
            "runs": str(tmp_path / "runs.jsonl"),
            "answers": str(tmp_path / "answers.jsonl"),
            "students": ["student", "student-dpo"],
            "teachers": ["teacher", "teacher-dpo"],
        },
    )
    return found, right


def test_each_side_is_held_against_the_other_treated_alike(about):
    found, right = about
    known = found.scored()
    for student, teacher in (("student", "teacher"), ("student-dpo", "teacher-dpo")):
        below = {
            task: 100 * (right[teacher][task][m].mean() - right[student][task][m].mean())
            for task, m in (MAIN | {"sciq": "acc"}).items()
        }
        assert students.measure(known[student], "behind") == pytest.approx(np.mean([below[t] for t in MAIN]))
        five = np.mean([below[t] for t in MAIN if t != "boolq"])
        assert students.measure(known[student], "behind.five") == pytest.approx(five)
        ability = (below["piqa"] + below["sciq"]) / 0.8  # of a teacher that has 0.72 / 0.9
        assert students.measure(known[student], "behind.ability") == pytest.approx(ability)
        assert students.measure(known[student], "behind.low") < students.measure(known[student], "behind")
        assert students.measure(known[teacher], "behind") is None


def test_how_much_wider_the_gap_has_become_is_over_the_same_items(about):
    found, right = about
    known = found.scored()
    assert students.measure(known["student"], "wider") is None
    gaps = [students.measure(known[name], "behind") for name in ("student", "student-dpo")]
    wider = students.measure(known["student-dpo"], "wider")
    assert wider == pytest.approx(gaps[1] - gaps[0])
    random = np.random.default_rng(1)
    draws = []
    for _ in range(1000):  # items by themselves, all four models on the same
        change = 0.0
        for task, metric in MAIN.items():
            drawn = random.integers(300, size=300)
            each = {name: right[name][task][metric][drawn].mean() for name in right}
            change += each["teacher-dpo"] - each["student-dpo"] - each["teacher"] + each["student"]
        draws.append(100 * change / len(MAIN))
    ends = [students.measure(known["student-dpo"], f"wider.{end}") for end in ("low", "high")]
    assert ends == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.5)


def test_without_the_teacher_as_it_was_nothing_is_wider(about):
    found, _ = about
    path = Path(found.records)
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["name"] != "teacher"]
    path.write_text("\n".join(lines) + "\n")
    found.alignment["students"].append("student-dpo")  # a third, behind what is then the first
    found.alignment["teachers"].append("teacher-dpo")
    known = found.scored()
    assert students.measure(known["student-dpo"], "behind") is not None
    assert students.measure(known["student-dpo"], "wider") is None


def test_the_first_run_was_scored_and_the_last_one_answered(about):
    known = about[0].scored()
    wanted = {
        "student": {"preferred": 0.5, "gained": None, "answer": 3.0, "cut": 0.0, "longer": None},
        "student-dpo": {"preferred": 0.59, "gained": 0.09, "gained.again": 0.07, "answer": 7.0, "cut": 50.0,
                        "longer": 4.0, "moved": 0.25},
        "teacher": {"preferred": 0.51, "gained": None, "answer": None},
        "teacher-dpo": {"preferred": 0.62, "gained": 0.11, "gained.low": 0.1, "answer": None},
    }  # fmt: skip
    for name, numbers in wanted.items():
        got = {key: students.measure(known[name], key) for key in numbers}
        assert got == pytest.approx(numbers), name


def test_what_was_optimised_no_longer_has_the_bits_that_it_was_packed_in(about):
    known = about[0].scored()
    for name in ("student-dpo", "teacher-dpo"):
        assert students.measure(known[name], "megabytes") is None
        assert students.measure(known[name], "int8_decoding") is None
    assert students.measure(known["student"], "megabytes") > 0
    assert students.measure(known["student-dpo"], "megabytes_int8") > 0


def test_the_table(about):
    text = to_markdown(students_section.section(about[0]))
    (line,) = re.findall(r"^\| student-dpo +\| +0\.590.*$", text, flags=re.MULTILINE)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    header = next(row for row in text.splitlines() if "preferred, Social IQA" in row)
    columns = dict(zip([cell.strip() for cell in header.strip("|").split("|")], cells, strict=True))
    assert columns["gained"] == r"+0.090 \[+0.080, +0.100\]"
    assert columns["tokens of an answer"] == "7.0"
    assert columns["cut, %"] == "50"


def test_names_go_in_pairs():
    with pytest.raises((ValidationError, ValueError), match="as many names"):
        alignment.Alignment(runs="a", answers="b", students=["s", "s-dpo"], teachers=["t"])


def test_measured_joules_are_of_the_way_that_is_named(about, tmp_path):
    found, _ = about
    ways = [("dense bf16", 1, 200.0), ("event-driven, as trained", 1, 80.0), ("dense bf16", 8, 20.0)]
    lines = [
        {"size": "s", "batch": b, "way": w, "seconds": 5e-4, "mJ": e, "mJ_net": e / 2} for w, b, e in ways
    ]
    path = tmp_path / "gpu.jsonl"
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, lines[0] | {"size": "other", "mJ": 1}])
    )
    found.decoded, found.size = str(path), "s"
    found.ways = {"teacher": "dense bf16", "student": "event-driven, as trained", "student-dpo": "dense int8"}
    known = found.scored()
    got = {
        name: [students.measure(known[name], key) for key in ("mJ", "mJ_net", "ms")] for name in found.ways
    }
    assert got == {"teacher": [200.0, 100.0, 0.5], "student": [80.0, 40.0, 0.5], "student-dpo": [None] * 3}


def cells_of_the_readme(label):
    text = (ROOT / "recipes/rl/README.md").read_text()
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", text, flags=re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize(
    ("label", "form"),
    [
        ("preference accuracy, Social IQA, half to report on", "{preferred:.3f}"),
        ("six zero-shot sets, %", "{six:.1f}"),
        ("student below the teacher so treated, points", "{behind:.2f}"),
        ("in ability, % of the teacher's before", "{behind.ability:.1f}"),
        ("KL from before on web text, nats", "{moved:.3f}"),
        ("perplexity there", "{perplexity:.1f}"),
        ("mean abs s on the sets' text", "{mean_abs.text:.3f}"),
        ("tokens of an answer, cut at 128 (second runs, but of the student's KTO)", "{answer:.1f}"),
    ],
)
def test_the_readme_s_table_is_that_of_the_records(label, form, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = results.parse_settings(results.ResultsSettings, ["recipes/ablate/results.yaml"])
    shipped = students_section.About(**settings.students)
    known, where = shipped.scored(), shipped.aligned
    names = [*where.students, *where.teachers]
    wanted = [students_section.fill(form, lambda m, n=n: students.measure(known[n], m)) or "" for n in names]
    assert cells_of_the_readme(label) == wanted


def test_no_question_was_both_trained_on_and_reported():
    runs = read_records(RECORDS / "alignment.jsonl")
    assert {run["name"] for run in runs} == {"spiking-dpo", "spiking-kto", "dense-dpo", "dense-kto"}
    for found in runs:
        assert found["rows"]["overlap"] == {"social_iqa": 0}
        assert found["held_out"]["half"] == "report"
        assert not found["provenance"]["commit"].endswith("dirty")
