"""Write docs/results.md from the rows that recipes/ablate/study.py has measured.

python recipes/ablate/results.py recipes/ablate/results.yaml
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

from figures import Records
from frontier import answer, draw
from pydantic import Field
from recorded import PERPLEXITY, Row, read
from sections import section
from students import Seeds, Student
from students_picture import draw_students
from students_section import About
from students_section import section as of_students
from table import Table

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.provenance import MARK
from spiking_mamba.common.schema import Name, Names, mapping_of, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.reports.document import Block, Heading, Paragraph, Picture, to_markdown
from spiking_mamba.reports.document import Table as Cells
from spiking_mamba.spikes.costs import ACCUMULATOR

RATE = 500_000  # tokens a second of student steps with their teacher on an H200, processes together
AROUND = 10.0  # seconds a row takes besides training


@schema
class Question:
    """What a referee would ask; all of it may have placeholders of ``figures.py``.

    Attributes:
        asked: in words.
        answer: with its numbers.
        unknown: what no record answers.
        measured: goes on with the answer, once what it names is in documents.jsonl.
        else_unknown: what is not known until then.
    """

    asked: str
    answer: str
    unknown: str
    measured: str = ""
    else_unknown: str = ""


@schema
class ResultsSettings:
    """Settings of the page; every field is a key of the YAML file.

    Attributes:
        tables: the YAML files of the tables, in the order of the page.
        page: the Markdown file to write; its picture stands beside it.
        results: folder of the rows' results; null: where each table says.
        referee: what a referee would ask.
        records: folder of the other records that they name.
        students: of the converted model, see ``students.About``; null: none.
        configuration: the YAML file of the source's own configuration on that model; null: none.
        appendix, appendix_text: what stands above the tables' rows.
    """

    tables: Annotated[Names, Field(min_length=1)]
    page: Name = "docs/results.md"
    results: Name | None = None
    referee: list[mapping_of(Question)] = field(default_factory=list)
    records: Name = "docs/results"
    students: mapping_of(About) | None = None
    configuration: Name | None = None
    appendix: str = ""
    appendix_text: str = ""


def write(settings: ResultsSettings) -> None:
    override = [] if settings.results is None else [f"results={settings.results}"]
    paths = [*settings.tables, *([settings.configuration] if settings.configuration else [])]
    tables = {path: parse_settings(Table, [path, *override]) for path in paths}
    rows = {table.name: read(table) for table in tables.values()}
    configuration = tables.pop(settings.configuration or "", None)
    everything = [row for table in tables.values() for row in rows[table.name]]
    runs = [run for row in everything for run in row.runs]
    blocks: list[Block] = [
        Heading("Results", 1),
        Paragraph(
            "What the source (SpikingMamba, arXiv 2510.04595) claims, measured on our own teacher as far "
            "as it can be seen at this scale. Written by recipes/ablate/results.py from the files in "
            "docs/results, a line a run: there is no number without a run behind it."
            + ("" if runs else " Nothing has been run yet: this is the plan.")
        ),
    ]
    image = Path(settings.page).with_name("frontier.png")
    image.parent.mkdir(parents=True, exist_ok=True)
    if settings.students is not None:
        blocks += converted_students(About(**settings.students), image.with_name("students.png"))
    if configuration is not None:
        blocks += section(configuration, rows, str(settings.configuration))
    if settings.referee:
        blocks += referee(settings, rows)
    if settings.appendix:
        blocks += [Heading(settings.appendix), Paragraph(settings.appendix_text)]
    blocks.append(Paragraph(answer(everything)))
    if draw(image, everything):
        blocks.append(Picture(image, "Perplexity above the best dense model against energy"))
    blocks += [Heading("How to read the tables"), *reading(everything)]
    blocks += plan({path: rows[table.name] for path, table in tables.items()})
    for path, table in tables.items():
        blocks += section(table, rows, path)
    write_whole(Path(settings.page), to_markdown(blocks))
    print(f"{settings.page}: {len(runs)} runs")


def converted_students(about: About, image: Path) -> list[Block]:
    """The section on students of the converted model, with its pictures."""
    texts = image.with_name(f"{image.stem}_texts.png")
    drawn = {
        image: (("kept",), "Ability kept against weights fetched and energy"),
        texts: (
            ("six", "kl", "perplexity"),
            "The six sets, KL and perplexity against weights fetched and energy",
        ),
    }
    return of_students(
        about, [Picture(p, said) for p, (w, said) in drawn.items() if draw_students(p, about, w)]
    )


def referee(settings: ResultsSettings, rows: Mapping[str, Sequence[Row]]) -> list[Block]:
    """The table of what a referee would ask."""
    students: dict[str, Student | Seeds] = {}
    if settings.students is not None:
        students = About(**settings.students).scored()
    records = Records(rows, Path(settings.records), students)
    body = []
    for number, line in enumerate(settings.referee, 1):
        measured = records.filled_if_recorded(line.get("measured", ""))
        left = "" if measured else line.get("else_unknown", "")
        answer, unknown = (records.filled(line[key]) for key in ("answer", "unknown"))
        body.append([str(number), line["asked"], f"{answer} {measured}".strip(), f"{unknown} {left}".strip()])
    about = "Numbers come from the records, as everywhere on this page; what no record answers is named."
    header = ["", "asked", "answer", "not known yet"]
    return [Heading("What a referee would ask"), Paragraph(about), Cells(header, body)]


def plan(tables: dict[str, list[Row]]) -> list[Block]:
    """What was to be run and what was, by the tables' YAML files."""
    body, total = [], 0.0
    for path, rows in tables.items():
        minutes = sum(len(row.seeds) * (row.tokens / RATE + AROUND) for row in rows) / 60
        spent = sum(run["seconds"] for row in rows for run in row.runs) / 60
        wanted, done = sum(len(row.seeds) for row in rows), sum(len(row.runs) for row in rows)
        total += minutes
        tokens = sum(len(row.seeds) * row.tokens for row in rows) / 1e6
        body.append([path, f"{wanted}", f"{tokens:.0f}", f"{minutes:.0f}", f"{done}", f"{spent:.1f}"])
    header = ["table", "runs planned", "M tokens", "minutes planned", "runs made", "minutes taken"]
    sizes = {parameters(row.table.teacher) for rows in tables.values() for row in rows} - {None}
    of_size = "".join(f", {size / 1e6:.1f}M parameters" for size in sorted(filter(None, sizes)))
    text = (
        f"GPU time is short, so every run is small. The budget: {total:.0f} minutes of one H200, at "
        f"{RATE // 1000}k tokens/s (student steps with the teacher's forward passes{of_size}; what "
        f"processes that share it see together) and {AROUND:.0f} seconds around each run. Minutes taken are "
        "each process's own, several of which shared a GPU (conversion: on a CPU). Tables stand in the "
        "order of their importance."
    )
    return [Heading("Plan"), Paragraph(text), Cells(header, body)]


