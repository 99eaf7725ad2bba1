"""What preference optimisation is worth: teacher, student, after DPO and KTO, dense control, over seeds.

python recipes/rl/table.py recipes/rl/table.yaml
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.machine import keep_freed_memory
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import MARK, is_clean
from spiking_mamba.common.records import put_record, read_records
from spiking_mamba.common.schema import Count, Name, Seeds, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.text import check_sources
from spiking_mamba.evaluation.evaluator import evaluate
from spiking_mamba.evaluation.settings import EvaluationSettings
from spiking_mamba.evaluation.statistics import groups, interval
from spiking_mamba.evaluation.tasks import zero_shot_tasks
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.training.preference import PreferenceSettings, optimise

# column of the table: method, whose model it starts from
COLUMNS = {"DPO": ("dpo", "student"), "KTO": ("kto", "student"), "teacher, DPO": ("dpo", "teacher")}
IDENTITY = ("kind", "group", "seed")  # of a record: a run of a column, or a model that was evaluated
OF_A_RUN = ("method", "rows", "held_out", "before", "after", "change", "seconds", "provenance")
OF_A_MODEL = ("weights_sha256", "tasks", "average", "perplexity")


@schema
class TableSettings:
    """Settings of the table; every field is a key of the YAML file.

    Attributes:
        teacher, student: checkpoint folders or hub names; ``{seed}`` in one stands for each seed.
        output: folder of ``table.md``, the runs and their evaluation. Finished runs in it are reused, others
            go on.
        results: file of the records that the table is made of, a line for each run and each model that was
            evaluated; null: ``table.jsonl`` in ``output``.
        dpo, kto: YAML files of the two optimisations, for all seeds.
        changes: keys of both files to set otherwise, as on the command line: ``training.max_steps=10``.
        seeds: of the optimisations.
        tasks: zero-shot sets that were not trained on.
        corpora: texts for the perplexity.
        limit: items of each task and rows of each text; null for all.
        batch_size: sequences a forward pass of the evaluation.
    """

    teacher: Name
    student: Name
    output: Name
    results: Name | None = None
    dpo: Name = "recipes/rl/dpo.yaml"
    kto: Name = "recipes/rl/kto.yaml"
    changes: list[str] = field(default_factory=list)
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    tasks: list[Name] = field(
        default_factory=lambda: ["arc_easy", "arc_challenge", "boolq", "openbookqa", "lambada_openai"]
    )
    corpora: list[Name] = field(default_factory=lambda: ["openwebtext-passages", "wikipedia-passages"])
    limit: Count | None = None
    batch_size: Count = 16

    def __post_init__(self) -> None:
        if self.results is None:
            self.results = str(Path(self.output, "table.jsonl"))


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


def of_run(column: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run: all that its folder's ``results.json`` has but the log."""
    seed = result["provenance"]["settings"]["seed"]
    return {"kind": "run", "group": column, "seed": seed} | {key: result[key] for key in OF_A_RUN}


def of_model(model: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an evaluated model: its scores, and how far they are from the student's."""
    record = {"kind": "model", "group": model["group"], "seed": model["seed"]}
    record |= {key: model[key] for key in OF_A_MODEL}
    if model["spikes"]:
        record["spikes"] = {"mean_abs": model["spikes"]["mean_abs"]}
    if model["energy"]:
        record["energy"] = {"projections": {"fp32": model["energy"]["projections"]["fp32"]}}
    gaps = [row for row in evaluation["gaps"] if row["model"] == model["name"]]
    record["gaps"] = {row["task"]: {k: row[k] for k in ("gap", "low", "high", "items")} for row in gaps}
    about = {key: value for key, value in evaluation["provenance"].items() if key != "settings"}
    return record | {"provenance": about}


def quantities(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The table's rows, ``{quantity: {column: interval over seeds}}``."""
    runs = {column: [r for r in records if r["kind"] == "run" and r["group"] == column] for column in COLUMNS}
    found = accuracies(runs)
    for column, group in groups([r for r in records if r["kind"] == "model"]).items():
        for name, values in group.items():
            found.setdefault(name, {})[column] = values
    return found


def accuracies(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
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


def make_table(settings: TableSettings) -> list[dict[str, Any]]:
    """Run what is missing, evaluate, and return the records of it all."""
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
    check_sources(settings.corpora)
    plan = {column: [planned(settings, column, seed) for seed in settings.seeds] for column in COLUMNS}
    planned_runs = [one for of_column in plan.values() for one in of_column]
    for model in dict.fromkeys(one.model for one in planned_runs):
        locate(model)
    path = Path(settings.results)
    read_records(path)
    made = set()
    with interruptible(lambda: finished(planned_runs, settings.output)):
        for column, of_column in plan.items():
            for one in of_column:
                made.add(keep(path, of_run(column, run(one))))
        evaluation = evaluate(wanted)
        for model in evaluation["models"]:
            made.add(keep(path, of_model(model, evaluation)))
    return [record for record in read_records(path) if tuple(map(record.get, IDENTITY)) in made]


def keep(path: Path, record: dict[str, Any]) -> tuple[Any, ...]:
    """Record it; return what it is told from others by."""
    put_record(path, record, IDENTITY)
    return tuple(map(record.get, IDENTITY))


def to_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The table; a column with a number whose code is in no commit is marked."""
    columns = ["teacher", "student", *COLUMNS]
    changed = {r["group"] for r in records if not is_clean(r["provenance"]["commit"])}
    changed |= {COLUMNS[column][1] for column in changed & COLUMNS.keys()}  # a run measures its start, too
    rows = []
    for name, found in quantities(records).items():
        digits = 2 if name.startswith(("perplexity", "gain")) else 3
        rows.append([name, *(cell(found.get(column), digits) for column in columns)])
    seeds = len({r["seed"] for r in records if r["kind"] == "run"})
    header = [f"{column} {MARK}" if column in changed else column for column in columns]
    text = markdown_table([f"{seeds} seeds, 95% intervals over them", *header], rows)
    return text + (f"\n\n{MARK}: from code that differed from its commit, or had none." if changed else "")


def finished(runs: list[Any], output: str) -> str:
    done = sum(Path(one.output, "results.json").is_file() for one in runs)
    return f"{done} of {len(runs)} runs in {output} are finished; the same command goes on."


@fail_clearly()
def main() -> None:
    settings = parse_settings(TableSettings, description=__doc__)
    quiet()
    keep_freed_memory()
    table = to_markdown(make_table(settings))
    write_whole(Path(settings.output) / "table.md", table + "\n")
    print(f"\n{table}\n\nTable: {settings.output}/table.md, records: {settings.results}")


if __name__ == "__main__":
    main()
