"""The pictures of an evaluation, drawn from its results; colours that colour-blind readers can tell apart.

Each function writes one PNG, whole or not at all. Names are drawn as they are, cut in the middle when long.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.spikes.energy import COSTS_45NM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_and_energy",
    "draw_accuracy_energy",
    "draw_gaps",
    "draw_layer_energy",
    "draw_spike_map",
    "picture",
    "save_picture",
    "short",
]

# Okabe and Ito's palette without black, which marks the reference, and without yellow, too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE = {"color": "black", "marker": "*", "markersize": 13}
_UNITS = ((1e12, "J"), (1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ"), (1.0, "pJ"))


def short(name: str, length: int = 34) -> str:
    """A name that fits a picture. It never starts with an underscore, which matplotlib leaves out of
    legends."""
    name = "".join(c if c.isprintable() else " " for c in name)
    if len(name) > length:
        name = name[: length // 2 - 1] + "…" + name[-(length // 2) :]
    return " " + name if name.startswith("_") else name


def unit(picojoules: float) -> tuple[float, str]:
    """The unit to show an energy in, and how many picojoules it is."""
    return next((u for u in _UNITS if picojoules >= u[0]), _UNITS[-1])


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, **grid: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of ``width`` x ``height`` inches and its axes (``plt.subplots``), written to ``path`` at the
    end of the block, whole or not at all."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
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
        save_picture(figure, path, dpi=130)


def save_picture(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all."""
    draft = path.with_name(path.stem + ".part.png")
    figure.savefig(draft, dpi=dpi)
    draft.replace(path)


def _gain(model: Mapping[str, Any], scope: str) -> float | None:
    """How many times less energy than the dense model, fp32 table: 1 for a model without neurons."""
    if not model.get("energy"):
        return 1.0 if not model.get("neuron") else None
    return model["energy"][scope].get("fp32", {}).get("gain")


