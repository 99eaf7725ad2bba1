"""The rows of a table with the runs that are recorded of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from placeholders import FIELDS
from table import CHECKS, OUTSIDE, Table, tokens_seen

from spiking_mamba.common.provenance import MARK, is_clean
from spiking_mamba.common.records import read_records
from spiking_mamba.evaluation.statistics import interval

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

    def values(self, *path: str) -> list[float]:
        """A number of every finished run, those that have it; ``"after", "gain", "fp32"``, say."""
        found = []
        for run in self.done:
            value: Any = run
            for key in path:
                value = None if value is None else value.get(key)
            if value is not None:
                found.append(value)
        return found

    def over(self, control: "Row | None") -> list[float]:
        """Perplexity over the mean of a control or any other row, less 1; over the teacher's for ``None``."""
        if control is None:
            return [r["after"]["perplexity"] / r["teacher"]["perplexity"] - 1 for r in self.done]
        mean = interval(control.values(*PERPLEXITY))["mean"]
        return [value / mean - 1 for value in self.values(*PERPLEXITY)]

    def per_seed(self, field: str) -> list[float]:
        """What ``placeholders.py`` may name, of every finished run: per cent, where it is a change."""
        if field in FIELDS:
            return self.values(*FIELDS[field])
        if field in CHECKS:
            changed, as_it_is = (self.values("checks", field, key) for key in ("perplexity", "without"))
            return [100 * (one / other - 1) for one, other in zip(changed, as_it_is, strict=True)]
        match field:
            case "over_teacher":
                return [100 * value for value in self.over(None)]
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
            wanted = {k: v for k, v in asdict(table.settings(row, seed)).items() if k not in OUTSIDE}
            if run["settings"] == json.loads(json.dumps(wanted)):
                runs.append(run)
        rows.append(Row(table, row, runs))
    return rows


def best_control(rows: Sequence[Row], tokens: int) -> Row | None:
    """The dense control of as many tokens whose perplexity is lowest."""
    controls = [row for row in rows if row.dense and row.tokens == tokens and row.done]
    return min(controls, key=lambda row: interval(row.values(*PERPLEXITY))["mean"], default=None)
