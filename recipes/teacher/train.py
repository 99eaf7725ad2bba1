"""Pretrain a small dense Mamba2: python recipes/teacher/train.py recipes/teacher/tiny.yaml"""

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.training.pretraining import PretrainingSettings, pretrain


@fail_clearly()
def main() -> None:
    settings = parse_settings(PretrainingSettings, description=__doc__)
    quiet()
    folder, _ = pretrain(settings)
    print(f"The teacher is in {folder}.")


if __name__ == "__main__":
    main()
