"""What every training recipe shares: its run folder, its data and transformers' arguments."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedTokenizerBase, Trainer

from spiking_mamba.common.errors import DivergedError, RunError
from spiking_mamba.common.files import PART, full, replace_folder, write_whole
from spiking_mamba.common.machine import keep_freed_memory
from spiking_mamba.common.progress import quiet
from spiking_mamba.model.checkpoint import export
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.training.checkpoints import Checkpoints, LeaveFinished, last_checkpoint
from spiking_mamba.training.finite import StopWhenNotFinite
from spiking_mamba.training.folder import HISTORY, kept_in, run_folder, start_run
from spiking_mamba.training.log import show_table
from spiking_mamba.training.processes import on_first_process

__all__ = ["finish_run", "kept_in", "quiet", "run", "run_folder", "start_run", "whole_model"]

_RECORD = "training.json"  # beside the model


def run(trainer: Trainer, resume: bool) -> list[dict[str, float]]:
    """Train, from the last checkpoint if there is one to resume, and return the log's rows.

    Raises:
        DivergedError: a loss or a weight is not finite; no such weights are saved.
        RunError: the folder cannot be written any more.
    """
    keep_freed_memory()
    if trainer.is_fsdp_enabled:
        # accelerate would cast every weight to bf16, A_log and dt_bias too; autocast casts the products alone
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    folder = Path(str(trainer.args.output_dir))
    table = show_table(trainer)
    checkpoints = Checkpoints(trainer)
    for callback in (StopWhenNotFinite(trainer), checkpoints, LeaveFinished()):
        trainer.add_callback(callback)
    last = last_checkpoint(folder) if resume else None
    try:
        with _writing(folder):
            trainer.train(resume_from_checkpoint=last)
    finally:
        table.close()
    history, state = checkpoints.history(), trainer.state
    state.global_step, state.log_history = min(state.global_step, state.max_steps), list(history)
    on_first_process(write_whole, folder / HISTORY, json.dumps(history, indent=1))
    return history


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say of a disk that is full, or was taken away, what libraries in C++ and Rust say in their own ways."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, DivergedError) or (reason := full(folder)) is None:
            raise
        raise RunError(f"{folder} cannot be written: {reason}. Then: {kept_in(folder)}") from error


def whole_model(trainer: Trainer) -> SpikingMambaForCausalLM | None:
    """The trained model, gathered from its shards where it is sharded: then on the first process only.

    Every process has to call it.
    """
    trained = cast(SpikingMambaForCausalLM, trainer.model)
    if not trainer.is_fsdp_enabled:
        return trained
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(trainer.model_wrapped, options=whole)
    if not trainer.is_world_process_zero():
        return None
    with torch.device("meta"):
        model = SpikingMambaForCausalLM(copy.deepcopy(trained.config))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = trained.generation_config
    return model


def finish_run(
    model: SpikingMambaForCausalLM | None,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    name: str = "model",
    record: dict[str, Any] | None = None,
) -> Path:
    """Export model and tokenizer to ``folder / name``, whole or not at all; return that folder.

    Args:
        model: what :func:`whole_model` gives: processes other than the first need none.
        record: what ``training.json`` is to hold, beside the model.
        tokenizer: to go beside the model; None: there is none. folder: of the run. name: of the folder in it.
    """
    target, draft = folder / name, folder / f"{name}{PART}"

    def save() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        with _writing(folder):
            export(cast(SpikingMambaForCausalLM, model), draft, tokenizer)
            if record is not None:
                (draft / _RECORD).write_text(json.dumps(record, indent=1, default=str) + "\n")
        replace_folder(draft, target)

    on_first_process(save)
    return target
