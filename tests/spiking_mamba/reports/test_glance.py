"""The first screen of an evaluation's report: its numbers are the results', and its picture what there is."""

import math
from statistics import fmean

import pytest

from spiking_mamba.reports.glance import first_picture, sentences
from spiking_mamba.reports.overview import energy_text
from tests.helpers.evaluations import evaluation_model, seeds

SMALL = {"items": 40, "layers": 1}


def test_a_student_against_its_teacher():
    models = seeds(1, **SMALL)
    teacher, student = models
    fields = {"neuron": "SILIFNode", "levels": 9}
    assert {key: student[key] for key in fields} == fields
    energy = student["energy"]
    gains = [energy["model"]["fp32"]["gain"], energy["with_memory"]["decode"]["fp32"]["gain"]]
    gains.append(energy["projections"]["int8"]["gain_over_quantised_sparse"])
    losses = [model["perplexity"]["wikipedia-leads"]["perplexity"] for model in (student, teacher)]
    assert sentences({"models": models}) == {
        "Measured": "teacher (dense), student-seed0 (SILIFNode, 9 levels), 129.0 million parameters each; "
        "on 7 zero-shot tasks (280 items) and wikipedia-leads and state-of-the-union.",
        "Keeps": f"against teacher, student scores {100 * student['average']:.2f} % where that scores "
        f"{100 * teacher['average']:.2f} % (average of the source's six tasks) and has a perplexity of "
        f"{losses[0]:.2f} against {losses[1]:.2f} on wikipedia-leads.",
        "Costs": "energy against its dense form's, estimated from counted operations (at 45 nm, fp32): "
        f"the whole model {gains[0]:.2f} times less; decoding, memory traffic included, {gains[1]:.2f} times "
        f"less; hypothetically at int8, projections against a network that skips zeros {gains[2]:.2f} times "
        "less.",
    }
    (panel,) = first_picture({"models": models})
    for text in (f"{losses[0]:.2f} against {losses[1]:.2f}", f"{gains[0]:.2f} times less"):
        assert text in panel.text


def test_what_costs_more_is_said_so():
    assert [energy_text(gain) for gain in (2.0, 0.5, 1.0, 1.0001, 0.9999)] == [
        "2.00 times less", "2.00 times more", "as much", "as much", "as much"
    ]  # fmt: skip
    assert [energy_text(gain) for gain in (None, math.nan, 0.0)] == ["not known"] * 3
    assert energy_text(math.inf) == "none at all"
    models = [evaluation_model("hot", rate=6.0, **SMALL)]
    gain = models[0]["energy"]["model"]["fp32"]["gain"]
    assert gain < 1
    assert f"the whole model {1 / gain:.2f} times more" in sentences({"models": models})["Costs"]


def test_without_a_reference_scores_are_held_against_chance():
    models = [evaluation_model("dense", spiking=False, tasks=("piqa", "sciq"), **SMALL)]
    said = sentences({"models": models})
    scores = [models[0]["tasks"][task]["metrics"]["acc"]["value"] for task in ("piqa", "sciq")]
    loss = models[0]["perplexity"]["wikipedia-leads"]["perplexity"]
    assert said["Keeps"] == (
        f"no model was named as a reference; dense scores {100 * fmean(scores):.2f} % where guessing scores "
        f"37.50 % (mean accuracy of 2 tasks) and has a perplexity of {loss:.2f} on wikipedia-leads."
    )
    assert said["Costs"].startswith("not asked: no model here spikes")
    (panel,) = first_picture({"models": models})
    assert panel.text == "Accuracy by task with standard errors, as in the table: piqa, sciq."


@pytest.mark.parametrize("number", [2, 6, 7])
def test_several_students(number):
    teacher, *_ = seeds(1, **SMALL)
    students = [evaluation_model(f"s{i}", rate=0.2 + 0.1 * i, **SMALL) for i in range(number)]
    results = {"models": [teacher, *students]}
    best = max(students, key=lambda model: model["average"])
    said = sentences(results)
    assert f"{best['name']}, the best of {number}, scores {100 * best['average']:.2f} %" in said["Keeps"]
    assert said["Costs"].startswith(f"{best['name']}, energy")
    (panel,) = first_picture(results)
    assert panel.text.startswith("Held against teacher" if number <= 6 else "Projections only, fp32 table")


def test_runs_of_one_group_are_averaged():
    models = seeds(2, **SMALL)
    mean = 100 * fmean(model["average"] for model in models[1:])
    assert f"student (mean of 2 runs) scores {mean:.2f} %" in sentences({"models": models})["Keeps"]


def test_numbers_that_are_not_there():
    """null, as an overflow is written, of everything that may be."""
    models = seeds(1, **SMALL)
    for model in models:
        model["average"] = None
        model["perplexity"]["wikipedia-leads"] |= dict.fromkeys(("perplexity", "bits_per_byte"))
        for task in model["tasks"].values():
            for metric in task["metrics"].values():
                metric |= {"value": None, "stderr": None}
    for section in (models[1]["energy"]["model"], models[1]["energy"]["projections"]):
        for row in section.values():
            row |= {"gain": None, "gain_over_quantised_sparse": None}
    said = sentences({"models": models})
    loss = models[1]["perplexity"]["state-of-the-union"]["perplexity"]
    assert f"student has a perplexity of {loss:.2f}" in said["Keeps"]
    assert "the whole model not known" in said["Costs"]
    (panel,) = first_picture({"models": models})
    for word in ("nan", "None", "inf"):
        assert word not in " ".join([*said.values(), panel.text]).replace(",", " ").split()
    models[1] |= {"perplexity": {}, "tasks": {}}
    assert "has no number that can be compared" in sentences({"models": models})["Keeps"]


def test_references_alone():
    models = seeds(1, **SMALL)[:1]
    assert sentences({"models": models})["Keeps"] == "not asked: all models here are references."
    assert len(first_picture({"models": models})) == 1
