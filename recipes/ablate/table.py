"""A table of students: what the study runs and what the page says of it, as its YAML file has it."""

import copy
import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from placeholders import rows_named
from pydantic import AfterValidator, BeforeValidator, Field

from spiking_mamba.common.keys import reject_unknown_keys, set_dotted, shown
from spiking_mamba.common.schema import (
    Count,
    Name,
    Positive,
    Seeds,
    SettingsError,
    Sources,
    Words,
    mapping_of,
    schema,
)
from spiking_mamba.training.distillation import DistillationSettings

CHECKS = ("bf16", "int8", "spike_driven")
DRIVEN_ROWS = 8  # that spike_driven is measured on
_OWN = ("name", "seeds", "checks", "lever")  # of a row; its other keys are settings
# Of the settings, what the runner fills in or a number does not depend on.
OUTSIDE = ("teacher", "output", "data", "seed", "resume", "overwrite", "dry_run", "compile")
# Settings younger than the first records, and what those had: left out of a record where they are that.
YOUNGER = {"separate_documents": False, "decontaminate": False, "shift_inputs": False}


def _check_file_name(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"must be a file's name without a folder, got {shown(name)}.")
    return name


def _check_row_name(name: str) -> str:
    if not slug(name) or ".." in Path(name).parts or Path(name).is_absolute():
        raise ValueError(f"must be a name that is no path, got {shown(name)}.")
    return name


Patterns = Annotated[
    list[str],
    BeforeValidator(lambda only: [only] if isinstance(only, str) else only),
    Words("a pattern or a list of them (quote one with a colon or comma twice: only='\"4.76x: *\"')"),
]


@functools.cache  # the page asks for the same again and again
def _checked(fields: str) -> DistillationSettings:
    return DistillationSettings(**json.loads(fields))


@schema
class Claim:
    """A claim of the source.

    Attributes:
        claim: in words.
        verdict: what is found, with placeholders.
        rows: further ones that it is judged by.
    """

    claim: str
    verdict: str = ""
    rows: list[str] = field(default_factory=list)


@schema
class Lever:
    """What a single change gave.

    Attributes:
        change: in words.
        row: that has it.
        against: the row it is held against.
    """

    change: str
    row: str
    against: str


@schema
class Finding:
    """What follows.

    Attributes:
        text: with placeholders.
        rows: that must have been run, besides those that it names.
    """

    text: str
    rows: list[str] = field(default_factory=list)


@schema
class Row:
    """What of a row is no setting of its students.

    Attributes:
        name: its own.
        seeds: instead of the table's.
        checks: instead of the table's.
        lever: by which the picture groups it.
    """

    name: Annotated[Name, AfterValidator(_check_row_name)]
    seeds: Seeds = field(default_factory=lambda: [0])
    checks: list[Literal[CHECKS]] = field(default_factory=list)
    lever: str = ""


def _check_row(row: dict[str, Any]) -> dict[str, Any]:
    Row(**{"name": "", **{key: value for key, value in row.items() if key in _OWN}})
    return row


@schema
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
        renew: run rows again whose result came from code that was in no commit.
        minutes: start no row that would end later than this many minutes after the start; null: no limit.
    """

    name: Annotated[Name, AfterValidator(_check_file_name)]
    teacher: Name
    data: Sources
    held_out: Sources
    common: dict[str, Any]
    rows: Annotated[list[Annotated[dict[str, Any], AfterValidator(_check_row)]], Field(min_length=1)]
    title: str = ""
    about: str = ""
    claims: list[mapping_of(Claim)] = field(default_factory=list)
    levers: list[mapping_of(Lever)] = field(default_factory=list)
    findings: list[mapping_of(Finding)] = field(default_factory=list)
    seeds: Seeds = field(default_factory=lambda: [0])
    checks: list[Literal[CHECKS]] = field(default_factory=list)
    held_out_rows: Count | None = None
    results: Name = "docs/results"
    output: Name = "runs/study"
    only: Patterns | None = None
    rehearse: bool = False
    renew: bool = False
    minutes: Positive | None = None

    def __post_init__(self) -> None:
        if self.rehearse:
            self.held_out_rows, self.output = 4, str(Path(self.output, "rehearsal"))
            self.results = str(Path(self.output, "results"))
        self._check_names()
        self._check_texts()
        for row in self.rows:
            self._check_settings(row)

    def _check_names(self) -> None:
        names = [row["name"] for row in self.rows]
        slugs = [slug(name) for name in names]
        if twice := [name for name in names if slugs.count(slug(name)) > 1]:
            raise ValueError(f"Every row of {self.name} needs a name of its own, got {shown(twice)}.")
        for pattern in self.only or ():
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"only={shown(pattern)} is none of the rows {', '.join(map(repr, names[:20]))}; "
                    "quote one with a colon or comma twice: only='\"4.76x: *\"'."
                )

    def _check_texts(self) -> None:
        """Raise a ValueError where what the page says of the rows rests on none of them."""
        for claim in self.claims:
            self._check_rows(claim.get("rows", []), "claims")
            self._check_rows(self._own_rows(claim.get("verdict", "")), "claims")
        for finding in self.findings:
            self._check_rows(finding.get("rows", []), "findings")
            self._check_rows(self._own_rows(finding["text"]), "findings")
        for lever in self.levers:
            self._check_rows([lever["row"], lever["against"]], "levers")

    def _check_settings(self, row: dict[str, Any]) -> None:
        """Raise a ValueError for what cannot be trained, at the first row that has it."""
        try:
            settings = self.settings(row)
            if isinstance(given := settings.training.get("max_steps", 0), float | str) or given < 0:
                raise ValueError(f"training.max_steps must be an integer of at least 0, got {shown(given)}.")
        except SettingsError as error:
            raise SettingsError(self.name, [each.within(row["name"]) for each in error.problems]) from None
        except ValueError as error:
            raise ValueError(f"{row['name']}: {error}") from None

    def _check_rows(self, rows: Sequence[str], key: str) -> None:
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
        if self.rehearse and isinstance(given.get("training"), dict) and given["training"].get("max_steps"):
            given["training"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
        others = {"teacher": self.teacher, "output": self.output, "data": self.data, "seed": seed}
        return copy.deepcopy(_checked(json.dumps(given | others)))

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


def settings_recorded(settings: DistillationSettings) -> dict[str, Any]:
    """What a record says of a row's settings: all that its numbers depend on."""
    settings_used = {k: v for k, v in asdict(settings).items() if k not in OUTSIDE}
    return {k: v for k, v in settings_used.items() if k not in YOUNGER or v != YOUNGER[k]}


def slug(name: str) -> str:
    """A row's name as a file name."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")


def steps(settings: DistillationSettings) -> int:
    return int(settings.training.get("max_steps", 0))


def tokens_seen(settings: DistillationSettings) -> int:
    batch = settings.training.get("per_device_train_batch_size", 8)
    return steps(settings) * batch * settings.training.get("gradient_accumulation_steps", 1) * settings.length
