"""Distil a dense Mamba2 into a spiking one: python recipes/distill/distill.py recipes/distill/tiny.yaml"""

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.training.distillation import DistillationSettings, distill
from spiking_mamba.training.rehearsal import rehearse


@fail_clearly()
def main() -> None:
    settings = parse_settings(DistillationSettings, description=__doc__)
    quiet()
    folder, _ = (rehearse if settings.dry_run else distill)(settings)
    print(f"The student is in {folder}.")


if __name__ == "__main__":
    main()
