"""What every training recipe shares: its run folder, its data and transformers' arguments."""

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.machine import keep_freed_memory
from spiking_mamba.common.progress import quiet
from spiking_mamba.model.checkpoint import export
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.training.log import show_table

__all__ = ["finish_run", "kept_in", "quiet", "run", "start_run", "whole_model"]


_SETTINGS = "settings.yaml"
_HISTORY = "log.json"
_RECORD = "training.json"  # beside the model
_COMPLETE = "complete"  # in a checkpoint


def _on_first_process(action: Callable[..., Any], *arguments: Any) -> None:
    """Call ``action`` once in a distributed run: when every process is here, the others waiting for it."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed:
        torch.distributed.barrier()
    if not distributed or torch.distributed.get_rank() == 0:
        action(*arguments)
    if distributed:
        torch.distributed.barrier()


def start_run(settings: Any, resume: bool, overwrite: bool) -> Path:
    """Make the folder of a run and write its settings there, before anything is trained.

    Args:
        settings: a dataclass with a field ``output``.
        resume: go on with the run in that folder, whose settings must be the same.
        overwrite: throw away what the folder holds.

    Raises:
        RunError: the folder holds another run, or there is nothing to resume.
    """
    folder = Path(settings.output)
    _on_first_process(_claim, folder, settings, resume, overwrite)
    return folder


def _claim(folder: Path, settings: Any, resume: bool, overwrite: bool) -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    plain = {key: value for key, value in plain.items() if key not in ("resume", "overwrite", "dry_run")}
    kept = folder / _SETTINGS
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other.")
    if resume and occupied:
        if not kept.is_file():
            raise RunError(f"{folder} holds no run to resume: it has no {_SETTINGS}.")
        before = yaml.safe_load(kept.read_text())
        changed = sorted(k for k in before.keys() | plain.keys() if before.get(k) != plain.get(k))
        if changed:
            raise RunError(f"{folder} holds a run with other settings of {', '.join(changed)}.")
        return
    if occupied and not overwrite:
        raise RunError(
            f"{folder} already holds files: choose another output, or say resume=true or overwrite=true."
        )
    if occupied:
        if not kept.is_file():  # never remove what was not a run
            raise RunError(f"{folder} is not empty and holds no run: it is left as it is.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(kept, yaml.safe_dump(plain, sort_keys=False))


class _MarkComplete(TrainerCallback):
    """Mark a checkpoint when every process has written its part: a run may be killed while it writes."""

    def on_save(self, args, state, control, **kwargs) -> None:
        _on_first_process((_checkpoint(args.output_dir, state.global_step) / _COMPLETE).touch)


class _LeaveFinished(TrainerCallback):
    """A finished run that is resumed gets one step more from Trainer: let it change and write nothing."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step > state.max_steps:
            control.should_save = control.should_log = control.should_evaluate = False


def _checkpoint(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint of a run."""
    while (last := get_last_checkpoint(str(folder))) and not Path(last, _COMPLETE).is_file():
        _on_first_process(_discard, Path(last))
    return last


def kept_in(folder: Path) -> str:
    """What a training that is interrupted now leaves in its folder, and how to go on, in a sentence."""
    marks = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_COMPLETE}")
    complete = [int(mark.parent.name.rpartition("-")[2]) for mark in marks]
    if (model := folder / "model").is_dir():  # a finished run has one
        way = "resume=true does the rest" if complete else "without a checkpoint: resume=true trains it again"
        return f"{model} is trained and stays; {way}."
    if complete:
        return f"{folder} holds the checkpoint of step {max(complete)}; resume=true goes on from there."
    return f"nothing trained is kept in {folder}; start again with overwrite=true."


def _discard(checkpoint: Path) -> None:
    print(f"{checkpoint} is incomplete: the run was stopped while it wrote. Going back.", file=sys.stderr)
    shutil.rmtree(checkpoint)


def run(trainer: Trainer, resume: bool) -> list[dict[str, float]]:
    """Train, from the last checkpoint if there is one to resume, and return the log's rows."""
    keep_freed_memory()
    if trainer.is_fsdp_enabled:
        # accelerate would cast every weight to bf16, A_log and dt_bias too; autocast casts the products alone
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    folder = trainer.args.output_dir
    table = show_table(trainer)
    trainer.add_callback(_MarkComplete())
    trainer.add_callback(_LeaveFinished())
    last = _last_checkpoint(Path(folder)) if resume else None
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        table.close()
    state = trainer.state
    history = [row for row in state.log_history if row["step"] <= state.max_steps]
    state.global_step = min(state.global_step, state.max_steps)
    _on_first_process(write_whole, Path(folder) / _HISTORY, json.dumps(history, indent=1))
    return history


def whole_model(trainer: Trainer) -> SpikingMambaForCausalLM | None:
    """The trained model, gathered from its shards where it is sharded: then on the first process only.

    Every process has to call it.
    """
    if not trainer.is_fsdp_enabled:
        return trainer.model
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(trainer.model_wrapped, options=whole)
    if not trainer.is_world_process_zero():
        return None
    with torch.device("meta"):
        model = SpikingMambaForCausalLM(copy.deepcopy(trainer.model.config))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = trainer.model.generation_config
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
    """
    target, draft = folder / name, folder / f"{name}.part"

    def save() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        export(model, draft, tokenizer)
        if record is not None:
            (draft / _RECORD).write_text(json.dumps(record, indent=1, default=str) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)

    _on_first_process(save)
    return target
