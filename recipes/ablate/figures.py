"""Hold the numbers of pages that are written by hand to the records that they come from.

python recipes/ablate/figures.py recipes/ablate/figures.yaml              # says what differs
python recipes/ablate/figures.py recipes/ablate/figures.yaml renew=true   # writes the records' numbers

``figures.yaml`` has, for every page, its sentences with placeholders in place of their numbers, and a short
list of what is no result, with where it comes from. A number that neither accounts for is an error: none can
be typed. Besides those of ``placeholders.py``, with ``table::row``, placeholders are

    {held_out_512.over:+.2f}                       of docs/results/documents.jsonl, see ``of_documents``
    {speed Neurons#1 / node, bf16 / ILIFNode:.2f}  a cell of docs/results/speeds.jsonl: table, row, column
    {ratio T / row / A over row / B:.1f}           of two cells of one table
    {count runs:.0f}                               of ``counts``
    {cost 32 fp32 mac:.1f}                         of ``costs_45nm(32)``; gain: mac over ac
    {run table::row / 0 / after.perplexity:.2f}    of the run of a row with that seed
    {task student / piqa / acc:.3f}                of a zero-shot set; also: acc error, items, chance
    {outliers NAME / in_proj / 0 / 0.001 / wikipedia-leads:.1f}  how many times the control's perplexity
    {student s63 / kept.low:.1f}                   of a student, see ``students.MEASURES``
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import placeholders
import recorded
from documents import perplexity_ratio
from placeholders import PLACEHOLDER
from pydantic import Field
from students import Seeds, Student, measure
from students_section import About
from table import Table

from spiking_mamba import SpikingMambaConfig
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Name, Names, mapping_of, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.common.yaml_text import read_yaml
from spiking_mamba.spikes.costs import costs_45nm
from spiking_mamba.spikes.energy import energy_of_rates

NUMBER = re.compile(r"(?<![\w.])[+-]?\d(?:[\d,]*\d)?(?:\.\d+)?")
FENCED = re.compile(r"^```(\w*)\n.*?^```$|^    \S[^\n]*$", re.DOTALL | re.MULTILINE)  # or indented
TABLE = re.compile(r"^\|(.*)\|\n\| ?-.*\n((?:\|.*\|\n?)+)", re.MULTILINE)
# within lines: code, and the addresses of links
INLINE = re.compile(r"`[^`]*`|(?<=\])\([^)]*\)")


@schema
class Other:
    """What is no result.

    Attributes:
        text: a regular expression.
        source: where it comes from.
    """

    text: Name
    source: Name


@schema
class Printed:
    """Results of which no record was kept.

    Attributes:
        source: where they come from.
        lines: of the page that say them, word for word.
    """

    source: Name
    lines: list[Name]


@schema
class Page:
    """Where the numbers of a page come from; its tables of speeds.jsonl need no mention.

    Attributes:
        figures: sentences with placeholders.
        others: what is no result.
        printed: results without a record.
    """

    figures: list[Name] = field(default_factory=list)
    others: list[mapping_of(Other)] = field(default_factory=list)
    printed: list[mapping_of(Printed)] = field(default_factory=list)


@schema
class FigureSettings:
    """Keys of the YAML file.

    Attributes:
        tables: the YAML files of the study's tables.
        pages: by their paths.
        results: folder of the records.
        students: YAML file of ``results.py``, which says where the converted model's are; null: none.
        renew: write the records' numbers into the pages.
    """

    tables: Annotated[Names, Field(min_length=1)]
    pages: dict[str, mapping_of(Page)]
    results: Name = "docs/results"
    students: Name | None = None
    renew: bool = False


class NotRecordedError(ValueError):
    """A placeholder names a text or a student of which there is no record."""


class Records:
    """What a placeholder may name."""

    def __init__(
        self,
        rows: Mapping[str, Sequence[recorded.Row]],
        folder: Path,
        students: Mapping[str, Student | Seeds] | None = None,
    ) -> None:
        """Take the rows of the study's tables by their names, the folder of other records, and students."""
        self.students = students or {}
        self.rows = {(table, row.name): row for table, found in rows.items() for row in found}
        self.documents = {
            f"{Path(r['text']).stem.split('-')[0]}_{r['length']}": of_documents(r)
            for r in read_records(folder / "documents.jsonl")
        }
        self.outliers = {
            path.stem.removeprefix("outliers-"): json.loads(path.read_text())["rows"]
            for path in sorted(folder.glob("*/outliers-*.json"))
        }
        self.speeds = {record["table"]: record for record in read_records(folder / "speeds.jsonl")}
        self.counts = counts([run for row in self.rows.values() for run in row.runs], folder)
        self.tasks: dict[str, dict[str, Any]] = {}  # by model; of what two files have, the later one counts
        for path in sorted(folder.glob("*/tasks*.json")):
            (found,) = json.loads(path.read_text())["models"]
            self.tasks.setdefault(path.parent.name, {}).update(found["tasks"])

    def filled(self, text: str) -> str:
        """A text with its numbers."""
        return PLACEHOLDER.sub(lambda match: self.value(*match.groups()), text)

    def filled_if_recorded(self, text: str) -> str:
        """The same; nothing where it names a text or a student of which there is no record."""
        try:
            return self.filled(text)
        except NotRecordedError:
            return ""

    def find(self, name: str) -> recorded.Row:
        table, _, row = name.partition("::")
        if (table, row) not in self.rows:
            raise ValueError(f"There is no row {name!r}.")
        return self.rows[table, row]

    def cell(self, table: str, row: str, column: str) -> float:
        """A number of a table of speeds."""
        if table not in self.speeds:
            raise ValueError(f"There is no table of speeds {table!r}: {', '.join(self.speeds)}.")
        header, rows = self.speeds[table]["header"], {cells[0]: cells for cells in self.speeds[table]["rows"]}
        if row not in rows or column not in header:
            raise ValueError(f"{table} has no {row!r} or no {column!r}: {[*rows]}, {header}.")
        return float(rows[row][header.index(column)].rstrip("%"))

    def of_run(self, row: str, seed: str, path: str) -> float:
        """A number of one run of a row."""
        (value,) = [run for run in self.find(row).done if run["seed"] == int(seed)]
        for key in path.split("."):
            value = value[key]
        return value

    def of_outliers(self, name: str, site: str, value: str, fraction: str, text: str) -> float:
        """How many times the perplexity of a text is where the largest activations are replaced."""
        control, *others = self.outliers.get(name, [{}])
        wanted = site, float(value), float(fraction)
        rows = [r for r in others if (r["site"], r["value"], r["fraction"]) == wanted]
        if not rows or text not in control["perplexity"]:
            known = ", ".join(self.outliers)
            raise ValueError(f"No such row of outliers {name!r} on {text!r}: {known} were measured.")
        one, other = (r["perplexity"][text]["perplexity"] for r in (rows[0], control))
        return float(one / other)

    def of_student(self, name: str, what: str) -> float:
        """A number of a student of the converted model, or of a model beside it."""
        if name not in self.students:
            raise NotRecordedError(f"There is no student {name!r}: {', '.join(self.students)} were scored.")
        if (number := measure(self.students[name], what)) is None:
            raise ValueError(f"{name} has no {what}.")
        return number

    def score(self, model: str, task: str, what: str) -> float:
        """A number of a zero-shot set: a metric, its standard error, the number of items, or chance."""
        if task not in self.tasks.get(model, {}):
            raise ValueError(f"There is no {task!r} of {model!r}: {', '.join(self.tasks)} have tasks.json.")
        result = self.tasks[model][task]
        if what in ("items", "chance"):
            return result["n" if what == "items" else what]
        metric, _, error = what.partition(" ")
        return result["metrics"][metric]["stderr" if error else "value"]

    def value(self, name: str, form: str | None) -> str:
        """The text of a placeholder.

        Raises:
            ValueError: it names nothing that is recorded.
        """
        if "[" in name:
            return placeholders.fill(f"{{{name}:{form}}}" if form else f"{{{name}}}", self.find)
        if form is None:
            raise ValueError(f"{{{name}}} must have a form such as :.2f.")
        kind, _, rest = name.partition(" ")
        match kind:
            case "speed":
                table, row, column = rest.split(" / ", 2)
                number = self.cell(table, row, column)
            case "ratio":
                above, below = (part.split(" / ", 2) for part in rest.split(" over "))
                number = self.cell(*above) / self.cell(above[0], below[0], " / ".join(below[1:]))  # type: ignore[arg-type]
            case "count":
                number = self.counts[rest]
            case "cost":
                bits, table, attribute = rest.split()
                cost = costs_45nm(int(bits))[table]
                number = cost.mac / cost.ac if attribute == "gain" else getattr(cost, attribute)
            case "run":
                number = self.of_run(*rest.split(" / "))
            case "outliers":
                number = self.of_outliers(*rest.split(" / "))
            case "student":
                number = self.of_student(*rest.split(" / "))
            case "task":
                number = self.score(*rest.split(" / "))
            case _:
                text, _, field = name.partition(".")
                if text not in self.documents:
                    raise NotRecordedError(f"{{{name}}}: documents.jsonl has {', '.join(self.documents)}.")
                if field not in self.documents[text]:
                    raise ValueError(f"{{{name}}} is none of {', '.join(self.documents[text])}.")
                number = self.documents[text][field]
        return f"{number:{form}}"


