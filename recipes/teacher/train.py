"""Pretrain a small dense Mamba2: python recipes/teacher/train.py recipes/teacher/tiny.yaml"""

from spiking_mamba.pretraining import PretrainingSettings, pretrain
from spiking_mamba.settings import parse_settings
from spiking_mamba.training import fail_clearly, quiet


@fail_clearly()
def main() -> None:
    settings = parse_settings(PretrainingSettings, description=__doc__)
    quiet()
    folder, _ = pretrain(settings)
    print(f"The teacher is in {folder}.")


if __name__ == "__main__":
    main()
