"""What an evaluation found: ``report.md``, ``report.html`` and their pictures, from its results.

The results are those of ``recipes/evaluate``, plain data as in its ``results.json``; parts that an evaluation
does not have (no spiking model, a single seed, no reference) are left out of its report.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .document import Block, Code, Heading, Paragraph, Picture, Table, to_html, to_markdown
from .figures import (
    accuracy_and_energy,
    draw_accuracy_energy,
    draw_gaps,
    draw_layer_energy,
    draw_spike_map,
    unit,
)
from .report import markdown_table
from .training import write_whole

__all__ = ["write_evaluation_report"]

Model = Mapping[str, Any]

_RIVALS = {
    "gain": "over dense",
    "gain_over_quantised": "over quantised",
    "gain_over_quantised_sparse": "over quantised, skipping zeros",
}
_SPENDERS = {
    "dense_pj_per_token": "dense",
    "spiking_pj_per_token": "spiking",
    "quantised_pj_per_token": "quantised",
    "quantised_sparse_pj_per_token": "quantised, skipping zeros",
}
_SCOPES = {"projections": "the projections", "model": "the whole model"}
_MEMORY_SCOPES = {
    "projections": "the projections, prefill",
    "model": "the whole model, prefill",
    "decode_projections": "the projections, decoding token by token",
    "decode": "the whole model, decoding token by token",
}


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
    blocks: list[Block] = [Heading("Evaluation", 1), Paragraph(_lead(results))]
    blocks += [Heading("Models"), _models(models)]
    blocks += _accuracy_over_energy(folder, models)
    blocks += _tasks(models)
    blocks += _gaps(folder, results.get("gaps") or [])
    blocks += _seeds(results.get("groups") or {})
    blocks += _perplexity(models)
    blocks += _spikes(models)
    blocks += _energy(models)
    blocks += _joules(models)
    blocks += _layers(folder, models)
    blocks += _provenance(results)
    write_whole(folder / "report.md", to_markdown(blocks))
    write_whole(folder / "report.html", to_html(blocks))
    tables = [block for block in (*_tasks(models), *_perplexity(models)) if isinstance(block, Table)]
    return "\n\n".join(markdown_table(table.header, table.rows) for table in tables)


def _number(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "infinite" if math.isinf(value) else f"{factor * value:,.{digits}f}"


def _ratio(value: float | None) -> str:
    text = _number(value)
    if text == "–":
        return text
    return f"{text}x" if value >= 1 else f"{_number(value, 3)}x: costs more"  # type: ignore[operator]


def _with_error(value: float | None, error: float | None, factor: float = 1.0) -> str:
    return _number(value, 2, factor) + ("" if error is None else f" ± {_number(error, 2, factor)}")


def _range(row: Mapping[str, Any], digits: int = 2, factor: float = 1.0) -> str:
    return f"({_number(row['low'], digits, factor)} to {_number(row['high'], digits, factor)})"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _lead(results: Mapping[str, Any]) -> str:
    models, provenance = results["models"], results.get("provenance") or {}
    tasks = {task for model in models for task in model["tasks"]}
    device = (provenance.get("hardware") or {}).get("device", "an unknown device")
    text = f"{_plural(len(models), 'model')} on {_plural(len(tasks), 'zero-shot task')}"
    text += f", {provenance.get('date', 'no date')}, on {device}."
    references = [model["name"] for model in models if model["reference"]]
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
    points, label = accuracy_and_energy(models)
    if not points or not any(model.get("energy") for model in models):
        return []
    path = folder / "accuracy_energy.png"
    draw_accuracy_energy(path, models)
    text = f"Accuracy ({label}) over energy gain. "
    text += "; ".join(f"{p['name']}: {p['accuracy']:.2f} at {p['projections']:.2f}x" for p in points)
    note = (
        "Right is less energy than the dense model, up is more accurate; the star is the reference, at 1x. "
        "Where a group has several runs, small points are runs and the large one is their mean with "
        "95 % intervals (Student's t), cut off where they leave the picture."
    )
    return [Heading("Accuracy and energy"), Picture(path, text), Paragraph(note)]


def _shared_tasks(models: Sequence[Model]) -> list[str]:
    """All tasks, in the order in which they first come."""
    return list(dict.fromkeys(task for model in models for task in model["tasks"]))


def _tasks(models: Sequence[Model]) -> list[Block]:
    tasks = _shared_tasks(models)
    if not tasks:
        return []
    rows = []
    if any(model["average"] is not None for model in models):
        values = [_number(model["average"], 2, 100) for model in models]
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
            chance = _number(known[0]["chance"], 2, 100) if share else ""
            rows.append([f"{task}, {name}" + (" %" if share else ""), main, items, chance, *cells])
    note = (
        "± is the standard error over items, as lm-eval gives it. The main metric of a task is the one that "
        "enters the source's average, gaps and intervals; chance is what guessing scores."
    )
    header = ["task, metric", "main", "items", "chance %", *(model["name"] for model in models)]
    return [Heading("Zero-shot accuracy"), Table(header, rows), Paragraph(note)]


def _gaps(folder: Path, gaps: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not gaps:
        return []
    path = folder / "gaps.png"
    draw_gaps(path, gaps)
    gaps = sorted(gaps, key=lambda gap: gap["task"] != "average")
    pairs = list(dict.fromkeys((gap["reference"], gap["model"]) for gap in gaps))
    found = {(gap["task"], gap["reference"], gap["model"]): gap for gap in gaps}
    several = len({gap["reference"] for gap in gaps}) > 1
    rows = []
    for task in dict.fromkeys(gap["task"] for gap in gaps):
        cells = []
        for pair in pairs:
            gap = found.get((task, *pair))
            cells.append("–" if gap is None else f"{_number(gap['gap'], 2, 100)} {_range(gap, 2, 100)}")
        items = next(gap["items"] for gap in gaps if gap["task"] == task)
        rows.append([task, f"{items:,}", *cells])
    names = [f"{model} to {reference}" if several else model for reference, model in pairs]
    note = (
        "Reference minus model in points of accuracy, with a 95 % interval by a paired bootstrap: the items "
        "that both answered are resampled together, for the average within each task. An interval that "
        "holds 0 is no evidence of a gap."
    )
    text = "Gaps to the reference with 95 % intervals, as in the table below."
    return [
        Heading("Gap to the reference"),
        Picture(path, text),
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
        accuracy = name not in ("mean_abs", "gain_fp32") and not name.startswith("perplexity:")
        factor = 100.0 if accuracy else 1.0
        cells = []
        for quantities in several.values():
            row = quantities.get(name)
            if row is None:
                cells.append("–")
            elif row["sd"] is None:
                cells.append(f"{_number(row['mean'], 2, factor)}, {_plural(row['runs'], 'run')}")
            else:
                middle = _with_error(row["mean"], row["sd"], factor)
                cells.append(f"{middle} {_range(row, 2, factor)}, {_plural(row['runs'], 'run')}")
        rows.append([_QUANTITIES.get(name, name + (" %" if accuracy else "")), *cells])
    note = (
        "Mean ± standard deviation (n - 1) over the runs of a group, and the 95 % interval of the mean by "
        "Student's t. It tells how far another seed may lie; the standard errors above, how far other items."
    )
    return [Heading("Over seeds"), Table(["", *several], rows), Paragraph(note)]


_QUANTITIES = {
    "average": "average of the source's six tasks %",
    "mean_abs": "mean |s|",
    "gain_fp32": "energy gain of the projections, fp32, times",
}


def _perplexity(models: Sequence[Model]) -> list[Block]:
    corpora = list(dict.fromkeys(corpus for model in models for corpus in model["perplexity"] or {}))
    if not corpora:
        return []
    rows = []
    for corpus in corpora:
        found = [(model["perplexity"] or {}).get(corpus) for model in models]
        tokens = "/".join(dict.fromkeys(f"{f['tokens']:,}" for f in found if f is not None))
        for key, label, digits in (
            ("perplexity", "perplexity", 2),
            ("nll_per_token", "nats per token", 4),
            ("bits_per_byte", "bits per byte", 4),
        ):
            cells = [_number((f or {}).get(key), digits) for f in found]
            rows.append([f"{corpus}, {label}", tokens, *cells])
    header = ["text", "tokens", *(model["name"] for model in models)]
    note = "Bits per byte compare models whose tokenizers differ; the other two do not."
    return [Heading("Perplexity"), Table(header, rows), Paragraph(note)]


def _spikes(models: Sequence[Model]) -> list[Block]:
    spiking = [model for model in models if model["spikes"]]
    if not spiking:
        return []
    header = ["model", "tokens", "mean |s|", "non-zero %", "silent channels", "accumulations", "dense MACs"]
    rows, dearer = [], []
    for model in spiking:
        spikes = model["spikes"]
        layers = list(spikes["projections"].values())
        accumulations, dense = (
            spikes[key] if spikes.get(key) is not None else sum(row[key] or 0.0 for row in layers)
            for key in ("accumulations", "dense_macs")
        )
        tokens = spikes.get("tokens") or max((row["tokens"] for row in layers), default=0)
        silent = sum(row["silent_channels"] or 0 for row in layers)
        rows.append(
            [
                model["name"],
                f"{tokens:,}",
                _number(spikes["mean_abs"], 3),
                _number(spikes["nonzero_share"], 1, 100),
                f"{silent:,}",
                f"{accumulations:.4g}",
                f"{dense:.4g}",
            ]
        )
        if accumulations > dense:
            dearer.append(model["name"])
    blocks: list[Block] = [Heading("Spikes"), Table(header, rows)]
    blocks.append(
        Paragraph(
            "Counted in the forward passes that gave the scores above, padding left out. Mean |s| and the "
            "share of non-zero counts are weighted by the projections' output widths; an accumulation is "
            "one unit of |s| times one output."
        )
    )
    if dearer:
        blocks.append(Paragraph(f"More accumulations than the dense model's MACs: {', '.join(dearer)}."))
    if rows := _spikes_by_task(spiking):
        header = ["task", "of", *(model["name"] for model in spiking)]
        blocks += [Heading("By task", 3), Table(header, rows)]
    return blocks


def _spikes_by_task(models: Sequence[Model]) -> list[list[str]]:
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("mean |s|", lambda spikes: _number(spikes["mean_abs"], 3)),
        ("non-zero %", lambda spikes: _number(spikes["nonzero_share"], 1, 100)),
        ("tokens", lambda spikes: f"{spikes['tokens']:,}"),
    ]
    rows = []
    for task in _shared_tasks(models):
        found = [(model["tasks"].get(task) or {}).get("spikes") for model in models]
        if any(found):
            rows += [[task, label, *(show(f) if f else "–" for f in found)] for label, show in columns]
    return rows


def _energy(models: Sequence[Model]) -> list[Block]:
    counted = [model for model in models if model["energy"]]
    if not counted:
        return []
    blocks: list[Block] = [
        Heading("Energy by operation counts"),
        Paragraph(
            "Estimates, not measurements: per token, operations counted in the passes that gave the scores, "
            "times a cost table; fp32, fp16 and int8 are Horowitz's at 45 nm (ISSCC 2014). The rival "
            "'quantised' has the same 2D + 1 "
            "activation levels and integer MACs; it is the fair one. A table is hypothetical where the "
            "accuracy was not measured in its precision. A ratio below 1 says that spikes cost more."
        ),
    ]
    if costs := {name: cost for m in counted for name, cost in (m["energy"].get("costs") or {}).items()}:
        rows = []
        for name, cost in costs.items():
            integer = cost["mac"] if cost["quantised_mac"] is None else cost["quantised_mac"]
            rows.append([name, *(f"{v:g}" for v in (cost["mac"], cost["ac"], integer, cost["byte"]))])
        header = ["cost table, pJ", "MAC", "accumulation", "MAC of the quantised", "byte of memory"]
        blocks.append(Table(header, rows))
    for scope, name in _SCOPES.items():
        blocks += _energy_table(f"Compute only, {name}", [(m, m["energy"].get(scope)) for m in counted])
    scopes = list(dict.fromkeys(s for m in counted for s in m["energy"].get("with_memory") or {}))
    for scope in scopes:
        blocks += _energy_table(
            f"With memory traffic, {_MEMORY_SCOPES.get(scope, scope)}",
            [(m, (m["energy"].get("with_memory") or {}).get(scope)) for m in counted],
        )
    passes = {(p["batch"], p["length"]) for m in counted if (p := m["energy"].get("pass"))}
    if passes:
        shapes = " or ".join(f"{batch} x {length:,}" for batch, length in sorted(passes))
        blocks.append(Paragraph(f"Prefill is a pass of {shapes} tokens (batch x length)."))
    parts = list(dict.fromkeys(p for m in counted for p in m["energy"].get("operations_per_token") or {}))
    if parts:
        rows = [
            [
                part,
                *(_number((m["energy"].get("operations_per_token") or {}).get(part), 0) for m in counted),
            ]
            for part in parts
        ]
        blocks += [
            Heading("Operations per token", 3),
            Table(["part", *(m["name"] for m in counted)], rows),
            Paragraph("Multiply-accumulates of the dense model unless the part's name says otherwise."),
        ]
    return blocks


def _energy_table(
    title: str, found: Sequence[tuple[Model, Mapping[str, Mapping[str, Any]] | None]]
) -> list[Block]:
    rows = []
    for model, tables in found:
        for table, row in (tables or {}).items():
            hypothetical = table in (model["energy"].get("hypothetical") or ())
            energies = [row.get(key) for key in _SPENDERS]
            label = f"{model['name']}, {table}" + (" (hypothetical)" if hypothetical else "")
            rows.append([label, *map(_energy_number, energies), *(_ratio(row.get(key)) for key in _RIVALS)])
    if not rows:
        return []
    header = ["model, cost table", *_SPENDERS.values(), *(f"gain {name}" for name in _RIVALS.values())]
    return [Heading(title, 3), Table(header, rows)]


def _energy_number(picojoules: float | None) -> str:
    if picojoules is None or not math.isfinite(picojoules):
        return _number(picojoules)
    scale, name = unit(picojoules)
    return f"{picojoules / scale:.4g} {name}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _joules(models: Sequence[Model]) -> list[Block]:
    measured = {model["name"]: _flat(model["joules"]) for model in models if model["joules"]}
    if not measured:
        return []
    keys = list(dict.fromkeys(key for values in measured.values() for key in values))

    def cell(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return f"{value:.5g}" if number else "–" if value is None else str(value)

    rows = [[key, *(cell(values.get(key)) for values in measured.values())] for key in keys]
    note = (
        "What the GPU's own counter (NVML) saw while this software ran: dense matrix units multiply the "
        "spikes too, so that it is no measure of spiking hardware. The estimates above contain nothing of it."
    )
    return [Heading("Energy measured on this GPU"), Table(["", *measured], rows), Paragraph(note)]


def _file_name(name: str, taken: set[str]) -> str:
    """A harmless part of a file name, of its own for each model."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "model"
    candidate, number = slug, 2
    while candidate.lower() in taken:
        candidate, number = f"{slug}-{number}", number + 1
    taken.add(candidate.lower())
    return candidate


