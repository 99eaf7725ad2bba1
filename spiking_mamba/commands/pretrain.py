"""Pretrain a dense Mamba2, the teacher of a spiking one."""

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet, say_once
from spiking_mamba.training.pretraining import PretrainingSettings, pretrain


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(PretrainingSettings, "pretrain", description)
    quiet()
    folder, _ = pretrain(settings)
    say_once(f"The teacher is in {folder}.")


if __name__ == "__main__":
    main()
