"""Evaluate checkpoints: zero-shot tasks, perplexity, and the spikes and energy of those forward passes."""

from pathlib import Path

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.machine import keep_freed_memory
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.ranks import is_first_process
from spiking_mamba.evaluation.evaluator import evaluate
from spiking_mamba.evaluation.settings import EvaluationSettings, names_of
from spiking_mamba.reports.evaluation import write_evaluation_report


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(EvaluationSettings, "evaluate", description, as_mapping={"models": names_of})
    quiet()
    keep_freed_memory()
    results = evaluate(settings)
    if not is_first_process():  # of a launcher's, which share the measurements
        return
    output = Path(settings.output)
    with interruptible(lambda: f"{output / 'results.json'} is complete; the same command reports it."):
        print("\n" + write_evaluation_report(output, results))
    print(f"\nReport: {output / 'report.md'}, {output / 'report.html'}; numbers: {output / 'results.json'}")


if __name__ == "__main__":
    main()
