"""The table of a preference optimisation's results."""

from typing import Any

from spiking_mamba.reports.document import markdown_table

__all__ = ["summary"]


def summary(results: dict[str, Any]) -> str:
    """The table of a run's results, or that there are none."""
    before, after, change = results["before"], results["after"], results["change"]
    rows = []
    if change["accuracy"] is not None:
        for name, gain in change["accuracy"]["sum"].items():
            rows.append(
                _accuracy_row(f"preference accuracy, {name}, {gain['items']} items", name, "sum", results)
            )
        rows.append(_accuracy_row("the same, log-probability per token", "average", "per_token", results))
    if change["perplexity_ratio"] is not None:
        drift = f"{change['perplexity_ratio'] - 1:+.1%}"
        rows.append(["perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}", drift])
    if after["mean_abs"] is not None:
        rows.append(["mean |s|", f"{before['mean_abs']:.3f}", f"{after['mean_abs']:.3f}", ""])
        gains = [f"{side['energy']['fp32']:.2f}x" for side in (before, after)]
        rows.append(["energy gain of the projections, 45 nm fp32", *gains, ""])
    if not rows:
        return "Nothing was measured: there are neither held-out pairs nor a text."
    return markdown_table(["held-out", "before", "after", "change (95% interval)"], rows)


def _accuracy_row(label: str, task: str, kind: str, results: dict[str, Any]) -> list[str]:
    gain = results["change"]["accuracy"][kind][task]
    shares = [f"{results[side]['accuracy'][kind][task]:.3f}" for side in ("before", "after")]
    return [label, *shares, f"{gain['gain']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"]
