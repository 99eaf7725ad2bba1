"""Evaluate checkpoints: zero-shot tasks, perplexity, and the spikes and energy of those forward passes.

python recipes/evaluate/evaluate.py recipes/evaluate/evaluate.yaml models=runs/quickstart/student/model
"""

from pathlib import Path

from spiking_mamba.evaluation import EvaluationSettings, evaluate
from spiking_mamba.evaluation_report import write_evaluation_report
from spiking_mamba.interruption import interruptible
from spiking_mamba.settings import parse_settings
from spiking_mamba.training import fail_clearly, keep_freed_memory, quiet


@fail_clearly()
def main() -> None:
    settings = parse_settings(EvaluationSettings, description=__doc__)
    quiet()
    keep_freed_memory()
    results = evaluate(settings)
    output = Path(settings.output)
    with interruptible(lambda: f"{output / 'results.json'} is complete; the same command reports it."):
        print("\n" + write_evaluation_report(output, results))
    print(f"\nReport: {output / 'report.md'}, {output / 'report.html'}; numbers: {output / 'results.json'}")


if __name__ == "__main__":
    main()
