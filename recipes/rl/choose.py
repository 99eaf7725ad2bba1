"""Choose among runs on one half of the held-out questions, and report the chosen one on the other.

python recipes/rl/choose.py recipes/rl/choose.yaml
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import refuse_changed_code
from spiking_mamba.common.records import put_record
from spiking_mamba.common.schema import Name, Names, Positive, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.preferences import Preference
from spiking_mamba.evaluation.statistics import paired_gap
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.training.preference import PreferenceSettings

IDENTITY = ("method", "run")
KEPT = ("rows", "held_out", "seconds", "provenance")  # of a run, as it is
SIDE = ("perplexity", "mean_abs")  # of the model before and after


@schema
class ChooseSettings:
    """Keys of the YAML file.

    Attributes:
        runs: folders of align.py's runs, each measured on all held-out questions (``held_out_half: null``);
            of those of one method, one is chosen.
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
        item = number if p.item is None else p.item
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


def choose(records: Sequence[dict[str, Any]], rise: float) -> list[dict[str, Any]]:
    """The same records with ``chosen``: of each method the run that gains most on the half to tune on.

    Among those whose perplexity rises by no more than ``rise``.
    """
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        other = best.get(record["method"])
        gained = record["tune"]["sum"]["gain"]
        if (record["perplexity_ratio"] or 1.0) <= 1 + rise and (
            other is None or gained > other["tune"]["sum"]["gain"]
        ):
            best[record["method"]] = record
    return [record | {"chosen": record is best.get(record["method"])} for record in records]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The runs as Markdown; what the other half says stands beside the chosen ones alone."""
    rows = []
    for record in records:
        training = record["provenance"]["settings"]["training"]
        steps, rate = training["max_steps"], training["learning_rate"]
        ratio = record["perplexity_ratio"]
        rows.append(
            [
                f"{record['method'].upper()}, {steps} steps, lr {rate:.2g}",
                told(record["tune"]["sum"]),
                "" if ratio is None else f"{ratio - 1:+.1%}",
                told(record["report"]["sum"]) if record["chosen"] else "",
                told(record["report"]["per_token"]) if record["chosen"] else "",
            ]
        )
    header = ["run", "gained, half to tune on", "perplexity", "half to report on", "the same per token"]
    return markdown_table(header, rows)


def told(gain: Mapping[str, float]) -> str:
    return f"{gain['gain']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


@fail_clearly()
def main() -> None:
    settings = parse_settings(ChooseSettings, description=__doc__)
    quiet()
    refuse_changed_code(Path(settings.results))
    records = choose([of_run(folder) for folder in settings.runs], settings.rise)
    for record in records:
        put_record(Path(settings.results), record, IDENTITY)
    print(f"\n{table(records)}\n\nRecords: {settings.results}")


if __name__ == "__main__":
    main()
