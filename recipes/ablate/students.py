"""The source's table at its own size: students of a converted model beside their teacher and its rivals.

Of records that ``recipes/convert/score_student.py`` has written, all on full sets.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from placeholders import ENERGIES, PLACEHOLDER
from recorded import energy_of

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.provenance import MARK, is_clean
from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Name, schema
from spiking_mamba.data.benchmarks import BENCHMARK_SETS, SOURCE_TASKS
from spiking_mamba.model.projection import spike_fed
from spiking_mamba.reports.document import Block, Code, Heading, Paragraph
from spiking_mamba.reports.document import Table as Cells

__all__ = ["MEASURES", "About", "Student", "of_file", "section"]

COMMAND = "python recipes/convert/score_student.py recipes/distill/score.yaml model=FOLDER name=NAME"
GROUP = 32  # inputs that share a scale where weights have less than 8 bits


class Student:
    """A model that was scored: a spiking student, its teacher, or a rival.

    Args:
        record: a line of the log.
        config: folder of the teacher's configuration, of which energies are calculated.
        source: the record of the Transformer that everything was converted from, if it was scored.
        teacher: that of the dense model of `config`, if it was.
    """

    def __init__(
        self,
        record: Mapping[str, Any],
        config: str,
        source: Mapping[str, Any] | None = None,
        teacher: Mapping[str, Any] | None = None,
    ) -> None:
        self.record, self.config, self.name = record, config, record["name"]
        self.source, self.teacher = source, teacher

    @property
    def clean(self) -> bool:
        return is_clean(self.record["provenance"]["commit"])

    def score(self, task: str) -> float:
        """Accuracy on a set by the metric that counts for it, in per cent."""
        return 100 * self.record["tasks"][task][BENCHMARK_SETS[task].main]

    @property
    def six(self) -> float:
        """Mean accuracy on the source's six sets, in per cent."""
        return sum(map(self.score, SOURCE_TASKS)) / len(SOURCE_TASKS)

    @property
    def all(self) -> float:
        """The same over all sets that were asked."""
        return sum(map(self.score, self.record["tasks"])) / len(self.record["tasks"])

    @property
    def of_source(self) -> float | None:
        """Its ability as a share of the source's, per cent."""
        if self.source is None or self.source["sets"] != self.record.get("sets"):
            return None
        return 100 * self.record["ability"] / self.source["ability"]

    @property
    def below_all(self) -> float | None:
        """By how many points it lies below its teacher over all sets, if the teacher was scored on them."""
        if self.teacher is None or self.teacher["tasks"].keys() != self.record["tasks"].keys():
            return None
        return Student(self.teacher, self.config).all - self.all

    @property
    def rates(self) -> dict[str, float] | None:
        """Mean |s| and share of non-zero counts over the sets, first tokens included; None if dense."""
        return None if "spikes" not in self.record else self.record["spikes"]["both"]

    @property
    def energy(self) -> dict[str, Any]:
        """What its spikes stand for; of a dense model none counts."""
        neuron = self.record.get("neuron") or {"class": "neurons.SILIFNode", "args": {"max_spike_count": 1}}
        rates = self.rates or {"mean_abs": 1.0, "nonzero": 1.0}
        shifted = self.record.get("shift_inputs", False)
        return energy_of(
            self.config, json.dumps(neuron), "token", rates["mean_abs"], rates["nonzero"], shifted
        )

    def microjoules(self, table: str, scope: Sequence[str]) -> float | None:
        """Of a token, spiking or multiplied; None where a dense model was not scored in such a precision.

        At int8 it was if it was rounded to 8 bits. The source is no model of this configuration.
        """
        bits = (self.record.get("weights"), self.record.get("activations"))
        dense = {"fp32": (None, None), "int8": (8, 8)}
        if "model" not in self.record or (self.rates is None and bits != dense[table]):
            return None
        found: Any = self.energy
        for key in scope:
            found = found[key]
        machine = "dense" if self.rates is None else "spiking"
        return found[table][f"{machine}_pj_per_token"] / 1e6

    @property
    def megabytes(self) -> float | None:
        """Of the projections' weights, that a token decoded alone fetches.

        As bfloat16 where it is dense, in the bits that it was rounded to, and of a spiking model, of which
        only what a count that is not zero asks for is fetched, in the int8 of an event-driven model.
        """
        if "model" not in self.record:
            return None
        bits = 16 if self.rates is None else 8
        if (rounded := self.record.get("weights")) is not None:
            bits = rounded + (16 / GROUP if rounded < 8 else 0)  # a group's scale has 16
        share = 1.0 if self.rates is None else self.rates["nonzero"]
        return share * weights_of(self.config) * bits / 8e6