def parameters(checkpoint: str) -> int | None:
    """How many numbers a checkpoint's weights are, by the header of the file; None where there is none."""
    path = Path(checkpoint, "model.safetensors")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def reading(rows: Sequence[Row]) -> list[Block]:
    """How the tables are meant, and what differences mean nothing."""
    text = (
        "Perplexity is that of the held-out documents, in float32. The best dense model is the one with the "
        "lowest perplexity of the teacher as it is and of the teacher trained further, dense, at any length "
        "and learning rate; 'over' is by how much a perplexity is higher. Mean abs s is weighted by output "
        "width. The next columns are how many times less energy than the dense model at fp32 the spikes "
        "counted in the very same forward passes stand for (docs/energy.md): in the projections alone, with "
        "the neurons' own additions, in the whole model, and where tokens are decoded one by one at batch 1 "
        "with memory traffic. The last is the projections at int8, hypothetical, against a network of the "
        "same 2D + 1 levels with int8 weights that skips zeros, both with sums of "
        f"{ACCUMULATOR} bits. Of several seeds: mean [95 % interval by Student's t over the row's seeds]. "
        "Changes between rows with the same seeds are compared in pairs, others by Welch's interval; of one "
        f"seed, or against one, there is none. An interval over seeds is none over texts.{noise(rows)} "
        "'Before' is converted and not trained. Rows were chosen on the very documents that report them: "
        "no part of the corpus is left that nothing was chosen by."
    )
    runs = [run for row in rows for run in row.runs]
    changed = sum(not Row(row.table, row.row, [run]).clean for row in rows for run in row.runs)
    if not changed:
        return [Paragraph(text)]
    marks = (
        f"{MARK} stands beside what rests on a run whose code differed from its commit, or had none: "
        f"{changed} of the study's {len(runs)} runs. New results are recorded from committed code alone."
    )
    return [Paragraph(text), Paragraph(marks)]


def noise(rows: Sequence[Row]) -> str:
    """How far seeds of one row lie apart, and what differences between single seeds mean nothing."""
    signed, others = [], []
    for row in rows:
        spread = interval(row.values(*PERPLEXITY)) if row.done and not row.dense else {"sd": None}
        if spread["sd"] is not None:
            deviation = 100 * spread["sd"] / spread["mean"]
            if row.table.settings(row.row).neuron["class"] == "neurons.SILIFNode":
                signed.append((deviation, spread["runs"] - 1))
            else:
                others.append(f"; {row.name}: {deviation:.1f} %")
    if not signed:
        return ""
    deviations = [deviation for deviation, _ in signed]
    pooled = math.sqrt(math.fsum(d * d * n for d, n in signed) / sum(n for _, n in signed))
    return (
        f" Seeds of a student have a standard deviation of {math.fsum(deviations) / len(signed):.2f} % on "
        f"average ({min(deviations):.2f} to {max(deviations):.2f} %{''.join(others)}), pooled {pooled:.2f} "
        "%, so between two rows with one seed each, differences below "
        f"{1.96 * math.sqrt(2) * pooled:.2f} % mean nothing."
    )


@fail_clearly()
def main() -> None:
    settings = parse_settings(ResultsSettings, description=__doc__)
    with interruptible(lambda: f"{settings.page} is as it was; the same command writes it."):
        write(settings)


if __name__ == "__main__":
    main()
