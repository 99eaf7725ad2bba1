"""How far a student moves when its weights hardly do: by noise far below any rounding, and in integers.

python recipes/convert/perturb.py recipes/convert/perturb.yaml

A count that stands on a boundary flips, the next projection gets another input, and so on through all blocks.
Of logits' mean over several such draws the part of the distance that differs from draw to draw is smaller.
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from tokens import PASSAGES, passage_rows
from tqdm import tqdm

from spiking_mamba import SpikingMambaForCausalLM, event_driven
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import provenance, refuse_changed_code
from spiking_mamba.common.records import put_record
from spiking_mamba.common.schema import Count, Name, Positive, Seed, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.evaluation.scoring import kl_and_agreement
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.projection import spike_fed


@schema
class PerturbSettings:
    """Every field is a key of the YAML file.

    Attributes:
        student, teacher: folders of a spiking model and of its dense teacher.
        data: ``evaluated.npz`` of ``prepare.py``.
        rows: of every kind of passage, its first ones.
        noise: standard deviations of what all projections' weights are multiplied by, around 1.
        seed: of the noise.
        results: file of the records, one a model and what was done to it.
    """

    student: Name
    teacher: Name
    data: Name
    results: Name
    noise: Annotated[list[Positive], Field(min_length=1)]
    rows: Count = 8
    seed: Seed = 0


@torch.no_grad()
def perturbed(model: SpikingMambaForCausalLM, deviation: float, seed: int) -> SpikingMambaForCausalLM:
    """A copy whose projections' weights are multiplied by ``1 + deviation * normal``, in float32."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for _, projection in spike_fed(copied):
        weight = projection.linear.weight
        weight.mul_(1 + deviation * torch.randn(weight.shape, generator=generator))
    return copied


@torch.no_grad()
def all_logits(model: SpikingMambaForCausalLM, ids: torch.Tensor, name: str) -> torch.Tensor:
    """Float32 logits ``[rows, L - 1, V]`` of ids ``[rows, L]``, without each row's first token's."""
    rows = tqdm(ids.split(1), name, leave=False)
    return torch.cat([model(input_ids=row, use_cache=False).logits[:, 1:].float() for row in rows])


def measures(
    logits: torch.Tensor, reference: torch.Tensor, others: torch.Tensor, ids: torch.Tensor
) -> dict[str, float]:
    """Perplexity, and the distance from a model's own logits and from its teacher's, row by row."""
    sums = np.zeros(5)
    for moved, own, theirs, row in zip(logits, reference, others, ids, strict=True):
        nats = F.cross_entropy(moved[:-1], row[2:], reduction="sum").item()
        sums += [nats, *kl_and_agreement(moved, own), *kl_and_agreement(moved, theirs)]
    tokens = logits.shape[0] * logits.shape[1]
    perplexity = float(np.exp(sums[0] / (tokens - len(ids))))  # a row's last token has none behind it
    names = ("kl", "top1", "teacher_kl", "teacher_top1")
    return {"perplexity": perplexity} | dict(zip(names, (sums[1:] / tokens).tolist(), strict=True))


def passages(path: str, rows: int) -> torch.Tensor:
    """The first rows of every kind, ``[rows, 512]``, each behind an end of text."""
    with np.load(path) as kept:
        kinds = [passage_rows(kept, kind)[:rows] for kind in PASSAGES]
    if min(map(len, kinds)) < rows:
        raise RunError(f"{path} has no {rows} rows of passages of each kind.")
    return torch.cat(kinds)


def perturb(settings: PerturbSettings) -> list[dict[str, Any]]:
    """A record for every model and what was done to it."""
    ids = passages(settings.data, settings.rows)
    teacher, student = load_dense(settings.teacher), load_model(settings.student)
    others, own = all_logits(teacher, ids, "teacher"), all_logits(student, ids, "student")
    found = []
    for model, name, reference in ((student, settings.student, own), (teacher, settings.teacher, others)):
        found.append({"model": name, "changed": "nothing"} | measures(reference, reference, others, ids))
        total = reference.clone()
        for deviation in settings.noise:
            changed = f"noise of {deviation:g}"
            moved = all_logits(perturbed(model, deviation, settings.seed), ids, changed)
            found.append({"model": name, "changed": changed} | measures(moved, reference, others, ids))
            total += moved
        mean, changed = total / (1 + len(settings.noise)), f"mean logits of these {1 + len(settings.noise)}"
        found.append({"model": name, "changed": changed} | measures(mean, reference, others, ids))
        moved = all_logits(event_driven(model), ids, "int8")
        found.append({"model": name, "changed": "int8"} | measures(moved, reference, others, ids))
    return [each | {"tokens": ids[:, 1:].numel()} for each in found]


@fail_clearly()
def main() -> None:
    settings = parse_settings(PerturbSettings, description=__doc__)
    quiet()
    refuse_changed_code(Path(settings.results))
    about = provenance(settings)
    for record in perturb(settings):
        put_record(Path(settings.results), record | about, ("model", "changed"))
        numbers = {key: round(value, 4) for key, value in record.items() if isinstance(value, float)}
        print(f"{record['model']}, {record['changed']}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
