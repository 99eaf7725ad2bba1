"""A checkpoint in any form that this package reads, written in one that another program reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.claims import whole_folder
from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import refuse_file
from spiking_mamba.common.schema import Name, Sources, schema
from spiking_mamba.model.checkpoint import export_dense, load_dense, load_model
from spiking_mamba.model.converted import is_converted
from spiking_mamba.model.event_driven import STATES, WEIGHTS, EventDrivenMambaForCausalLM, event_driven
from spiking_mamba.model.gguf import write_gguf
from spiking_mamba.model.remote_code import save_with_code
from spiking_mamba.model.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer

__all__ = ["ExportSettings", "export"]

Form = Literal["transformers", "state-spaces", "gguf", "event-driven", "remote-code"]
DENSE = ("transformers", "state-spaces", "gguf")
Rows = Callable[[str | list[str], PreTrainedTokenizerBase], torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@schema
class ExportSettings:
    """Every field is a key of the YAML file.

    Attributes:
        model: folder or hub name of a checkpoint: transformers' or state-spaces' Mamba2, a model of this
            package, or a converted model.
        output: where to write, a new or empty folder; for gguf a new file.
        to: transformers, for Mamba2ForCausalLM; state-spaces, for mamba-ssm; gguf, for llama.cpp: these three
            take a dense model. These take a spiking one as well: event-driven; remote-code, for
            AutoModelForCausalLM with trust_remote_code=True where this package is not installed.
        tokenizer: folder or hub name of one to write beside the model; null: the checkpoint's own, if any.
        dtype: of the weights, for transformers and state-spaces.
        weights: of an event-driven model.
        calibration: of its 4-bit weights, text for which they are rounded, 128 rows of its training part: a
            corpus or a file, or a list of them, see ``load_text``; null: each weight to the nearest.
        tolerance: with a calibration, by how much perplexity may grow, 0.01 for 1%, as estimated on that
            text: layers that cost most for the bytes they save become int8; null: none does.
        states: dtype of the scan's states in an event-driven model's decoding.
    """

    model: Name
    output: Name
    to: Form
    tokenizer: Name | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    weights: Literal[WEIGHTS] = "int8"  # type: ignore[valid-type]
    calibration: Sources | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None
    states: Literal[STATES] = "float32"  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        if self.to not in ("transformers", "state-spaces") and self.dtype != "float32":
            raise ValueError(f"dtype belongs to transformers and state-spaces, not to {self.to}.")
        if self.calibration is not None and (self.to, self.weights) != ("event-driven", "int4"):
            raise ValueError("calibration belongs to event-driven models with weights=int4.")
        if self.tolerance is not None and self.calibration is None:
            raise ValueError("tolerance is estimated on a text: it wants calibration.")


def export(settings: ExportSettings, rows_of: Rows) -> Path:
    """Write a checkpoint in another form, whole or not at all.

    Args:
        settings: what and where.
        rows_of: tokens of the text of ``settings.calibration``, by its names and a tokenizer, int64
            ``[rows, length]``.

    Returns:
        What was written: a folder, or a GGUF file.

    Raises:
        RunError: there is something at the output already; a calibration has no tokenizer.
        CheckpointError: the checkpoint cannot be read, or is spiking where a dense one is asked for.
        DataError: a converted model's source cannot be had.
        ValueError: that form has no such model.
    """
    output = Path(settings.output)
    refuse_file(output.absolute().parent)
    filled = output.is_dir() and (settings.to == "gguf" or any(output.iterdir()))
    if filled or (output.exists() and not output.is_dir()):
        raise RunError(f"{output} is there already: name another output.")
    folder, _ = locate(settings.model)
    tokenizer = None
    if settings.tokenizer is not None or has_tokenizer(folder) or is_converted(folder):
        tokenizer = load_tokenizer(folder, settings.tokenizer)
    model = load_dense(folder) if settings.to in DENSE else load_model(folder)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model)
    if settings.to == "gguf":
        output.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(model, output)
    elif settings.to in ("event-driven", "remote-code"):
        if isinstance(model, EventDrivenMambaForCausalLM):
            raise RunError(f"{settings.model} is event-driven already: export the model that it was made of.")
        if settings.to == "remote-code":
            _write(output, lambda draft: save_with_code(model, draft), tokenizer)
        else:
            seen = None
            if settings.calibration is not None:
                if tokenizer is None:
                    raise RunError("calibration reads text: name a tokenizer.")
                seen = rows_of(settings.calibration, tokenizer)
            made = event_driven(model, settings.weights, settings.states, seen, settings.tolerance)
            _write(output, made.save_pretrained, tokenizer)
    else:
        export_dense(model.to(DTYPES[settings.dtype]), output, settings.to, tokenizer)
    return output


def _write(output: Path, save: Callable[[Path], object], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Make a folder by ``save`` and the tokenizer, whole or not at all."""
    with whole_folder(output) as draft:
        save(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
