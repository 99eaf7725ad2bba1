"""Which of an evaluation's tables of energy costs are whose, and which of them its pictures show."""

from collections.abc import Mapping, Sequence
from typing import Any

from spiking_mamba.spikes.energy import COSTS_45NM

__all__ = ["drawn_tables", "is_hypothetical", "own_tables", "tables_of"]


def tables_of(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """All tables that ``models`` of an evaluation's results have, in the order in which they first come."""
    energies = [model["energy"]["projections"] for model in models if model.get("energy")]
    return list(dict.fromkeys(table for energy in energies for table in energy))


def own_tables(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that a user gave, see :func:`spiking_mamba.spikes.energy.load_costs`."""
    return [table for table in tables_of(models) if table not in COSTS_45NM]


def drawn_tables(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that pictures show: fp32 and the user's own; where there is neither, the first.

    At fp16 and int8 the projections' gains are those at fp32 times a constant.
    """
    tables = tables_of(models)
    return [t for t in tables if t == "fp32" or t not in COSTS_45NM] or tables[:1]


def is_hypothetical(models: Sequence[Mapping[str, Any]], table: str) -> bool:
    """Whether the accuracy of one of them was not measured in the precision of ``table``."""
    return any(table in ((model.get("energy") or {}).get("hypothetical") or ()) for model in models)
