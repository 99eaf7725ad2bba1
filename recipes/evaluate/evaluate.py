"""Evaluate checkpoints: zero-shot tasks, perplexity, and the spikes and energy of those forward passes.

python recipes/evaluate/evaluate.py recipes/evaluate/evaluate.yaml models=runs/quickstart/student/model
"""

from pathlib import Path
from typing import Any

from spiking_mamba.evaluation import SOURCE_TASKS, EvaluationSettings, evaluate
from spiking_mamba.report import markdown_table
from spiking_mamba.settings import parse_settings
from spiking_mamba.training import fail_clearly, keep_freed_memory, quiet


def _cell(metric: dict[str, Any]) -> str:
    error = metric["stderr"]
    return f"{metric['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def table(models: list[dict[str, Any]]) -> str:
    """Every metric of every task and text, one column a model; ``*`` marks what the source averages."""
    rows = []
    for task, first in models[0]["tasks"].items():
        for metric in first["metrics"]:
            mark = " *" if task in SOURCE_TASKS and metric == first["main"] else ""
            cells = [_cell(model["tasks"][task]["metrics"][metric]) for model in models]
            rows.append([f"{task} {metric}{mark}, {first['n']} items", *cells])
    averages = [model["average"] for model in models]
    if averages[0] is not None:
        rows.append(["average of the six *", *(f"{average:.4f}" for average in averages)])
    for corpus in models[0]["perplexity"]:
        for key in ("perplexity", "bits_per_byte"):
            rows.append([f"{corpus}, {key}", *(f"{m['perplexity'][corpus][key]:.3f}" for m in models)])
    spikes = [model["spikes"] for model in models]
    rows.append(["mean absolute spike count", *("" if s is None else f"{s['mean_abs']:.3f}" for s in spikes)])
    return markdown_table(["", *(model["name"] for model in models)], rows)


def main() -> None:
    settings = parse_settings(EvaluationSettings, description=__doc__)
    quiet()
    keep_freed_memory()
    with fail_clearly():
        results = evaluate(settings)
        print("\n" + table(results["models"]))
        print(f"\nResults: {Path(settings.output) / 'results.json'}")


if __name__ == "__main__":
    main()
