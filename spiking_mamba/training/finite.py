"""A training that leaves the finite numbers stops there: nothing of it is saved or exported."""

from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from spiking_mamba.common.errors import DivergedError
from spiking_mamba.training.processes import anywhere

__all__ = ["StopWhenNotFinite", "check_weights"]


def _not_finite(model: nn.Module) -> list[str]:
    """Names of the weights, of whatever process's part, that hold NaN or infinities."""
    named = [(name, p.detach()) for name, p in model.named_parameters() if p.is_floating_point()]
    if not named:
        return []
    local = [p.to_local() if hasattr(p, "to_local") else p for _, p in named]
    flags = anywhere(torch.stack([~p.isfinite().all() for p in local]))
    return [name for (name, _), flag in zip(named, flags.tolist(), strict=True) if flag]


def _some(names: list[str], number: int) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else f" of {number}")


def check_weights(model: nn.Module, step: int) -> None:
    """Raise a DivergedError where a weight is not finite. Every process has to call it."""
    if names := _not_finite(model):
        raise DivergedError(
            f"The training diverged: after step {step} weights are not finite "
            f"({_some(names, sum(1 for _ in model.parameters()))}). They are not kept; "
            "a lower training.learning_rate may help."
        )


class StopWhenNotFinite(TrainerCallback):
    """Raise a DivergedError in the first step whose loss, in any process, is not finite.

    On a GPU the loss is looked at one step later, when it is there, so that the host never waits for it; but
    always before a row is logged and before anything is saved.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event] | None = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._settle()
        step = state.global_step + 1
        bad = anywhere(~torch.isfinite(self.trainer._tr_loss.detach()).reshape(1))
        if bad.is_cuda:
            flag = torch.empty(1, dtype=torch.bool, pin_memory=True).copy_(bad, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = step, flag, event
        elif bad.item():
            self._stop(step)

    def _settle(self) -> None:
        if self._pending is None:
            return
        step, flag, event = self._pending
        event.synchronize()
        self._pending = None
        if flag.item():
            self._stop(step)

    def _before_writing(self, args, state, control, **kwargs) -> None:
        if control.should_log or control.should_save or control.should_evaluate:
            self._settle()
        if control.should_save:
            check_weights(cast(nn.Module, self.trainer.model), state.global_step)

    on_step_end = on_epoch_end = _before_writing

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if args.save_strategy == "best":  # Trainer decides to save after this
            self._settle()
            check_weights(cast(nn.Module, self.trainer.model), state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._settle()
        check_weights(cast(nn.Module, self.trainer.model), state.global_step)

    def _stop(self, step: int) -> None:
        raise DivergedError(f"The loss is not finite in step {step}: {self._reason()}. Nothing is exported.")

    def _reason(self) -> str:
        trainer: Any = self.trainer
        for role, model in (("teacher", "teacher"), ("reference", "ref_model")):
            other = getattr(trainer, model, None)
            if isinstance(other, nn.Module) and (names := _not_finite(other)):
                return f"the {role}'s weights are not ({_some(names, sum(1 for _ in other.parameters()))})"
        if names := _not_finite(trainer.model):
            number = sum(1 for _ in trainer.model.parameters())
            return f"weights are not since the step before ({_some(names, number)}): the training diverged"
        parts = getattr(trainer, "_parts", {})
        bad = [name for name, values in parts.items() if not torch.isfinite(values[-1].float()).all()]
        if bad:
            return f"of its parts, {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not"
        return "all weights are; look at the settings of the loss and at the data"
