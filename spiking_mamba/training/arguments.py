"""transformers' arguments from a recipe's ``training`` mapping, and what else a recipe says of a step."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from spiking_mamba.common.machine import bf16_pays
from spiking_mamba.common.settings import reject_unknown_keys
from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["TRAINING_KEYS", "autocast", "compile_blocks", "training_arguments"]


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
