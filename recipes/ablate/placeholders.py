"""Numbers in a page's text, each named by the rows that it comes from.

    {perplexity[D=64]:.2f}                  the mean over the row's seeds
    {perplexity.max[D=64]:,.0f}             of its seeds min, max, abs; low, high: of the interval
    {perplexity[D=64 | control]:+.1f}       by how many per cent it is above another row, taken at its mean
    {perplexity[D=64 | D=8 + D=32]:+.1f}    the same above two rows, interpolated linearly to its own gain
    {times mean_abs[D=64 | D=8]:.1f}        how many times as large it is
    {max gain[D=64; D=8 | control]:.1f}     of several: min, max, abs
    {seeds[D=64]}                           in words: three seeds
    {perplexity[frontier::D=64]:.2f}        of another table

What stands between braces is looked up, never executed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.evaluation.statistics import interval

if TYPE_CHECKING:
    from recorded import Row

# What may be named, and where a record has it; the others are derived by recorded.Row.
FIELDS: dict[str, tuple[str, ...]] = {
    "perplexity": ("after", "perplexity"),
    "before": ("before", "perplexity"),
    "teacher": ("teacher", "perplexity"),
    "mean_abs": ("after", "mean_abs"),
    "nonzero": ("after", "nonzero_share"),
    "gain": ("after", "gain", "fp32"),
}
# Energy gains by what was counted: what of spiking_mamba.spikes.energy.energy_of_rates's report is meant.
ENERGIES: dict[str, Callable[[dict[str, Any]], float]] = {
    "with_neurons": lambda e: e["projections_with_neurons"]["fp32"]["gain"],
    "whole_model": lambda e: e["model"]["fp32"]["gain"],
    "decoding": lambda e: e["with_memory"]["decode"]["fp32"]["gain"],
    "neurons_add": lambda e: 100 * _neurons_add(e["projections"], e["projections_with_neurons"]),  # per cent
    "multiplied": lambda e: 100 * e["multiplied"]["fp32"],  # per cent
    "quantised": lambda e: e["projections"]["int8"]["gain_over_quantised_sparse"],
    "quantised_with_neurons": lambda e: e["projections_with_neurons"]["int8"]["gain_over_quantised_sparse"],
    "whole_quantised": lambda e: e["model"]["int8"]["gain_over_quantised_sparse"],
    "whole_int8": lambda e: e["model"]["int8"]["gain"],
    # what the quantised rival, int8, takes less than the student in fp32, in which accuracy was measured
    "rival_fp32": lambda e: 1 / e["projections"]["fp32"]["gain_over_quantised_sparse"],
    # over the dense projections in fp32: spikes with int8 weights, and the rival that multiplies
    "int8_spiking": lambda e: _over_dense_fp32(e, "spiking"),
    "int8_quantised": lambda e: _over_dense_fp32(e, "quantised_sparse"),
}
DERIVED = ("over_teacher", "bf16", "int8", "spike_driven", "tokens", "cut_off", "seeds")
OF_SEVERAL = ("min", "max", "abs", "times")
OF_SEEDS = ("mean", "min", "max", "abs", "low", "high")
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _neurons_add(alone: dict[str, Any], with_neurons: dict[str, Any]) -> float:
    """What neurons add to the accumulations of the projections, as a share of these."""
    return with_neurons["fp32"]["spiking_pj_per_token"] / alone["fp32"]["spiking_pj_per_token"] - 1


def _over_dense_fp32(energy: dict[str, Any], machine: str) -> float:
    scope = energy["projections_with_neurons"]
    return scope["fp32"]["dense_pj_per_token"] / scope["int8"][f"{machine}_pj_per_token"]


# of records, by a name and a form: {held_out_512.over:+.2f}
PLACEHOLDER = re.compile(r"{([^{}]+?)(?::([+,]*\.\df))?}")
# of rows
_PLACEHOLDER = re.compile(r"{(?:(\w+) )?(\w+)(?:\.(\w+))?\[([^][]*)\](?::(\+?,?\.\df))?}")


@dataclass(frozen=True)
class Item:
    """A row, and what it is held against: nothing, a row, or two to be interpolated."""

    row: str
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placeholder:
    text: str
    how: str | None
    field: str
    statistic: str
    items: tuple[Item, ...]
    form: str


def parse(text: str) -> list[str | Placeholder]:
    """The text in pieces.

    Raises:
        ValueError: something between braces is no placeholder, or names nothing that a row has.
    """
    pieces: list[str | Placeholder] = []
    for piece in re.split(r"({[^{}]*})", text):
        if piece.startswith("{"):
            pieces.append(_placeholder(piece))
        elif "{" in piece or "}" in piece:
            raise ValueError(f"A brace stands alone in {piece!r}.")
        elif piece:
            pieces.append(piece)
    return pieces


def _placeholder(text: str) -> Placeholder:
    match = _PLACEHOLDER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text} is no placeholder: it must look like {{perplexity[row]:.2f}}.")
    how, field, statistic, rows, form = match.groups()
    statistic = statistic or "mean"
    reject_unknown_keys({field: 0}, [*FIELDS, *ENERGIES, *DERIVED], text)
    reject_unknown_keys({statistic: 0}, OF_SEEDS, text)
    reject_unknown_keys({how: 0} if how else {}, OF_SEVERAL, text)
    items = []
    for item in rows.split(";"):
        row, *against = item.split(" | ")
        others = tuple(name.strip() for each in against for name in each.split(" + "))
        if len(against) > 1 or len(others) > 2 or not all([row.strip(), *others]):
            raise ValueError(f"{text}: {item.strip()!r} must be a row, 'a | b' or 'a | b + c'.")
        items.append(Item(row.strip(), others))
    if how == "times" and not all(item.against for item in items):
        raise ValueError(f"{text}: times needs a row that it is held against: 'a | b'.")
    if len(items) > 1 and how not in ("min", "max", "abs"):
        raise ValueError(f"{text} has several rows: say min, max or abs.")
    if (form is None) != (field == "seeds"):
        raise ValueError(f"{text} must have a form such as :.2f, but for seeds, which are words.")
    return Placeholder(text, how, field, statistic, tuple(items), form or "")


def rows_named(text: str) -> list[str]:
    """The rows that a text rests on, each once: ``name`` or ``table::name``."""
    items = [item for piece in parse(text) if isinstance(piece, Placeholder) for item in piece.items]
    return list(dict.fromkeys(name for item in items for name in (item.row, *item.against)))


def fill(text: str, find: "Callable[[str], Row]") -> str:
    """The text with its numbers.

    Args:
        text: with placeholders.
        find: gives the row of a name.

    Raises:
        ValueError: a row has no such number.
    """
    return "".join(piece if isinstance(piece, str) else _number(piece, find) for piece in parse(text))


def _number(placeholder: Placeholder, find: "Callable[[str], Row]") -> str:
    values = [_value(placeholder, item, find) for item in placeholder.items]
    match placeholder.how:
        case "min":
            value = min(values)
        case "max":
            value = max(values)
        case "abs":
            value = max(map(abs, values))
        case _:
            (value,) = values
    if placeholder.field == "seeds":
        number = int(value)
        word = WORDS[number] if number < len(WORDS) else str(number)
        return f"{word} seed{'' if number == 1 else 's'}"
    return f"{value:{placeholder.form}}"


def _value(placeholder: Placeholder, item: Item, find: "Callable[[str], Row]") -> float:
    row, others = find(item.row), [find(name) for name in item.against]
    if placeholder.statistic in ("low", "high") and len(others) == 1:
        return _of_change(placeholder, row, others[0])
    values = _values(placeholder, row, placeholder.field)
    if others:
        base = _base(placeholder, row, others)
        values = [v / base if placeholder.how == "times" else 100 * (v / base - 1) for v in values]
    return _statistic(placeholder, values)


def _of_change(placeholder: Placeholder, row: "Row", other: "Row") -> float:
    """An end of the interval of a change, per cent, which both rows' seeds move."""
    if placeholder.field != "perplexity" or placeholder.how == "times":
        raise ValueError(f"{placeholder.text}: changes of perplexity alone have intervals.")
    change = row.over(other)[placeholder.statistic]
    if change is None:
        raise ValueError(f"{placeholder.text}: against one seed, or of one, there is no interval.")
    return 100 * change


def _values(placeholder: Placeholder, row: "Row", field: str) -> list[float]:
    values = row.per_seed(field)
    if not values:
        raise ValueError(f"{placeholder.text}: {row.name!r} has no {field}.")
    return values


def _base(placeholder: Placeholder, row: "Row", others: "Sequence[Row]") -> float:
    """What a row is held against: a mean, or of two means that of its own gain."""
    means = [interval(_values(placeholder, other, placeholder.field))["mean"] for other in others]
    if len(means) == 1:
        return means[0]
    gain, *gains = (interval(_values(placeholder, each, "gain"))["mean"] for each in (row, *others))
    if not min(gains) <= gain <= max(gains):
        raise ValueError(f"{placeholder.text}: {row.name!r} has a gain that is not between the others'.")
    order = np.argsort(gains)
    return float(np.interp(gain, np.asarray(gains)[order], np.asarray(means)[order]))


def _statistic(placeholder: Placeholder, values: Sequence[float]) -> float:
    match placeholder.statistic:
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "abs":
            return max(map(abs, values))
    statistic = interval(values)[placeholder.statistic]
    if statistic is None:
        raise ValueError(f"{placeholder.text}: one seed has no interval.")
    return statistic
