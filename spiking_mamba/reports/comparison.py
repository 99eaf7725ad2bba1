"""Students side by side: a column each, and of two the difference with its interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spiking_mamba.evaluation.statistics import gaps, groups
from spiking_mamba.reports.charts import Model
from spiking_mamba.reports.document import Block, Heading, Paragraph, Table
from spiking_mamba.reports.energy import number, shared_tasks
from spiking_mamba.reports.overview import energy_in, energy_text

__all__ = ["merged", "side_by_side"]

_COMPARED = ("tasks", "corpora", "limit", "limit_seed", "length", "data", "dtype")  # settings


def side_by_side(models: Sequence[Model]) -> list[Block]:
    """A table of all that is no reference; nothing where that is one model."""
    students = [model for model in models if not model["reference"]]
    if len(students) < 2:
        return []
    paired, why_not = _paired(students) if len(students) == 2 else ({}, "")
    rows = [
        *_about(students),
        *_accuracy(students, paired),
        *_perplexity(students),
        *_spikes(students),
        *_energy(students),
    ]
    header = ["", *(model["name"] for model in students)]
    if len(students) == 2:
        header.append("second less first")
    else:
        rows = [row[:-1] for row in rows]
    blocks: list[Block] = [Heading("Side by side"), Table(header, rows)]
    if paired:
        note = (
            "Accuracies differ by points, with 95 % intervals by bootstrap: items that both answered are "
            "resampled together. An interval that holds 0 is no evidence of a difference."
        )
        blocks.append(Paragraph(note))
    if why_not:
        blocks.append(Paragraph(f"Accuracies were not compared item by item. {why_not}"))
    return blocks


def _paired(students: Sequence[Model]) -> tuple[dict[str, Mapping[str, Any]], str]:
    """The gap of the second to the first by task, or why there is none."""
    first, second = students
    try:
        rows = gaps([{**first, "reference": True}, {**second, "reference": False}])
    except ValueError as error:
        return {}, str(error)
    return {row["task"]: row for row in rows}, ""


def _about(students: Sequence[Model]) -> list[list[str]]:
    rows = [
        ["neuron", *(model["neuron"] or "dense" for model in students), ""],
        ["levels", *("–" if m["levels"] is None else str(m["levels"]) for m in students), ""],
    ]
    sizes = [model["parameters"] for model in students]
    return [*rows, ["parameters", *(f"{size:,}" for size in sizes), _difference(sizes, 0)]]


def _accuracy(students: Sequence[Model], paired: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    def difference(task: str) -> str:
        if (gap := paired.get(task)) is None:
            return "–"
        middle, low, high = (0.0 - 100 * gap[key] for key in ("gap", "high", "low"))  # no minus zero
        return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"

    rows = []
    if any(model["average"] is not None for model in students):
        values = [number(model["average"], 2, 100) for model in students]
        rows.append(["average of the source's six tasks, %", *values, difference("average")])
    for task in shared_tasks(students):
        found = [model["tasks"].get(task) for model in students]
        values = [number(f and f["metrics"][f["main"]]["value"], 2, 100) for f in found]
        if any(value != "–" for value in values):
            main = next(f["main"] for f in found if f)
            if main.startswith("acc"):
                rows.append([f"{task}: {main} %", *values, difference(task)])
    return rows


def _perplexity(students: Sequence[Model]) -> list[list[str]]:
    rows = []
    for text in dict.fromkeys(text for model in students for text in model["perplexity"] or {}):
        found = [(model["perplexity"] or {}).get(text) or {} for model in students]
        values = [f.get("perplexity") for f in found]
        rows.append([f"{text}: perplexity", *(number(v) for v in values), _difference(values)])
        for key, name, digits, factor in (
            ("kl", "KL to the reference, nats per token", 4, 1.0),
            ("top1_agreement", "same likeliest token as the reference, %", 1, 100.0),
        ):
            values = [(f.get("compared") or {}).get(key) for f in found]
            if any(value is not None for value in values):
                cells = [number(value, digits, factor) for value in values]
                rows.append([f"{text}: {name}", *cells, _difference(values, digits, factor)])
    return rows


def _spikes(students: Sequence[Model]) -> list[list[str]]:
    if not any(model["spikes"] for model in students):
        return []
    rows = []
    for key, name, digits, factor in (
        ("mean_abs", "mean |s|", 3, 1.0),
        ("nonzero_share", "non-zero %", 1, 100.0),
    ):
        values = [(model["spikes"] or {}).get(key) for model in students]
        rows.append([name, *(number(v, digits, factor) for v in values), _difference(values, digits, factor)])
    projections = [(model["spikes"] or {}).get("projections") for model in students]
    silent = [
        None if rows_of is None else sum(row["silent_channels"] or 0 for row in rows_of.values())
        for rows_of in projections
    ]
    return [*rows, ["silent channels", *(number(v, 0) for v in silent), _difference(silent, 0)]]


def _energy(students: Sequence[Model]) -> list[list[str]]:
    rows = []
    for scope, name in (
        ("projections_with_neurons", "projections with their neurons"),
        ("projections", "projections alone"),
        ("model", "whole model"),
        ("decode", "decoding, memory included"),
    ):
        found = []
        for model in students:
            section = energy_in(model["energy"] or {}, scope)
            found.append(section.get("fp32") and section["fp32"].get("gain"))
        if any(gain is not None for gain in found):
            cells = ["–" if gain is None else energy_text(gain) for gain in found]
            rows.append([f"energy against dense, {name}", *cells, ""])
    return rows


def _difference(values: Sequence[float | None], digits: int = 2, factor: float = 1.0) -> str:
    """Of two; nothing of more, or where one is not known."""
    if len(values) != 2 or not all(value is not None and math.isfinite(value) for value in values):
        return ""
    first, second = values
    return f"{factor * (second - first):+,.{digits}f}"  # type: ignore[operator]


def merged(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Several evaluations' results as those of one, for a report of all their models.

    A model that two have measured alike, such as the same teacher, is there once; where only names are the
    same, the evaluation's is added.

    Args:
        evaluations: results by the evaluation's name.
    """
    models: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for run, results in evaluations.items():
        taken = {model["group"] for model in models}
        names: dict[str, str] = {}
        for model in results["models"]:
            known = next((other for other in models if _alike(model, other)), None)
            if known is None:
                known = dict(model)
                if model["name"] in {other["name"] for other in models}:
                    known["name"] = f"{model['name']} ({run})"
                if model["group"] in taken:
                    known["group"] = f"{model['group']} ({run})"
                models.append(known)
            names[model["name"]] = known["name"]
        for gap in results.get("gaps") or []:
            row = gap | {side: names[gap[side]] for side in ("reference", "model")}
            rows += [] if row in rows else [row]
    provenance = {run: dict(results.get("provenance") or {}) for run, results in evaluations.items()}
    return {
        "models": models,
        "groups": groups(models),
        "gaps": rows,
        "provenance": provenance,
        "notes": _unlike({run: about.get("settings") or {} for run, about in provenance.items()}),
    }


def _alike(model: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both are measurements of one model, whatever was compared with it and wherever it lay."""
    apart = ("path", "group", "seed", "joules", "perplexity")
    texts = [
        {name: {**text, "compared": None} for name, text in (side["perplexity"] or {}).items()}
        for side in (model, other)
    ]
    kept = [{key: value for key, value in side.items() if key not in apart} for side in (model, other)]
    return texts[0] == texts[1] and kept[0] == kept[1]


def _unlike(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the evaluations did not do alike, a sentence each."""
    notes = []
    for key in _COMPARED:
        values = {run: given.get(key) for run, given in settings.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            told = "; ".join(f"{run}: {value}" for run, value in values.items())
            notes.append(f"These evaluations differ in {key} ({told}): compare what was measured alike.")
    return notes
