"""Write a checkpoint in the form that another program reads."""

import sys
from pathlib import Path
from typing import Any, Literal

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.claims import scratch_folder
from spiking_mamba.common.errors import CheckpointError, RunError, fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Name, schema
from spiking_mamba.model.checkpoint import FORMS, export_dense, load_model
from spiking_mamba.model.event_driven import STATES, WEIGHTS, EventDrivenMambaForCausalLM, event_driven
from spiking_mamba.model.gguf import write_gguf
from spiking_mamba.model.tokenizer import load_tokenizer

_FORMS = (*FORMS, "gguf", "event-driven")


@schema
class ExportSettings:
    """What is written, and where.

    Attributes:
        model: folder or hub name of a checkpoint: transformers' or state-spaces' Mamba2, or one of this
            project.
        output: folder that is written, new or empty; of ``gguf`` a file.
        form: ``transformers``, for its ``Mamba2ForCausalLM``; ``state-spaces``, for mamba-ssm; ``gguf``, in
            float32 and without a tokenizer, for llama.cpp: these three of dense models alone.
            ``event-driven``: integers for decoding on a processor, of spiking and dense ones.
        tokenizer: folder or hub name; null: the checkpoint's own, where it has one.
        weights: of ``event-driven``: bits of the projections' weights.
        states: of ``event-driven``: dtype of the scan's states.
    """

    model: Name
    output: Name
    form: Literal[_FORMS] = "transformers"  # type: ignore[valid-type]
    tokenizer: Name | None = None
    weights: Literal[WEIGHTS] = "int8"  # type: ignore[valid-type]
    states: Literal[STATES] = "float32"  # type: ignore[valid-type]


def export(settings: ExportSettings) -> Path:
    """Write it, whole or not at all.

    Raises:
        RunError: something is there already.
        ValueError: that form has no such model.
    """
    output, form = Path(settings.output), settings.form
    if output.is_file() or (output.is_dir() and (form == "gguf" or any(output.iterdir()))):
        raise RunError(f"{output} is there already.")
    model: Any = load_model(settings.model)
    if isinstance(model, EventDrivenMambaForCausalLM):
        raise RunError(
            f"{settings.model} is event-driven already: other forms come from what it was made of."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if form == "gguf":
        write_gguf(model, output)
        return output
    tokenizer = _tokenizer(settings)
    if form == "event-driven":
        made = event_driven(model, settings.weights, settings.states)
        with scratch_folder(output.parent, f".{output.name}-") as scratch:
            made.save_pretrained(scratch / output.name)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch / output.name)
            (scratch / output.name).replace(output)
    else:
        export_dense(model, output, form, tokenizer)
    return output


def _tokenizer(settings: ExportSettings) -> Any:
    """The one that is named, or the checkpoint's own; None where it has none."""
    try:
        return load_tokenizer(settings.model, settings.tokenizer)
    except CheckpointError:
        if settings.tokenizer is not None:
            raise
        print(f"{settings.model} has no tokenizer: none is written.", file=sys.stderr)
        return None


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(ExportSettings, "export", description)
    quiet()
    print(f"{settings.model} is in {export(settings)}, for {settings.form}.")


if __name__ == "__main__":
    main()