@functools.cache
def weights_of(config: str) -> int:
    """Of all projections of a configuration's model."""
    with torch.device("meta"):
        model = SpikingMambaForCausalLM(SpikingMambaConfig.from_pretrained(config))
    return sum(p.in_features * p.out_features for _, p in spike_fed(model))


def _of(*keys: str, scale: float = 1.0) -> Callable[[Student], float | None]:
    """A number of a record; None where it has none."""

    def get(student: Student) -> float | None:
        found: Any = student.record
        for key in keys:
            if key not in found:
                return None
            found = found[key]
        return round(scale * found, 9)  # 100 * 0.8915 is 89.15, not a little less

    return get


def _task(name: str) -> Callable[[Student], float | None]:
    return lambda s: s.score(name) if name in s.record["tasks"] else None


def _gain(name: str) -> Callable[[Student], float | None]:
    return lambda s: None if s.rates is None else ENERGIES[name](s.energy)


GAINS = (
    *("with_neurons", "whole_model", "decoding", "multiplied"),
    *("quantised_with_neurons", "whole_quantised", "rival_fp32"),
)
# What a text or a table may say of a student, each None where it has no such number.
MEASURES: dict[str, Callable[[Student], float | None]] = {
    **{name: _task(name) for name in BENCHMARK_SETS},
    **{f"{name}.guessing": _of("guessing", name, scale=100) for name in BENCHMARK_SETS},
    "six": lambda s: s.six,
    "all": lambda s: s.all,
    "below_all": lambda s: s.below_all,
    "gap": _of("gap", "gap"),
    "gap.low": _of("gap", "low"),
    "gap.high": _of("gap", "high"),
    "kept": _of("kept", "share", scale=100),
    "kept.low": _of("kept", "low", scale=100),
    "kept.high": _of("kept", "high", scale=100),
    "ability": _of("ability"),
    "of_source": lambda s: s.of_source,
    "kl": _of("teacher_kl_web"),
    "kl.wiki": _of("teacher_kl_wiki"),
    "source_kl": _of("kl_web"),
    "source_kl.wiki": _of("kl_wiki"),
    "agreement": _of("teacher_agreement_web", scale=100),
    "perplexity": _of("perplexity_web"),
    "tokens": _of("progress", "tokens", scale=1e-6),
    "seconds": _of("progress", "seconds"),
    "mean_abs": lambda s: None if s.rates is None else s.rates["mean_abs"],
    "nonzero": lambda s: None if s.rates is None else s.rates["nonzero"],
    "mean_abs.text": _of("spikes", "text", "mean_abs"),
    "nonzero.text": _of("spikes", "text", "nonzero"),
    "projections": lambda s: None if s.rates is None else s.energy["projections"]["fp32"]["gain"],
    **{name: _gain(name) for name in GAINS},
    "fp32": lambda s: s.microjoules("fp32", ("model",)),
    "int8": lambda s: s.microjoules("int8", ("model",)),
    "int8_decoding": lambda s: s.microjoules("int8", ("with_memory", "decode")),
    "megabytes": lambda s: s.megabytes,
}
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
    "MB of weights a token": "{megabytes:.0f}",
    "projections": "{projections:.2f}",
    "with neurons": "{with_neurons:.2f}",
    "whole model": "{whole_model:.2f}",
    "decoding": "{decoding:.2f}",
    "over quantised, sparse, int8": "{quantised_with_neurons:.2f}",
    "µJ a token, fp32": "{fp32:.1f}",
    "int8": "{int8:.1f}",
    "int8, decoding": "{int8_decoding:.0f}",
}


