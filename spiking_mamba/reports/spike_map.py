"""Pictures of where a model spikes: layers by channels, and by spike counts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spiking_mamba.reports.figures import picture, short
from spiking_mamba.spikes.counts import SpikeCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["count_map", "draw_count_map", "draw_spike_map", "draw_spikes", "heat_map", "share_norm"]

_SHADES = 1000  # colours span three decades below the busiest channel
_LABELS = 28  # of layers, as many as stand below one another in four inches
_COLUMNS = 1024  # as many as the picture has pixels for


def draw_spike_map(counts: SpikeCounts, path: str | Path) -> None:
    """Draw mean ``|s|`` of every channel of every layer to a PNG.

    One panel for each kind of projection (their widths differ), all on one logarithmic colour scale; silent
    channels are grey. Of more channels than a picture has columns, each column shows the busiest. Beside each
    panel stand the layers' means.

    Raises:
        ValueError: there are no spikes to draw: the model is dense or has seen no token; or they are not
            finite.
    """
    rows = {name: spikes.to_dict(detail=True) for name, spikes in counts.projections.items() if spikes.tokens}
    if not rows:
        raise ValueError("There are no spikes to draw: the model is dense, or it has seen no token.")
    _draw_channel_map(rows, Path(path))


def draw_spikes(spikes: Mapping[str, Any], path: Path) -> bool:
    """Draw spikes as an evaluation's results have them; returns whether they had any to draw.

    :func:`draw_spike_map` where they have the means of every channel, else :func:`draw_count_map`.

    Args:
        spikes: see :meth:`SpikeCounts.to_dict`.
        path: of the PNG.
    """
    rows = {name: row for name, row in spikes["projections"].items() if row["tokens"]}
    if rows and all(row.get("channels") for row in rows.values()):
        _draw_channel_map(rows, path)
    elif rows and all(row.get("histogram") for row in rows.values()):
        draw_count_map(rows, path)
    else:
        return False
    return True


def _draw_channel_map(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    from matplotlib.colors import LogNorm

    kinds = _kinds(rows, "channels")
    maps = [np.array([row["channels"] for row in kind.rows], dtype=float) for kind in kinds]
    top = max(float(means.max()) for means in maps) or 1.0
    if not np.isfinite(top):
        raise ValueError("The spikes are not finite: the model has diverged.")
    widest = max(float(means.mean(1).max()) for means in maps) or 1.0
    height = 1.6 + len(kinds) * min(6.0, 1.4 + 0.16 * max(map(len, maps)))
    grid: dict[str, Any] = {"nrows": len(kinds), "ncols": 2, "width_ratios": (7, 1), "squeeze": False}
    with picture(path, 12, height, **grid) as (figure, axes):
        for (heat, bars), kind, means in zip(axes, kinds, maps, strict=True):
            channels = means.shape[1]
            merged = -(-channels // _COLUMNS)
            image = _busiest(means, merged)
            across = (-0.5, merged * image.shape[1] - 0.5)
            shown = heat_map(heat, image, kind.layers, across, LogNorm(top / _SHADES, top))
            title = f"{kind.name}: {channels:,} channels, {(means == 0).mean():.1%} silent"
            heat.set(title=title, ylabel="layer", xlim=(-0.5, channels - 0.5))
            bars.barh(range(len(means)), means.mean(1), height=0.8, color="#2a7f62")
            bars.set(ylim=heat.get_ylim(), yticks=[], title="layer's mean", xlim=(0, 1.05 * widest))
        axes[-1, 0].set_xlabel("input channel")
        bar: dict[str, Any] = {"location": "bottom", "aspect": 60, "shrink": 0.6, "pad": 0.02}
        figure.colorbar(shown, ax=axes, label="mean |s| (grey: silent)", **bar)


def draw_count_map(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw how often each spike count came in every layer, a panel for each kind of projection.

    Args:
        rows: of the projections by name, see :meth:`ProjectionSpikes.to_dict`, all with a ``histogram``.
        path: of the PNG.
    """
    kinds = _kinds(rows, "histogram")
    height = min(12.0, max(3.2, 1.6 + 0.13 * max(len(kind.rows) for kind in kinds)))
    with picture(path, 9, height, ncols=len(kinds), squeeze=False) as (figure, axes):
        norm = share_norm(list(rows.values()))
        for panel, kind in zip(axes[0], kinds, strict=True):
            shown = count_map(panel, kind.rows, kind.layers, norm)
            panel.set(title=kind.name, xlabel="spike count s")
        axes[0, 0].set_ylabel("layer")
        label = "share of the counts (grey: none)"
        figure.colorbar(shown, ax=axes[0].tolist(), label=label)


def count_map(
    panel: "Axes", rows: Sequence[Mapping[str, Any]], layers: Sequence[str], norm: Any
) -> "AxesImage":
    """The share of each count of ``-D .. D``, a row a projection; ``norm`` as of :func:`share_norm`."""
    from matplotlib.ticker import MaxNLocator

    image = np.array([_shares(row) for row in rows])
    reach = image.shape[1] / 2
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return heat_map(panel, image, layers, (-reach, reach), norm)


def heat_map(
    panel: "Axes", values: np.ndarray, layers: Sequence[str], across: tuple[float, float], norm: Any
) -> "AxesImage":
    """Rows of numbers as colours, the first row at the top; what is not above zero is grey.

    Args:
        panel: the axes to draw into.
        values: ``[layers, columns]``.
        layers: the rows' names.
        across: left and right end on the horizontal axis.
        norm: from numbers to colours; what lies below its range has the darkest.
    """
    from matplotlib import colormaps

    shown = panel.imshow(
        np.ma.masked_where(~(values > 0), values),
        aspect="auto",
        interpolation="nearest",  # or rows and columns run into one another
        cmap=colormaps["viridis"].with_extremes(bad="0.75"),
        norm=norm,
        extent=(*across, len(values) - 0.5, -0.5),
    )
    every = 1 + (len(layers) - 1) // _LABELS
    panel.set_yticks(range(0, len(layers), every), layers[::every], fontsize=8)
    return shown


def share_norm(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A logarithmic scale from the rarest spike count that came to the commonest."""
    from matplotlib.colors import LogNorm

    present = np.concatenate([share[share > 0] for share in map(_shares, rows)])
    low, high = (float(present.min()), float(present.max())) if len(present) else (0.1, 1.0)
    return LogNorm(min(low, high / 10), high)


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
