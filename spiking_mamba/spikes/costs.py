"""Energy of one operation, in picojoules: Horowitz's tables at 45 nm, and those of users."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from spiking_mamba.common.keys import reject_unknown_keys, shown
from spiking_mamba.common.yaml_text import load_yaml

__all__ = ["ACCUMULATOR", "COSTS_45NM", "Costs", "costs_45nm", "load_costs"]

# Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9, pJ
_ADDITION = {8: 0.03, 32: 0.1}  # of integers, by their bits
_MULTIPLICATION = 0.2  # of 8-bit integers
ACCUMULATOR = 32  # bits: a sum of some hundred 8-bit weights does not fit into 8


@dataclass(frozen=True)
class Costs:
    """Energy per operation in pJ.

    Attributes:
        mac, ac: of a multiply-accumulate and of an accumulation.
        byte: of one byte read from or written to memory. 24.96 is spikingjelly 2.0.0's
            (``op_counter.SimpleEnergyCostConfig``), 8 times the 3.12 pJ per bit of STEP.
        width: bytes of a number.
        quantised_mac: of the quantised rival's integer multiply-accumulate; ``None``: ``mac``.
    """

    mac: float
    ac: float
    byte: float = 24.96
    width: float = 4.0
    quantised_mac: float | None = None


def costs_45nm(accumulator: int = ACCUMULATOR) -> dict[str, Costs]:
    """Horowitz's tables: an accumulation is an addition, a multiply-accumulate a multiplication with it.

    Args:
        accumulator: bits of the integers that are added, 8 or 32, on every side of a comparison: in the int8
            table those of the spikes and of their rivals, in the others those of the quantised rivals.

    Returns:
        ``fp32``, ``fp16`` and ``int8``.

    Raises:
        ValueError: Horowitz has no such adder.
    """
    if accumulator not in _ADDITION:
        raise ValueError(f"accumulator must be 8 or 32 bits, got {accumulator!r}.")
    add = _ADDITION[accumulator]
    integer = round(_MULTIPLICATION + add, 12)
    return {
        "fp32": Costs(mac=4.6, ac=0.9, width=4.0, quantised_mac=integer),
        "fp16": Costs(mac=1.5, ac=0.4, width=2.0, quantised_mac=integer),
        "int8": Costs(mac=integer, ac=add, width=1.0),
    }


COSTS_45NM = costs_45nm()


def load_costs(path: str | Path) -> dict[str, Costs]:
    """Read tables of costs from a YAML file, ``name: {mac: pJ, ac: pJ}`` and :class:`Costs`' other fields.

    Raises:
        ValueError: names the file, the table and the key that is missing, unknown, or no positive number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file of costs {path}.")
    try:
        tables = load_yaml(path.read_text())
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is no YAML file: {error}") from None
    if not isinstance(tables, dict) or not tables:
        raise ValueError(f"{path} must map names of tables to their costs, got {shown(tables)}.")
    found = {}
    for name, table in tables.items():
        where = f"{path}: {name}"
        if not isinstance(name, str):
            raise ValueError(f"{where}: the name of a table must be a string.")
        if name in COSTS_45NM:  # reports and pictures call these Horowitz's
            raise ValueError(f"{where} is the name of a built-in table: choose another.")
        if not isinstance(table, dict):
            raise ValueError(f"{where} must be a mapping with mac and ac, got {shown(table)}.")
        reject_unknown_keys(table, (field.name for field in fields(Costs)), where)
        for key in ("mac", "ac"):
            if key not in table:
                raise ValueError(f"{where} lacks {key}.")
        for key, value in table.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            free = key == "byte"  # memory may be left out of an account; an operation is never free
            if not number or not math.isfinite(value) or value < 0 or (value == 0 and not free):
                raise ValueError(f"{where}: {key} must be a positive number, got {value!r}.")
        found[name] = Costs(**{key: float(value) for key, value in table.items()})
    return found
