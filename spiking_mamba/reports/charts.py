"""What the pictures of an evaluation show: accuracies, gaps, and energy by layer."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.reports.costs import drawn_tables, is_hypothetical
from spiking_mamba.reports.figures import COLOURS, MARKERS, REFERENCE, Panel, short, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__ = [
    "accuracies",
    "accuracy_and_energy",
    "accuracy_energy_panels",
    "gap_panels",
    "layer_energy_panels",
    "task_panels",
]

Model = Mapping[str, Any]
_Interval = tuple[float, float, float]  # a value and where it may lie
_Row = tuple[str, Sequence[_Interval | None], float | None]  # a task, every model's value, and chance


def accuracies(models: Sequence[Model]) -> tuple[list[float], str]:
    """What all models can be compared by, in per cent, and what it is called.

    The source's average where all have it, else the mean of the tasks that all have; no numbers where there
    are none.
    """
    if not models:
        return [], ""
    whole = [model.get("average") for model in models]
    if None not in whole:
        return [
            100 * average for average in whole if average is not None
        ], "average of the source's six tasks, %"
    scores = [
        {task: found["metrics"][found["main"]]["value"] for task, found in model["tasks"].items()}
        for model in models
    ]
    tasks = [task for task in scores[0] if all(row.get(task) is not None for row in scores)]
    if not tasks:
        return [], ""
    label = f"accuracy on {tasks[0]}, %" if len(tasks) == 1 else f"mean accuracy of {len(tasks)} tasks, %"
    return [100 * float(np.mean([row[task] for task in tasks])) for row in scores], label


def _gain(model: Model, scope: str, table: str) -> float | None:
    """How many times less energy than the dense model at a table: 1 for a model without neurons."""
    if not model.get("energy"):
        return 1.0 if not model.get("neuron") else None
    return model["energy"][scope].get(table, {}).get("gain")


def _called(models: Sequence[Model], table: str) -> str:
    return f"{short(table, 24)} table" + (", hypothetical" if is_hypothetical(models, table) else "")


def _title(text: str) -> str:
    """A panel's, in two lines where one is too short for it."""
    return text if len(text) <= 42 else text.replace(", ", ",\n", 1)


def accuracy_and_energy(models: Sequence[Model], table: str = "fp32") -> tuple[list[dict[str, Any]], str]:
    """The points of :func:`accuracy_energy_panels` at one table of costs.

    Returns:
        For each model with an accuracy and an energy gain its ``name``, ``group``, ``reference``,
        ``accuracy`` (%), and gains ``projections`` and ``model``; and what the accuracy is, see
        :func:`accuracies`.
    """
    values, label = accuracies(models)
    points = []
    for model, accuracy in zip(models, values, strict=False):
        gains = {scope: _gain(model, scope, table) for scope in ("projections", "model")}
        if all(gain is not None and math.isfinite(gain) for gain in (*gains.values(), accuracy)):
            about = {key: model[key] for key in ("name", "group", "reference")}
            points.append(about | {"accuracy": accuracy} | gains)
    return points, label


def accuracy_energy_panels(models: Sequence[Model]) -> list[Panel]:
    """Accuracy over energy gain, a point a model, two panels for each of :func:`drawn_tables`.

    Where a group has several runs, its mean with 95 % intervals over them. Nothing where there are fewer
    than three points: two are told better by :mod:`.overview`.
    """
    panels = []
    for table in drawn_tables(models):
        points, label = accuracy_and_energy(models, table)
        if len(points) < 3:
            continue
        for scope, title in (("projections", "Projections only"), ("model", "Whole model")):
            where = f"{title}, {_called(models, table)}"
            said = "; ".join(f"{p['name']}: {p['accuracy']:.2f} at {p[scope]:.2f}x" for p in points)
            draw = partial(_draw_scatter, points=points, scope=scope, title=where, label=label)
            height = 3.6 + 0.23 * len({point["group"] for point in points})
            text = f"{where}: {label.removesuffix(', %')} in % over energy gain. {said}."
            panels.append(Panel(text, height, draw))
    return panels


def _draw_scatter(
    figure: "FigureBase", points: Sequence[Mapping[str, Any]], scope: str, title: str, label: str
) -> None:
    panel = figure.subplots()
    handles = []
    for name, look in _group_looks(points).items():
        rows = [point for point in points if point["group"] == name]
        handles.append(_draw_group(panel, rows, scope, look, short(name)))
    panel.axvline(1.0, color="grey", linewidth=0.8, linestyle="--")
    panel.grid()
    panel.set(title=_title(title), xlabel="times less energy than dense, compute only")
    panel.set_ylabel(label, fontsize=11)
    _limit(panel, [point[scope] for point in points], [point["accuracy"] for point in points])
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=11)


