"""The rows of a table with the runs that are recorded of them."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from placeholders import ENERGIES, FIELDS
from scipy.special import stdtrit
from table import CHECKS, Table, settings_recorded, tokens_seen

import neurons
from spiking_mamba import SpikingMambaConfig
from spiking_mamba.common.provenance import MARK, is_clean
from spiking_mamba.common.records import read_records
from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.spikes.energy import energy_of_rates

PERPLEXITY = ("after", "perplexity")


@dataclass
class Row:
    """A row of a table and what its seeds gave."""

    table: Table
    row: dict[str, Any]
    runs: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.row["name"]

    @property
    def clean(self) -> bool:
        """Whether the code of every run is in a commit."""
        return all(is_clean(run["commit"]) for run in self.runs)

    @property
    def label(self) -> str:
        """The name, marked unless the row is clean."""
        return marked(self.name, [self])

    @property
    def lever(self) -> str:
        """By what the picture groups it: its lever, or its table."""
        return self.row.get("lever", self.table.name)

    @property
    def seeds(self) -> list[int]:
        return self.table.seeds_of(self.row)

    @property
    def tokens(self) -> int:
        return tokens_seen(self.table.settings(self.row))

    @property
    def dense(self) -> bool:
        return self.table.settings(self.row).neuron is None

    @property
    def done(self) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["status"] == "done"]

    @property
    def seeds_done(self) -> list[int]:
        return [run.get("seed", place) for place, run in enumerate(self.done)]

    def values(self, *path: str) -> list[float]:
        """A number of every finished run, those that have it; ``"after", "gain", "fp32"``, say."""
        collected = []
        for run in self.done:
            value: Any = run
            for key in path:
                value = None if value is None else value.get(key)
            if value is not None:
                collected.append(value)
        return collected

    def over_teacher(self) -> list[float]:
        """Perplexity over the teacher's in the same run, less 1."""
        return [r["after"]["perplexity"] / r["teacher"]["perplexity"] - 1 for r in self.done]

    def over(self, dense: "Row | None") -> dict[str, Any]:
        """:func:`change` from a dense row; from the teacher as it is, which no seed moves, for ``None``."""
        return interval(self.over_teacher()) if dense is None else change(self, dense)

    def energies(self, name: str) -> list[float]:
        """One of ``placeholders.ENERGIES`` of every finished run, by what was counted in it.

        None of a dense row or without the teacher's configuration.
        """
        collected = []
        for run in self.done:
            if run["after"].get("mean_abs") is not None and Path(self.table.teacher, "config.json").is_file():
                energy = energy_of(
                    self.table.teacher, json.dumps(run["settings"]["neuron"]), run["settings"]["membrane"],
                    run["after"]["mean_abs"], run["after"]["nonzero_share"],
                    run["settings"].get("shift_inputs", False),
                )  # fmt: skip
                collected.append(ENERGIES[name](energy))
        return collected

    def per_seed(self, field: str) -> list[float]:
        """What ``placeholders.py`` may name, of every finished run: per cent, where it is a change."""
        if field in FIELDS:
            return self.values(*FIELDS[field])
        if field in CHECKS:
            changed, as_it_is = (self.values("checks", field, key) for key in ("perplexity", "without"))
            return [100 * (one / other - 1) for one, other in zip(changed, as_it_is, strict=True)]
        if field in ENERGIES:
            return self.energies(field)
        match field:
            case "over_teacher":
                return [100 * value for value in self.over_teacher()]
            case "tokens":
                return [self.tokens / 1e6]
            case "seeds":
                return [len(self.done)]
            case "cut_off":  # the largest input that is counted in full
                settings = self.table.settings(self.row)
                return [settings.neuron["args"]["max_spike_count"] * settings.threshold]
        raise ValueError(f"A row has no {field}.")


def marked(text: str, rows: Sequence[Row]) -> str:
    """A text that rests on rows, with the mark if one of them is not clean."""
    return text if all(row.clean for row in rows) else f"{text} {MARK}"


