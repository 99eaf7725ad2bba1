"""A run's checkpoints: marked when they are whole, then rotated; with the losses that are not yet logged."""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from spiking_mamba.common.files import remove_whole, write_whole
from spiking_mamba.training.folder import COMPLETE, HISTORY
from spiking_mamba.training.processes import on_first_process

__all__ = ["Checkpoints", "last_checkpoint"]

_STEP = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)$")


def checkpoint(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint of a run; what was not written to its end is removed."""
    while (last := get_last_checkpoint(str(folder))) and not Path(last, COMPLETE).is_file():
        on_first_process(_discard, Path(last))
    return last


def _discard(incomplete: Path) -> None:
    print(f"{incomplete} is incomplete: the run was stopped while it wrote. Going back.", file=sys.stderr)
    shutil.rmtree(incomplete)


class Checkpoints(TrainerCallback):
    """Mark a checkpoint when every process has written its part, and remove old ones only then.

    Trainer removes the old checkpoint before this package knows the new one to be whole, so it must not:
    ``save_total_limit`` is taken from it here. Into every checkpoint goes what Trainer forgets: the sums of
    losses since the last row of the log and since the beginning, so that a resumed run logs what one that
    was never stopped would.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self.begun = time.time()
        self.resumed: dict[str, Any] = {}  # of the checkpoint that this training goes on from
        self.first_step = 0
        self.at_first: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begun, self.first_step = time.time(), state.global_step
        self.at_first = {"total_flos": state.total_flos, "epoch": state.epoch}
        path = self._sums(checkpoint(args.output_dir, state.global_step))
        if not state.global_step or not path.is_file():  # written before there were sums
            return
        self.resumed = json.loads(path.read_text())
        trainer = self.trainer
        trainer._tr_loss = torch.tensor(self.resumed["loss"], device=args.device)
        trainer._total_loss_scalar = self.resumed["total_loss"]
        trainer._globalstep_last_logged = self.resumed["logged"]
        if hasattr(trainer, "_parts"):
            trainer._parts = {k: [torch.tensor(v) for v in part] for k, part in self.resumed["parts"].items()}
        if hasattr(trainer, "_metrics"):  # trl's
            trainer._metrics["train"].update(self.resumed["metrics"])
        if hasattr(trainer, "_total_train_tokens"):  # trl's, too
            trainer._total_train_tokens = self.resumed["tokens"]

    def on_save(self, args, state, control, **kwargs) -> None:
        trainer, folder = self.trainer, checkpoint(args.output_dir, state.global_step)
        sums = {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "logged": trainer._globalstep_last_logged,
            "parts": {k: [float(v) for v in part] for k, part in getattr(trainer, "_parts", {}).items()},
            "metrics": getattr(trainer, "_metrics", {}).get("train", {}),
            "tokens": getattr(trainer, "_total_train_tokens", 0),
            "seconds": self.seconds(),
        }
        write_whole(self._sums(folder), json.dumps(sums))
        on_first_process(self._mark_and_rotate, folder, state.best_model_checkpoint)

    def _sums(self, folder: Path) -> Path:
        return folder / f"losses-{self.trainer.args.process_index}.json"

    def _mark_and_rotate(self, newest: Path, best: str | None) -> None:
        (newest / COMPLETE).touch()
        if not self.limit or self.limit < 1:
            return
        checkpoints = {int(m[1]): path for path in newest.parent.iterdir() if (m := _STEP.match(path.name))}
        kept = {newest, Path(best)} if best else {newest}
        going = [checkpoints[step] for step in sorted(checkpoints) if checkpoints[step] not in kept]
        for old in going[: max(0, len(checkpoints) - max(self.limit, len(kept)))]:
            remove_whole(old)

    def seconds(self) -> float:
        """Spent on training so far, that of earlier parts with it, as far as checkpoints tell."""
        return self.resumed.get("seconds", 0.0) + time.time() - self.begun

    def history(self) -> list[dict[str, float]]:
        """The log's rows, whose last is the summary of the whole training, however often it was stopped."""
        state, args = self.trainer.state, self.trainer.args
        rows = [row for row in state.log_history if row["step"] <= state.max_steps]
        finished = bool(self.first_step) and self.first_step >= state.max_steps
        if finished and (before := _summary(Path(str(args.output_dir)), state.max_steps)) is not None:
            return [row for row in rows if "train_runtime" not in row] + [before]
        if not self.first_step:
            return rows
        total, steps = self.trainer._total_loss_scalar, min(state.global_step, state.max_steps)
        summary = {"total_flos": state.total_flos, "epoch": state.epoch}
        if finished:  # Trainer has made a step more, see LeaveFinished
            total = self.resumed.get("total_loss", 0.0) + self.resumed.get("loss", 0.0)
            summary = self.at_first
        seconds = self.resumed.get("seconds", 0.0) if finished else self.seconds()
        samples = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        row = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(samples / max(seconds, 1e-9), 3),
            "train_steps_per_second": round(steps / max(seconds, 1e-9), 3),
            "total_flos": summary["total_flos"],
            "train_loss": total / max(steps, 1),
            "epoch": summary["epoch"],
            "step": steps,
        }
        if not self.resumed:  # of a checkpoint without sums nothing is known
            del row["train_loss"]
        return [row for row in rows if "train_runtime" not in row] + [row]


def _summary(folder: Path, step: int) -> dict[str, float] | None:
    """The summary that a run has written when it finished."""
    try:
        rows = json.loads((folder / HISTORY).read_text())
        return next(row for row in reversed(rows) if "train_runtime" in row and row["step"] == step)
    except (OSError, ValueError, TypeError, KeyError, StopIteration):
        return None


class LeaveFinished(TrainerCallback):
    """A finished run that is resumed gets one step more from Trainer: let it change and write nothing."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def _leave(self, args, state, control, **kwargs) -> None:
        if state.global_step > state.max_steps:
            control.should_save = control.should_log = control.should_evaluate = False

    on_step_end = on_epoch_end = _leave
