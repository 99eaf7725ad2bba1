"""Students of a converted model, their teacher and its rivals, and what may be said of each.

Of records that ``recipes/convert/score_student.py`` has written, all on full sets.
"""

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from placeholders import ENERGIES
from recorded import energy_of

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.provenance import is_clean
from spiking_mamba.common.records import read_records
from spiking_mamba.data.benchmarks import BENCHMARK_SETS, SOURCE_TASKS
from spiking_mamba.evaluation.outcomes import main_outcomes
from spiking_mamba.evaluation.statistics import interval, paired_gap
from spiking_mamba.model.projection import spike_fed

__all__ = ["MEASURES", "Items", "Seeds", "Student", "measure", "of_file", "over_seeds", "points_apart"]

Items = Mapping[str, list[float]]  # of every item of a set how far it is right

SCALE = 16 / 32  # bits a weight, of what has a scale of 16 bits for every 32
# Of a weight, and of what is fetched with it, fires its input or not: packed; Q4_1, which has a least, too.
OWN_BITS = {"mamba": (4, SCALE), "mlp": (4, 2 * SCALE)}
TRAINED_WHOLE = (16, 0.0)  # MLPs that do not pack, as they were scored
RANK = 32  # of the update of students' MLPs, as in recipes/distill/smollm2-*.yaml


class Student:
    """A model that was scored: a spiking student, its teacher, or a rival.

    Args:
        record: a line of the log.
        config: folder of the teacher's configuration, of which energies are calculated.
        source: the record of the Transformer that everything was converted from, if it was scored.
        teacher: that of the dense model of `config`, if it was.
        multiplied: its counts are integers of 8 bits that are multiplied, whatever they were trained as.
        packs: its weights have the bits that they are packed in.
    """

    def __init__(
        self,
        record: dict[str, Any],
        config: str,
        source: Mapping[str, Any] | None = None,
        teacher: Mapping[str, Any] | None = None,
        multiplied: bool = False,
        packs: bool = True,
    ) -> None:
        self.record, self.config, self.name = record, config, record["name"]
        self.source, self.teacher, self.multiplied, self.packs = source, teacher, multiplied, packs

    @property
    def clean(self) -> bool:
        return is_clean(self.record["provenance"]["commit"])

    def items(self, folder: Path) -> Items:
        """Whether each item of each set is right, by the metric that counts for it."""
        found = main_outcomes(folder / self.record.get("items", f"{self.name}.npz"))
        return {task: np.asarray(right, float).tolist() for task, right in found.items()}

    @property
    def ability_scale(self) -> float:
        """Makes a mean over the ability's sets a share of the teacher's ability, which is taken as known."""
        return len(self.record["sets"]) * self.record["kept"]["share"] / self.record["ability"]

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
    def above_six(self) -> float | None:
        """By how many points it lies above guessing on the source's six sets, on average."""
        guessing = self.record.get("guessing")
        if guessing is None:
            return None
        return self.six - 100 * sum(guessing[task] for task in SOURCE_TASKS) / len(SOURCE_TASKS)

    @property
    def without_boolq(self) -> float | None:
        """By how many points it lies below its teacher on the other five of them."""
        if self.teacher is None:
            return None
        theirs, tasks = Student(self.teacher, self.config), [t for t in SOURCE_TASKS if t != "boolq"]
        return sum(theirs.score(task) - self.score(task) for task in tasks) / len(tasks)

    @property
    def rates(self) -> dict[str, float] | None:
        """Mean |s| and share of non-zero counts over the sets, first tokens included; None without counts."""
        return None if "spikes" not in self.record else self.record["spikes"]["both"]

    @property
    def adds(self) -> bool:
        """Whether it adds weights as often as counts ask for; others multiply."""
        return self.rates is not None and not self.multiplied

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
        """Of a token, added or multiplied; None where it was not scored in such a precision.

        At int8 what multiplies was if its inputs were rounded to 8 bits; weights of fewer are priced as of 8.
        What adds is priced hypothetically. The source is no model of this configuration.
        """
        scored = self.multiplied or self.record.get("activations") == 8
        if table != "int8":
            scored = not self.multiplied and not {"activations", "weights"} & self.record.keys()
        if "model" not in self.record or not (scored or (self.adds and table == "int8")):
            return None
        found: Any = self.energy
        for key in scope:
            found = found[key]
        machine = "spiking" if self.adds else "dense"
        return found[table][f"{machine}_pj_per_token"] / 1e6

    @property
    def skipping(self) -> float | None:
        """Of a token whose counts are multiplied in int8, but where they are zero, in microjoules."""
        if self.rates is None:
            return None
        return self.energy["model"]["int8"]["quantised_sparse_pj_per_token"] / 1e6

    @property
    def decoding_microjoules(self) -> float | None:
        """Of a token decoded alone at int8 with memory traffic, in the bits of its weights.

        Of what adds, only weights are fetched that counts which are not zero ask for.
        """
        if self.adds:
            whole: float | None = self.energy["with_memory"]["event_driven"]["int8"]["pj_per_token"] / 1e6
        else:
            whole = self.microjoules("int8", ("with_memory", "decode"))
        if whole is None or self.megabytes is None or self.megabytes_int8 is None:
            return None
        return whole - (self.megabytes_int8 - self.megabytes) * self.energy["costs"]["int8"]["byte"]

    @property
    def rank(self) -> int | None:
        """Of the update of its MLPs; 0: they are the source's; None: they were trained whole."""
        if self.record["model"] == self.config:
            return 0
        return self.record.get("progress", {}).get("settings", {}).get("rank", RANK)

    @property
    def megabytes(self) -> float | None:
        """Of the projections' weights, that a token decoded alone fetches, in the bits that they have.

        Of what adds, those that counts which are not zero ask for, all scales, and updates whole.
        """
        if "model" not in self.record or not self.packs:
            return None
        bits, update = dict(OWN_BITS), 0.0
        if (rounded := self.record.get("weights")) is not None:  # of 8 bits an output has one scale
            bits = dict.fromkeys(bits, (rounded, 0.0 if rounded >= 8 else SCALE))
        elif self.rank is None:
            bits["mlp"] = TRAINED_WHOLE
        else:
            update = sum(2 * self.rank * (m + n) for m, n in matrices_of(self.config)["mlp"])
        asked = self._fetched()
        total = sum(count * (bits[k][0] * asked + bits[k][1]) for k, count in weights_of(self.config).items())
        return (total / 8 + update) / 1e6

    @property
    def megabytes_int8(self) -> float | None:
        """The same in int8, as the event-driven runtime has them."""
        if "model" not in self.record:
            return None
        return self._fetched() * sum(weights_of(self.config).values()) / 1e6

    def _fetched(self) -> float:
        """Share of the weights."""
        return self.rates["nonzero"] if self.adds and self.rates else 1.0


