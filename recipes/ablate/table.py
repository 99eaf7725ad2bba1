"""A table of students: what the study runs and what the page says of it, as its YAML file has it."""

import copy
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from placeholders import rows_named

from spiking_mamba.common.settings import is_list_of, reject_unknown_keys, set_dotted
from spiking_mamba.training.arguments import TRAINING_KEYS
from spiking_mamba.training.distillation import DistillationSettings

CHECKS = ("bf16", "int8", "spike_driven")
DRIVEN_ROWS = 8  # that spike_driven is measured on
_OWN = ("name", "seeds", "checks", "lever")  # of a row; its other keys are settings
# Of the settings, what the runner fills in or a number does not depend on.
OUTSIDE = ("teacher", "output", "data", "seed", "resume", "overwrite", "dry_run", "compile")


@dataclass
class Table:
    """A table of students; every field is a key of the YAML file.

    Attributes:
        name: of the file of results.
        title, about: what stands above the table in ``docs/results.md``.
        teacher: folder of a dense checkpoint with its tokenizer, what every student starts from.
        data, held_out: text to train on and to measure on, see ``spiking_mamba.data.load_text``.
        common: settings of every row: fields of ``spiking_mamba.training.distillation.DistillationSettings``.
        rows: in the order in which they run. Each has a ``name``, perhaps ``seeds`` and ``checks`` of its
            own, a ``lever`` by which the picture groups it, and settings: ``training.max_steps: 500``.
            A row without steps (``training.max_steps: 0``) is converted and measured, not trained. One with
            ``neuron: null`` is a dense control.
        claims: of the source: ``claim``, the ``verdict``, and perhaps further ``rows`` that it is judged by.
            The verdict is shown when they, and those that it names, are there. Numbers in it are
            placeholders, see ``placeholders.py``.
        levers: what single changes gave: ``change``, the ``row`` that has it, and the one it is held
            ``against``.
        findings: what follows: ``text`` with placeholders, shown when the rows that it names, and further
            ``rows``, were run.
        seeds: of rows that name none. All rows get their first seed before any gets its second.
        checks: perplexities measured beside every student, unless its row says otherwise. bf16: with all
            weights rounded to bfloat16, as a student may be shipped. int8: with projection weights rounded to
            int8, as in the equal-level quantised network. spike_driven: of 8 rows, fed ternary micro-steps.
        held_out_rows: rows of 512 tokens to measure on, from the first; null for all.
        results: folder of the results, ``<name>.jsonl`` with a line for each row and seed.
        output: folder of the students, of the tokenised data, and of what is said of a row that failed where
            an earlier result of it stays.
        only: patterns of the rows to run, as of file names; null for all.
        rehearse: every row once, two steps of two rows, measured on four, results beside the students in
            ``output``: whether all of it runs on this machine.
        minutes: start no row that would end later than this many minutes after the start; null: no limit.
    """

    name: str
    teacher: str
    data: Any
    held_out: Any
    common: dict
    rows: Any
    title: str = ""
    about: str = ""
    claims: Any = ()
    levers: Any = ()
    findings: Any = ()
    seeds: Any = (0,)
    checks: Any = ()
    held_out_rows: Any = None
    results: str = "docs/results"
    output: str = "runs/study"
    only: Any = None
    rehearse: bool = False
    minutes: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.rows, list) or not self.rows:
            raise ValueError(f"{self.name} has no rows.")
        if self.rehearse:
            self.held_out_rows, self.output = 4, str(Path(self.output, "rehearsal"))
            self.results = str(Path(self.output, "results"))
        self._check_names()
        number = isinstance(self.minutes, int | float) and not isinstance(self.minutes, bool)
        if self.minutes is not None and not (number and self.minutes > 0):
            raise ValueError(f"minutes must be a positive number or null, got {self.minutes!r}.")
        for seeds in (self.seeds, *(row.get("seeds", ()) for row in self.rows)):
            if not is_list_of(seeds, int):
                raise ValueError(f"seeds must be a list of integers, got {seeds!r}.")
        self._check_texts()
        for row in self.rows:
            reject_unknown_keys(dict.fromkeys(self.checks_of(row)), CHECKS, f"{row['name']}: checks")
            self.settings(row)

    def _check_names(self) -> None:
        names = [row.get("name") for row in self.rows]
        slugs = [slug(str(name)) for name in names]
        if not all(isinstance(name, str) and slug(name) for name in names) or len(set(slugs)) < len(slugs):
            raise ValueError(f"Every row of {self.name} needs a name of its own, got {names}.")
        self.only = [self.only] if isinstance(self.only, str) else self.only
        if self.only is not None and not is_list_of(self.only, str):
            raise ValueError("only takes names; quote one with a colon or comma twice: only='\"4.76x: *\"'.")
        for pattern in self.only or ():
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"only={pattern!r} is none of the rows {', '.join(map(repr, names))}.")

    def _check_texts(self) -> None:
        """Raise a ValueError where what the page says of the rows rests on none of them."""
        self._check_entries("claims", ("claim",), ("rows", "verdict"))
        self._check_entries("findings", ("text",), ("rows",))
        self._check_entries("levers", ("change", "row", "against"))
        for claim in self.claims:
            self._check_rows(claim.get("rows", []), "claims")
            self._check_rows(self._own_rows(claim.get("verdict", "")), "claims")
        for finding in self.findings:
            self._check_rows(finding.get("rows", []), "findings")
            self._check_rows(self._own_rows(finding["text"]), "findings")
        for lever in self.levers:
            self._check_rows([lever["row"], lever["against"]], "levers")

    def _check_entries(self, key: str, needed: Sequence[str], others: Sequence[str] = ()) -> None:
        """Raise a ValueError unless ``key`` is a list of mappings with these keys."""
        entries = getattr(self, key)
        if not is_list_of(entries, dict):
            raise ValueError(f"{self.name}: {key} must be a list of mappings, got {entries!r}.")
        for entry in entries:
            reject_unknown_keys(entry, (*needed, *others), f"{self.name}: {key}")
            if missing := [name for name in needed if name not in entry]:
                raise ValueError(f"{self.name}: {key}: {entry} must set {', '.join(missing)}.")

    def _check_rows(self, rows: Any, key: str) -> None:
        if not isinstance(rows, list):
            raise ValueError(f"{self.name}: {key}: rows must be a list of names, got {rows!r}.")
        reject_unknown_keys(dict.fromkeys(rows), [row["name"] for row in self.rows], f"{self.name}: {key}")

    def _own_rows(self, text: str) -> list[str]:
        """The rows of this table that a text names; those of others are the page's to find."""
        return [name for name in rows_named(text) if "::" not in name]

    def checks_of(self, row: dict[str, Any]) -> Sequence[str]:
        return row.get("checks", self.checks)

    def seeds_of(self, row: dict[str, Any]) -> list[int]:
        return list(row.get("seeds", self.seeds))

    def settings(self, row: dict[str, Any], seed: int = 0) -> DistillationSettings:
        """The settings of a row; the paths are the runner's to fill in."""
        given = copy.deepcopy(self.common)
        for key, value in row.items():
            if key not in _OWN:
                set_dotted(given, key, value)
        known = [f.name for f in fields(DistillationSettings) if f.name not in OUTSIDE or f.name == "compile"]
        reject_unknown_keys(given, known, row["name"])
        if self.rehearse and given["training"].get("max_steps"):
            given["training"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
        reject_unknown_keys(given.get("training", {}), TRAINING_KEYS, f"{row['name']}: training")
        settings = DistillationSettings(teacher=self.teacher, output="", data=self.data, seed=seed, **given)
        settings.make_loss()
        return settings

    def runs(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Rows and seeds, in the order in which they are run."""
        chosen = [
            r for r in self.rows if not self.only or any(fnmatch.fnmatch(r["name"], p) for p in self.only)
        ]
        last = 1 if self.rehearse else None
        seeds = [self.seeds_of(row)[:last] for row in chosen]
        for turn in range(max(map(len, seeds), default=0)):
            for row, own in zip(chosen, seeds, strict=True):
                if turn < len(own):
                    yield row, own[turn]

    @property
    def records(self) -> Path:
        """The file of the results."""
        return Path(self.results, f"{self.name}.jsonl")

    def folder(self, row: dict[str, Any], seed: int, suffix: str) -> Path:
        """What belongs to a row and seed in ``output``."""
        return Path(self.output, self.name, f"{slug(row['name'])}-{seed}{suffix}")


def slug(name: str) -> str:
    """A row's name as a file name."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")


def steps(settings: DistillationSettings) -> int:
    return int(settings.training.get("max_steps", 0))


def tokens_seen(settings: DistillationSettings) -> int:
    batch = settings.training.get("per_device_train_batch_size", 8)
    return steps(settings) * batch * settings.training.get("gradient_accumulation_steps", 1) * settings.length