def of_documents(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a student beside its teacher on a text, per cent where they are shares or changes."""
    ratio, spikes = perplexity_ratio(record["documents"]), record["spikes"]
    config = SpikingMambaConfig.from_pretrained(record["student"])
    energy = energy_of_rates(
        config, spikes["mean_abs"], spikes["nonzero_share"], digits=spikes["signed_digits"]
    )
    measures = {name: ratio[name] for name in ("teacher", "student", "documents")}
    measures |= {name: 100 * ratio[name] for name in ("over", "low", "high")}
    measures["nats"] = math.log1p(ratio["over"])
    measures |= {"kl": record["kl"], "top1": 100 * record["top1"], "tokens": record["tokens"]} | spikes
    measures |= {name: function(energy) for name, function in placeholders.ENERGIES.items()}
    measures["projections"] = energy["projections"]["fp32"]["gain"]
    measures["int8"] = energy["projections"]["int8"]["gain"]
    measures["prefill"] = energy["with_memory"]["projections"]["fp32"]["gain"]
    measures["shift_and_add"] = energy["projections"]["int8"]["gain_over_shift_and_add"]
    measures["whole_shift_and_add"] = energy["model"]["int8"]["gain_over_shift_and_add"]
    return measures


def counts(runs: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """How many runs there are, what the preference table left out, and what chosen settings gained."""
    preferences = [r for r in read_records(folder / "preference.jsonl") if r["kind"] == "run"]
    held_out = [r["held_out"] for r in preferences]
    return {
        "runs": len(runs),
        "changed": sum(not recorded.is_clean(run["commit"]) for run in runs),
        "held-out tokens": max((run.get("held_out_tokens", 0) for run in runs), default=0),
        "preference runs": len(preferences),
        "preference pairs": max((h["kept"] for h in held_out), default=0),
        "preference pairs cut": max((h["truncated"] for h in held_out), default=0),
        **recorded.chosen_gains(read_records(folder / "choice.jsonl")),
    }


def pattern(figure: str) -> re.Pattern[str]:
    """What a figure looks like in a page: its words, however they are broken into lines, and numbers."""
    pieces = PLACEHOLDER.split(figure)[::3]
    words = [r"\s+".join(map(re.escape, re.split(r"\s+", piece))) for piece in pieces]
    return re.compile(r"([+-]?\d[\d,]*(?:\.\d+)?)".join(words))


def held(text: str, figures: list[str], value: Callable[[str, str], str]) -> Iterator[tuple[int, int, str]]:
    """Where a page has the numbers of its figures, and what the records say.

    Raises:
        ValueError: a figure is not in the page, or there twice.
    """
    for figure in figures:
        matches = list(pattern(figure).finditer(text))
        if len(matches) != 1:
            raise ValueError(f"is {len(matches)} times in the page, not once: {figure!r}")
        for group, placeholder in enumerate(PLACEHOLDER.finditer(figure), 1):
            yield *matches[0].span(group), value(*placeholder.groups())


def examine(
    text: str,
    about: Page,
    value: Callable[[str, str], str],
    speeds: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[str, list[str]]:
    """The page with the records' numbers, and what is wrong with it as it is."""
    found = sorted(held(text, about.figures, value))
    wrong = [f"{text[a:b]} should be {new}: {_around(text, a, b)}" for a, b, new in found if text[a:b] != new]
    covered = [(a, b) for a, b, _ in found] + code(text) + speed_tables(text, speeds or {})
    for other in about.others:
        places = [m.span() for m in re.finditer(other["text"], text)]
        if not places:
            wrong.append(f"is not in the page: {other['text']!r}")
        covered += places
    for printed in about.printed:
        for line in printed["lines"]:
            place = text.find(line)
            if place < 0:
                wrong.append(f"is not in the page: {line!r}")
            covered.append((place, place + len(line)))
    for number in NUMBER.finditer(text):
        if not any(a <= number.start() and number.end() <= b for a, b in covered):
            wrong.append(f"{number.group()} comes from nowhere: {_around(text, *number.span())}")
    for a, b, new in reversed(found):
        text = text[:a] + new + text[b:]
    return text, wrong


def speed_tables(text: str, speeds: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Where a page has tables that are recorded speeds, cell by cell."""

    def cells(line: str) -> list[str]:
        return [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]

    kept = [(record["header"], record["rows"]) for record in speeds.values()]
    return [
        m.span()
        for m in TABLE.finditer(text)
        if (cells(m.group(1)), [cells(line) for line in m.group(2).splitlines()]) in kept
    ]


def code(text: str) -> list[tuple[int, int]]:
    """Where a page has code, which is tested otherwise, and no figures; blocks of ``text`` are none."""
    blocks = list(FENCED.finditer(text))
    spans = [m.span() for m in blocks if m.group(1) != "text"]
    start = 0
    for end, after in [*(m.span() for m in blocks), (len(text), len(text))]:
        spans += [(start + m.start(), start + m.end()) for m in INLINE.finditer(text[start:end])]
        start = after
    return spans


def _around(text: str, start: int, end: int) -> str:
    return repr(text[max(0, start - 50) : end + 30])


def main_of(settings: FigureSettings) -> list[str]:
    """What is wrong, each with its page."""
    tables = [parse_settings(Table, [path]) for path in settings.tables]
    rows = {table.name: recorded.read(table) for table in tables}
    known: dict[str, Student | Seeds] = {}
    if settings.students:
        known = About(**read_yaml(Path(settings.students))["students"]).scored()
    records, wrong = Records(rows, Path(settings.results), known), []
    for page, about in settings.pages.items():
        try:
            text, found = examine(Path(page).read_text(), Page(**about), records.value, records.speeds)
        except ValueError as error:
            wrong.append(f"{page}: {error}")
            continue
        if settings.renew:
            write_whole(Path(page), text)
            found = [each for each in found if " should be " not in each]
        wrong += [f"{page}: {each}" for each in found]
    return wrong


@fail_clearly()
def main() -> None:
    wrong = main_of(parse_settings(FigureSettings, description=__doc__))
    if wrong:
        sys.exit("\n".join(wrong))
    print("Every number is that of its record.")


if __name__ == "__main__":
    main()
