"""The source's table at its own size: the page's section on students of a converted model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path

import numpy as np
from alignment import ALIGNED, Alignment, attach
from placeholders import PLACEHOLDER
from students import Items, Seeds, Student, measure, of_file, over_seeds, points_apart

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.provenance import MARK, is_clean
from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Name, mapping_of, schema
from spiking_mamba.data.benchmarks import SOURCE_TASKS
from spiking_mamba.reports.document import Block, Code, Heading, Paragraph, Picture
from spiking_mamba.reports.document import Table as Cells

__all__ = ["About", "section"]

COMMAND = "python recipes/convert/score_student.py recipes/distill/score.yaml model=FOLDER name=NAME"
PERTURB = "python recipes/convert/perturb.py recipes/convert/perturb.yaml"
ACCURACY = {
    "six sets, %": "{six:.2f}",
    "below the teacher there, points": "{gap:.2f} [{gap.low:.2f}, {gap.high:.2f}]",
    "all sets, %": "{all:.2f}",
    "ability kept, %": "{kept:.1f} [{kept.low:.1f}, {kept.high:.1f}]",
    "of the Transformer's, %": "{of_source:.1f}",
}
TEXTS = {
    "KL to the teacher, web": "{kl:.3f}",
    "the teacher, wiki": "{kl.wiki:.3f}",
    "KL to the Transformer, web": "{source_kl:.3f}",
    "the Transformer, wiki": "{source_kl.wiki:.3f}",
    "the teacher's likeliest token, web, %": "{agreement:.1f}",
    "perplexity, web": "{perplexity:.2f}",
}
COST = {
    "mean abs s": "{mean_abs:.3f}",
    "non-zero": "{nonzero:.3f}",
    "MB of weights a token, in their bits": "{megabytes:.0f}",
    "in int8": "{megabytes_int8:.0f}",
    "gain: projections": "{projections:.2f}",
    "with neurons": "{with_neurons:.2f}",
    "whole model": "{whole_model:.2f}",
    "decoding, all weights read": "{decoding:.2f}",
    "µJ a token: compute, fp32": "{fp32:.1f}",
    "compute, int8": "{int8:.1f}",
    "its integers multiplied, zeros skipped": "{int8_skipping:.1f}",
    "decoding, int8": "{int8_decoding:.0f}",
}
OVER_SEEDS = {
    "ability kept, %": "{kept:.1f} [{kept.low:.1f}, {kept.high:.1f}]",
    "below the teacher on six sets, points": "{gap:.2f} [{gap.low:.2f}, {gap.high:.2f}]",
    "all sets, %": "{all:.2f} [{all.low:.2f}, {all.high:.2f}]",
    "KL to the teacher, web": "{kl:.3f} [{kl.low:.3f}, {kl.high:.3f}]",
    "mean abs s, text": "{mean_abs.text:.3f} [{mean_abs.text.low:.3f}, {mean_abs.text.high:.3f}]",
    "non-zero, text": "{nonzero.text:.3f} [{nonzero.text.low:.3f}, {nonzero.text.high:.3f}]",
}


def fill(form: str, find: Callable[[str], float | None]) -> str | None:
    """A text with a number in place of every ``{measure:.2f}``; None where one is not there."""
    values = {name: find(name) for name, _ in PLACEHOLDER.findall(form)}
    if None in values.values():
        return None
    return PLACEHOLDER.sub(lambda match: f"{values[match[1]]:{match[2] or ''}}", form)


@schema
class About:
    """What the page says of students; every field is a key of ``results.yaml``.

    Attributes:
        title: of the section.
        glance: a table above all else, its header and its rows; in cells ``{name.measure:.2f}``, and where
            there is no such number "not run". source: where its figures that are not ours come from; it may
            have such places, too.
        text: before the tables.
        records: file of what ``score_student.py`` has logged.
        config: folder of the teacher.
        logs: of trainings, by the names of records that do not say how far it went.
        labels: what the tables call a record, or several seeds, by their name, in the tables' order.
        seeds: names of records that differ in their seed alone, by the name of all of them.
        made: by what a record's model was made, and scored.
        multiplied: names of records whose counts are multiplied, as integers of 8 bits.
        pairs: of names, whose difference is given.
        alignment: what ``recipes/rl`` made of them, see :class:`alignment.Alignment`; null: nothing.
        decoded: file of what ``gpu_decoding.py`` has recorded; null: none. size: what it calls the student.
        ways: of its ways, one a token, by the names of records that were decoded so.
        perturbed: file of what ``perturb.py`` has recorded; null: none. perturbed_text: before its table.
        drawn: what the picture calls a record, by its name.
        findings: behind the tables, with ``{name.measure:.2f}``; one without a number is left out.
    """

    title: Name
    text: str
    records: Name
    config: Name
    labels: dict[str, str]
    glance: list[list[str]] = field(default_factory=list)
    source: str = ""
    seeds: dict[str, list[str]] = field(default_factory=dict)
    multiplied: list[str] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    pairs: list[list[str]] = field(default_factory=list)
    alignment: mapping_of(Alignment) | None = None
    decoded: Name | None = None
    size: str = ""
    ways: dict[str, str] = field(default_factory=dict)
    perturbed: Name | None = None
    perturbed_text: str = ""
    drawn: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    logs: dict[str, Name] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {"made": self.made, "drawn": self.drawn, "multiplied": self.multiplied, "seeds": self.seeds}
        named |= {"ways": self.ways}
        if (alignment := self.aligned) is not None:
            named["alignment"] = [*alignment.students, *alignment.teachers]
        for number, names in enumerate((*self.pairs, *self.seeds.values())):
            named[f"pair or seeds {number}"] = names
        for key, names in named.items():
            reject_unknown_keys(dict.fromkeys(names), self.labels, f"{key} of students")

    @property
    def aligned(self) -> Alignment | None:
        return None if self.alignment is None else Alignment(**self.alignment)

    def scored(self) -> dict[str, Student | Seeds]:
        """What was scored, and the groups of seeds of it, by their names."""
        alignment = self.aligned
        unpacked = () if alignment is None else alignment.optimised
        students = of_file(Path(self.records), self.config, self.logs, self.multiplied, unpacked)
        if alignment is not None:
            attach(students, alignment, Path(self.records).parent)
        if self.decoded is not None:
            found = read_records(Path(self.decoded))
            ways = {r["way"]: r for r in found if (r["size"], r["batch"]) == (self.size, 1)}
            for name, way in self.ways.items():
                if name in students and way in ways:
                    students[name].record["decoded"] = ways[way]
        return {**students, **over_seeds(students, self.seeds)}


def section(about: About, pictures: Sequence[Picture] = ()) -> list[Block]:
    """The section, a picture above its text, others below its tables; nothing where nothing was scored."""
    known = about.scored()
    students = {name: each for name, each in known.items() if isinstance(each, Student)}
    groups = {name: each for name, each in known.items() if isinstance(each, Seeds)}
    found = [(label, students[name]) for name, label in about.labels.items() if name in students]
    if not found:
        return []

    def find(name: str) -> float | None:
        who, _, what = name.partition(".")
        reject_unknown_keys({who: 0}, about.labels, "a finding")
        return measure(known[who], what) if who in known else None

    blocks: list[Block] = [Heading(about.title)]
    if about.glance:
        header, *rows = about.glance
        glance = [[fill(cell, find) or "not run" if cell else "" for cell in row] for row in rows]
        blocks += [Cells(header, glance), Paragraph(fill(about.source, find) or about.source)]
    blocks += [*pictures[:1], Paragraph(about.text), Code(COMMAND)]
    for columns in (ACCURACY, TEXTS, COST):
        blocks.append(Cells(["model", *columns], [cells(label, s, columns) for label, s in found]))
    blocks += pictures[1:]
    if groups:
        header = ["model, of so many seeds", *OVER_SEEDS]
        names = {name: f"{about.labels[name]}, {len(group.students)}" for name, group in groups.items()}
        blocks.append(Cells(header, [cells(names[name], each, OVER_SEEDS) for name, each in groups.items()]))
    if (alignment := about.aligned) is not None:
        names = [n for n in (*alignment.teachers, *alignment.students) if n in students]
        body = [cells(about.labels[name], students[name], ALIGNED) for name in names]
        blocks.append(Cells(["model", *ALIGNED], body))
    blocks += compared(about, known)
    texts = [fill(text, find) for text in about.findings]
    blocks += [Paragraph(text) for text in texts if text is not None]
    if about.perturbed is not None:
        blocks += perturbed(Path(about.perturbed), about.perturbed_text)
    runs = [student.record["provenance"] for _, student in found]
    devices = sorted({run["hardware"]["device"] for run in runs})
    commits, dates = (sorted({str(run[key]) for run in runs}) for key in ("commit", "date"))
    when = " to ".join(sorted({dates[0][:10], dates[-1][:10]}))
    versions = sorted({run.get("versions", {}).get("transformers") for run in runs} - {None})
    by = f"; transformers {', '.join(versions)}" if versions else ""
    text = f"Scored on {', '.join(devices)}, {when}{by}; commit {', '.join(c[:7] for c in commits)}."
    blocks.append(Paragraph(text))
    return blocks


def compared(about: About, students: Mapping[str, Student | Seeds]) -> list[Block]:
    """Tables of differences between models, and of what each was made by."""
    blocks: list[Block] = []
    pairs = [[students[name] for name in names] for names in about.pairs if all(n in students for n in names)]
    if pairs:
        items = Path(about.records).parent
        rows = [[*(about.labels[s.name] for s in pair), *differences(*pair, items)] for pair in pairs]
        header = ["model", "less", "ability, % of the teacher's", "six sets, points", "all sets"]
        blocks.append(Cells(header, rows))
    made = [[about.labels[name], name, text] for name, text in about.made.items() if name in students]
    if made:
        blocks.append(Cells(["model", "record", "made by"], made))
    return blocks


def perturbed(path: Path, text: str) -> list[Block]:
    """The table of what models say whose weights hardly changed; nothing where none was measured."""
    rows = []
    for found in read_records(path):
        name = found["model"] if is_clean(found["commit"]) else f"{found['model']} {MARK}"
        own = [f"{found['kl']:.3f}", f"{100 * found['top1']:.1f}"]
        own = ["", ""] if found["changed"] == "nothing" else own
        numbers = [f"{found['perplexity']:.2f}", *own, f"{found['teacher_kl']:.3f}"]
        rows.append([name, found["changed"], *numbers])
    if not rows:
        return []
    of_itself = ("KL from itself", "same likeliest token, %")
    header = ["model", "weights changed by", "perplexity", *of_itself, "KL to the teacher"]
    return [Paragraph(text), Code(PERTURB), Cells(header, rows)]


def differences(one: Student | Seeds, other: Student | Seeds, folder: Path) -> list[str]:
    """What one has more than another with its interval, over the same items, of ability, six sets and all.

    Of several seeds an item counts as the share of them that have it right. Ability is in per cent of the
    teacher's, which is taken as known.
    """
    right = [items_of(each, folder) for each in (one, other)]
    first = one.students[0] if isinstance(one, Seeds) else one
    found = (
        points_apart(*right, first.record["sets"], first.ability_scale),
        points_apart(*right, SOURCE_TASKS),
        points_apart(*right, list(right[0])),
    )
    return [f"{each['gap']:+.1f} [{each['low']:+.1f}, {each['high']:+.1f}]" for each in found]


def items_of(who: Student | Seeds, folder: Path) -> Items:
    """Whether each item of each set is right, by the metric that counts for it."""
    each = who.students if isinstance(who, Seeds) else [who]
    found = [student.items(folder) for student in each]
    return {task: np.mean([items[task] for items in found], 0).tolist() for task in found[0]}


def cells(label: str, student: Student | Seeds, columns: Mapping[str, str]) -> list[str]:
    """A line of a table; what it has no number for is empty."""
    values = [fill(form, functools.partial(measure, student)) or "" for form in columns.values()]
    return [label if student.clean else f"{label} {MARK}", *values]
