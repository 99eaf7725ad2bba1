"""The picture of a report's first screen: what students keep of a dense model, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spiking_mamba.reports.figures import COLOURS, Panel, short

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

__all__ = ["MOST", "Quantity", "energy_in", "energy_text", "overview"]

MOST = 6  # students that a picture tells apart
_REACH = 4.5  # powers of two that are drawn; what lies beyond is cut off, and said by its number
_LINE, _BAR = 0.34, 0.22  # inches of a line of text and of a bar
_SAVED, _KEPT = COLOURS[2], COLOURS[0]


@dataclass(frozen=True)
class Quantity:
    """One thing that students are held against the dense model by.

    Attributes:
        name: what it is; with a star at its end where it is hypothetical.
        ratios: of every student, how many times what the dense model has; ``None`` where it is not known.
        texts: the same in words and numbers.
        cost: whether it is something spent, of which less is better, and not something kept.
    """

    name: str
    ratios: Sequence[float | None]
    texts: Sequence[str]
    cost: bool = False


def energy_text(gain: float | None) -> str:
    """How much less, or more, energy a gain over another machine says; plain where it is not known."""
    if gain is None or math.isnan(gain) or gain <= 0:
        return "not known"
    if math.isinf(gain):
        return "none at all"
    more, less = f"{1 / gain:.2f}", f"{gain:.2f}"
    return "as much" if more == less else f"{less} times less" if gain > 1 else f"{more} times more"


def energy_in(energy: Mapping[str, Any], scope: str) -> Mapping[str, Any]:
    """An evaluation's energy in a scope, by table of costs; of decoding, with memory traffic."""
    return energy.get(scope) or (energy.get("with_memory") or {}).get(scope) or {}


def overview(quantities: Sequence[Quantity], students: Sequence[str], against: str) -> list[Panel]:
    """A bar a student for every quantity, to the left for less and to the right for more than ``against``.

    Nothing where there is nothing to draw.
    """
    if not quantities:
        return []
    lines = len(quantities)
    bars = lines * len(students)
    height = 0.75 + _LINE * lines + _BAR * bars + (_LINE * len(students) if len(students) > 1 else 0)
    said = "; ".join(
        f"{quantity.name}: " + ", ".join(_said(students, quantity.texts)) for quantity in quantities
    )
    draw = partial(_draw, quantities=quantities, students=students, against=against)
    return [Panel(f"Held against {against}: {said}.", height, draw)]


def _said(students: Sequence[str], texts: Sequence[str]) -> list[str]:
    return list(texts) if len(students) == 1 else [f"{n} {t}" for n, t in zip(students, texts, strict=True)]


def _draw(
    figure: "FigureBase", quantities: Sequence[Quantity], students: Sequence[str], against: str
) -> None:
    panel = figure.subplots()
    one = len(students) == 1
    found = [_power(ratio) for quantity in quantities for ratio in quantity.ratios]
    powers = [power for power in found if power is not None]
    low, high = min([-1.0, *powers]) - 0.15, max([0.5, *powers]) + 0.15
    right = high if one else high + 0.75 * (high - low)  # numbers stand beside the bars of several
    height = 0.0
    for quantity in quantities:
        height += _LINE
        bottom = height + _BAR * len(students)
        panel.plot([0.0, 0.0], [height, bottom], color="black", linewidth=0.8, zorder=3)
        at = height - 0.02
        panel.text(low, at, short(quantity.name, 40), ha="left", va="bottom", fontsize=11)
        if one:
            panel.text(right, at, quantity.texts[0], ha="right", va="bottom", fontsize=11, weight="bold")
        for place, (ratio, text) in enumerate(zip(quantity.ratios, quantity.texts, strict=True)):
            colour = (_SAVED if quantity.cost else _KEPT) if one else COLOURS[place]
            if (power := _power(ratio)) is not None:
                panel.barh(height + _BAR / 2, power, height=0.8 * _BAR, color=colour, zorder=2)
            if not one:
                panel.text(right, height + _BAR / 2, text, ha="right", va="center", fontsize=10.5)
            height += _BAR
    panel.set(xlim=(low, right), ylim=(height + 0.05, 0.0), yticks=[])
    panel.spines["left"].set_visible(False)
    step = 1 if high - low < 6 else 2
    ticks = [power for power in range(-4, 5, step) if low <= power <= high]
    panel.set_xticks(ticks, [_tick(power) for power in ticks])
    hypothetical = any(quantity.name.endswith("*") for quantity in quantities)
    panel.set_xlabel(
        f"times {short(against, 36)}" + ("; * hypothetical" if hypothetical else ""), fontsize=11
    )
    if not one:
        marks = [panel.barh(0, 0, color=colour)[0] for colour in COLOURS[: len(students)]]
        names = [short(student, 40) for student in students]
        figure.legend(marks, names, loc="outside lower left", frameon=False, fontsize=11)


def _power(ratio: float | None) -> float | None:
    """Of two, as it is drawn."""
    if ratio is None or math.isnan(ratio) or ratio < 0:
        return None
    return max(-_REACH, min(_REACH, math.log2(ratio))) if ratio > 0 else -_REACH


def _tick(power: int) -> str:
    return "same" if power == 0 else f"{2**power}x" if power > 0 else f"1/{2**-power}"