def _group_looks(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each group is drawn, in the order in which they come: the reference as a black star."""
    looks = _looks()
    references = {point["group"] for point in points if point["reference"]}
    names = dict.fromkeys(point["group"] for point in points)
    return {name: REFERENCE if name in references else next(looks) for name in names}


def _looks() -> Iterator[dict[str, Any]]:
    """Pairs of colour and marker; as they are 6 and 7, the first 42 differ."""
    for color, marker in zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False):
        yield {"color": color, "marker": marker, "markersize": 6}


def _draw_group(
    panel: "Axes", rows: Sequence[Mapping[str, Any]], scope: str, look: dict[str, Any], label: str
) -> Any:
    """Draw one group's runs; returns what stands for it in a legend."""
    x, y = [row[scope] for row in rows], [row["accuracy"] for row in rows]
    if len(rows) == 1:
        return panel.plot(x, y, linestyle="none", label=label, **look)[0]
    panel.plot(x, y, linestyle="none", **look | {"markersize": 4, "alpha": 0.55})
    across, up = interval(x), interval(y)
    half = [s["high"] - s["mean"] for s in (across, up)]
    bars: dict[str, Any] = {"label": f"{label} ({len(rows)} runs)", "capsize": 3, "linewidth": 1}
    return panel.errorbar(across["mean"], up["mean"], half[1], half[0], **bars, **look)


def _limit(panel: "Axes", x: Sequence[float], y: Sequence[float]) -> None:
    """Keep the points apart: the interval of two runs can be many times as wide as their distance."""
    space = 0.25 * (max(y) - min(y)) or 1.0
    panel.set_ylim(min(y) - space, max(y) + space)
    panel.set_xlim(0.0, 1.2 * max(1.0, *x))


def _dodged(number: int) -> list[float]:
    """Where ``number`` marks of one row stand: within half a row above and below its middle."""
    return [(2 * place + 1 - number) / (2 * number) * 0.8 for place in range(number)]


def _draw_rows(
    figure: "FigureBase",
    rows: Sequence[_Row],
    names: Sequence[str],
    looks: Sequence[dict[str, Any]],
    xlabel: str,
    line: float | None = None,
) -> None:
    """Values with their intervals, a row a task.

    Args:
        figure: to draw into.
        rows: a task's name; of every model ``middle, low, high``, or ``None``; and what chance is.
        names, looks: of the models.
        xlabel: of the values.
        line: a value that all are held against.
    """
    panel = figure.subplots()
    marks: dict[str, Any] = {}
    for place, (_, values, chance) in enumerate(rows):
        if chance is not None:
            panel.plot([chance] * 2, [place - 0.42, place + 0.42], color="#8a8f94", linewidth=2, zorder=1)
        for name, look, value, off in zip(names, looks, values, _dodged(len(names)), strict=True):
            if value is not None:
                middle, low, high = value
                bars = [[max(0.0, middle - low)], [max(0.0, high - middle)]]  # need not hold the middle
                size = {"markersize": min(9, look["markersize"])}
                marks[name] = panel.errorbar(middle, place + off, xerr=bars, capsize=2, **look | size)
    if line is not None:
        panel.axvline(line, color="black", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [short(task, 22) for task, *_ in rows], fontsize=11)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(axis="x")
    panel.set_xlabel(xlabel, fontsize=11)
    if len(names) > 1:
        handles, labels = list(marks.values()), [short(name, 40) for name in marks]
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=11)


def _row_height(rows: int, models: int) -> float:
    return 0.9 + rows * (0.2 + 0.14 * models) + (0.23 * models if models > 1 else 0.0)