def _layers(folder: Path, models: Sequence[Model]) -> list[Block]:
    blocks: list[Block] = []
    taken: set[str] = set()
    for model in models:
        name = _file_name(model["name"], taken)
        pictures = []
        if (model["energy"] or {}).get("layers"):
            path = folder / f"layer_energy-{name}.png"
            draw_layer_energy(path, model["energy"])
            pictures.append(Picture(path, f"Energy per token by layer, dense and spiking: {model['name']}"))
        if model["spikes"]:
            path = folder / f"spikes-{name}.png"
            if draw_spike_map(path, model["spikes"]):
                pictures.append(Picture(path, f"Spikes by layer: {model['name']}"))
        if pictures:
            blocks += [Heading(model["name"], 3), *pictures]
    note = "Energy of the projections: operation counts at the fp32 table, compute only."
    return [Heading("Layer by layer"), Paragraph(note), *blocks] if blocks else []


def _provenance(results: Mapping[str, Any]) -> list[Block]:
    provenance = dict(results.get("provenance") or {})
    blocks: list[Block] = [Heading("Provenance")]
    if command := provenance.pop("command", None):
        blocks.append(Code(str(command)))
    settings = provenance.pop("settings", None)
    rows = [[key, "–" if value is None else str(value)] for key, value in _flat(provenance).items()]
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
