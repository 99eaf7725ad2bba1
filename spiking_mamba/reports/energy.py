"""What an evaluation's report says of spikes and energy: counted, estimated, measured, and by layer."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spiking_mamba.reports.charts import Model, layer_energy_panels
from spiking_mamba.reports.costs import drawn_tables, own_tables
from spiking_mamba.reports.document import Block, Heading, Paragraph, Table, drawn
from spiking_mamba.reports.figures import unit
from spiking_mamba.reports.spike_map import spike_panels

__all__ = ["flat", "number", "of_energy", "of_joules", "of_layers", "of_spikes", "shared_tasks"]

_RIVALS = {
    "gain": "over dense",
    "gain_over_quantised": "over quantised",
    "gain_over_quantised_sparse": "over quantised, skipping zeros",
    "gain_over_shift_and_add": "over shift-and-add",
}
_SPENDERS = {
    "dense_pj_per_token": "dense",
    "spiking_pj_per_token": "spiking",
    "quantised_pj_per_token": "quantised",
    "quantised_sparse_pj_per_token": "quantised, skipping zeros",
    "shift_and_add_pj_per_token": "shift-and-add",
}
_SCOPES = {
    "projections_with_neurons": "the projections with their neurons",
    "projections": "the projections alone",
    "model": "the whole model",
}
_MEMORY_SCOPES = {
    "projections": "the projections, prefill",
    "model": "the whole model, prefill",
    "decode_projections": "the projections, decoding token by token",
    "decode": "the whole model, decoding token by token",
    "event_driven": "the whole model, decoding by the event-driven runtime",
}


def of_spikes(models: Sequence[Model]) -> list[Block]:
    """Spikes of the forward passes that gave the scores, and by task; nothing without a spiking model."""
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
                number(spikes["mean_abs"], 3),
                number(spikes["nonzero_share"], 1, 100),
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
        header = ["task, count", *(model["name"] for model in spiking)]
        blocks += [Heading("By task", 3), Table(header, rows)]
    return blocks


def _spikes_by_task(models: Sequence[Model]) -> list[list[str]]:
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("mean |s|", lambda spikes: number(spikes["mean_abs"], 3)),
        ("non-zero %", lambda spikes: number(spikes["nonzero_share"], 1, 100)),
        ("tokens", lambda spikes: f"{spikes['tokens']:,}"),
    ]
    rows = []
    for task in shared_tasks(models):
        found = [(model["tasks"].get(task) or {}).get("spikes") for model in models]
        if any(found):
            rows += [[f"{task}, {label}", *(show(f) if f else "–" for f in found)] for label, show in columns]
    return rows


def of_energy(models: Sequence[Model]) -> list[Block]:
    """Energy by operation counts, a table a scope; nothing where none was counted."""
    counted = [model for model in models if model["energy"]]
    if not counted:
        return []
    blocks: list[Block] = [
        Heading("Energy by operation counts"),
        Paragraph(
            "Estimates, not measurements: per token, operations counted in the passes that gave the scores, "
            "times a cost table. The rival 'quantised' has the same 2D + 1 "
            "activation levels and integer MACs; it is the fair one. 'Shift-and-add' takes the student's own "
            "integers, an addition a signed digit. A table is hypothetical where the "
            "accuracy was not measured in its precision. A ratio below 1 says that spikes cost more."
        ),
        *_cost_tables(counted),
    ]
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
    return blocks + _operations(counted)


def _cost_tables(models: Sequence[Model]) -> list[Block]:
    costs = {name: cost for m in models for name, cost in (m["energy"].get("costs") or {}).items()}
    if not costs:
        return []
    rows = []
    for name, cost in costs.items():
        integer = cost["mac"] if cost["quantised_mac"] is None else cost["quantised_mac"]
        values = (cost["mac"], cost["ac"], integer, cost["byte"], cost["width"])
        rows.append([name, *(f"{value:g}" for value in values)])
    header = ["cost table, pJ", "MAC", "accumulation", "MAC of the quantised", "byte of memory"]
    text = (
        "fp32, fp16 and int8 are Horowitz's at 45 nm (ISSCC 2014), integers summed in 32 bits on every side."
    )
    if own := own_tables(models):
        text += f" Given by the user: {', '.join(own)}."
    return [Table([*header, "bytes a number"], rows), Paragraph(text)]


def _operations(models: Sequence[Model]) -> list[Block]:
    counts = [model["energy"].get("operations_per_token") or {} for model in models]
    parts = list(dict.fromkeys(part for operations in counts for part in operations))
    if not parts:
        return []
    rows = [[part, *(number(operations.get(part), 0) for operations in counts)] for part in parts]
    return [
        Heading("Operations per token", 3),
        Table(["part", *(model["name"] for model in models)], rows),
        Paragraph("Multiply-accumulates of the dense model unless the part's name says otherwise."),
    ]


def _energy_table(
    title: str, measured: Sequence[tuple[Model, Mapping[str, Mapping[str, Any]] | None]]
) -> list[Block]:
    rows = []
    for model, tables in measured:
        for table, row in (tables or {}).items():
            hypothetical = table in (model["energy"].get("hypothetical") or ())
            energies = [row.get(key) for key in _SPENDERS]
            label = f"{model['name']}, {table}" + (" (hypothetical)" if hypothetical else "")
            rows.append([label, *map(_energy_number, energies), *(_ratio(row.get(key)) for key in _RIVALS)])
    if not rows:
        return []
    header = ["model, cost table", *_SPENDERS.values(), *(f"gain {name}" for name in _RIVALS.values())]
    known = [any(cell != "–" for cell in column) for column in zip(*rows, strict=True)]
    header, *rows = [[*itertools.compress(row, known)] for row in (header, *rows)]
    return [Heading(title, 3), Table(header, rows)]


def _energy_number(picojoules: float | None) -> str:
    if picojoules is None or not math.isfinite(picojoules):
        return number(picojoules)
    scale, name = unit(picojoules)
    return f"{picojoules / scale:.4g} {name}"


def of_joules(models: Sequence[Model]) -> list[Block]:
    """What the GPU's counter saw; nothing where there was none."""
    measured = {model["name"]: flat(model["joules"]) for model in models if model["joules"]}
    if not measured:
        return []
    keys = list(dict.fromkeys(key for values in measured.values() for key in values))

    def cell(value: Any) -> str:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        return f"{value:.5g}" if numeric else "–" if value is None else str(value)

    rows = [[key, *(cell(values.get(key)) for values in measured.values())] for key in keys]
    note = (
        "What the GPU's own counter (NVML) saw while this software ran: dense matrix units multiply the "
        "spikes too, so that it is no measure of spiking hardware. The estimates above contain nothing of it."
    )
    return [Heading("Energy measured on this GPU"), Table(["", *measured], rows), Paragraph(note)]


