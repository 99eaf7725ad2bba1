"""What every training recipe shares: its run folder, its data and transformers' arguments."""

import contextlib
import copy
import ctypes
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .checkpoint import CheckpointError, export
from .interruption import end_interrupted
from .modeling import SpikingMambaForCausalLM
from .packages import DataError
from .progress import quiet
from .settings import reject_unknown_keys
from .training_log import show_table

__all__ = [
    "RunError",
    "autocast",
    "collate",
    "finish_run",
    "kept_in",
    "quiet",
    "run",
    "start_run",
    "training_arguments",
    "whole_model",
]

_SETTINGS = "settings.yaml"
_HISTORY = "log.json"
_RECORD = "training.json"  # beside the model
_COMPLETE = "complete"  # in a checkpoint


class RunError(ValueError):
    """A run cannot start: its folder holds another one, or its settings contradict each other."""


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of equal length to ``input_ids`` and ``labels`` of shape ``[B, L]``."""
    ids = np.array([row["input_ids"] for row in rows], dtype=np.int64)  # faster than torch, from lists too
    input_ids = torch.from_numpy(ids)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


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


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    On a CPU every large activation is otherwise mapped, faulted in and unmapped again at every step:
    without, a training step of 2.7M parameters took 1.15 times as long (medians of 3 runs, 2 cores).
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)


def bf16_pays() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def device_name() -> str:
    """What this process computes on, for reports."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


# of a recipe's ``training``
TRAINING_KEYS = tuple(field.name for field in dataclasses.fields(TrainingArguments) if field.init)


def training_arguments(
    folder: Path,
    given: dict[str, Any],
    seed: int,
    cls: type[TrainingArguments] = TrainingArguments,
    **others: Any,
) -> TrainingArguments:
    """transformers' ``TrainingArguments`` from a recipe's ``training`` mapping; or a ``cls`` derived from
    them, whose further fields ``others`` are.

    ``bf16: auto`` means where the hardware makes it pay. Defaults that differ from transformers': nothing
    is reported to services, logs and checkpoints go to ``folder``, AdamW with betas (0.9, 0.95).

    Raises:
        ValueError: an unknown key; the nearest known one is named.
    """
    reject_unknown_keys(given, TRAINING_KEYS, "training")
    defaults = {
        "report_to": "none",
        "disable_tqdm": False,  # transformers would decide by how much it is to say itself
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 200,
        "save_total_limit": 2,
        "save_only_model": False,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "bf16": "auto",
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "ddp_find_unused_parameters": False,
        "logging_nan_inf_filter": False,  # it waits for the GPU at every step, and hides what went wrong
        "prediction_loss_only": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    given = {key: _number(key, value) for key, value in given.items()}
    # YAML reads a bare `no` as false
    given = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in given.items()}
    arguments = defaults | given
    if arguments["bf16"] == "auto":
        arguments["bf16"] = bf16_pays()
    made = cls(output_dir=str(folder), seed=seed, data_seed=seed, **arguments, **others)
    if made.n_gpu > 1:
        # Trainer would split each batch over threads, and Triton's tuning is not safe among threads
        print(f"Using one of {made.n_gpu} GPUs: torchrun or accelerate launch use them all.", file=sys.stderr)
        made._n_gpu = 1
    return made


_NUMBERS = {
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
}


def _number(key: str, value: Any) -> Any:
    """The value of an argument that is a number: YAML reads 1e-3, which has no point, as text."""
    if key not in _NUMBERS or not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"training.{key} must be a number, got {value!r}.") from None
    return int(number) if number.is_integer() else number


def compile_blocks(setting: Any, *models: SpikingMambaForCausalLM) -> None:
    """Compile the models' blocks if a recipe's ``compile`` says so; 'auto' means on a GPU that has Triton.

    Raises:
        ValueError: it is none of true, false and 'auto'.
    """
    if setting not in (True, False, "auto"):
        raise ValueError(f"compile must be true, false or auto, got {setting!r}.")
    if setting == "auto":
        setting = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    for model in models:
        model.compile_blocks(setting)


def autocast(trainer: Trainer) -> torch.autocast:
    """The trainer's mixed precision, for what runs outside its model: accelerate wraps that alone."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    return torch.autocast(trainer.args.device.type, dtype, enabled=dtype is not None)


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


def check_rows(rows: datasets.Dataset, arguments: TrainingArguments, vocab_size: int) -> None:
    """Raise a RunError when the data do not fill one batch, or hold a token that the model does not know."""
    batch = arguments.per_device_train_batch_size
    if len(rows) < batch:
        raise RunError(f"The data make {len(rows)} rows, fewer than one batch of {batch}: give more text.")
    largest = pc.max(pc.list_flatten(rows.data.column("input_ids"))).as_py()
    if largest >= vocab_size:
        raise RunError(
            f"The data hold the token id {largest}, outside the vocabulary of {vocab_size}: "
            "the tokenizer does not belong to the model."
        )


@contextlib.contextmanager
def fail_clearly() -> Iterator[None]:
    """End a recipe with one line instead of a traceback when its input is at fault, or at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        end_interrupted(interrupt)
    except (CheckpointError, DataError, RunError, StrictDataclassError, ValueError, TypeError) as error:
        if os.environ.get("SPIKING_MAMBA_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
