"""Accuracy against energy over all rows: whether the target is met, and the picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recorded import PERPLEXITY, Row, best_dense, marked

from spiking_mamba.common.provenance import MARK
from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.reports.figures import COLOURS, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TARGET_GAIN, TARGET_GAP = 4.76, 0.03
WIDEST, HIGHEST = 20.0, 0.25  # gain and gap that are drawn

__all__ = ["answer", "best_at", "draw", "non_dominated"]


def best_at(rows: Sequence[Row], scope: str, gain: float = TARGET_GAIN) -> Row | None:
    """Of the trained students with at least that gain the one with the lowest perplexity.

    Args:
        rows: of finished runs.
        scope: "gain", of the projections alone, or a name of ``placeholders.ENERGIES``.
        gain: the least that counts.
    """
    candidates = []
    for row in rows:
        gains = row.per_seed(scope) if row.tokens and not row.dense else []
        if gains and interval(gains)["mean"] >= gain:
            candidates.append(row)
    return min(candidates, key=lambda row: interval(row.over_teacher())["mean"], default=None)


def answer(rows: Sequence[Row]) -> str:
    """Whether the target is met: the best row at or above the target's gain."""
    best, row = best_dense(rows), best_at(rows, "gain")
    if row is None:
        return f"No student with a gain of at least {TARGET_GAIN}x has been trained yet."
    gap = row.over(best)
    reference = "the teacher as it is" if best is None else f"'{best.name}'"
    ends = "" if gap["low"] is None else f" [{100 * gap['low']:+.2f}, {100 * gap['high']:+.2f}]"
    text = (
        f"The target, at most {TARGET_GAP:.0%} above the best dense model's perplexity at a gain of at least "
        f"{TARGET_GAIN}x in the projections alone, is {'met' if gap['mean'] <= TARGET_GAP else 'missed'}: "
        f"'{row.name}' stands {100 * gap['mean']:+.2f} %{ends} from {reference} ({_seeds(row)}), the best "
        f"dense model of all that were tried{_controls(rows)}. It has a gain "
        f"of {_mean(row, 'gain'):.2f}x in the projections alone"
    )
    if row.energies("with_neurons"):
        text += (
            f", {_mean(row, 'with_neurons'):.2f}x with their neurons, {_mean(row, 'whole_model'):.2f}x in "
            f"the whole model and {_mean(row, 'decoding'):.2f}x where single tokens are decoded at batch 1, "
            f"memory traffic included; {_mean(row, 'multiplied'):.1f}% of its compute energy at fp32 is "
            "still spent on multiplications"
        )
    used, text = [row] if best is None else [row, best], f"{text}."
    if (whole := best_at(rows, "with_neurons")) is not None and whole is not row:
        change = whole.over(best)
        text += (
            f" Counted with their neurons, the best student at {TARGET_GAIN}x or more is '{whole.name}': "
            f"{100 * change['mean']:+.2f} % at {_mean(whole, 'with_neurons'):.2f}x ({_seeds(whole)})."
        )
        used.append(whole)
    return marked(text, used)


def _controls(rows: Sequence[Row]) -> str:
    controls = [row for row in rows if row.dense and row.done]
    gaps = [interval(row.over_teacher())["mean"] for row in controls]
    if not gaps:
        return ""
    return (
        f": {len(gaps)} dense controls, trained further, lie {100 * min(gaps):+.2f} to "
        f"{100 * max(gaps):+.2f} % from the teacher"
    )


def _seeds(row: Row) -> str:
    return f"{len(row.done)} seed{'s' if len(row.done) > 1 else ''}"


def _mean(row: Row, field: str) -> float:
    return interval(row.per_seed(field))["mean"]


