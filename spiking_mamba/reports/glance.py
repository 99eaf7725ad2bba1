"""The first screen of an evaluation's report: three sentences and a picture."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from spiking_mamba.reports.charts import Model, accuracies, accuracy_energy_panels, task_panels
from spiking_mamba.reports.costs import drawn_tables, is_hypothetical
from spiking_mamba.reports.figures import Panel, short
from spiking_mamba.reports.overview import MOST, Quantity, energy_in, energy_text, overview
from spiking_mamba.spikes.energy import COSTS_45NM

__all__ = ["RIVAL", "first_picture", "plural", "sentences", "students_of"]

# what spikes cost, by where an evaluation's energy has it: in a picture, and in a sentence
_SCOPES = {
    "projections_with_neurons": ("energy: projections with neurons", "projections with their neurons"),
    "model": ("energy: whole model", "the whole model"),
    "decode": ("energy: decoding, with memory", "decoding, memory traffic included,"),
}
RIVAL = "over quantised int8, zeros skipped*"  # both at int8, for which no accuracy was measured


class Student(NamedTuple):
    """The models of a group that is not the reference's; numbers are means over its runs.

    Attributes:
        name: of the group.
        runs: how many they are.
        accuracy: in per cent, see :func:`spiking_mamba.reports.charts.accuracies`.
        perplexity: by text.
        gains: over the dense model, by table of costs and scope; ``None`` where it is not known.
        rival: projections over those of a quantised network that skips zeros, both int8.
    """

    name: str
    runs: int
    accuracy: float | None
    perplexity: Mapping[str, float]
    gains: Mapping[str, Mapping[str, float | None]]
    rival: float | None


def plural(count: int, noun: str) -> str:
    """The number and the noun."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def students_of(models: Sequence[Model]) -> tuple[list[Student], Student | None, str]:
    """The students, what the references have, and what the accuracy is."""
    values, label = accuracies(models)
    by_model = dict(zip(map(id, models), values, strict=False))
    groups: dict[tuple[bool, str], list[Model]] = {}
    for model in models:
        groups.setdefault((bool(model["reference"]), model["group"]), []).append(model)
    tables = drawn_tables(models)
    found = {key: _student(key[1], rows, by_model, tables) for key, rows in groups.items()}
    references = [student for (is_reference, _), student in found.items() if is_reference]
    students = [student for (is_reference, _), student in found.items() if not is_reference]
    return students, references[0] if references else None, label.removesuffix(", %")


def _student(
    name: str, rows: Sequence[Model], accuracy: Mapping[int, float], tables: Sequence[str]
) -> Student:
    losses = [
        {text: found["perplexity"] for text, found in (model["perplexity"] or {}).items()} for model in rows
    ]
    texts = [text for text in losses[0] if all(row.get(text) is not None for row in losses)]
    energies = [model["energy"] for model in rows if model["energy"]]
    gains: dict[str, dict[str, float | None]] = {}
    for table in tables if energies else ():
        for scope in _SCOPES:
            found = [energy_in(energy, scope) for energy in energies]
            if all(table in row for row in found):
                gains.setdefault(table, {})[scope] = _mean([row[table].get("gain") for row in found])
    rivals = [_rival(energy) for energy in energies]
    return Student(
        name,
        len(rows),
        _mean([accuracy.get(id(model)) for model in rows]),
        {text: fmean(row[text] for row in losses) for text in texts},
        gains,
        _mean(rivals) if rivals else None,
    )


