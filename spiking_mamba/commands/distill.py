"""Distil a dense Mamba2 into a spiking one."""

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet, say_once
from spiking_mamba.training.distillation import DistillationSettings, distill
from spiking_mamba.training.rehearsal import rehearse


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(DistillationSettings, "distill", description)
    quiet()
    folder, _ = (rehearse if settings.dry_run else distill)(settings)
    say_once(f"The student is in {folder}.")


if __name__ == "__main__":
    main()
