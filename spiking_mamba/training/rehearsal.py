"""A distillation rehearsed on random weights and tokens, on any machine and without a network."""

from dataclasses import replace
from pathlib import Path

import datasets
import torch

from spiking_mamba.common.interruption import interruptible
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.training.distillation import DistillationSettings, distill

__all__ = ["estimate", "rehearse"]

_STEPS = 3
_SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_heads": 4, "vocab_size": 512}
_SMALL_LENGTH = 64


def estimate(config: SpikingMambaConfig, frozen_embeddings: bool = True) -> dict[str, float]:
    """What a distillation holds at least, without activations.

    Parameters of a student like ``config``, and bytes of student, gradients, AdamW's two moments and teacher,
    in float32.
    """
    with torch.device("meta"):
        model = SpikingMambaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = parameters - (model.get_input_embeddings().weight.numel() if frozen_embeddings else 0)
    return {"parameters": parameters, "trained": trained, "bytes": 4 * (2 * parameters + 3 * trained)}


def rehearse(settings: DistillationSettings) -> tuple[Path, list[dict[str, float]]]:
    """Run three steps of ``settings`` from end to end: training, checkpoint, export. Nothing is fetched.

    With ``dry_run: true`` the model has 2 layers of width 128 and rows have at most 64 tokens; with
    ``dry_run: full`` both are as the settings say. The run's folder is ``output`` with ``-dry-run`` behind
    it, and is overwritten.

    Raises:
        ValueError: the settings are wrong, or the teacher's size is not known here.
    """
    if settings.dry_run not in (True, "full"):
        raise ValueError(f"dry_run must be true, false or full, got {settings.dry_run!r}.")
    config = published_config(settings.teacher)
    needs = estimate(config, settings.freeze_embeddings)
    print(
        f"{settings.teacher}: {needs['parameters']:,} parameters, {needs['trained']:,} of them trained; "
        f"student, gradients, AdamW and teacher take {needs['bytes'] / 2**30:.1f} GiB without activations."
    )
    training = settings.training | {"max_steps": _STEPS, "save_steps": _STEPS, "logging_steps": 1}
    length = settings.length
    if settings.dry_run is True:
        config = SpikingMambaConfig.from_dict(config.to_dict() | _SMALL | {"head_dim": 64, "expand": 2})
        training |= {"per_device_train_batch_size": 2}
        length = min(length, _SMALL_LENGTH)
    settings = replace(
        settings,
        output=f"{settings.output}-dry-run",
        training=training,
        length=length,
        overwrite=True,
        resume=False,
    )
    arguments = settings.make_arguments()
    count = _STEPS * arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(config.vocab_size, (count, length), generator=generator)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    torch.manual_seed(settings.seed)
    with interruptible(lambda: "a rehearsal is not gone on with; the same command starts it again."):
        return distill(settings, SpikingMambaForCausalLM(config).eval(), rows=rows)