def fill(form: str, find: Callable[[str], float | None]) -> str | None:
    """A text with a number in place of every ``{measure:.2f}``; None where one is not there."""
    values = {name: find(name) for name, _ in PLACEHOLDER.findall(form)}
    if None in values.values():
        return None
    return PLACEHOLDER.sub(lambda match: f"{values[match[1]]:{match[2] or ''}}", form)


def measure(student: Student, name: str) -> float | None:
    """A number of a student.

    Raises:
        ValueError: there is no such measure.
    """
    reject_unknown_keys({name: 0}, MEASURES, f"a text of {student.name}")
    return MEASURES[name](student)


def of_file(path: Path, config: str, logs: Mapping[str, str] | None = None) -> dict[str, Student]:
    """The students of a file by their names; of a name that is there twice, the later one.

    Args:
        path: of the file.
        config: folder of the teacher.
        logs: of trainings, whose last lines are the progress of records that have none, as packed students'.
    """
    records = {record["name"]: record for record in read_records(path)}
    for name, log in (logs or {}).items():
        if name in records and (lines := read_records(Path(log))):
            records[name].setdefault("progress", lines[-1])
    source = next((record for record in records.values() if "model" not in record), None)
    whole = [r for r in records.values() if r.get("model") == config and r.get("weights") is None]
    teacher = whole[0] if whole else None
    return {name: Student(record, config, source, teacher) for name, record in records.items()}


@schema
class About:
    """What the page says of students; every field is a key of ``results.yaml``.

    Attributes:
        title: of the section.
        text: before the tables.
        records: file of what ``score_student.py`` has logged.
        config: folder of the teacher.
        logs: of trainings, by the names of records that do not say how far it went.
        labels: what the tables call a record, by its name, in the tables' order.
        drawn: what the picture calls a record, by its name.
        findings: behind the tables, with ``{name.measure:.2f}``; one without a number is left out.
    """

    title: Name
    text: str
    records: Name
    config: Name
    labels: dict[str, str]
    drawn: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    logs: dict[str, Name] = field(default_factory=dict)


def section(about: About) -> list[Block]:
    """The section; nothing where nothing was scored."""
    students = of_file(Path(about.records), about.config, about.logs)
    found = [(label, students[name]) for name, label in about.labels.items() if name in students]
    if not found:
        return []
    blocks: list[Block] = [Heading(about.title), Paragraph(about.text), Code(COMMAND)]
    for columns in (ACCURACY, TEXTS, COST):
        blocks.append(Cells(["model", *columns], [cells(label, s, columns) for label, s in found]))

    def find(name: str) -> float | None:
        who, _, what = name.partition(".")
        reject_unknown_keys({who: 0}, about.labels, "a finding")
        return measure(students[who], what) if who in students else None

    texts = [fill(text, find) for text in about.findings]
    blocks += [Paragraph(text) for text in texts if text is not None]
    runs = [student.record["provenance"] for _, student in found]
    devices = sorted({run["hardware"]["device"] for run in runs})
    commits, dates = (sorted({str(run[key]) for run in runs}) for key in ("commit", "date"))
    when = " to ".join(sorted({dates[0][:10], dates[-1][:10]}))
    text = f"Scored on {', '.join(devices)}, {when}; commit {', '.join(c[:7] for c in commits)}."
    blocks.append(Paragraph(text))
    return blocks


def cells(label: str, student: Student, columns: Mapping[str, str]) -> list[str]:
    """A line of a table; what it has no number for is empty."""
    values = [fill(form, functools.partial(measure, student)) or "" for form in columns.values()]
    return [label if student.clean else f"{label} {MARK}", *values]