def _file_name(name: str, taken: set[str]) -> str:
    """A harmless part of a file name, of its own for each model."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "model"
    candidate, suffix = slug, 2
    while candidate.lower() in taken:
        candidate, suffix = f"{slug}-{suffix}", suffix + 1
    taken.add(candidate.lower())
    return candidate


def of_layers(folder: Path, models: Sequence[Model]) -> list[Block]:
    """Pictures of energy and spikes by layer, written to ``folder``."""
    blocks: list[Block] = []
    taken: set[str] = set()
    for model in models:
        name = _file_name(model["name"], taken)
        pictures = []
        if (model["energy"] or {}).get("layers"):
            panels = layer_energy_panels(model["energy"], model["name"])
            pictures.append(drawn(folder / f"layer_energy-{name}.png", panels))
        if model["spikes"] and (panels := spike_panels(model["spikes"])):
            pictures.append(drawn(folder / f"spikes-{name}.png", panels))
        if pictures:
            blocks += [Heading(model["name"], 3), *pictures]
    if not blocks:
        return []
    note: list[Block] = []
    if tables := drawn_tables(models):
        text = f"Energy of the projections: operation counts at the {_at(tables)}, compute only."
        note.append(Paragraph(text))
    return [Heading("Layer by layer"), *note, *blocks]


def _at(tables: Sequence[str]) -> str:
    return f"table{'' if len(tables) == 1 else 's'} {', '.join(tables)}"


def number(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
    """``factor * value`` for a cell; a dash for what is not there."""
    if value is None or math.isnan(value):
        return "–"
    return "infinite" if math.isinf(value) else f"{factor * value:,.{digits}f}"


def _ratio(value: float | None) -> str:
    text = number(value)
    if text == "–":
        return text
    return f"{text}x" if value >= 1 else f"{number(value, 3)}x: costs more"  # type: ignore[operator]


def shared_tasks(models: Sequence[Model]) -> list[str]:
    """All tasks, in the order in which they first come."""
    return list(dict.fromkeys(task for model in models for task in model["tasks"]))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = value
    return flattened
