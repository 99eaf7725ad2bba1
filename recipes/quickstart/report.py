"""What a run found: a table for the terminal, ``report.md`` and a picture."""

import json
from pathlib import Path
from typing import Any

from spiking_mamba.common.files import write_whole
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import save_picture

__all__ = ["write_report"]


def _score(score: dict[str, Any]) -> str:
    error = score["acc_stderr"]
    return f"{score['acc']:.3f} ± " + ("?" if error is None else f"{error:.3f}")


def summary(results: dict[str, Any]) -> str:
    """The tables of a distillation's results, see ``recipes/quickstart``."""
    models = ("teacher", "before", "after")
    rows = [["perplexity, held-out text", *(f"{results[m]['perplexity']:.2f}" for m in models), ""]]
    for task, score in results["after"]["zero_shot"].items():
        cells = [_score(results[m]["zero_shot"][task]) for m in models]
        chance = "" if score["chance"] is None else f"{score['chance']:.3f}"
        rows.append([f"{task}, {score['n']} items", *cells, chance])
    quality = markdown_table(["", "teacher", "student before", "student after", "chance"], rows)
    energy, spikes = results["energy"], results["spikes"]
    rows = [
        ["mean absolute spike count, by output width", f"{spikes['mean_abs']:.3f}"],
        ["share of non-zero spike counts", f"{spikes['nonzero_share']:.3f}"],
        ["energy gain of the projections, 45 nm fp32", f"{energy['fp32']:.2f}x"],
        ["the same, int8 (hypothetical: accuracy was measured in fp32)", f"{energy['int8']:.2f}x"],
        [f"against a quantised network of {results['levels']} levels, int8", f"{energy['quantised']:.2f}x"],
        ["against the same, skipping zeros", f"{energy['quantised_sparse']:.2f}x"],
    ]
    costs = markdown_table(["spikes and energy of the student", ""], rows)
    closed = f"Distillation closed {results['gap_closed']:.0%} of the perplexity gap."
    return f"{quality}\n\n{closed}\n\n{costs}"


def write_report(folder: Path, results: dict[str, Any], picture: str = "report.png") -> str:
    """Write ``report.md``, the picture and ``results.json`` to ``folder``; return the summary."""
    text = summary(results)
    _draw(results, folder / picture)
    report = f"""# Distilling a spiking Mamba2

{text}

![KL by step, spike histograms and energy]({picture})

Perplexity is that of {results["held_out_tokens"]} tokens of {results["held_out"]}; zero-shot scores
are accuracies of lm-eval's tasks with their standard errors. Energy counts the operations of the projections
alone on that text: a multiply-accumulate of the dense model against one accumulation a unit of |s|, compute
only.

A sample of the student, prompted with "{results["prompt"]}":

> {results["sample"]}

Settings: `settings.yaml`; seed {results["seed"]}; {results["seconds"]:.0f} s on {results["device"]};
{", ".join(f"{name} {version}" for name, version in results["versions"].items())}.
"""
    write_whole(folder / "report.md", report)
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    return text


def _draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, spikes, energy) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    points = [(row["step"], row["kl"]) for row in results["log"] if "kl" in row]
    losses.plot([x for x, _ in points], [y for _, y in points], marker=".")
    losses.set(title="KL of the student to its teacher", xlabel="step", ylabel="nats a token")
    losses.set_ylim(bottom=0)

    rows = results["spikes"]["projections"]
    shares = [[count / max(1, sum(row["histogram"])) for count in row["histogram"]] for row in rows.values()]
    levels = len(shares[0]) // 2
    extent = (-levels - 0.5, levels + 0.5, len(shares), 0)
    image = spikes.imshow(shares, aspect="auto", cmap="viridis", norm="log", extent=extent)
    labels = [f"{n.split('.')[2]} {n.rsplit('.', 1)[1].removesuffix('_proj')}" for n in rows]
    spikes.set_yticks([i + 0.5 for i in range(len(labels))], labels, fontsize=8)
    spikes.xaxis.get_major_locator().set_params(integer=True)
    spikes.set(title="Spike counts by layer", xlabel="spike count s", ylabel="layer, projection")
    figure.colorbar(image, ax=spikes, label="share of spike counts")

    names = {
        "fp32": "dense fp32",
        "int8": "dense int8 *",
        "quantised_sparse": "quantised int8,\nskipping zeros",
    }
    gains = [results["energy"][key] for key in names]
    bars = energy.barh(list(names.values()), gains, color=["#2a7f62", "#7fb7a3", "#b7c9c2"])
    energy.bar_label(bars, [f"{gain:.1f}x" for gain in gains], padding=4)
    energy.axvline(1.0, color="black", linewidth=0.8)
    energy.invert_yaxis()
    energy.margins(x=0.15)
    energy.set(title="Energy gain of the projections against", xlabel="times less, 45 nm operation costs")
    energy.text(1, -0.26, "* hypothetical", transform=energy.transAxes, ha="right", fontsize=8)

    save_picture(figure, path, dpi=110)
    plt.close(figure)
