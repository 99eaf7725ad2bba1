"""A picture of where a model spikes: layers by channels."""

import re
from pathlib import Path

import torch

from spiking_mamba.reports.figures import save_picture
from spiking_mamba.spikes.counting import SpikeCounts

__all__ = ["draw_spike_map"]

_SHADES = 1000  # colours span three decades below the busiest channel
_COLUMNS = 1024  # as many as the picture has pixels for


def _layer(name: str) -> str:
    numbers = re.findall(r"\d+", name)
    return numbers[-1] if numbers else name


def draw_spike_map(counts: SpikeCounts, path: str | Path) -> None:
    """Draw mean ``|s|`` of every channel of every layer to a PNG, one panel for each kind of projection
    (their widths differ), all on one logarithmic colour scale; silent channels are grey. Of more channels
    than a picture has columns, each column shows the busiest. Beside each panel stand the layers' means.

    Raises:
        ValueError: there are no spikes to draw: the model is dense or has seen no token.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    kinds: dict[str, list[str]] = {}
    for name, spikes in counts.projections.items():
        if spikes.tokens:
            kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    if not kinds:
        raise ValueError("There are no spikes to draw: the model is dense, or it has seen no token.")
    maps = {
        kind: torch.stack([counts.projections[name].channel_mean_abs.cpu() for name in names])
        for kind, names in kinds.items()
    }
    top = max(float(each.max()) for each in maps.values()) or 1.0
    widest = max(float(each.mean(1).max()) for each in maps.values()) or 1.0
    colours = plt.get_cmap("viridis").with_extremes(bad="0.75")

    layers = max(map(len, kinds.values()))
    figure, axes = plt.subplots(
        len(kinds),
        2,
        figsize=(12, 1.6 + len(kinds) * min(6.0, 1.4 + 0.16 * layers)),
        width_ratios=(7, 1),
        squeeze=False,
        layout="constrained",
    )
    for (heat, bars), (kind, means) in zip(axes, maps.items(), strict=True):
        channels = means.shape[1]
        merged = -(-channels // _COLUMNS)
        busiest = torch.nn.functional.max_pool1d(means, merged, ceil_mode=True)
        image = heat.imshow(
            busiest.clamp(min=top / _SHADES).masked_fill(busiest == 0, float("nan")).numpy(),
            aspect="auto",
            interpolation="nearest",  # or rows and columns run into one another
            cmap=colours,
            norm=LogNorm(top / _SHADES, top),
            extent=(-0.5, busiest.shape[1] * merged - 0.5, len(means) - 0.5, -0.5),
        )
        silent = float((means == 0).double().mean())
        heat.set(
            title=f"{kind}: {channels} channels, {silent:.1%} silent",
            ylabel="layer",
            xlim=(-0.5, channels - 0.5),
        )
        labels = [_layer(name) for name in kinds[kind]]
        every = 1 + (len(labels) - 1) // 24
        heat.set_yticks(range(0, len(labels), every), labels[::every], fontsize=8)
        bars.barh(range(len(labels)), means.mean(1).tolist(), height=0.8, color="#2a7f62")
        bars.set(ylim=heat.get_ylim(), yticks=[], title="layer's mean")
        bars.set_xlim(0, 1.05 * widest)
    axes[-1, 0].set_xlabel("input channel")
    figure.colorbar(
        image, ax=axes, label="mean |s| (grey: silent)", location="bottom", aspect=60, shrink=0.6, pad=0.02
    )

    save_picture(figure, Path(path), dpi=150)
    plt.close(figure)
