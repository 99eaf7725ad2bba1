"""The frame that every picture is drawn in, and the pictures of an evaluation.

Colours are such that colour-blind readers can tell them apart. Each ``draw_`` function takes what to draw and
the PNG to write, whole or not at all. Names are drawn as they are, cut in the middle when long.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.reports.costs import drawn_tables, is_hypothetical

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_and_energy",
    "draw_accuracy_energy",
    "draw_gaps",
    "draw_layer_energy",
    "picture",
    "short",
]

# Okabe and Ito's palette without black, which marks the reference, and without yellow, too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 13}
_UNITS = ((1e12, "J"), (1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ"), (1.0, "pJ"))


def short(name: str, length: int = 34) -> str:
    """A name that fits a picture.

    It never starts with an underscore, which matplotlib leaves out of legends.
    """
    name = "".join(c if c.isprintable() else " " for c in name)
    if len(name) > length:
        name = name[: length // 2 - 1] + "…" + name[-(length // 2) :]
    return " " + name if name.startswith("_") else name


def unit(picojoules: float) -> tuple[float, str]:
    """The unit to show an energy in, and how many picojoules it is."""
    return next((u for u in _UNITS if picojoules >= u[0]), _UNITS[-1])


@contextlib.contextmanager
def picture(
    path: Path, width: float, height: float, *, dpi: int = 130, **grid: Any
) -> "Iterator[tuple[Figure, Any]]":
    """A figure of ``width`` x ``height`` inches and its axes (``Figure.subplots``).

    It is written to ``path`` as a PNG at the end of the block, whole or not at all.

    Nothing of matplotlib's global state is left changed, so that a program's own figures stay as they are.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "text.parse_math": False,  # a name may hold dollar signs
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.axisbelow": True,
        "font.size": 10,
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(**grid)
        _plain_ticks(figure)
        draft = path.with_name(path.stem + ".part.png")
        figure.savefig(draft, dpi=dpi)
        draft.replace(path)


def _plain_ticks(figure: "Figure") -> None:
    """Label logarithmic axes 0.1, 1, 10: as text is drawn as it is, powers of ten would be seen as TeX."""
    from matplotlib.ticker import LogFormatter, LogFormatterMathtext

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: Any = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # it leaves some out on long axes

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            axis.set_major_formatter(Plain())
        if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
            axis.set_minor_formatter(Plain())


def _gain(model: Mapping[str, Any], scope: str, table: str) -> float | None:
    """How many times less energy than the dense model at a table: 1 for a model without neurons."""
    if not model.get("energy"):
        return 1.0 if not model.get("neuron") else None
    return model["energy"][scope].get(table, {}).get("gain")


def _called(models: Sequence[Mapping[str, Any]], table: str) -> str:
    return f"{short(table)} table" + (", hypothetical" if is_hypothetical(models, table) else "")


def accuracy_and_energy(
    models: Sequence[Mapping[str, Any]], table: str = "fp32"
) -> tuple[list[dict[str, Any]], str]:
    """The points of :func:`draw_accuracy_energy` at one table of costs.

    Returns:
        For each model with an accuracy and an energy gain its ``name``, ``group``, ``reference``,
        ``accuracy`` (%), and gains ``projections`` and ``model``; and what the accuracy is: the source's
        average where all models have it, else the mean of the tasks that all have.
    """
    tasks = [t for t in models[0]["tasks"] if all(t in m["tasks"] for m in models)] if models else []
    whole = all(model.get("average") is not None for model in models)
    if whole:
        label = "average of the source's six tasks, %"
    else:
        label = f"accuracy on {tasks[0]}, %" if len(tasks) == 1 else f"mean accuracy of {len(tasks)} tasks, %"
    points = []
    for model in models:
        gains = {scope: _gain(model, scope, table) for scope in ("projections", "model")}
        if not tasks or not all(gain is not None and math.isfinite(gain) for gain in gains.values()):
            continue
        scores = [model["tasks"][t]["metrics"][model["tasks"][t]["main"]]["value"] for t in tasks]
        accuracy = 100 * (model["average"] if whole else float(np.mean(scores)))
        about = {key: model[key] for key in ("name", "group", "reference")}
        points.append(about | {"accuracy": accuracy} | gains)
    return points, label