def non_dominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of ``(gain, gap)`` those that no other has a larger gain and a smaller gap than, by their gains."""
    best: list[tuple[float, float]] = []
    for gain, gap in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or gap < best[-1][1]:
            best.append((gain, gap))
    return best[::-1]


class Mark(NamedTuple):
    """What is drawn of a model: gain and gap in per cent, and what is written beside it."""

    gain: float
    gap: float
    label: str = ""


def students(rows: Sequence[Row]) -> list[Mark]:
    """The best trained students of every energy, projections with neurons at fp32.

    Three of them are labelled: the one nearest to the dense model, the target's and, of several seeds, the
    one with the largest gain.
    """
    best, target = best_dense(rows), best_at(rows, "gain")
    by_point: dict[tuple[float, float], Row] = {}
    for row in rows:
        gains = row.energies("with_neurons") if row.tokens else []
        if gains:
            point = (interval(gains)["mean"], 100 * row.over(best)["mean"])
            if point[0] <= WIDEST and point[1] <= 100 * HIGHEST:
                by_point[point] = row
    points = non_dominated(list(by_point))
    several = [point for point in points if len(by_point[point].done) > 1]
    told = {*points[:1], *several[-1:]}
    marks = []
    for point in points:
        row = by_point[point]
        label = f"{point[0]:.1f}x, {point[1]:+.1f} %{'' if row.clean else ' ' + MARK}"
        marks.append(Mark(*point, label if point in told or row is target else ""))
    return marks


def in_int8(rows: Sequence[Row]) -> list[Mark]:
    """The target's student with int8 projections, and as the equal-level quantised network.

    That one multiplies and skips zeros: one function, whose perplexity was measured, and two prices.
    """
    row, best = best_at(rows, "gain"), best_dense(rows)
    changed = [] if row is None else row.values("checks", "int8", "perplexity")
    if row is None or not changed or not row.energies("with_neurons"):
        return []
    dense = row.values("teacher", "perplexity") if best is None else best.values(*PERPLEXITY)
    gap = 100 * (interval(changed)["mean"] / interval(dense)["mean"] - 1)
    mark = "" if row.clean else " " + MARK
    gains = {name: _mean(row, name) for name in ("int8_spiking", "int8_quantised")}
    return [
        Mark(
            gains["int8_quantised"],
            gap,
            f"multiplying,\nskipping zeros\n{gains['int8_quantised']:.0f}x{mark}",
        ),
        Mark(gains["int8_spiking"], gap, f"spiking\n{gains['int8_spiking']:.0f}x{mark}"),
    ]


def draw(path: Path, rows: Sequence[Row]) -> bool:
    """What perplexity one pays for what energy, a few marks with their labels; whether there was one."""
    spiking, rivals = students(rows), in_int8(rows)
    if not spiking:
        return False
    with picture(path, 5.2, 4.6, dpi=200) as (_, axes):
        blue, orange = COLOURS[:2]
        axes.plot([1], [0], "*", color="black", markersize=17)
        _say(axes, Mark(1, 0, "best dense"), (10, 6), color="black", weight="bold")
        gains, gaps = [m.gain for m in spiking], [m.gap for m in spiking]
        axes.plot(gains, gaps, "-", color=blue, linewidth=1.5, alpha=0.5)
        for place, mark in enumerate(spiking):
            axes.plot([mark.gain], [mark.gap], "o", color=blue, markersize=9 if mark.label else 3.5)
            if place:
                _say(axes, mark, (-8, 8), color=blue, ha="right")
            else:
                _say(axes, mark, (8, -6), color=blue, va="top")
        _say(
            axes,
            Mark(gains[-1], gaps[-1], "spiking students, fp32"),
            (-8, 24),
            color=blue,
            weight="bold",
            ha="right",
        )
        for mark, look, place in zip(rivals, ("s", "o"), ((0, -12), (4, 10)), strict=False):
            axes.plot([mark.gain], [mark.gap], look, color=orange, markersize=9)
            _say(axes, mark, place, color=orange, ha="center", va="top" if place[1] < 0 else "bottom")
        if rivals:
            above = Mark(rivals[0].gain, rivals[0].gap, "int8 weights:")
            _say(axes, above, (14, 40), color=orange, weight="bold", ha="center", va="bottom")
        top = max(*gaps, *(mark.gap for mark in rivals), 100 * TARGET_GAP)
        axes.set_xscale("log")
        axes.set(xlim=(0.85, 70), ylim=(-0.08 * top, 1.25 * top))
        axes.set_xticks([1, 2, 5, 10, 20, 50], ["1x", "2x", "5x", "10x", "20x", "50x"])
        axes.minorticks_off()
        axes.grid(color="#e5e5e5")
        axes.set_title("What one pays: perplexity above the best dense, %", fontsize=11.5)
        axes.set_xlabel(
            "what one gets: times less energy than dense fp32,\nprojections with their neurons", fontsize=11
        )
        axes.tick_params(labelsize=11)
    return True


def _say(
    axes: "Axes", mark: Mark, place: tuple[float, float], ha: str = "left", va: str = "bottom", **look
) -> None:
    """Write a mark's label beside it; ``place`` is in points."""
    if mark.label:
        axes.annotate(
            mark.label,
            (mark.gain, mark.gap),
            place,
            textcoords="offset points",
            ha=ha,
            va=va,
            fontsize=11.5,
            **look,
        )
