"""transformers' arguments from a recipe's ``training`` mapping, and what else a recipe says of a step."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, Field
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from spiking_mamba.common.keys import unknown_key
from spiking_mamba.common.machine import bf16_pays
from spiking_mamba.common.schema import (
    Auto,
    Count,
    Natural,
    Positive,
    Problem,
    SettingsError,
    Words,
    mapping_of,
    schema,
    schema_of,
)
from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["TRAINING_KEYS", "Training", "autocast", "compile_blocks", "training_arguments"]


# What a recipe decides by itself, or has no use for; how many devices train is accelerate's to say.
_LEFT_OUT = {
    *("output_dir", "seed", "data_seed", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "local_rank"),
    *("debug", "label_names"),
    "label_smoothing_factor",  # of a loss that is not the recipes'
    "save_only_model",  # what is saved would not go on as it was
    *("length_column_name", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches"),
    *("eval_use_gather_object", "train_sampling_strategy", "use_liger_kernel", "liger_kernel_config"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),  # a recipe's `compile` does
}
# of a recipe's ``training``
TRAINING_KEYS = tuple(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.init and field.name not in _LEFT_OUT
)


@schema
class _Checkpointing:
    """What ``torch.utils.checkpoint`` takes."""

    use_reentrant: bool = False
    preserve_rng_state: bool = True
    determinism_check: Literal["default", "none"] = "default"
    early_stop: bool = True


_Steps = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Log = Literal["debug", "info", "warning", "error", "critical", "passive", "detail"]
_MAX_STEPS = "a positive integer, or -1 to go by num_train_epochs"
_BOUNDS: dict[str, Any] = {
    "max_steps": Annotated[Natural | Literal[-1], Words(_MAX_STEPS)],
    **dict.fromkeys(("learning_rate", "num_train_epochs", "adam_epsilon"), Positive),
    **dict.fromkeys(("logging_steps", "save_steps"), _Steps),
    **dict.fromkeys(("eval_steps", "neftune_noise_alpha"), _Steps | None),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[_NotNegative, Field(lt=1)]),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), _NotNegative),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "ddp_timeout",
        ),
        Count,
    ),
    **dict.fromkeys(
        (
            *("torch_empty_cache_steps", "eval_accumulation_steps"),
            *("dataloader_prefetch_factor", "ddp_bucket_cap_mb"),
        ),
        Count | None,
    ),
    "dataloader_num_workers": Natural,
    "save_total_limit": Natural | None,
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        mapping_of(_Checkpointing) | None,
    ),
    "bf16": Auto,
    **dict.fromkeys(("log_level", "log_level_replica"), _Log),
}
_NUMBERS = {
    field.name: int if field.name in ("max_steps",) or isinstance(field.default, int) else float
    for field in dataclasses.fields(TrainingArguments)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
}
_Checked = schema_of(TrainingArguments, TRAINING_KEYS, _BOUNDS, "training")


def check_training(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's ``training`` as it is.

    Raises:
        SettingsError: a key that is not known here, or a value that it does not take.
    """
    if (unknown := unknown_key(given, TRAINING_KEYS)) is not None:
        raise SettingsError("training", [Problem("", f"Unknown key {unknown[0]} in ", f"; {unknown[1]}")])
    _Checked(**_plain(given))
    return given


# The type of a recipe's ``training``.
Training = Annotated[
    dict[str, Any],
    AfterValidator(check_training),
    Words("a mapping, fields of transformers' TrainingArguments"),
]


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """Values as the arguments take them: numbers that were written as text, and what YAML makes of ``no``."""
    given = {key: _number(key, value) for key, value in given.items()}
    return {k: "no" if v is False and k.endswith("_strategy") else v for k, v in given.items()}


def _number(key: str, value: Any) -> Any:
    """The value of an argument that is a number: 1e3 is a whole one, and in quotes it is text."""
    if key not in _NUMBERS or not isinstance(value, str | float):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    whole = number.is_integer() and (isinstance(value, str) or _NUMBERS[key] is int)
    return int(number) if whole else number


