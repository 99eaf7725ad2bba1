"""What a run found: tables for the terminal, ``report.md``, ``report.html`` and a picture."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_mamba.common.files import write_whole
from spiking_mamba.reports.document import (
    Block,
    Heading,
    Paragraph,
    Picture,
    Quote,
    Table,
    markdown_table,
    write_document,
)
from spiking_mamba.reports.figures import picture
from spiking_mamba.reports.spike_map import count_map, share_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["summary", "write_report"]


def write_report(folder: Path, results: dict[str, Any]) -> str:
    """Write ``results.json``, ``report.md``, ``report.html`` and ``report.png`` to ``folder``.

    Returns:
        The summary.
    """
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    image = folder / "report.png"
    _draw(results, image)
    write_document(folder, _document(results, image))
    return summary(results)


def summary(results: dict[str, Any]) -> str:
    """The tables of a distillation's results, see ``recipes/quickstart``."""
    quality, costs = (markdown_table(t.header, t.rows) for t in (_quality(results), _costs(results)))
    return f"{quality}\n\n{_closed(results)}\n\n{costs}"


def _document(results: dict[str, Any], image: Path) -> list[Block]:
    about = (
        f"Perplexity is that of {results['held_out_tokens']} tokens of {results['held_out']}; zero-shot "
        "scores are accuracies of lm-eval's tasks with their standard errors. Energy counts operations on "
        "that text: in the projections a multiply-accumulate of the dense model against one accumulation a "
        "unit of |s|, in the neurons D accumulations a channel; compute only, unless it says otherwise. "
        "Integers are summed in 32 bits on every side."
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    made = f"seed {results['seed']}; {results['seconds']:.0f} s on {results['device']}; {versions}"
    return [
        Heading("Distilling a spiking Mamba2", 1),
        _quality(results),
        Paragraph(_closed(results)),
        _costs(results),
        Picture(image, "KL by step, spike histograms and energy"),
        Paragraph(about),
        Paragraph(f'A sample of the student, prompted with "{results["prompt"]}":'),
        Quote(results["sample"]),
        Paragraph(f"Settings: settings.yaml; {made}."),
    ]


def _quality(results: dict[str, Any]) -> Table:
    models = ("teacher", "before", "after")
    rows = [["perplexity, held-out text", *(f"{results[m]['perplexity']:.2f}" for m in models), ""]]
    students = [results[m] for m in models[1:]]
    rows += [
        ["KL to the teacher, nats a token", "", *(f"{student['kl']:.3f}" for student in students), ""],
        ["same likeliest token as it", "", *(f"{student['top1_agreement']:.1%}" for student in students), ""],
    ]
    for task, score in results["after"]["zero_shot"].items():
        cells = [_score(results[m]["zero_shot"][task]) for m in models]
        chance = "" if score["chance"] is None else f"{score['chance']:.3f}"
        rows.append([f"{task}, {score['n']} items", *cells, chance])
    return Table(["", "teacher", "student before", "student after", "chance"], rows)


def _score(score: dict[str, Any]) -> str:
    error = score["acc_stderr"]
    return f"{score['acc']:.3f} ± " + ("?" if error is None else f"{error:.3f}")


def _closed(results: dict[str, Any]) -> str:
    return f"Distillation closed {results['gap_closed']:.0%} of the gap in nats a token."


def _costs(results: dict[str, Any]) -> Table:
    energy, spikes = results["energy"], results["spikes"]
    rows = [
        ["mean absolute spike count, by output width", f"{spikes['mean_abs']:.3f}"],
        ["share of non-zero spike counts", f"{spikes['nonzero_share']:.3f}"],
        ["energy gain of the projections with their neurons, 45 nm fp32", _times(energy["with_neurons"])],
        ["the projections alone", _times(energy["fp32"])],
        ["the whole model", _times(energy["whole_model"])],
        ["decoding at batch 1, with memory traffic", _times(energy["decoding"])],
        ["projections, int8 (hypothetical: accuracy was measured in fp32)", _times(energy["int8"])],
        [f"against a quantised network of {results['levels']} levels, int8", _times(energy["quantised"])],
        ["against the same, skipping zeros", _times(energy["quantised_sparse"])],
    ]
    if "shift_and_add" in energy:
        rows.append(["against the same integers by shift-and-add", _times(energy["shift_and_add"])])
    return Table(["spikes and energy of the student", ""], rows)


def _times(gain: float, digits: int = 2) -> str:
    return f"{gain:.{digits}f}x" if math.isfinite(gain) else "infinite"  # without a spike


def _draw(results: dict[str, Any], path: Path) -> None:
    with picture(path, 15, 4.2, dpi=110, ncols=3) as (figure, (losses, spikes, energy)):
        points = [(row["step"], row["kl"]) for row in results["log"] if "kl" in row]
        losses.plot([x for x, _ in points], [y for _, y in points], marker=".")
        losses.set(title="KL of the student to its teacher", xlabel="step", ylabel="nats a token")
        losses.set_ylim(bottom=0)

        rows = results["spikes"]["projections"]
        names = [f"{n.split('.')[2]} {n.rsplit('.', 1)[1].removesuffix('_proj')}" for n in rows]
        shown = count_map(spikes, list(rows.values()), names, share_norm(list(rows.values())))
        spikes.set(title="Spike counts by layer", xlabel="spike count s", ylabel="layer, projection")
        figure.colorbar(shown, ax=spikes, label="share of the counts (grey: none)")
        _draw_energy(energy, results["energy"])


def _draw_energy(panel: "Axes", gains: dict[str, float]) -> None:
    names = {
        "with_neurons": "projections\nwith neurons",
        "whole_model": "whole model",
        "decoding": "decoding,\nwith memory",
        "quantised_sparse": "projections, over\nquantised int8\nskipping zeros *",
    }
    lengths = [gains[key] if math.isfinite(gains[key]) else 0.0 for key in names]
    bars = panel.barh(list(names.values()), lengths, color=["#2a7f62", "#2a7f62", "#2a7f62", "#b7c9c2"])
    panel.bar_label(bars, [_times(gains[key], 1) for key in names], padding=4)
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set(title="Energy gain over dense fp32", xlabel="times less, 45 nm operation costs")
    panel.text(1, -0.26, "* hypothetical", transform=panel.transAxes, ha="right", fontsize=8)
