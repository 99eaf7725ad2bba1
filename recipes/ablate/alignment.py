"""A student and its teacher optimised on preferences alike: what each gained, how far apart they lie then."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from students import Items, Student, points_apart

from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Name, Names, schema
from spiking_mamba.data.benchmarks import SOURCE_TASKS

__all__ = ["ALIGNED", "Alignment", "attach"]

# Of the table on the page, see ``students.MEASURES``.
ALIGNED = {
    "preferred, Social IQA": "{preferred:.3f}",
    "gained": "{gained:+.3f} [{gained.low:+.3f}, {gained.high:+.3f}]",
    "six sets, %": "{six:.2f}",
    "below the teacher so treated, points": "{behind:.2f} [{behind.low:.2f}, {behind.high:.2f}]",
    "there, without BoolQ": "{behind.five:.2f} [{behind.five.low:.2f}, {behind.five.high:.2f}]",
    "more than before": "{wider:+.2f} [{wider.low:+.2f}, {wider.high:+.2f}]",
    "in ability, %": "{behind.ability:.1f} [{behind.ability.low:.1f}, {behind.ability.high:.1f}]",
    "more in ability": "{wider.ability:+.1f} [{wider.ability.low:+.1f}, {wider.ability.high:+.1f}]",
    "ability, % of the teacher's before": "{kept:.1f} [{kept.low:.1f}, {kept.high:.1f}]",
    "KL from before, web": "{moved:.3f}",
    "perplexity, web": "{perplexity:.2f}",
    "mean abs s, text": "{mean_abs.text:.3f}",
    "non-zero, text": "{nonzero.text:.3f}",
    "tokens of an answer": "{answer:.1f}",
    "cut, %": "{cut:.0f}",
}


@schema
class Alignment:
    """Where the records of ``recipes/rl`` are, and of whom; every field is a key of ``results.yaml``.

    Attributes:
        runs: file of what ``align.py`` has measured, a line a run; of a name the first was scored.
        answers: file of what ``answers.py`` has, of the last.
        students: names of the student as it was and of what each method made of it.
        teachers: the same of its teacher, in the same order.
    """

    runs: Name
    answers: Name
    students: Names
    teachers: Names

    def __post_init__(self) -> None:
        if len(self.students) != len(self.teachers) or len(self.students) < 2:
            raise ValueError("students and teachers must be as many names, two at least.")

    @property
    def optimised(self) -> tuple[str, ...]:
        """Names of all that is not as it was."""
        return (*self.students[1:], *self.teachers[1:])


def attach(students: Mapping[str, Student], alignment: Alignment, folder: Path) -> None:
    """Put under ``alignment`` of each record what is known of it; nothing of names that were not scored.

    Args:
        students: of ``students.of_file``.
        alignment: whose runs and answers, and where they are.
        folder: of the items' outcomes.
    """
    answers = {record["model"]: record for record in read_records(Path(alignment.answers))}
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in read_records(Path(alignment.runs)):
        runs[run["name"]].append(run)
    for names in (alignment.students, alignment.teachers):
        for name in names:
            if name in students:
                students[name].record["alignment"] = _facts(name, names, runs, answers)
    before = None  # unless the two were scored as they were
    for one, other in zip(alignment.students, alignment.teachers, strict=True):
        if one in students and other in students:
            apart = _apart(students[one], students[other], folder)
            students[one].record["alignment"] |= _behind(students[one], apart, before)
            if one == alignment.students[0]:
                before = apart


def _facts(
    name: str, names: Sequence[str], runs: Mapping[str, Sequence[Any]], answers: Mapping[str, Any]
) -> dict[str, Any]:
    """Of one model: the first run's accuracy, what it gained, and how long the last one's answers are."""
    before = name == names[0]
    made = [run for other in names[1:] for run in runs[other]] if before else runs[name]
    if not made:
        return {}
    first, last = made[0], made[-1]
    then = first["before" if before else "after"]
    facts: dict[str, Any] = {"preferred": then["accuracy"]["sum"]["average"]}
    if then.get("mean_abs") is not None:
        facts |= {"mean_abs": then["mean_abs"], "gain": then["energy"]["fp32"]}
    if not before:
        facts["gained"] = first["change"]["accuracy"]["sum"]["average"]
        facts["again"] = last["change"]["accuracy"]["sum"]["average"]["gain"]
    model = first["provenance"]["settings"]["model"] if before else last["model"]
    if (found := answers.get(model)) is not None:
        facts |= {
            "answer": float(np.mean(found["tokens"])),
            "cut": 100 - 100 * float(np.mean(found["ended"])),
        }
        facts |= {} if before else {"longer": found["change"]}
    return facts


def _apart(student: Student, teacher: Student, folder: Path) -> Items:
    """Of every item, by how much the teacher's outcome is better."""
    sides = [each.items(folder) for each in (teacher, student)]
    return {task: np.subtract(right, sides[1][task]).tolist() for task, right in sides[0].items()}


def _behind(student: Student, apart: Items, before: Items | None) -> dict[str, dict[str, float]]:
    """By how much the student lies below, and how much more that is than before, over the same items.

    In points on the source's sets and on those without BoolQ, and in ability, in per cent of the teacher's
    before.
    """
    nothing = {task: [0.0] * len(items) for task, items in apart.items()}
    found = {}
    for key, tasks, scale in (
        ("", SOURCE_TASKS, 1.0),
        ("_five", [task for task in SOURCE_TASKS if task != "boolq"], 1.0),
        ("_ability", student.record["sets"], student.ability_scale),
    ):
        found[f"behind{key}"] = points_apart(apart, nothing, tasks, scale)
        if before is not None:
            found[f"wider{key}"] = points_apart(apart, before, tasks, scale)
    return found