def draw_accuracy_energy(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over energy gain, a point a model, a row of panels for each of :func:`drawn_tables`.

    Where a group has several runs, its mean with 95 % intervals over them.
    """
    tables = {table: accuracy_and_energy(models, table) for table in drawn_tables(models)}
    tables = {table: (points, label) for table, (points, label) in tables.items() if points}
    looks = _group_looks([point for points, _ in tables.values() for point in points])
    legend_lines = math.ceil(len(looks) / 2)
    grid: dict[str, Any] = {"nrows": len(tables), "ncols": 2, "sharey": True, "squeeze": False}
    marks: dict[str, Any] = {}  # of the groups, for the legend
    with picture(path, 9, 0.6 + 3.6 * len(tables) + 0.24 * legend_lines, **grid) as (figure, axes):
        for panels, (table, (points, label)) in zip(axes, tables.items(), strict=True):
            scopes = (("projections", "Projections only"), ("model", "Whole model"))
            for panel, (scope, title) in zip(panels, scopes, strict=True):
                for name, look in looks.items():
                    if rows := [point for point in points if point["group"] == name]:
                        marks[name] = _draw_group(panel, rows, scope, look, short(name))
                panel.axvline(1.0, color="grey", linewidth=0.8, linestyle="--")
                panel.grid(color="#e5e5e5")
                what = f"energy gain over dense, times, compute only\n({_called(models, table)})"
                panel.set(title=title, xlabel=what)
                _limit(panel, [point[scope] for point in points], [point["accuracy"] for point in points])
            panels[0].set_ylabel(label)
        handles = [marks[name] for name in looks]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=9)


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


def draw_gaps(gaps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The gaps to the reference with their intervals, a panel a task, the source's average first."""
    tasks = list(dict.fromkeys(gap["task"] for gap in gaps))
    tasks.sort(key=lambda task: task != "average")
    several = len({gap["reference"] for gap in gaps}) > 1
    rows = [[gap for gap in gaps if gap["task"] == task] for task in tasks]
    heights = [len(row) + 1.5 for row in rows]
    grid: dict[str, Any] = {
        "nrows": len(tasks),
        "sharex": True,
        "squeeze": False,
        "gridspec_kw": {"height_ratios": heights},
    }
    with picture(path, 7.5, 0.6 + 0.24 * sum(heights), **grid) as (_, axes):
        for panel, task, row in zip(axes[:, 0], tasks, rows, strict=True):
            for place, (gap, look) in enumerate(zip(row, _looks(), strict=False)):
                middle, low, high = (100 * gap[key] for key in ("gap", "low", "high"))
                # a percentile interval need not hold the gap itself
                bars = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
                panel.errorbar(middle, place, xerr=bars, capsize=3, **look)
            names = [short(gap["model"] + (f" to {gap['reference']}" if several else ""), 40) for gap in row]
            panel.set_yticks(range(len(row)), names, fontsize=9)
            panel.set_ylim(len(row) - 0.4, -0.6)
            panel.axvline(0.0, color="black", linewidth=0.8)
            panel.grid(axis="x", color="#e5e5e5")
            title = "average of the source's six tasks" if task == "average" else task
            panel.set_title(f"{title} ({row[0]['items']} items)", fontsize=10)
        axes[-1, 0].set_xlabel("accuracy below the reference, points (95 % interval)")


def _by_projection(rows: Mapping[str, Any]) -> dict[str, list[tuple[int, Any]]]:
    """``{"in_proj": [(layer, row), ...]}`` of rows named ``backbone.layers.<layer>.mixer.<projection>``."""
    layers: dict[str, list[tuple[int, Any]]] = {}
    for index, (name, row) in enumerate(rows.items()):
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), index)
        layers.setdefault(parts[-1], []).append((layer, row))
    return layers


def _layer_axis(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def draw_layer_energy(energy: Mapping[str, Any], path: Path) -> None:
    """Energy per token of every projection by layer: the dense product and the spiking one.

    A panel for each of :func:`drawn_tables` and each kind of projection.

    Args:
        energy: of one model, see :func:`spiking_mamba.spikes.energy.model_energy`.
        path: of the PNG.
    """
    sides = _by_projection({row["name"]: row for row in energy["layers"]})
    model = {"energy": energy}
    places = [(table, side) for table in drawn_tables([model]) for side in sides]
    layers = 1 + max(layer for rows in sides.values() for layer, _ in rows)
    width = min(12, max(7, 2.5 + 0.16 * layers))
    grid: dict[str, Any] = {"nrows": len(places), "sharex": True, "squeeze": False}
    with picture(path, width, 0.5 + 2.2 * len(places), **grid) as (figure, axes):
        for panel, (table, side) in zip(axes[:, 0], places, strict=True):
            spent = [row["energy"][table] for row in energy["layers"]]
            machines = ("dense_pj_per_token", "spiking_pj_per_token")
            scale, name = unit(max(row[machine] for row in spent for machine in machines))
            x = np.array([layer for layer, _ in sides[side]])
            dense, spiking = (
                [row["energy"][table][machine] / scale for _, row in sides[side]] for machine in machines
            )
            panel.bar(x - 0.2, dense, 0.4, color="#9a9a9a", label="dense: multiply-accumulates")
            panel.bar(x + 0.2, spiking, 0.4, color=COLOURS[1], label="spiking: accumulations")
            title = f"{side}, {_called([model], table)}"
            panel.set(title=title, ylabel=f"{name} per token", xlim=(-0.8, layers - 0.2))
            panel.grid(axis="y", color="#e5e5e5")
            _layer_axis(panel.xaxis)
        axes[-1, 0].set_xlabel("layer")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
