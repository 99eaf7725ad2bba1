"""Pictures of where a model spikes: layers by channels, and by spike counts.

Colours are shared out by quantiles, so that each stands for a tenth of what is shown and none for nearly all
of it; what is silent has a colour of its own.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spiking_mamba.reports.figures import COLOURS, Panel, short, write_png
from spiking_mamba.spikes.counts import SpikeCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__ = ["count_panels", "draw_spike_map", "quantile_norm", "spike_panels"]

_SHADES = 10  # of as many cells each
_LABELS = 28  # of layers, as many as stand below one another in four inches
_COLUMNS = 1024  # of channels
_SILENT = COLOURS[1]  # unlike every colour of the map
_NEVER = "0.75"  # of counts


def draw_spike_map(counts: SpikeCounts, path: str | Path) -> None:
    """Draw mean ``|s|`` of every channel of every layer to a PNG.

    One panel for each kind of projection (their widths differ), all on one scale, each of whose colours
    stands for a tenth of what is shown; silent channels are orange. Of more than 1024 channels, each column
    shows the busiest of several. Beside each panel stand the layers' means, and how many of their channels
    are silent.

    Raises:
        ValueError: there are no spikes to draw: the model is dense or has seen no token; or they are not
            finite.
    """
    rows = {name: spikes.to_dict(detail=True) for name, spikes in counts.projections.items() if spikes.tokens}
    if not rows:
        raise ValueError("There are no spikes to draw: the model is dense, or it has seen no token.")
    write_png(Path(path), _channel_panels(rows))


def spike_panels(spikes: Mapping[str, Any]) -> list[Panel]:
    """Spikes as an evaluation's results have them; nothing where they have none to draw.

    The map of :func:`draw_spike_map` where they have the means of every channel, else :func:`count_panels`.

    Args:
        spikes: see :meth:`SpikeCounts.to_dict`.
    """
    rows = {name: row for name, row in spikes["projections"].items() if row["tokens"]}
    if rows and all(row.get("channels") for row in rows.values()):
        return _channel_panels(rows)
    if rows and all(row.get("histogram") for row in rows.values()):
        return count_panels(rows)
    return []


def quantile_norm(values: np.ndarray) -> Any:
    """A scale with as many of the numbers above zero in each of its colours."""
    from matplotlib.colors import BoundaryNorm

    present = values[values > 0]
    edges = np.unique(np.quantile(present, np.linspace(0, 1, _SHADES + 1))) if present.size else np.ones(1)
    if len(edges) == 1:  # one number, or none
        edges = np.array([0.9, 1.1]) * edges
    edges[-1] = np.nextafter(edges[-1], np.inf)  # the largest belongs to the last colour
    return BoundaryNorm(edges, 256)


def _channel_panels(rows: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    kinds = _kinds(rows, "channels")
    maps = [np.array([row["channels"] for row in kind.rows], dtype=float) for kind in kinds]
    if not all(np.isfinite(means).all() for means in maps):
        raise ValueError("The spikes are not finite: the model has diverged.")
    images = [_busiest(means, -(-means.shape[1] // _COLUMNS)) for means in maps]
    norm = quantile_norm(np.concatenate([image.ravel() for image in images]))
    widest = max(float(means.mean(1).max()) for means in maps) or 1.0
    panels = []
    for kind, means, image in zip(kinds, maps, images, strict=True):
        silent = (means == 0).mean()
        title = f"{kind.name}: {means.shape[1]:,} channels, {silent:.1%} silent"
        draw = partial(
            _draw_channels, kind=kind, means=means, image=image, norm=norm, widest=widest, title=title
        )
        text = f"Mean |s| of every channel by layer. {title}."
        panels.append(Panel(text + _silent_layers(kind, (means == 0).all(1)), _height(kind), draw))
    return panels


def _draw_channels(
    figure: "FigureBase",
    kind: "_Kind",
    means: np.ndarray,
    image: np.ndarray,
    norm: Any,
    widest: float,
    title: str,
) -> None:
    channels = means.shape[1]
    across = (-0.5, -(-channels // image.shape[1]) * image.shape[1] - 0.5)
    silent = (means == 0).sum(1)
    heat, mean, *beside = figure.subplots(
        1, 3 if silent.any() else 2, width_ratios=(6, 1, 1)[: 2 + silent.any()]
    )
    shown = _heat_map(heat, image, kind.layers, across, norm, _SILENT)
    heat.set(ylabel="layer", xlabel="input channel", xlim=(-0.5, channels - 0.5))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    mean.barh(range(len(means)), means.mean(1), height=0.8, color=COLOURS[0])
    mean.set(xlim=(0, 1.05 * widest), xlabel="mean")
    for axes in beside:
        _draw_silent(axes, silent, channels)
    for axes in (mean, *beside):
        axes.set(ylim=heat.get_ylim(), yticks=[])
        axes.tick_params(axis="x", labelsize=9.5)
    _colour_bar(figure, shown, [heat, mean, *beside], "mean |s|, a tenth of the channels a colour")


def _draw_silent(axes: "Axes", silent: np.ndarray, channels: int) -> None:
    """How many of the channels of every layer are silent; where all are, the bar is full."""
    bars = axes.barh(range(len(silent)), silent, height=0.8, color=_SILENT)
    if len(silent) <= _LABELS:
        axes.bar_label(
            bars, [f"{count:,}" if count else "" for count in silent], padding=1, fontsize=9, color=_SILENT
        )
    axes.set(xlim=(0, channels), xticks=[])
    axes.set_xlabel("silent\nchannels", color=_SILENT, fontsize=10)


def count_panels(rows: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    """How often each spike count came in every layer, a panel for each kind of projection.

    Args:
        rows: of the projections by name, see :meth:`ProjectionSpikes.to_dict`, all with a ``histogram``.
    """
    kinds = _kinds(rows, "histogram")
    maps = [np.array([_shares(row) for row in kind.rows]) for kind in kinds]
    norm = quantile_norm(np.concatenate([image.ravel() for image in maps]))
    panels = []
    for kind, image in zip(kinds, maps, strict=True):
        middle = image.shape[1] // 2
        quiet = image[:, middle] == image.sum(1)
        draw = partial(_draw_counts, kind=kind, image=image, norm=norm, quiet=quiet)
        text = f"How often each spike count came by layer, {kind.name}."
        panels.append(Panel(text + _silent_layers(kind, quiet), _height(kind), draw))
    return panels


def _draw_counts(
    figure: "FigureBase", kind: "_Kind", image: np.ndarray, norm: Any, quiet: np.ndarray
) -> None:
    from matplotlib.ticker import MaxNLocator

    silent = np.array([row.get("silent_channels") or 0 for row in kind.rows])
    widths = (6, 1) if silent.any() else (6,)
    grid: dict[str, Any] = {"width_ratios": widths, "squeeze": False}
    panel, *beside = figure.subplots(1, len(widths), **grid)[0]
    reach = image.shape[1] / 2
    shown = _heat_map(panel, image, kind.layers, (-reach, reach), norm, _NEVER)
    for layer in np.flatnonzero(quiet):
        panel.axhspan(layer - 0.5, layer + 0.5, color=_SILENT)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"Spike counts, {kind.name}"
    title += f": {quiet.sum()} of {len(quiet)} layers silent" if quiet.any() else ""
    panel.set(title=title, xlabel="spike count s", ylabel="layer")
    for axes in beside:
        _draw_silent(axes, silent, max(row.get("in_features") or 0 for row in kind.rows) or silent.max())
        axes.set(ylim=panel.get_ylim(), yticks=[])
        axes.tick_params(axis="x", labelsize=9.5)
    label = "share of the counts, a tenth of the cells a colour"
    _colour_bar(figure, shown, [panel, *beside], label + ("" if (image > 0).all() else "; grey: none"))


def _silent_layers(kind: "_Kind", silent: np.ndarray) -> str:
    names = [name for name, is_silent in zip(kind.layers, silent, strict=True) if is_silent]
    return f" Silent layers: {', '.join(names)}." if names else ""


def _height(kind: "_Kind") -> float:
    return 1.7 + min(5.0, 0.8 + 0.13 * len(kind.rows))


def _colour_bar(figure: "FigureBase", shown: Any, axes: "Sequence[Axes]", label: str) -> None:
    norm = shown.norm
    ticks = norm.boundaries[:: 1 if len(norm.boundaries) < 4 else 2]
    bar = figure.colorbar(
        shown, ax=axes, location="bottom", aspect=40, pad=0.02, spacing="uniform", ticks=ticks
    )
    bar.set_label(label, fontsize=10.5)
    bar.ax.set_xticklabels([f"{tick:.2g}" for tick in ticks], fontsize=9.5)
    bar.ax.minorticks_off()


def _heat_map(
    panel: "Axes",
    values: np.ndarray,
    layers: Sequence[str],
    across: tuple[float, float],
    norm: Any,
    absent: str,
) -> Any:
    """Rows of numbers as colours, the first row at the top.

    Args:
        panel: the axes to draw into.
        values: ``[layers, columns]``.
        layers: the rows' names.
        across: left and right end on the horizontal axis.
        norm: from numbers to colours.
        absent: colour of what is not above zero.
    """
    from matplotlib import colormaps

    shown = panel.imshow(
        np.ma.masked_where(~(values > 0), values),
        aspect="auto",
        interpolation="nearest",  # or rows and columns run into one another
        cmap=colormaps["viridis"].with_extremes(bad=absent),
        norm=norm,
        extent=(*across, len(values) - 0.5, -0.5),
    )
    every = 1 + (len(layers) - 1) // _LABELS
    panel.set_yticks(range(0, len(layers), every), layers[::every], fontsize=9.5 if every > 1 else 9)
    return shown


def _shares(row: Mapping[str, Any]) -> np.ndarray:
    """How often each count of ``-D .. D`` came, as a share: ``[2D + 1]``."""
    counts = np.array(row["histogram"], dtype=float)
    return counts / max(1.0, counts.sum())


def _busiest(means: np.ndarray, merged: int) -> np.ndarray:
    """Of every ``merged`` channels the largest mean: ``[layers, ceil(channels / merged)]``."""
    missing = -means.shape[1] % merged
    return np.pad(means, ((0, 0), (0, missing))).reshape(len(means), -1, merged).max(2)


class _Kind(NamedTuple):
    """Projections of one width: the ``out_proj`` of a mixer and that of an MLP are of two kinds."""

    name: str
    layers: list[str]
    rows: list[Mapping[str, Any]]


def _kinds(rows: Mapping[str, Mapping[str, Any]], key: str) -> list[_Kind]:
    """The rows by the last part of their name and how many numbers they have under ``key``."""
    kinds: dict[tuple[str, int], _Kind] = {}
    for name, row in rows.items():
        last = name.rsplit(".", 1)[-1]
        kind = kinds.setdefault((last, len(row[key])), _Kind(last, [], []))
        numbers = re.findall(r"\d+", name)
        kind.layers.append(numbers[-1] if numbers else short(name))
        kind.rows.append(row)
    return list(kinds.values())