def read(table: Table) -> list[Row]:
    """Every row with those of its runs that were made with the settings which the table has now."""
    found = {(run.get("row"), run.get("seed")): run for run in read_records(table.records)}
    rows = []
    for row in table.rows:
        runs = []
        for seed in table.seeds_of(row):
            if (run := found.get((row["name"], seed))) is None:
                continue
            if missing := [key for key in ("settings", "status", "commit") if key not in run]:
                raise ValueError(f"{table.records}: {row['name']}, seed {seed} has no {missing[0]}.")
            if run["settings"] == json.loads(json.dumps(settings_recorded(table.settings(row, seed)))):
                runs.append(run)
        rows.append(Row(table, row, runs))
    return rows


def best_dense(rows: Sequence[Row]) -> Row | None:
    """The dense row of any length and learning rate whose mean perplexity is lowest.

    ``None`` where that is the teacher as it is.
    """
    controls = [row for row in rows if row.dense and row.done]
    best = min(controls, key=lambda row: interval(row.over_teacher())["mean"], default=None)
    return None if best is None or interval(best.over_teacher())["mean"] >= 0 else best


def change(row: Row, against: Row) -> dict[str, Any]:
    """By how much a row's mean perplexity is above another's, less 1, with a 95 % interval.

    Rows with the same seeds, which see the same text in the same order, are compared in pairs, others by
    Welch's interval. A single seed tells nothing of the others: against one, or of one, there is no interval.

    Returns:
        ``mean``, ``sd`` (of the pairs; of the row's own seeds for Welch), ``low`` and ``high``.
    """
    ours, theirs = row.values(*PERPLEXITY), against.values(*PERPLEXITY)
    mean = float(np.mean(ours) / np.mean(theirs) - 1)
    if min(len(ours), len(theirs)) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    if row.seeds_done == against.seeds_done:
        pairs = interval([a / b - 1 for a, b in zip(ours, theirs, strict=True)])
        return {key: pairs[key] for key in ("mean", "sd", "low", "high")}
    parts = [float(np.var(values, ddof=1) / len(values) / np.mean(values) ** 2) for values in (ours, theirs)]
    if not sum(parts):
        return {"mean": mean, "sd": 0.0, "low": mean, "high": mean}
    freedom = sum(parts) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, (ours, theirs), strict=True))
    half = (1 + mean) * float(stdtrit(freedom, 0.975)) * sum(parts) ** 0.5
    sd = float(np.std(ours, ddof=1) / np.mean(theirs))
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


@functools.cache
def energy_of(
    teacher: str, neuron: str, membrane: str, mean_abs: float, nonzero: float, shifted: bool = False
) -> dict[str, Any]:
    """Energy of a student of a teacher, decoding at batch 1 included; the neuron as JSON.

    ``shifted``: its inputs are, which costs additions.
    """
    spec = json.loads(neuron)
    node = neurons.build(spec)
    surrogate = getattr(node, "surrogate_function", None)
    count = getattr(node, "max_spike_count", getattr(surrogate, "max_spike_count", 1))
    config = SpikingMambaConfig.from_pretrained(teacher, neuron=spec, membrane=membrane, shift_inputs=shifted)
    return energy_of_rates(config, mean_abs, nonzero, max_spike_count=int(count))


def chosen_gains(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Gains on the half to report on, of settings that ``choose.py`` chose: ``{"student dpo mean": ...}``.

    Named by the model's folder and the method: ``mean``, ``low`` and ``high`` over seeds, ``runs``.
    """
    gains: dict[str, list[float]] = {}
    for record in records:
        if record["chosen"]:
            name = f"{Path(record['provenance']['settings']['model']).name} {record['method']}"
            gains.setdefault(name, []).append(record["report"]["sum"]["gain"])
    found = {name: interval(values) for name, values in gains.items()}
    return {
        f"{name} {key}": v for name, values in found.items() for key, v in values.items() if v is not None
    }
