"""lm-eval's command line, which knows the model ``spiking_mamba`` then.

python -m spiking_mamba.evaluation run --model spiking_mamba --model_args pretrained=FOLDER --tasks piqa
"""

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.evaluation import harness  # noqa: F401 - registers the model


def main() -> None:
    """What ``lm_eval`` does, with its arguments."""
    from lm_eval.__main__ import cli_evaluate

    with fail_clearly():
        cli_evaluate()


if __name__ == "__main__":
    main()
