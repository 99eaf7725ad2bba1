"""Write a checkpoint in a form that another program reads."""

import torch
from transformers import PreTrainedTokenizerBase

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.data import draw_rows
from spiking_mamba.model.exporting import ExportSettings, export

ROWS, LENGTH = 128, 256  # of a calibration


def calibration_rows(source: str | list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Rows drawn from a text's training part, int64 ``[rows, 256]``, at most 128."""
    return torch.tensor(draw_rows(source, tokenizer, LENGTH, ROWS, "train")["input_ids"])


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(ExportSettings, "export", description)
    quiet()
    print(f"Written: {export(settings, calibration_rows)}")


if __name__ == "__main__":
    main()
