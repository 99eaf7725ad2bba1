"""A student and its teacher optimised on preferences alike: what each gained, how far apart they lie then."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from students import Student

from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Name, Names, schema
from spiking_mamba.data.benchmarks import SOURCE_TASKS
from spiking_mamba.evaluation.statistics import paired_gap

__all__ = ["ALIGNED", "Alignment", "attach"]

# Of the table on the page, see ``students.MEASURES``.
ALIGNED = {
    "preferred, Social IQA": "{preferred:.3f}",
    "gained": "{gained:+.3f} [{gained.low:+.3f}, {gained.high:+.3f}]",
    "six sets, %": "{six:.2f}",
    "below the teacher so treated, points": "{behind:.2f} [{behind.low:.2f}, {behind.high:.2f}]",
    "there, without BoolQ": "{behind.five:.2f} [{behind.five.low:.2f}, {behind.five.high:.2f}]",
    "in ability, %": "{behind.ability:.1f} [{behind.ability.low:.1f}, {behind.ability.high:.1f}]",
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


@dataclass(frozen=True)
class Answered:
    """How long a model's answers are, in tokens, and how many were cut, in per cent."""

    answer: float
    cut: float
    change: Mapping[str, float]


def attach(students: Mapping[str, Student], alignment: Alignment, folder: Path) -> None:
    """Put under ``alignment`` of each record what is known of it; nothing of names that were not scored.

    Args:
        students: of ``students.of_file``.
        folder: of the items' outcomes.
    """
    answered = {
        r["model"]: Answered(float(np.mean(r["tokens"])), 100 - 100 * float(np.mean(r["ended"])), r["change"])
        for r in read_records(Path(alignment.answers))
    }
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in read_records(Path(alignment.runs)):
        runs[run["name"]].append(run)
    for names in (alignment.students, alignment.teachers):
        for name in names:
            if name in students:
                students[name].record["alignment"] = _facts(name, names, runs, answered)
    for one, other in zip(alignment.students, alignment.teachers, strict=True):
        if one in students and other in students:
            students[one].record["alignment"] |= _behind(students[one], students[other], folder)


def _facts(
    name: str, names: Sequence[str], runs: Mapping[str, Sequence[Any]], answered: Mapping[str, Answered]
) -> dict[str, Any]:
    """Of one model: the first run's accuracy, what it gained, and how long the last one's answers are."""
    before = name == names[0]
    made = [run for other in names[1:] for run in runs[other]] if before else runs[name]
    if not made:
        return {}
    first, last = made[0], made[-1]
    facts: dict[str, Any] = {
        "preferred": first["before" if before else "after"]["accuracy"]["sum"]["average"]
    }
    if not before:
        facts["gained"] = first["change"]["accuracy"]["sum"]["average"]
        facts["again"] = last["change"]["accuracy"]["sum"]["average"]["gain"]
    model = first["provenance"]["settings"]["model"] if before else last["model"]
    if model in answered:
        found = answered[model]
        facts |= {"answer": found.answer, "cut": found.cut}
        facts |= {} if before else {"longer": dict(found.change)}
    return facts


def _behind(student: Student, teacher: Student, folder: Path) -> dict[str, dict[str, float]]:
    """By how much the student lies below, with intervals over the same items.

    In points on the source's sets and on those without BoolQ, and in ability, in per cent of the teacher's
    before.
    """
    sides = [each.items(folder) for each in (teacher, student)]
    sets, whole = student.record["sets"], student.record["ability"] / student.record["kept"]["share"]
    found = {}
    for key, tasks, scale in (
        ("behind", SOURCE_TASKS, 1.0),
        ("behind_five", [task for task in SOURCE_TASKS if task != "boolq"], 1.0),
        ("behind_ability", sets, len(sets) / whole),
    ):
        gap = paired_gap(*({task: side[task] for task in tasks} for side in sides))
        found[key] = {end: 100 * scale * gap[end] for end in ("gap", "low", "high")}
    return found
