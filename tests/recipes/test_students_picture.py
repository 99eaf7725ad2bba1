"""Pictures of what students keep, against what they cost."""

from pathlib import Path

import pytest
import results
import students
import students_picture
import students_section

from tests.helpers.commands import ROOT
from tests.helpers.student_records import CONFIG, about_records


@pytest.fixture
def about(tmp_path):
    return about_records(tmp_path)


def test_the_picture_has_a_mark_for_what_has_a_cost_and_a_worth(about, tmp_path):
    about.drawn = {"teacher": "dense", "s63": "spiking", "w8a8": "W8A8", "s40": "not scored"}
    found = students.of_file(Path(about.records), CONFIG)
    drawn = [(label, found[name]) for name, label in about.drawn.items() if name in found]
    marks = students_picture.marks(drawn, "megabytes", "six")
    assert [(mark.label, mark.spiking) for mark in marks] == [
        ("dense", False),
        ("spiking", True),
        ("W8A8", False),
    ]
    assert [mark.worth for mark in marks] == [students.measure(each, "six") for _, each in drawn]
    assert {(mark.below, mark.above) for mark in marks} == {(0, 0)}  # there is no interval of it
    assert [mark.label for mark in students_picture.marks(drawn, "int8", "six")] == ["spiking", "W8A8"]
    (mark,) = students_picture.marks(drawn, "megabytes", "kept")  # of the others it was not asked
    assert (mark.worth, mark.below, mark.above) == pytest.approx((93, 2, 2))
    assert students_picture.draw_students(tmp_path / "students.png", about, ["kept", "six"])
    about.drawn = {"teacher": "dense"}
    assert not students_picture.draw_students(tmp_path / "none.png", about)
    assert [path.name for path in tmp_path.glob("*.png")] == ["students.png"]


def test_names_in_a_panel_do_not_cover_one_another():
    from matplotlib.figure import Figure

    place = {"below": 0, "above": 0}
    marks = [
        students_picture.Mark(at, worth, **place, label=f"a model {number}", spiking=bool(number % 2))
        for number, (at, worth) in enumerate([(50, 90), (51, 90.1), (52, 90), (95, 90), (97, 90.2), (96, 80)])
    ]
    figure = Figure(figsize=(4.1, 4.2))
    axes = figure.subplots()
    students_picture._panel(axes, marks)
    figure.canvas.draw()
    students_picture._label(axes, marks)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == [f"a model {number}" for number in range(6)]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_the_shipped_picture_is_of_its_records(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    settings = results.parse_settings(results.ResultsSettings, ["recipes/ablate/results.yaml"])
    about = students_section.About(**settings.students)
    for name, worths in (("students", ["kept"]), ("students_texts", ["six", "kl", "perplexity"])):
        assert students_picture.draw_students(tmp_path / f"{name}.png", about, worths)
        assert (tmp_path / f"{name}.png").read_bytes() == Path(f"docs/{name}.png").read_bytes()
