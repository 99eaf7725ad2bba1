"""Choose among settings on one half of the held-out questions, and report the chosen ones on the other.

python recipes/rl/choose.py recipes/rl/choose.yaml
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import refuse_changed_code
from spiking_mamba.common.records import put_record, read_records
from spiking_mamba.common.schema import Name, Names, Positive, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.preferences import Preference
from spiking_mamba.evaluation.statistics import interval, paired_gap
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.training.preference import PreferenceSettings

IDENTITY = ("method", "run")
KEPT = ("rows", "held_out", "seconds", "provenance")  # of a run, as it is
SIDE = ("perplexity", "mean_abs")  # of the model before and after
OF_A_SEED = ("seed", "output", "resume", "overwrite")  # settings in which runs of one candidate may differ
HEADER = ["model", "run", "seeds", "gained, half to tune on", "perplexity"]
HEADER += ["half to report on", "the same per token"]


@schema
class ChooseSettings:
    """Keys of the YAML file.

    Attributes:
        runs: folders of align.py's runs, each measured on all held-out questions (``held_out_half: null``);
            one that is gone is taken as ``results`` has it. Runs that differ in their seed alone are one
            candidate; of those of one model and method, one is chosen.
        rise: by how much perplexity may rise at most, as a share.
        results: file of the records, one a run.
    """

    runs: Annotated[Names, Field(min_length=1)]
    rise: Positive = 0.05
    results: Name = "runs/choice.jsonl"


def tuned_on(everything: Sequence[Preference], tune: Sequence[Preference]) -> dict[str, list[bool]]:
    """Which items are in the half to tune on, by task, in the order of a run's scores."""
    prompts = {(p.task, tuple(p.prompt)) for p in tune}
    found: dict[str, dict[Any, bool]] = {}
    for number, p in enumerate(everything):
        item = ("pair", number) if p.item is None else p.item
        found.setdefault(p.task, {}).setdefault(item, (p.task, tuple(p.prompt)) in prompts)
    return {task: list(items.values()) for task, items in found.items()}


