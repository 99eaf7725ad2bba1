"""Score a student, a rival or a teacher on the ten zero-shot sets and on passages, with its spikes.

python recipes/convert/score_student.py recipes/distill/score.yaml model=runs/students/63/state.pt name=s63
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from ability import ability, guessing, relative_ability
from llama import Llama
from pydantic import Field
from quantise import quantise
from score import Scored, outcomes, passages, tasks
from student import load_student
from tokens import END, passage_rows

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import refuse_file
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.schema import Count, Name, Natural, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.evaluation.outcomes import read_outcomes, write_outcomes
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.source import load_source
from spiking_mamba.spikes.counting import count_spikes

Bits = Annotated[int, Field(ge=2, le=8)]


@schema
class StudentScoreSettings:
    """Every field is a key of the YAML file.

    Attributes:
        name: what the log calls it; its items are kept in `output`/NAME.npz.
        model: folder of a model, packed or whole, or a student's ``state.pt``; null: the source itself.
        source: the Transformer that everything was converted from, see ``source.load_source``.
        teacher: folder of a dense model, to which the KL is taken, too; null: none.
        reference: folder of any model, such as what an aligned one was before, to which it is taken, too.
        against: file of the teacher's items, whose ability is to be kept; null: none.
        data: folder that ``prepare.py`` has written.
        output: folder of the log, ``scores.jsonl``, and of items.
        sets: over which the ability is summed: those on which the teacher lies at least three standard errors
            above guessing.
        limit: items of each task, its first ones; 0: all.
        tokens: of a batch, padding included.
        passages: rows of 512 tokens of each kind.
        weights, activations: bits to which a model's are rounded after training, the latter a dense one's;
            null: they are not.
    """

    name: Name
    source: Name
    data: Name
    output: Name
    sets: list[Name]
    model: Name | None = None
    teacher: Name | None = None
    reference: Name | None = None
    against: Name | None = None
    limit: Natural = 0
    tokens: Count = 32768
    passages: Count = 128
    weights: Bits | None = None
    activations: Bits | None = None

    def __post_init__(self) -> None:
        if (self.weights is not None or self.activations is not None) and self.model is None:
            raise ValueError("weights, activations: the source is not rounded, only a model is.")
        if self.reference is not None and self.model is None:
            raise ValueError("reference: the source has none, only a model has.")
        if unknown := sorted(set(self.sets) - set(BENCHMARK_SETS)):
            raise ValueError(f"sets: unknown {', '.join(unknown)}; known are {', '.join(BENCHMARK_SETS)}.")


class CountedScored(Scored):
    """A spiking student whose spikes are counted in the passes that score it.

    Of text, and of rows' first tokens, which are all one and the same token. Padding is left out, as are ends
    of text within a row.
    """

    def __init__(self, source: Llama, student: SpikingMambaForCausalLM) -> None:
        super().__init__(source, student)
        projections = student.projections().values()
        self.weight = sum(p.in_features * p.out_features for p in projections)
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=source.head.device)

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.student is not None
        with torch.autocast(ids.device.type, torch.bfloat16, ids.is_cuda):
            output = self.student.backbone(ids, use_cache=False, output_accumulations=True)
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
        for row, mask in enumerate((~first & (ids != END), first)):
            costs = [
                (cost * mask).sum(dtype=torch.float64) for cost in (output.accumulations, output.fetches)
            ]
            self.sums[row] += torch.stack([*costs, mask.sum(dtype=torch.float64)])
        return output.last_hidden_state.to(self.source.head.dtype)

    def spikes(self) -> dict[str, Any]:
        """Mean |s| and share of non-zero counts by output width: of text, of first tokens, and of both."""
        measures = {}
        for name, sums in (("text", self.sums[0]), ("first", self.sums[1]), ("both", self.sums.sum(0))):
            size, share, tokens = sums.tolist()
            whole = max(1.0, tokens) * self.weight
            measures[name] = {"mean_abs": round(size / whole, 4), "nonzero": round(share / whole, 4)}
            measures[name]["tokens"] = int(tokens)
        return measures


@torch.no_grad()
def by_projection(scored: Scored, data: Any, rows: int = 16) -> dict[str, Any]:
    """Counts of every projection on some rows of passages, first tokens included.

    Mean |s|, share of non-zeros, share of counts at D, silent channels.
    """
    assert scored.student is not None
    ids = passage_rows(data, "openwebtext-passages")[:rows]
    with count_spikes(scored.student) as counts:
        Scored.hidden_states(scored, ids.to(scored.source.head.device))
    found = {}
    for name, p in counts.projections.items():
        levels = p.histogram
        cut = 0.0 if levels is None else float(levels[0] + levels[-1]) / max(1, int(levels.sum()))
        short = name.removeprefix("backbone.layers.").replace("mixer.", "")
        found[short] = [round(p.mean_abs, 3), round(p.nonzero_share, 3), round(cut, 5), p.silent_channels]
    return found


def load_scored(settings: StudentScoreSettings, device: torch.device) -> tuple[Scored, dict[str, Any]]:
    """What is scored, on the device, and what the log should say of it."""
    source = Llama.from_transformers(load_source(settings.source))
    source = source.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if settings.model is None:
        return Scored(source, None), {}
    facts: dict[str, Any] = {"model": settings.model}
    if Path(settings.model).is_file():
        model, progress = load_student(settings.model)
        facts |= {"progress": progress}
    else:
        model = load_model(settings.model)
    model = model.to(device).eval()
    quantise(model, settings.weights, settings.activations)
    rounded = {"weights": settings.weights, "activations": settings.activations}
    facts |= {key: bits for key, bits in rounded.items() if bits is not None}
    spiking = model.config.neuron is not None
    return (CountedScored if spiking else Scored)(source, model), facts


def _others(settings: StudentScoreSettings) -> dict[str, Any]:
    """The models to which the KL is taken, on the CPU."""
    named = (("teacher", settings.teacher, load_dense), ("reference", settings.reference, load_model))
    return {kind: load(name) for kind, name, load in named if name is not None}


def score(settings: StudentScoreSettings, device: torch.device) -> dict[str, Any]:
    """The log's line; items are written on the way."""
    data, folder = np.load(Path(settings.data, "evaluated.npz")), Path(settings.output)
    scored, facts = load_scored(settings, device)
    others = {} if settings.model is None else _others(settings)  # first: a name may be mistyped
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    right = outcomes(scored, data, settings.limit, settings.tokens)
    write_outcomes(folder / f"{settings.name}.npz", right)
    results, guess = tasks(right), guessing(data)
    sets = [name for name in settings.sets if name in right]
    mains = [values[BENCHMARK_SETS[name].main] for name, values in results.items()]
    entry = {"name": settings.name, **facts, "limit": settings.limit, "mean": round(float(np.mean(mains)), 4)}
    entry |= {"tasks": results, "guessing": {name: round(value, 4) for name, value in guess.items()}}
    entry |= {"sets": sets, "ability": round(ability(right, guess, sets), 4)}
    if settings.against is not None:
        entry |= relative_ability(right, read_outcomes(settings.against), guess, sets)
    if isinstance(scored, CountedScored):  # of the tasks alone
        assert scored.student is not None
        config = scored.student.config
        entry |= {"neuron": config.neuron, "shift_inputs": config.shift_inputs, "spikes": scored.spikes()}
        entry["projections"] = by_projection(scored, data)
    entry |= passages(scored, data, settings.passages, settings.tokens)
    for kind, model in others.items():
        other = Scored(scored.source, model.to(device).eval())
        rest = passages(scored, data, settings.passages, settings.tokens, reference=other)
        entry |= {f"{kind}_{key}": value for key, value in rest.items() if not key.startswith("perplexity")}
    return entry | {"seconds": round(time.monotonic() - begun, 1), "provenance": provenance(settings)}


@fail_clearly()
def main() -> None:
    settings = parse_settings(StudentScoreSettings, description=__doc__)
    quiet()
    folder = Path(settings.output)
    refuse_file(folder)
    if settings.against is not None and not Path(settings.against).is_file():
        raise RunError(f"There is no file {settings.against}, the teacher's items: score it first.")
    entry = score(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with (folder / "scores.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    for name, values in entry["tasks"].items():
        print(f"{name:16} {' '.join(f'{key} {value}' for key, value in values.items())}")
    left_out = ("tasks", "guessing", "projections", "progress", "provenance")
    print(json.dumps({key: value for key, value in entry.items() if key not in left_out}), flush=True)


if __name__ == "__main__":
    main()
