"""Write a checkpoint in a form that another program reads."""

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.model.exporting import ExportSettings, export


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(ExportSettings, "export", description)
    quiet()
    print(f"Written: {export(settings)}")


if __name__ == "__main__":
    main()