def task_panels(models: Sequence[Model]) -> list[Panel]:
    """The accuracy on every task with its standard error, and what guessing scores.

    Nothing without a task.
    """
    tasks = list(dict.fromkeys(task for model in models for task in model["tasks"]))
    rows: list[_Row] = []
    for task in tasks:
        asked = [model["tasks"].get(task) for model in models]
        known = [result for result in asked if result]
        if known[0]["main"].startswith("acc"):
            chance = known[0]["chance"]
            rows.append((task, [_score(result) for result in asked], chance and 100 * chance))
    rows = [row for row in rows if any(row[1])]
    if not rows:
        return []
    looks = _looks()
    marks = [REFERENCE if model["reference"] else next(looks) for model in models]
    xlabel = "accuracy, % ± standard error; grey: chance"
    names = [model["name"] for model in models]
    draw = partial(_draw_rows, rows=rows, names=names, looks=marks, xlabel=xlabel)
    text = "Accuracy by task with standard errors, as in the table: " + ", ".join(row[0] for row in rows)
    return [Panel(f"{text}.", _row_height(len(rows), len(models)), draw)]


def _score(result: Mapping[str, Any] | None) -> _Interval | None:
    metric = result and result["metrics"][result["main"]]
    if not metric or metric["value"] is None or not math.isfinite(metric["value"]):
        return None
    value, error = 100 * metric["value"], 100 * (metric["stderr"] or 0.0)
    return value, value - error, value + error


def _interval(gap: Mapping[str, Any] | None) -> _Interval | None:
    return gap and (100 * gap["gap"], 100 * gap["low"], 100 * gap["high"])  # type: ignore[return-value]


def gap_panels(gaps: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The gaps to every reference with their intervals, a row a task, the source's average first."""
    panels = []
    looks = dict(zip(dict.fromkeys(gap["model"] for gap in gaps), _looks(), strict=False))
    for reference in dict.fromkeys(gap["reference"] for gap in gaps):
        mine = [gap for gap in gaps if gap["reference"] == reference]
        names = list(dict.fromkeys(gap["model"] for gap in mine))
        tasks = sorted(dict.fromkeys(gap["task"] for gap in mine), key=lambda task: task != "average")
        by_pair = {(gap["task"], gap["model"]): gap for gap in mine}
        rows: list[_Row] = [
            (task, [_interval(by_pair.get((task, name))) for name in names], None) for task in tasks
        ]
        xlabel = f"points below {short(reference, 24)} (95 % interval)"
        marks = [looks[name] for name in names]
        draw = partial(_draw_rows, rows=rows, names=names, looks=marks, xlabel=xlabel, line=0.0)
        text = f"Gaps to {reference} with 95 % intervals, as in the table: {', '.join(tasks)}."
        panels.append(Panel(text, _row_height(len(rows), len(names)), draw))
    return panels


def _by_projection(rows: Mapping[str, Any]) -> dict[str, list[tuple[int, Any]]]:
    """``{"in_proj": [(layer, row), ...]}`` of rows named ``backbone.layers.<layer>.mixer.<projection>``."""
    layers: dict[str, list[tuple[int, Any]]] = {}
    for index, (name, row) in enumerate(rows.items()):
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), index)
        layers.setdefault(parts[-1], []).append((layer, row))
    return layers


def layer_energy_panels(energy: Mapping[str, Any], name: str) -> list[Panel]:
    """Energy per token of every projection by layer: the dense product and the spiking one.

    A panel for each of :func:`drawn_tables` and each kind of projection.

    Args:
        energy: of one model, see :func:`spiking_mamba.spikes.energy.model_energy`.
        name: of the model.
    """
    sides = _by_projection({row["name"]: row for row in energy["layers"]})
    model = {"energy": energy}
    panels = []
    for table in drawn_tables([model]):
        for side, rows in sides.items():
            title = f"{side}, {_called([model], table)}"
            spent = [(layer, row["energy"][table]) for layer, row in rows]
            draw: Callable[[FigureBase], None] = partial(_draw_layers, spent=spent, title=title)
            panels.append(Panel(f"Energy per token by layer, {title}: {name}", 2.6, draw))
    return panels


def _draw_layers(figure: "FigureBase", spent: Sequence[tuple[int, Mapping[str, Any]]], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    panel = figure.subplots()
    machines = ("dense_pj_per_token", "spiking_pj_per_token")
    scale, name = unit(max(row[machine] for _, row in spent for machine in machines))
    x = np.array([layer for layer, _ in spent])
    dense, spiking = ([row[machine] / scale for _, row in spent] for machine in machines)
    panel.bar(x - 0.2, dense, 0.4, color="#9a9a9a", label="dense: multiply-accumulates")
    panel.bar(x + 0.2, spiking, 0.4, color=COLOURS[1], label="spiking: accumulations")
    panel.set(title=_title(title), xlabel="layer", ylabel=f"{name} per token", xlim=(-0.8, x.max() + 0.8))
    panel.grid(axis="y")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=11)
