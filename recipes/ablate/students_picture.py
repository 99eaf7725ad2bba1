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

COSTS = {
    "megabytes": "MB of projections' weights, a token",
    "int8": "µJ of compute a token, int8 (hypothetical)",
}
WORTHS = {
    "kept": "ability kept, % of the teacher's",
    "six": "mean of the six sets, %",
    "kl": "KL to the teacher, web, nats",
    "perplexity": "perplexity, web",
}


@dataclass(frozen=True)
class Mark:
    """A model in a panel: where it lies, how far its interval reaches, and what is written beside it."""

    at: float
    worth: float
    below: float
    above: float
    label: str
    spiking: bool


def marks(drawn: Sequence[tuple[str, Student | Seeds]], cost: str, worth: str) -> list[Mark]:
    """Models that have a cost and a worth of that kind; without an interval it reaches nowhere."""
    found = []
    for label, student in drawn:
        at, value = measure(student, cost), measure(student, worth)
        if at is None or value is None:
            continue
        low, high = value, value
        if worth == "kept" or isinstance(student, Seeds):
            ends = measure(student, f"{worth}.low"), measure(student, f"{worth}.high")
            low, high = (value if end is None else end for end in ends)
        found.append(Mark(at, value, value - low, high - value, label, student.adds))
    return found


def draw_students(path: Path, about: About, worths: Sequence[str] = ("kept",)) -> bool:
    """A row of panels for each worth, a mark a model; whether there was a student to draw."""
    known = about.scored()
    drawn = [(label, known[name]) for name, label in about.drawn.items() if name in known]
    if not any(student.adds for _, student in drawn):
        return False
    shape = {"nrows": len(worths), "ncols": len(COSTS), "sharex": "col", "sharey": "row", "squeeze": False}
    with picture(path, 8.2, 4.2 if len(worths) == 1 else 3.1 * len(worths), dpi=160, **shape) as (_, axes):
        for row, worth in zip(axes, worths, strict=True):
            for axis, cost in zip(row, COSTS, strict=True):
                _panel(axis, marks(drawn, cost, worth))
            row[0].set_title(WORTHS[worth], loc="left", fontsize=11.5)
        for axis, cost in zip(axes[-1], COSTS, strict=True):
            axis.set_xlabel(COSTS[cost], fontsize=11)
        axes[0, 0].get_figure().canvas.draw()  # lays it out
        for row, worth in zip(axes, worths, strict=True):
            for axis, cost in zip(row, COSTS, strict=True):
                _label(axis, marks(drawn, cost, worth))
    return True


def _panel(axes: "Axes", found: Sequence[Mark]) -> None:
    for mark in found:
        axes.errorbar(
            [mark.at], [mark.worth], [[mark.below], [mark.above]],
            fmt="o" if mark.spiking else "s", color=_colour(mark), markersize=9, capsize=3,
        )  # fmt: skip
    axes.set_xlim(left=0, right=1.08 * max((mark.at for mark in found), default=1.0))
    axes.grid(color="#e5e5e5")
    axes.tick_params(labelsize=11)


def _colour(mark: Mark) -> str:
    return COLOURS[0] if mark.spiking else COLOURS[1]


def _label(axes: "Axes", found: Sequence[Mark]) -> None:
    """Each mark's name beside it, where no other name or mark stands; once the panel's limits are there.

    Rivals lie as high at more cost, or beside a student: their names are on the other side if they can be.
    """
    from matplotlib.transforms import Bbox

    places = axes.transData.transform([(mark.at, mark.worth) for mark in found])
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in places]  # pixels
    for mark in sorted(found, key=lambda mark: mark.worth):
        own = 1 if mark.spiking else -1
        beside = [(own, 0), (-own, 0), *((own, up) for up in (8, -8, 13, -13, 18, -18, 23))]  # points
        for side, up in beside:
            text = axes.annotate(
                mark.label, (mark.at, mark.worth), (9 * side, up), textcoords="offset points",
                ha="left" if side > 0 else "right", va="center", color=_colour(mark), fontsize=11,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if (inside and not any(box.overlaps(other) for other in taken)) or (side, up) == beside[-1]:
                taken.append(box)
                break
            text.remove()