def training_arguments(
    folder: Path,
    given: dict[str, Any],
    seed: int,
    cls: type[TrainingArguments] = TrainingArguments,
    evaluates: bool = False,
    **others: Any,
) -> TrainingArguments:
    """``TrainingArguments`` of transformers from a recipe's ``training`` mapping.

    Or a ``cls`` derived from them, whose further fields ``others`` are.

    ``bf16: auto`` means where the hardware makes it pay. Defaults that differ from transformers': nothing
    is reported to services, logs and checkpoints go to ``folder``, AdamW with betas (0.9, 0.95).

    Raises:
        ValueError: an unknown key, and then the nearest known one is named; a value that it does not take;
            or values that do not go together.
    """
    try:
        given = _plain(check_training(given))
    except SettingsError as error:
        raise SettingsError("training", [problem.within("training") for problem in error.problems]) from None
    if given.get("max_steps") == 0:  # a study has such rows, and trains none
        raise ValueError(f"training.max_steps must be {_MAX_STEPS}, got 0.")
    defaults: dict[str, Any] = {
        "report_to": "none",
        "run_name": folder.absolute().name,
        "project": "spiking-mamba",
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
    arguments = defaults | given
    if arguments["bf16"] == "auto":
        arguments["bf16"] = bf16_pays() and not arguments.get("fp16")
    try:
        made = cls(output_dir=str(folder), seed=seed, data_seed=seed, **arguments, **others)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"training: {error}") from error
    _rehearse(made, evaluates)
    if made.n_gpu > 1:
        # Trainer would split each batch over threads, and Triton's tuning is not safe among threads
        print(f"Using one of {made.n_gpu} GPUs: torchrun or accelerate launch use them all.", file=sys.stderr)
        made._n_gpu = 1
    return made


def _rehearse(made: TrainingArguments, evaluates: bool) -> None:
    """Raise a ValueError for what transformers would find out when the folder is written already."""
    asks = made.eval_strategy != "no" or made.save_strategy == "best" or made.load_best_model_at_end
    if asks and not evaluates:
        raise ValueError(
            "training.eval_strategy must be no, save_strategy not best, and load_best_model_at_end false: "
            "nothing is held out for them."
        )
    if (made.fp16 or made.fp16_full_eval) and not torch.cuda.is_available():
        raise ValueError("training.fp16 needs a GPU.")
    optimiser, schedule = OptimizerNames(made.optim).value, SchedulerType(made.lr_scheduler_type).value
    if made.optim_args and optimiser.startswith("adamw_torch"):
        raise ValueError(f"training.optim_args: {optimiser} takes none.")
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(made)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
    except Exception as error:  # whatever an optimiser's package raises
        raise ValueError(f"training.optim={optimiser} with optim_args={made.optim_args}: {error}") from error
    steps = made.max_steps if made.max_steps > 0 else 100
    options = cast("dict[str, Any]", made.lr_scheduler_kwargs or {})  # the arguments have parsed text
    try:
        get_scheduler(made.lr_scheduler_type, optimizer, made.get_warmup_steps(steps), steps, options)
    except Exception as error:
        said = f"training.lr_scheduler_type={schedule} with lr_scheduler_kwargs={options}"
        raise ValueError(f"{said}: {error}") from error
    try:
        for callback in get_reporting_integration_callbacks(made.report_to):
            callback()
    except Exception as error:
        raise ValueError(f"training.report_to={made.report_to}: {error}") from error


def compile_blocks(setting: bool | Literal["auto"], *models: SpikingMambaForCausalLM) -> None:
    """Compile the models' blocks if a recipe's ``compile`` says so; 'auto' means on a GPU that has Triton."""
    if setting == "auto":
        setting = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    for model in models:
        model.compile_blocks(setting)


def autocast(trainer: Trainer) -> torch.autocast:
    """The trainer's mixed precision, for what runs outside its model: accelerate wraps that alone."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    return torch.autocast(trainer.args.device.type, dtype, enabled=dtype is not None)
