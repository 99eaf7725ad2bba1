"""What students of the converted model keep, against the weights that a token fetches and against energy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from students import Seeds, Student, measure
from students_section import About

from spiking_mamba.reports.figures import COLOURS, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_students"]

PANELS = {
    "megabytes": "MB of projections' weights, a token",
    "int8": "µJ of compute a token, int8 (hypothetical)",
}


@dataclass(frozen=True)
class Mark:
    """A model in a panel: where it lies, how far its interval reaches, and what is written beside it."""

    at: float
    kept: float
    below: float
    above: float
    label: str
    spiking: bool


def marks(drawn: Sequence[tuple[str, Student | Seeds]], cost: str) -> list[Mark]:
    """Models that have a cost of that kind, with the per cent of ability they keep; the teacher keeps all."""
    found = []
    for label, student in drawn:
        at = measure(student, cost)
        if at is None:
            continue
        kept, low, high = (measure(student, name) for name in ("kept", "kept.low", "kept.high"))
        if kept is None or low is None or high is None:
            kept = low = high = 100.0
        found.append(Mark(at, kept, kept - low, high - kept, label, student.rates is not None))
    return found


def draw_students(path: Path, about: About) -> bool:
    """Two panels, a mark a model; whether there was a student to draw."""
    students, groups = about.scored()
    known: dict[str, Student | Seeds] = {**students, **groups}
    drawn = [(label, known[name]) for name, label in about.drawn.items() if name in known]
    if not any(student.rates is not None for _, student in drawn):
        return False
    with picture(path, 8.2, 4.2, dpi=160, ncols=2, sharey=True) as (_, axes):
        for axis, (cost, title) in zip(axes, PANELS.items(), strict=True):
            _panel(axis, marks(drawn, cost), title)
        axes[0].set_title("ability kept, % of the teacher's", loc="left", fontsize=11.5)
    return True


def _panel(axes: "Axes", found: Sequence[Mark], title: str) -> None:
    for mark in found:
        colour = COLOURS[0] if mark.spiking else COLOURS[1]
        axes.errorbar(
            [mark.at], [mark.kept], [[mark.below], [mark.above]],
            fmt="o" if mark.spiking else "s", color=colour, markersize=9, capsize=3,
        )  # fmt: skip
        # rivals lie as high at more cost, or beside a student: their labels are on the other side
        axes.annotate(
            mark.label,
            (mark.at, mark.kept),
            (9, 0) if mark.spiking else (-9, 0),
            textcoords="offset points",
            ha="left" if mark.spiking else "right",
            va="center",
            color=colour,
            fontsize=11,
        )
    axes.set_xlim(left=0, right=1.08 * max((mark.at for mark in found), default=1.0))
    axes.set_xlabel(title, fontsize=11)
    axes.grid(color="#e5e5e5")
    axes.tick_params(labelsize=11)