def gains(results: Mapping[str, Any], tuned: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """What each half of the questions gained, ``{half: {kind: {"gain", "low", "high", "items"}}}``."""
    found: dict[str, Any] = {}
    for half, wanted in (("tune", True), ("report", False)):
        found[half] = {}
        for kind, before in results["before"]["scores"].items():
            sides = [
                {
                    task: [s for s, of in zip(scores, tuned[task], strict=True) if of is wanted]
                    for task, scores in side.items()
                }
                for side in (results["after"]["scores"][kind], before)
            ]
            gap = paired_gap(*sides)
            found[half][kind] = {"gain": gap.pop("gap")} | gap
    return found


def read_run(folder: str) -> tuple[dict[str, Any], PreferenceSettings]:
    """The results and settings of a finished run.

    Raises:
        RunError: it is none, or was not measured on all questions.
    """
    path = Path(folder, "results.json")
    if not path.is_file():
        raise RunError(f"There is no {path}: choose among finished runs of align.py.")
    results = json.loads(path.read_text())
    settings = PreferenceSettings(**results["provenance"]["settings"])
    if settings.held_out_half or settings.held_out_items or results["before"]["scores"] is None:
        raise RunError(f"{folder} must be run with held_out_half=null held_out_items=null, and held_out.")
    return results, settings


def of_run(folder: str) -> dict[str, Any]:
    """The record of a run: what each half gained, and its settings."""
    results, settings = read_run(folder)
    tokenizer = load_tokenizer(settings.model, settings.tokenizer)
    everything, tune = (
        dataclasses.replace(settings, held_out_half=half).read_held_out(tokenizer)[0]
        for half in (None, "tune")
    )
    assert everything is not None
    assert tune is not None
    return {
        "method": settings.method,
        "run": Path(folder).name,
        **gains(results, tuned_on(everything, tune)),
        "perplexity_ratio": results["change"]["perplexity_ratio"],
        **{side: {key: results[side][key] for key in SIDE} for side in ("before", "after")},
        **{key: results[key] for key in KEPT},
    }


def candidates(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The records in groups that differ in their seed alone, in the order of their first.

    Raises:
        RunError: two are the same run.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        settings = record["provenance"]["settings"]
        same = {key: value for key, value in settings.items() if key not in OF_A_SEED}
        found.setdefault(json.dumps(same, sort_keys=True), []).append(record)
    for candidate in found.values():
        seeds = [record["provenance"]["settings"]["seed"] for record in candidate]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(record["run"] for record in candidate)
            raise RunError(f"{names}: two have the same settings and seed, which make one run.")
    return list(found.values())


def mean(candidate: Sequence[Mapping[str, Any]], half: str, kind: str = "sum") -> float:
    return statistics.fmean(record[half][kind]["gain"] for record in candidate)


def ratio(candidate: Sequence[Mapping[str, Any]]) -> float | None:
    """Perplexity after over before, the geometric mean of the seeds; None where none was measured."""
    ratios = [record["perplexity_ratio"] for record in candidate]
    return None if None in ratios else statistics.geometric_mean(ratios)


def choose(records: Sequence[dict[str, Any]], rise: float) -> list[dict[str, Any]]:
    """The same records with ``chosen``: of each model and method the settings that gain most to tune on.

    Among those whose perplexity rises by no more than ``rise``; gains are means over seeds.
    """
    best: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for candidate in candidates(records):
        key = model_of(candidate[0]), candidate[0]["method"]
        if (ratio(candidate) or 1.0) <= 1 + rise and (
            key not in best or mean(candidate, "tune") > mean(best[key], "tune")
        ):
            best[key] = candidate
    chosen = {id(record) for candidate in best.values() for record in candidate}
    return [record | {"chosen": id(record) in chosen} for record in records]


def model_of(record: Mapping[str, Any]) -> str:
    return str(record["provenance"]["settings"]["model"])


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The candidates as Markdown; what the other half says stands beside the chosen ones alone."""
    rows = []
    for candidate in candidates(records):
        first, change = candidate[0], ratio(candidate)
        training = first["provenance"]["settings"]["training"]
        steps, rate = training["max_steps"], training["learning_rate"]
        rows.append(
            [
                model_of(first),
                f"{first['method'].upper()}, {steps} steps, lr {rate:.2g}",
                str(len(candidate)),
                told(candidate, "tune"),
                "" if change is None else f"{change - 1:+.1%}",
                told(candidate, "report") if first["chosen"] else "",
                told(candidate, "report", "per_token") if first["chosen"] else "",
            ]
        )
    return markdown_table(HEADER, rows)


def told(candidate: Sequence[Mapping[str, Any]], half: str, kind: str = "sum") -> str:
    """A gain with its interval over questions, or, of several seeds, over these by Student's t."""
    gains = [record[half][kind] for record in candidate]
    if len(gains) == 1:
        return f"{gains[0]['gain']:+.3f} ({gains[0]['low']:+.3f} to {gains[0]['high']:+.3f})"
    seeds = interval([gain["gain"] for gain in gains])
    return (
        f"{seeds['mean']:+.3f} ({seeds['low']:+.3f} to {seeds['high']:+.3f}), +-{over_questions(gains):.3f}"
    )


def over_questions(gains: Sequence[Mapping[str, Any]]) -> float:
    """Half the interval over questions of a mean over seeds, at most.

    A mean of estimates spreads no more than these do on average, however they depend on each other.
    """
    return statistics.fmean((gain["high"] - gain["low"]) / 2 for gain in gains)


def read_runs(settings: ChooseSettings) -> list[dict[str, Any]]:
    """The record of each run, as its folder has it or, where that is gone, as it is recorded."""
    kept = {record["run"]: record for record in read_records(Path(settings.results))}
    found = []
    for folder in settings.runs:
        record = kept.get(Path(folder).name)
        found.append(of_run(folder) if record is None or Path(folder).exists() else record)
    return found


@fail_clearly()
def main() -> None:
    settings = parse_settings(ChooseSettings, description=__doc__)
    quiet()
    refuse_changed_code(Path(settings.results))
    records = choose(read_runs(settings), settings.rise)
    for record in records:
        put_record(Path(settings.results), record, IDENTITY)
    print(f"\n{table(records)}\n\nRecords: {settings.results}")


if __name__ == "__main__":
    main()
