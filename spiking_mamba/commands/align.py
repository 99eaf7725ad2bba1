"""Optimise a model on preferences by DPO or KTO."""

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.reports.preferences import summary
from spiking_mamba.training.preference import PreferenceSettings, optimise


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(PreferenceSettings, "align", description)
    quiet()
    results = optimise(settings)
    if results is not None:  # the first process
        print(f"\n{summary(results)}\n\nModel: {results['model']}; numbers: {settings.output}/results.json")


if __name__ == "__main__":
    main()
