"""What preference optimisation is worth: teacher, student, after DPO and KTO, dense control, over seeds.

python recipes/rl/table.py recipes/rl/table.yaml
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.machine import keep_freed_memory
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import is_list_of, parse_settings
from spiking_mamba.evaluation.evaluator import evaluate
from spiking_mamba.evaluation.settings import EvaluationSettings
from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.evaluation.tasks import zero_shot_tasks
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.training.preference import PreferenceSettings, optimise

# column of the table: method, whose model it starts from
COLUMNS = {"DPO": ("dpo", "student"), "KTO": ("kto", "student"), "teacher, DPO": ("dpo", "teacher")}


@dataclass
class TableSettings:
    """Settings of the table; every field is a key of the YAML file.

    Attributes:
        teacher, student: checkpoint folders or hub names; ``{seed}`` in one stands for each seed.
        output: folder of ``table.md``, ``table.json``, the runs and their evaluation. Finished runs in it are
            reused, others go on.
        dpo, kto: YAML files of the two optimisations, for all seeds.
        changes: keys of both files to set otherwise, as on the command line: ``training.max_steps=10``.
        seeds: of the optimisations.
        tasks: zero-shot sets that were not trained on.
        corpora: texts for the perplexity.
        limit: items of each task and rows of each text; null for all.
        batch_size: sequences a forward pass of the evaluation.
    """

    teacher: str
    student: str
    output: str
    dpo: str = "recipes/rl/dpo.yaml"
    kto: str = "recipes/rl/kto.yaml"
    changes: list = field(default_factory=list)
    seeds: list = field(default_factory=lambda: [0, 1, 2])
    tasks: list = field(
        default_factory=lambda: ["arc_easy", "arc_challenge", "boolq", "openbookqa", "lambada_openai"]
    )
    corpora: list = field(default_factory=lambda: ["openwebtext-passages", "wikipedia-passages"])
    limit: Any = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.seeds or not is_list_of(self.seeds, int):
            raise ValueError(f"seeds must be a list of integers, got {self.seeds!r}.")
        if not is_list_of(self.changes, str):
            raise ValueError(f"changes must be a list such as ['limit=100'], got {self.changes!r}.")


def folder(settings: TableSettings, column: str, seed: Any) -> Path:
    method, start = COLUMNS[column]
    return Path(settings.output, f"{start}-{method}-{seed}")


def planned(settings: TableSettings, column: str, seed: int) -> PreferenceSettings:
    """The settings of one optimisation."""
    method, start = COLUMNS[column]
    target = folder(settings, column, seed)
    model = getattr(settings, start).replace("{seed}", str(seed))
    arguments = [getattr(settings, method), f"model={model}", f"output={target}", f"seed={seed}"]
    one = parse_settings(PreferenceSettings, arguments + settings.changes)
    one.resume = target.exists()
    return one


def run(one: PreferenceSettings) -> dict[str, Any]:
    """The results of one optimisation, made now unless they are there."""
    target = Path(one.output)
    if (results := target / "results.json").is_file():
        found = json.loads(results.read_text())
        free = {"resume", "overwrite"}
        now = {key: value for key, value in json.loads(json.dumps(vars(one))).items() if key not in free}
        if any(found["provenance"]["settings"][key] != value for key, value in now.items()):
            raise RunError(f"{target} holds a run with other settings: choose another output.")
        print(f"{target}: done before.")
        return found
    print(f"{target}: from {one.model}", flush=True)
    found = optimise(one)
    assert found is not None, "the table is made by one process"
    return found


def cell(values: dict[str, Any] | None, digits: int = 3) -> str:
    if values is None:
        return ""
    text = f"{values['mean']:.{digits}f}"
    if values["low"] is None:
        return text
    return f"{text} ({values['low']:.{digits}f} to {values['high']:.{digits}f})"


def accuracies(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{quantity: {column: interval over seeds}}`` of the held-out pairs."""
    first = runs["DPO"][0]["change"]["accuracy"]
    if first is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for task in first["sum"]:
        row = found[f"preference accuracy, {task}"] = {}
        for name, column in (("teacher", "teacher, DPO"), ("student", "DPO")):
            shares = [r["before"]["accuracy"]["sum"][task] for r in runs[column]]
            row[name] = interval(shares if len(set(shares)) > 1 else shares[:1])  # one model, not three
        for column, results in runs.items():
            row[column] = interval([r["after"]["accuracy"]["sum"][task] for r in results])
    found["the same, gained"] = {
        column: interval([r["change"]["accuracy"]["sum"]["average"]["gain"] for r in results])
        for column, results in runs.items()
    }
    return found


def make_table(settings: TableSettings) -> dict[str, Any]:
    """Run what is missing, evaluate, and return what ``table.json`` holds."""
    models = {"teacher": settings.teacher, "student": settings.student}
    models |= {column: str(folder(settings, column, "{seed}") / "model") for column in COLUMNS}
    # what is wrong with the last step is said before the first
    wanted = EvaluationSettings(
        models=models,
        seeds=settings.seeds,
        reference="student",
        output=str(Path(settings.output) / "evaluation"),
        tasks=settings.tasks,
        corpora=settings.corpora,
        limit=settings.limit,
        batch_size=settings.batch_size,
    )
    if settings.tasks:
        zero_shot_tasks(settings.tasks)
    plan = {column: [planned(settings, column, seed) for seed in settings.seeds] for column in COLUMNS}
    for model in dict.fromkeys(one.model for of_column in plan.values() for one in of_column):
        locate(model)
    planned_runs = [one for of_column in plan.values() for one in of_column]
    with interruptible(lambda: finished(planned_runs, settings.output)):
        runs = {column: [run(one) for one in of_column] for column, of_column in plan.items()}
        evaluation = evaluate(wanted)
        quantities = accuracies(runs)
        for column, group in evaluation["groups"].items():
            for name, values in group.items():
                quantities.setdefault(name, {})[column] = values
        return {
            "quantities": quantities,
            "paired": {
                column: [{"seed": r["provenance"]["settings"]["seed"]} | r["change"] for r in results]
                for column, results in runs.items()
            },
            "gaps": evaluation["gaps"],
            "provenance": evaluation["provenance"],
        }


def finished(runs: list[Any], output: str) -> str:
    done = sum(Path(one.output, "results.json").is_file() for one in runs)
    return f"{done} of {len(runs)} runs in {output} are finished; the same command goes on."


@fail_clearly()
def main() -> None:
    settings = parse_settings(TableSettings, description=__doc__)
    quiet()
    keep_freed_memory()
    results = make_table(settings)
    columns = ["teacher", "student", *COLUMNS]
    rows = []
    for name, found in results["quantities"].items():
        digits = 2 if name.startswith(("perplexity", "gain")) else 3
        rows.append([name, *(cell(found.get(column), digits) for column in columns)])
    table = markdown_table([f"{len(settings.seeds)} seeds, 95% intervals over them", *columns], rows)
    write_whole(Path(settings.output) / "table.json", json.dumps(results, indent=1))
    write_whole(Path(settings.output) / "table.md", table + "\n")
    print(f"\n{table}\n\nTable: {settings.output}/table.md, numbers: {settings.output}/table.json")


if __name__ == "__main__":
    main()
