"""Accuracy against energy over all rows: whether the target is met, and the picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from recorded import Row, best_control, marked

from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.reports.figures import COLOURS, MARKERS, picture

TARGET_GAIN, TARGET_GAP = 4.76, 0.03
WIDEST = 20.0  # gain that is drawn

__all__ = ["answer", "draw", "non_dominated"]


def answer(rows: Sequence[Row]) -> str:
    """Whether the target is met: the best row at or above the target's gain."""
    candidates = []
    for row in rows:
        control = best_control(rows, row.tokens)
        gains = row.values("after", "gain", "fp32")
        if not row.dense and control is not None and gains and interval(gains)["mean"] >= TARGET_GAIN:
            candidates.append((interval(row.over(control))["mean"], row, control))
    if not candidates:
        gain = f"a gain of at least {TARGET_GAIN}x"
        return f"No student with {gain} has a control of as many tokens beside it yet."
    gap, row, control = min(candidates, key=lambda found: found[0])
    reached = "met" if gap <= TARGET_GAP else "not met"
    text = (
        f"The target, at most {TARGET_GAP:.0%} above the dense control's perplexity at a projection-energy "
        f"gain of at least {TARGET_GAIN}x (fp32 table), is {reached}: '{row.name}' stands {100 * gap:+.2f} "
        f"% from '{control.name}' at {interval(row.values('after', 'gain', 'fp32'))['mean']:.2f}x, "
        f"{_seeds(row)} against {_seeds(control)} of the control. Over the teacher as it is, from which both "
        f"start, the control stands {100 * _of_teacher(control):+.2f} %, the student "
        f"{100 * _of_teacher(row):+.2f} %: over that dense model the target would be "
        f"{'met' if _of_teacher(row) <= TARGET_GAP else 'missed'}."
    )
    return marked(text, [row, control])


def _seeds(row: Row) -> str:
    return f"{len(row.done)} seed{'s' if len(row.done) > 1 else ''}"


def _of_teacher(row: Row) -> float:
    return interval(row.over(None))["mean"]


def non_dominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of ``(gain, gap)`` those that no other has a larger gain and a smaller gap than, by their gains."""
    best: list[tuple[float, float]] = []
    for gain, gap in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or gap < best[-1][1]:
            best.append((gain, gap))
    return best[::-1]


def draw(path: Path, rows: Sequence[Row]) -> bool:
    """Perplexity over the control's against the energy gain, a colour a lever; whether there was a point."""
    points = []
    for row in rows:
        control = best_control(rows, row.tokens) if row.tokens else None
        gaps, gains = row.over(control), row.values("after", "gain", "fp32")
        if not row.dense and gaps and len(gains) == len(gaps) and row.tokens:
            points.append((row, [100 * gap for gap in gaps], gains, control is not None))
    if not points:
        return False
    levers = list(dict.fromkeys(row.lever for row, *_ in points))
    with picture(path, 8.5, 5.2) as (figure, axes):
        for place, lever in enumerate(levers):
            look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            chosen = [point for point in points if point[0].lever == lever]
            label: str | None = lever
            for row, gaps, gains, controlled in chosen:
                size = 5 + 1.5 * math.log2(max(1.0, row.tokens / 8e6))
                bars = interval(gaps)
                half = None if bars["sd"] is None else bars["high"] - bars["mean"]
                fill = {} if controlled else {"markerfacecolor": "none"}
                axes.errorbar(
                    interval(gains)["mean"], bars["mean"], half, linestyle="none", capsize=3,
                    markersize=size, label=label, **look, **fill,
                )  # fmt: skip
                label = None
        means = [(interval(gains)["mean"], interval(gaps)["mean"]) for _, gaps, gains, _ in points]
        # steps: between two students nothing was run
        axes.step(
            *zip(*non_dominated(means), strict=True), where="pre", color="silver", linewidth=1.5, zorder=0,
            label="best with that gain or more",
        )  # fmt: skip
        axes.axvline(TARGET_GAIN, color="grey", linewidth=0.8, linestyle="--")
        axes.axhline(100 * TARGET_GAP, color="grey", linewidth=0.8, linestyle="--")
        axes.axhline(0.0, color="black", linewidth=0.8)
        # a row that went wrong would squeeze all others into a line
        heights = sorted(gap for _, gap in means)
        top = 1.15 * max(100 * TARGET_GAP, min(heights[-1], 3 * heights[len(heights) // 2]))
        right = 1.1 * max((g for _, _, gains, _ in points for g in gains if g <= WIDEST), default=WIDEST)
        axes.set(xlim=(0.0, right), ylim=(min(-0.5, 1.1 * heights[0]), top))
        axes.text(TARGET_GAIN, top, f" {TARGET_GAIN}x", color="grey", va="top")
        axes.text(right, 100 * TARGET_GAP, f"{TARGET_GAP:.0%}", color="grey", ha="right", va="bottom")
        outside = sum(gap > top or gain > right for gain, gap in means)
        note = "Larger marks: more tokens. Conversions are not shown"
        axes.set_title(note + (f"; {outside} rows lie outside." if outside else "."), fontsize=9)
        axes.grid(color="#e5e5e5")
        axes.set(
            xlabel="energy gain of the projections over the dense model, times (fp32 table)",
            ylabel="perplexity over the dense control's, %\n(hollow: over the teacher's, for want of one)",
        )
        figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return True
