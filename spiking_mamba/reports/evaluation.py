"""What an evaluation found: ``report.md``, ``report.html`` and their pictures, from its results.

The results are those of ``recipes/evaluate``, plain data as in its ``results.json``; parts that an evaluation
does not have (no spiking model, a single seed, no reference) are left out of its report.
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from spiking_mamba.reports import energy as energy_report
from spiking_mamba.reports.charts import Model, accuracy_energy_panels, gap_panels, task_panels
from spiking_mamba.reports.comparison import side_by_side
from spiking_mamba.reports.document import (
    Block,
    Code,
    Glance,
    Heading,
    Paragraph,
    Table,
    drawn,
    markdown_table,
)
from spiking_mamba.reports.energy import flat, number, shared_tasks
from spiking_mamba.reports.glance import first_picture, plural, sentences
from spiking_mamba.reports.page import write_document

__all__ = ["write_evaluation_report"]


def write_evaluation_report(folder: Path, results: Mapping[str, Any]) -> str:
    """Write ``report.md``, ``report.html`` (one file, its pictures within) and the PNGs to ``folder``.

    Args:
        folder: is made if it is not there.
        results: ``provenance``, ``models``, ``groups`` and ``gaps``, see ``recipes/evaluate``.

    Returns:
        The table of accuracies, for the terminal.
    """
    models = results["models"]
    folder.mkdir(parents=True, exist_ok=True)
    shown = first_picture(results)
    first = drawn(folder / "overview.png", shown) if shown else None
    blocks: list[Block] = [Heading("Evaluation", 1), Glance(sentences(results), first)]
    blocks += [Paragraph(note) for note in results.get("notes") or []]
    blocks += [Heading("Models"), Paragraph(_lead(results)), _models(models)]
    blocks += side_by_side(models)
    blocks += _accuracy_over_energy(folder, models)
    blocks += _tasks(folder, models, {panel.text for panel in shown})
    blocks += _gaps(folder, results.get("gaps") or [])
    blocks += _seeds(results.get("groups") or {})
    blocks += _perplexity(models)
    blocks += energy_report.of_spikes(models)
    blocks += energy_report.of_energy(models)
    blocks += energy_report.of_joules(models)
    blocks += energy_report.of_layers(folder, models)
    blocks += _provenance(results)
    write_document(folder, blocks)
    tables = [block for block in (*_task_table(models), *_perplexity(models)) if isinstance(block, Table)]
    return "\n\n".join(markdown_table(table.header, table.rows) for table in tables)


def _with_error(value: float | None, error: float | None, factor: float = 1.0) -> str:
    return number(value, 2, factor) + ("" if error is None else f" ± {number(error, 2, factor)}")


def _range(row: Mapping[str, Any], digits: int = 2, factor: float = 1.0) -> str:
    return f"({number(row['low'], digits, factor)} to {number(row['high'], digits, factor)})"


def _lead(results: Mapping[str, Any]) -> str:
    provenance = results.get("provenance") or {}
    text = f"{plural(len(results['models']), 'model')}"
    if "date" in provenance:
        device = (provenance.get("hardware") or {}).get("device", "an unknown device")
        text += f", {provenance['date']}, on {device}"
    text += "."
    references = [model["name"] for model in results["models"] if model["reference"]]
    if references:
        text += f" Gaps are taken against {', '.join(references)}."
    return text


def _models(models: Sequence[Model]) -> Table:
    header = ["model", "role", "group", "seed", "neuron", "levels", "parameters", "dtype"]
    rows = [
        [
            model["name"],
            "reference" if model["reference"] else "",
            model["group"],
            "–" if model["seed"] is None else str(model["seed"]),
            model["neuron"] or "dense",
            "–" if model["levels"] is None else str(model["levels"]),
            f"{model['parameters']:,}",
            model["dtype"],
        ]
        for model in models
    ]
    return Table(header, rows)


def _accuracy_over_energy(folder: Path, models: Sequence[Model]) -> list[Block]:
    panels = accuracy_energy_panels(models)
    if not panels:
        return []
    note = (
        "Right is less energy than the dense model, up is more accurate; the star is the reference, at 1x. "
        "Where a group has several runs, small points are runs and the large one is their mean with "
        "95 % intervals (Student's t), cut off where they leave the picture."
    )
    picture = drawn(folder / "accuracy_energy.png", panels)
    return [Heading("Accuracy and energy"), picture, Paragraph(note)]


def _tasks(folder: Path, models: Sequence[Model], shown: Container[str]) -> list[Block]:
    """The table, and its picture where that is not shown already."""
    tables = _task_table(models)
    if not tables:
        return []
    panels = [panel for panel in task_panels(models) if panel.text not in shown]
    pictures = [drawn(folder / "tasks.png", panels)] if panels else []
    return [Heading("Zero-shot accuracy"), *pictures, *tables]


def _task_table(models: Sequence[Model]) -> list[Block]:
    tasks = shared_tasks(models)
    if not tasks:
        return []
    rows = []
    if any(model["average"] is not None for model in models):
        values = [number(model["average"], 2, 100) for model in models]
        rows.append(["average of the source's six tasks", "", "", "", *values])
    for task in tasks:
        asked = [model["tasks"].get(task) for model in models]
        known = [result for result in asked if result is not None]
        names = list(dict.fromkeys(name for result in known for name in result["metrics"]))
        names.sort(key=lambda name: name != known[0]["main"])
        for name in names:
            share = name.startswith("acc")
            factor = 100.0 if share else 1.0
            cells = []
            for result in asked:
                metric = (result or {"metrics": {}})["metrics"].get(name)
                cells.append(
                    "–" if metric is None else _with_error(metric["value"], metric["stderr"], factor)
                )
            items = "/".join(dict.fromkeys(f"{result['n']:,}" for result in known))
            main = "yes" if name == known[0]["main"] else ""
            chance = number(known[0]["chance"], 2, 100) if share else ""
            rows.append([f"{task}, {name}" + (" %" if share else ""), main, items, chance, *cells])
    note = (
        "± is the standard error over items, as lm-eval gives it. The main metric of a task is the one that "
        "enters the source's average, gaps and intervals; chance is what guessing scores."
    )
    header = ["task, metric", "main", "items", "chance %", *(model["name"] for model in models)]
    return [Table(header, rows), Paragraph(note)]


def _gaps(folder: Path, gaps: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not gaps:
        return []
    gaps = sorted(gaps, key=lambda gap: gap["task"] != "average")
    pairs = list(dict.fromkeys((gap["reference"], gap["model"]) for gap in gaps))
    by_pair = {(gap["task"], gap["reference"], gap["model"]): gap for gap in gaps}
    several = len({gap["reference"] for gap in gaps}) > 1
    rows = []
    for task in dict.fromkeys(gap["task"] for gap in gaps):
        cells = []
        for pair in pairs:
            gap = by_pair.get((task, *pair))
            cells.append("–" if gap is None else f"{number(gap['gap'], 2, 100)} {_range(gap, 2, 100)}")
        items = next(gap["items"] for gap in gaps if gap["task"] == task)
        rows.append([task, f"{items:,}", *cells])
    names = [f"{model} to {reference}" if several else model for reference, model in pairs]
    note = (
        "Reference minus model in points of accuracy, with a 95 % interval by a paired bootstrap: the items "
        "that both answered are resampled together, for the average within each task. An interval that "
        "holds 0 is no evidence of a gap."
    )
    return [
        Heading("Gap to the reference"),
        drawn(folder / "gaps.png", gap_panels(gaps)),
        Table(["task", "items", *names], rows),
        Paragraph(note),
    ]


def _seeds(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Block]:
    several = {
        name: quantities
        for name, quantities in groups.items()
        if any(row["runs"] > 1 for row in quantities.values())
    }
    if not several:
        return []
    names = list(dict.fromkeys(name for quantities in several.values() for name in quantities))
    names.sort(key=lambda name: name != "average")
    rows = []
    for name in names:
        accuracy = name != "mean_abs" and not name.startswith(("perplexity:", "gain_"))
        factor = 100.0 if accuracy else 1.0
        cells = []
        for quantities in several.values():
            row = quantities.get(name)
            if row is None:
                cells.append("–")
            elif row["sd"] is None:
                cells.append(f"{number(row['mean'], 2, factor)}, {plural(row['runs'], 'run')}")
            else:
                middle = _with_error(row["mean"], row["sd"], factor)
                cells.append(f"{middle} {_range(row, 2, factor)}, {plural(row['runs'], 'run')}")
        rows.append([_quantity(name) + (" %" if accuracy else ""), *cells])
    note = (
        "Mean ± standard deviation (n - 1) over the runs of a group, and the 95 % interval of the mean by "
        "Student's t. It tells how far another seed may lie; the standard errors above, how far other items."
    )
    return [Heading("Over seeds"), Table(["", *several], rows), Paragraph(note)]


def _quantity(name: str) -> str:
    if name.startswith("gain_"):
        return f"energy gain of the projections, {name.removeprefix('gain_')} table, times"
    names = {"average": "average of the source's six tasks", "mean_abs": "mean |s|"}
    return names.get(name, name)


def _perplexity(models: Sequence[Model]) -> list[Block]:
    corpora = list(dict.fromkeys(corpus for model in models for corpus in model["perplexity"] or {}))
    if not corpora:
        return []
    rows = []
    for corpus in corpora:
        results = [(model["perplexity"] or {}).get(corpus) for model in models]
        tokens = "/".join(dict.fromkeys(f"{f['tokens']:,}" for f in results if f is not None))
        for key, label, digits in (
            ("perplexity", "perplexity", 2),
            ("nll_per_token", "nats per token", 4),
            ("bits_per_byte", "bits per byte", 4),
        ):
            cells = [number((f or {}).get(key), digits) for f in results]
            rows.append([f"{corpus}, {label}", tokens, *cells])
        compared = [(f or {}).get("compared") for f in results]
        if any(compared):
            for key, label, digits, factor in (
                ("kl", "KL to the reference, nats per token", 4, 1.0),
                ("top1_agreement", "same likeliest token, %", 1, 100.0),
            ):
                cells = [number((c or {}).get(key), digits, factor) for c in compared]
                rows.append([f"{corpus}, {label}", tokens, *cells])
    header = ["text", "tokens", *(model["name"] for model in models)]
    note = "Bits per byte compare models whose tokenizers differ; the others do not."
    if any((f or {}).get("compared") for model in models for f in (model["perplexity"] or {}).values()):
        note += (
            " A model may predict a text as well as its reference and still say other things: KL(reference "
            "|| model) and how often both have the same likeliest next token tell."
        )
    return [Heading("Perplexity"), Table(header, rows), Paragraph(note)]


def _provenance(results: Mapping[str, Any]) -> list[Block]:
    provenance = dict(results.get("provenance") or {})
    blocks: list[Block] = [Heading("Provenance")]
    if command := provenance.pop("command", None):
        blocks.append(Code(str(command)))
    settings = provenance.pop("settings", None)
    rows = [[key, "–" if value is None else str(value)] for key, value in flat(provenance).items()]
    if rows:
        blocks.append(Table(["", "value"], rows))
    models = results["models"]
    rows = [[model["name"], model["path"], model["weights_sha256"]] for model in models]
    blocks += [Heading("Weights", 3), Table(["model", "path", "sha256"], rows)]
    rows, notes = [], dict[str, str]()
    for model in models:
        for name, result in (model["tasks"] | (model["perplexity"] or {})).items():
            if data := result.get("data"):
                size = str(data.get("rows", data.get("documents", "–")))
                row = [name, data["source"], data.get("split", "–"), size, data["sha256"]]
                rows += [] if row in rows else [row]
                notes |= {name: data["note"]} if data.get("note") else {}
    if rows:
        blocks += [Heading("Data", 3), Table(["task or text", "source", "split", "rows", "sha256"], rows)]
        blocks += [Paragraph(f"{name}: {note}.") for name, note in notes.items()]
    if settings:
        text = json.dumps(settings, indent=1, default=str, ensure_ascii=False)
        blocks += [Heading("Settings", 3), Code(text)]
    return blocks