@functools.cache
def matrices_of(config: str) -> dict[str, list[tuple[int, int]]]:
    """Inputs and outputs of all projections of a configuration's model, by the kind of their block."""
    about = SpikingMambaConfig.from_pretrained(config)
    with torch.device("meta"):
        model = SpikingMambaForCausalLM(about)
    sizes: dict[str, list[tuple[int, int]]] = {"mamba": [], "mlp": []}
    for number, block in enumerate(model.backbone.layers):
        sizes[about.block_type(number)] += [(p.in_features, p.out_features) for _, p in spike_fed(block)]
    return sizes


def weights_of(config: str) -> dict[str, int]:
    """How many there are, by the kind of their block."""
    return {kind: sum(m * n for m, n in sizes) for kind, sizes in matrices_of(config).items()}


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
    return lambda s: ENERGIES[name](s.energy) if s.adds else None


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
    "above_six": lambda s: s.above_six,
    "without_boolq": lambda s: s.without_boolq,
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
    "mean_abs": _of("spikes", "both", "mean_abs"),
    "nonzero": _of("spikes", "both", "nonzero"),
    "mean_abs.text": _of("spikes", "text", "mean_abs"),
    "nonzero.text": _of("spikes", "text", "nonzero"),
    "projections": lambda s: s.energy["projections"]["fp32"]["gain"] if s.adds else None,
    **{name: _gain(name) for name in GAINS},
    "fp32": lambda s: s.microjoules("fp32", ("model",)),
    "int8": lambda s: s.microjoules("int8", ("model",)),
    "int8_decoding": lambda s: s.decoding_microjoules,
    "int8_skipping": lambda s: s.skipping,
    "preferred": _of("alignment", "preferred"),
    "gained": _of("alignment", "gained", "gain"),
    "gained.low": _of("alignment", "gained", "low"),
    "gained.high": _of("alignment", "gained", "high"),
    "gained.again": _of("alignment", "again"),
    **{
        f"{name}{kind}{end}": _of("alignment", f"{name}{kind.replace('.', '_')}", end[1:] or "gap")
        for name in ("behind", "wider")
        for kind in ("", ".five", ".ability")
        for end in ("", ".low", ".high")
    },
    "pairs.mean_abs": _of("alignment", "mean_abs"),
    "pairs.gain": _of("alignment", "gain"),
    "answer": _of("alignment", "answer"),
    "cut": _of("alignment", "cut"),
    "longer": _of("alignment", "longer", "gap"),
    "longer.low": _of("alignment", "longer", "low"),
    "longer.high": _of("alignment", "longer", "high"),
    "mJ": _of("decoded", "mJ"),
    "mJ_net": _of("decoded", "mJ_net"),
    "ms": _of("decoded", "seconds", scale=1e3),
    "moved": _of("reference_kl_web"),
    "moved.wiki": _of("reference_kl_wiki"),
    "megabytes": lambda s: s.megabytes,
    "megabytes_int8": lambda s: s.megabytes_int8,
}