def _rival(energy: Mapping[str, Any]) -> float | None:
    table = energy["projections"].get("int8") or {}
    return table.get("gain_over_quantised_sparse")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def sentences(results: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, what it keeps and of what, and what it costs."""
    models = results["models"]
    students, reference, label = students_of(models)
    return {
        "Measured": _measured(models),
        "Keeps": _kept(models, students, reference, label),
        "Costs": _cost(students),
    }


def _measured(models: Sequence[Model]) -> str:
    tasks: dict[str, int] = {}
    for model in models:
        tasks |= {task: result["n"] for task, result in model["tasks"].items()}
    texts = list(dict.fromkeys(text for model in models for text in model["perplexity"] or {}))
    names = [f"{model['name']} ({_kind(model)})" for model in models]
    who = ", ".join(names) if len(names) <= 3 else f"{len(names)} models"
    sizes = {f"{model['parameters'] / 1e6:.1f} million parameters" for model in models}
    if len(sizes) == 1:
        who += f", {sizes.pop()}" + (" each" if len(models) > 1 else "")
    parts = []
    if tasks:
        parts.append(f"{plural(len(tasks), 'zero-shot task')} ({sum(tasks.values()):,} items)")
    if texts:
        parts.append(f"{plural(len(texts), 'text')}" if len(texts) > 2 else " and ".join(texts))
    return f"{who}; on {' and '.join(parts) or 'nothing'}."


def _kind(model: Model) -> str:
    return f"{model['neuron']}, {model['levels']} levels" if model["neuron"] else "dense"


def _kept(models: Sequence[Model], students: Sequence[Student], reference: Student | None, label: str) -> str:
    if not students:
        return "not asked: all models here are references."
    best = _closest(students)
    who = _runs(best) if len(students) == 1 else f"{_runs(best)}, the best of {len(students)},"
    said = []
    if best.accuracy is not None:
        base = None if reference is None else reference.accuracy
        held = f" where that scores {base:.2f} %" if base is not None else ""
        guessing = _chance(models) if reference is None else None
        held += "" if guessing is None else f" where guessing scores {guessing:.2f} %"
        said.append(f"scores {best.accuracy:.2f} %{held} ({label})")
    for text, value in list(best.perplexity.items())[:1]:
        base = None if reference is None else reference.perplexity.get(text)
        held = "" if base is None else f" against {base:.2f}"
        said.append(f"has a perplexity of {value:.2f}{held} on {text}")
    against = "no model was named as a reference;" if reference is None else f"against {reference.name},"
    return f"{against} {who} {' and '.join(said) or 'has no number that can be compared'}."


def _closest(students: Sequence[Student]) -> Student:
    """By accuracy; where it is not known or the same, by the first text's perplexity."""
    return max(students, key=lambda s: (_sortable(s.accuracy), *(-_sortable(p) for p in _first(s))))


def _first(student: Student) -> list[float]:
    return list(student.perplexity.values())[:1]


def _sortable(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def _runs(student: Student) -> str:
    return student.name + (f" (mean of {student.runs} runs)" if student.runs > 1 else "")


def _chance(models: Sequence[Model]) -> float | None:
    """Of the tasks that :func:`accuracies` averages, in per cent."""
    from spiking_mamba.evaluation.statistics import SOURCE_TASKS

    whole = all(model.get("average") is not None for model in models)
    shared = [task for task in models[0]["tasks"] if all(task in model["tasks"] for model in models)]
    found = [models[0]["tasks"][task]["chance"] for task in (SOURCE_TASKS if whole else shared)]
    return 100 * fmean(found) if found and None not in found else None


def _cost(students: Sequence[Student]) -> str:
    spiking = [student for student in students if student.gains]
    if not spiking:
        return "not asked: no model here spikes, so that there is no energy to compare."
    student = _closest(spiking)
    table, gains = next(iter(student.gains.items()))
    said = [f"{_SCOPES[scope][1]} {energy_text(gain)}" for scope, gain in gains.items()]
    if student.rival is not None:
        rival = "hypothetically at int8, projections against a network that skips zeros"
        said.append(f"{rival} {energy_text(student.rival)}")
    whose = f"{_runs(student)}, " if len(students) > 1 else ""
    costs = f"at 45 nm, {table}" if table in COSTS_45NM else f"table {table}"
    how = f"energy against its dense form's, estimated from counted operations ({costs})"
    return f"{whose}{how}: {'; '.join(said)}."


def first_picture(results: Mapping[str, Any]) -> list[Panel]:
    """What the first screen shows: the overview, or what there is of many students or of dense models."""
    models = results["models"]
    students, reference, label = students_of(models)
    if len(students) > MOST:
        return accuracy_energy_panels(models)[:1] or task_panels(models)
    quantities = _quantities(models, students, reference, label)
    against = "the dense model" if reference is None else reference.name
    return overview(quantities, [student.name for student in students], against) or task_panels(models)


def _quantities(
    models: Sequence[Model], students: Sequence[Student], reference: Student | None, label: str
) -> list[Quantity]:
    quantities = []
    if reference is not None and students:
        if (best := reference.accuracy) and all(student.accuracy is not None for student in students):
            found = [student.accuracy or 0.0 for student in students]
            texts = [f"{value:.2f} % against {best:.2f} %" for value in found]
            quantities.append(Quantity(label, [value / best for value in found], texts))
        for text, base in reference.perplexity.items():
            values = [student.perplexity.get(text) for student in students]
            texts = ["–" if value is None else f"{value:.2f} against {base:.2f}" for value in values]
            ratios = [None if value is None else value / base for value in values]
            quantities.append(Quantity(f"perplexity, {text}", ratios, texts))
    tables = list(dict.fromkeys(table for student in students for table in student.gains))
    for table, (scope, (name, _)) in product(tables, _SCOPES.items()):
        gains = [student.gains.get(table, {}).get(scope) for student in students]
        if any(gain is not None for gain in gains):
            ratios = [None if not gain else 1 / gain for gain in gains]
            label = name if len(tables) == 1 else f"{name.removeprefix('energy: ')}, {short(table, 12)}"
            label += "*" if is_hypothetical(models, table) else ""
            quantities.append(Quantity(label, ratios, [energy_text(gain) for gain in gains], cost=True))
    rivals = [student.rival for student in students]
    if any(rivals):
        texts = [energy_text(gain) for gain in rivals]
        quantities.append(Quantity(RIVAL, [gain and 1 / gain for gain in rivals], texts, cost=True))
    return quantities
