"""What training a spiking model adds to transformers' ``Trainer``, whatever the loss."""

import math
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.pretrained import OWN_IN_FLOAT32
from spiking_mamba.spikes.counts import SpikeCounts

__all__ = ["SpikingTrainer", "sgc_lambda"]


def sgc_lambda(schedule: str, start: float, progress: float) -> float:
    """SGC's lambda when ``progress`` in [0, 1] of the steps are done; 'linear' and 'cosine' end at 0."""
    progress = min(1.0, max(0.0, progress))
    if schedule == "linear":
        return start * (1.0 - progress)
    if schedule == "cosine":
        return start * 0.5 * (1.0 + math.cos(math.pi * progress))
    return start


class _SGCSchedule(TrainerCallback):
    """Set lambda from the step, so that a resumed run finds the one it left."""

    def __init__(self, student: SpikingMambaForCausalLM) -> None:
        self.student = student

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        sgc = self.student.config.sgc
        if sgc is not None:
            self.student.set_sgc_lambda(
                sgc_lambda(sgc["schedule"], sgc["lam"], state.global_step / state.max_steps)
            )


class SpikingTrainer(Trainer):
    """A ``Trainer``, or, before it in a list of bases, what one of its kin is mixed with.

    It anneals SGC, can freeze the embeddings, exempts thresholds from weight decay, and logs what a subclass
    notes beside the loss.
    """

    def __init__(self, model: SpikingMambaForCausalLM, freeze_embeddings: bool, **kwargs: Any) -> None:
        model.get_input_embeddings().weight.requires_grad_(not freeze_embeddings)
        super().__init__(model=model, **kwargs)
        self.student = model
        self._parts: dict[str, list[torch.Tensor]] = {}  # since the last log
        self.add_callback(_SGCSchedule(model))

    def get_decay_parameter_names(self, model) -> list[str]:
        """No weight decay on thresholds and levels, nor on what Mamba2 exempts (A_log, D, dt_bias)."""
        exempt = (*OWN_IN_FLOAT32, "A_log", "dt_bias", ".D")
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(exempt)]

    def _log_due(self) -> bool:
        return (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0

    def _note(self, **parts: torch.Tensor | float) -> None:
        for name, part in parts.items():
            self._parts.setdefault(name, []).append(torch.as_tensor(part))

    def _note_spikes(self, spikes: SpikeCounts) -> None:
        if spikes.projections:  # a dense model has none
            self._note(mean_abs_spike=spikes.mean_abs, sgc_lambda=self.student.sgc_lambda)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, values in self._parts.items():
                mean = torch.stack([value.float().to(self.args.device) for value in values]).mean()
                logs[name] = float(self.accelerator.reduce(mean, "mean"))
            self._parts.clear()
        super().log(logs, *args, **kwargs)