class Seeds:
    """Students that differ in their seed alone: of every number the mean, with Student's t interval.

    Args:
        name: of all of them.
        students: at least one.
    """

    def __init__(self, name: str, students: Sequence[Student]) -> None:
        self.name, self.students = name, list(students)

    @property
    def adds(self) -> bool:
        return self.students[0].adds

    @property
    def clean(self) -> bool:
        return all(student.clean for student in self.students)

    def measure(self, name: str) -> float | None:
        """The mean of a number of theirs; with ``.low`` or ``.high`` an end of its interval; its ``.sd``."""
        what, _, end = name.rpartition(".")
        what, end = (what, end) if end in ("low", "high", "sd") else (name, "mean")
        values = [number for student in self.students if (number := measure(student, what)) is not None]
        return interval(values)[end] if len(values) == len(self.students) else None


def points_apart(one: Items, other: Items, tasks: Iterable[str], scale: float = 1.0) -> dict[str, float]:
    """``gap`` of two models' means over the same items of some sets, ``low`` and ``high``, in points."""
    gap = paired_gap(*({task: side[task] for task in tasks} for side in (one, other)))
    return {end: 100 * scale * gap[end] for end in ("gap", "low", "high")}


def over_seeds(students: Mapping[str, Student], seeds: Mapping[str, Sequence[str]]) -> dict[str, Seeds]:
    """Groups of students by their names, of those groups that were scored whole."""
    groups = seeds.items()
    return {n: Seeds(n, [students[k] for k in names]) for n, names in groups if students.keys() >= {*names}}


def measure(student: Student | Seeds, name: str) -> float | None:
    """A number of a student, or of seeds of one.

    Raises:
        ValueError: there is no such measure.
    """
    if isinstance(student, Seeds):
        return student.measure(name)
    reject_unknown_keys({name: 0}, MEASURES, f"a text of {student.name}")
    return MEASURES[name](student)


def of_file(
    path: Path,
    config: str,
    logs: Mapping[str, str] | None = None,
    multiplied: Collection[str] = (),
    unpacked: Collection[str] = (),
) -> dict[str, Student]:
    """The students of a file by their names; of a name that is there twice, the later one.

    Args:
        path: of the file.
        config: folder of the teacher.
        logs: of trainings, whose last lines are the progress of records that have none, as packed students'.
        multiplied: names of those whose counts are multiplied.
        unpacked: names of those whose weights do not have the bits that they are packed in.
    """
    records = {record["name"]: record for record in read_records(path)}
    for name, log in (logs or {}).items():
        if name in records and (lines := read_records(Path(log))):
            records[name].setdefault("progress", lines[-1])
    source = next((record for record in records.values() if "model" not in record), None)
    rounded = {name for name, r in records.items() if r.get("weights") or r.get("activations")}
    whole = [r for name, r in records.items() if r.get("model") == config and name not in rounded]
    teacher = whole[0] if whole else None
    return {
        name: Student(record, config, source, teacher, name in multiplied, name not in unpacked)
        for name, record in records.items()
    }
