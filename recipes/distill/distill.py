"""Distil a dense Mamba2 into a spiking one: python recipes/distill/distill.py recipes/distill/tiny.yaml"""

from spiking_mamba.distillation import DistillationSettings, distill
from spiking_mamba.rehearsal import rehearse
from spiking_mamba.settings import parse_settings
from spiking_mamba.training import fail_clearly, quiet


@fail_clearly()
def main() -> None:
    settings = parse_settings(DistillationSettings, description=__doc__)
    quiet()
    folder, _ = (rehearse if settings.dry_run else distill)(settings)
    print(f"The student is in {folder}.")


if __name__ == "__main__":
    main()