def accuracy_and_energy(models: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The points of :func:`draw_accuracy_energy`.

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
        gains = {scope: _gain(model, scope) for scope in ("projections", "model")}
        if not tasks or not all(gain is not None and math.isfinite(gain) for gain in gains.values()):
            continue
        scores = [model["tasks"][t]["metrics"][model["tasks"][t]["main"]]["value"] for t in tasks]
        accuracy = 100 * (model["average"] if whole else float(np.mean(scores)))
        about = {key: model[key] for key in ("name", "group", "reference")}
        points.append(about | {"accuracy": accuracy} | gains)
    return points, label


def draw_accuracy_energy(path: Path, models: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy over energy gain, a point a model; where a group has several runs, its mean with 95 %
    intervals over them."""
    points, label = accuracy_and_energy(models)
    names = list(dict.fromkeys(point["group"] for point in points))
    table = "fp32 table, compute only"
    if any("fp32" in ((model.get("energy") or {}).get("hypothetical") or ()) for model in models):
        table += ", hypothetical"
    lines = math.ceil(len(names) / 2)
    with picture(path, 9, 4.2 + 0.24 * lines, ncols=2, sharey=True) as (figure, axes):
        for panel, scope, title in zip(
            axes, ("projections", "model"), ("Projections only", "Whole model"), strict=True
        ):
            looks = _looks()
            for name in names:
                rows = [point for point in points if point["group"] == name]
                look = REFERENCE if any(row["reference"] for row in rows) else next(looks)
                _draw_group(panel, rows, scope, look, short(name))
            panel.axvline(1.0, color="grey", linewidth=0.8, linestyle="--")
            panel.grid(color="#e5e5e5")
            panel.set(title=title, xlabel=f"energy gain over the dense model, times\n({table})")
            _limit(panel, [point[scope] for point in points], [point["accuracy"] for point in points])
        axes[0].set_ylabel(label)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9)


def _looks() -> Iterator[dict[str, Any]]:
    """Pairs of colour and marker; as they are 6 and 7, the first 42 differ."""
    for color, marker in zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False):
        yield {"color": color, "marker": marker, "markersize": 6}


def _draw_group(
    panel: Axes, rows: Sequence[Mapping[str, Any]], scope: str, look: Mapping[str, Any], label: str
) -> None:
    x, y = [row[scope] for row in rows], [row["accuracy"] for row in rows]
    if len(rows) == 1:
        panel.plot(x, y, linestyle="none", label=label, **look)
        return
    panel.plot(x, y, linestyle="none", **look | {"markersize": 4, "alpha": 0.55})
    across, up = interval(x), interval(y)
    half = [s["high"] - s["mean"] for s in (across, up)]
    text = f"{label} ({len(rows)} runs)"
    panel.errorbar(across["mean"], up["mean"], half[1], half[0], label=text, capsize=3, linewidth=1, **look)


def _limit(panel: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Keep the points apart: the interval of two runs can be many times as wide as their distance."""
    space = 0.25 * (max(y) - min(y)) or 1.0
    panel.set_ylim(min(y) - space, max(y) + space)
    panel.set_xlim(0.0, 1.2 * max(1.0, *x))


def draw_gaps(path: Path, gaps: Sequence[Mapping[str, Any]]) -> None:
    """The gaps to the reference with their intervals, a panel a task, the source's average first."""
    tasks = list(dict.fromkeys(gap["task"] for gap in gaps))
    tasks.sort(key=lambda task: task != "average")
    several = len({gap["reference"] for gap in gaps}) > 1
    rows = [[gap for gap in gaps if gap["task"] == task] for task in tasks]
    heights = [len(row) + 1.5 for row in rows]
    grid = {
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
    found: dict[str, list[tuple[int, Any]]] = {}
    for index, (name, row) in enumerate(rows.items()):
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), index)
        found.setdefault(parts[-1], []).append((layer, row))
    return found


def _layer_axis(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def draw_layer_energy(path: Path, energy: Mapping[str, Any]) -> None:
    """Energy per token of every projection by layer: the dense product and the spiking one, fp32 table."""
    cost = COSTS_45NM["fp32"]
    sides = _by_projection({row["name"]: row for row in energy["layers"]})
    dense = [row["dense_macs_per_token"] * cost.mac for row in energy["layers"]]
    spiking = [row["accumulations_per_token"] * cost.ac for row in energy["layers"]]
    scale, name = unit(max(dense + spiking))
    layers = max(len(rows) for rows in sides.values())
    width = min(12, max(7, 2.5 + 0.16 * layers))
    grid = {"nrows": len(sides), "sharex": True, "squeeze": False}
    with picture(path, width, 0.5 + 2.2 * len(sides), **grid) as (figure, axes):
        for panel, (side, rows) in zip(axes[:, 0], sides.items(), strict=True):
            x = np.array([layer for layer, _ in rows])
            dense = [row["dense_macs_per_token"] * cost.mac / scale for _, row in rows]
            spiking = [row["accumulations_per_token"] * cost.ac / scale for _, row in rows]
            panel.bar(x - 0.2, dense, 0.4, color="#9a9a9a", label="dense: multiply-accumulates")
            panel.bar(x + 0.2, spiking, 0.4, color=COLOURS[1], label="spiking: accumulations")
            panel.set(title=side, ylabel=f"{name} per token")
            panel.grid(axis="y", color="#e5e5e5")
            panel.set_xlim(-0.8, layers - 0.2)
            _layer_axis(panel.xaxis)
        axes[-1, 0].set_xlabel("layer")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)


def draw_spike_map(path: Path, spikes: Mapping[str, Any]) -> bool:
    """A heat map of the spikes, a row a layer: mean ``|s|`` of every channel, sorted, where the counts have
    it, else the share of every spike count. Returns whether they had either to draw."""
    rows = spikes["projections"]
    if rows and all(row.get("channels") for row in rows.values()):
        key = "channels"
    elif rows and all(row.get("histogram") for row in rows.values()):
        key = "histogram"
    else:
        return False
    sides = _by_projection(rows)
    layers = max(len(side) for side in sides.values())
    height = min(12.0, max(3.2, 1.6 + 0.13 * layers))
    with picture(path, 9, height, ncols=len(sides), squeeze=False) as (figure, axes):
        images = {side: np.array([_line(row, key) for _, row in listed]) for side, listed in sides.items()}
        present = np.concatenate([image[image > 0] for image in images.values()])
        high = float(present.max()) if len(present) else 1.0
        norm = _norm(present, high, logarithmic=key == "histogram")
        for panel, (side, listed) in zip(axes[0], sides.items(), strict=True):
            first, last = listed[0][0], listed[-1][0]
            values = np.ma.masked_equal(images[side], 0.0) if key == "histogram" else images[side]
            reach = (values.shape[1] - 1) / 2
            across = (0, 100) if key == "channels" else (-reach - 0.5, reach + 0.5)
            shown = panel.imshow(
                values,
                aspect="auto",
                interpolation="nearest",
                cmap="cividis",
                norm=norm,
                extent=(*across, last + 0.5, first - 0.5),
            )
            panel.set_facecolor("#dddddd")  # a count that never came
            label = "channels, most active first, %" if key == "channels" else "spike count s"
            panel.set(title=side, xlabel=label)
            _layer_axis(panel.yaxis)
            if key == "histogram":
                _layer_axis(panel.xaxis)
        axes[0, 0].set_ylabel("layer")
        text = "mean |s| of a channel" if key == "channels" else "share of the counts (grey: none)"
        figure.colorbar(shown, ax=axes[0].tolist(), label=text, format="%g")
    return True


def _line(row: Mapping[str, Any], key: str) -> np.ndarray:
    values = np.array(row[key], dtype=float)
    if key == "channels":
        return -np.sort(-values)
    return values / max(1.0, values.sum())


def _norm(present: np.ndarray, high: float, logarithmic: bool) -> Any:
    from matplotlib.colors import LogNorm, PowerNorm

    if not logarithmic:
        return PowerNorm(0.5, 0.0, high)  # a few channels spike many times as much as the others
    low = float(present.min()) if len(present) else 0.1
    return LogNorm(min(low, high / 10), high)
