"""What a person sees of a training: a table that grows, a row for each entry of the log, above one bar."""

import math
import sys
import time
from typing import Any, cast

from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from spiking_mamba.common.progress import say
from spiking_mamba.training.distillation_loss import TERMS
from spiking_mamba.training.trainer import SpikingTrainer

__all__ = ["TrainingTable", "show_table"]

_NARROWEST = 9  # columns, so that 12345.6789 alone would not fit


def _shown() -> dict[str, tuple[str, int]]:
    """Of what a trainer may log: title and decimals, in the order of the columns."""
    return {
        "loss": ("loss", 4),
        **{name: (term.title, 4) for name, term in TERMS.items()},
        "rewards/margins": ("margin", 4),
        "rewards/accuracies": ("accuracy", 3),
        "mean_abs_spike": ("mean |s|", 3),
        "eval_loss": ("held-out loss", 4),
    }


def show_table(trainer: Trainer) -> "TrainingTable":
    """Let a trainer print a :class:`TrainingTable` instead of what transformers prints.

    Returns:
        The table, to be closed when the training ends in whatever way.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    spiking = isinstance(trainer, SpikingTrainer) and trainer.student.config.neuron is not None
    row = cast(Dataset, trainer.train_dataset)[0].get("input_ids")
    batch = trainer.args.train_batch_size * trainer.args.world_size
    table = TrainingTable(None if row is None else batch * len(row), spiking)
    trainer.add_callback(table)
    return table


class TrainingTable(TrainerCallback):
    """Print the log as a table to stdout, with a bar below it on stderr where that is a terminal.

    Only the first process prints. ``disable_tqdm`` leaves the rows and takes the bar. The header comes with
    the first row, and once more should a number be logged that has no column yet.

    Args:
        batch_tokens: input tokens of one batch, those of all processes together; None where batches differ:
            then tokens are those that trl counts (``num_tokens``), where it does.
        spiking: keep a column for the mean ``|s|``, which not every row has.
    """

    def __init__(self, batch_tokens: int | None = None, spiking: bool = False) -> None:
        self.batch_tokens, self.spiking = batch_tokens, spiking
        self.tokens = 0  # trained on in this session
        self._columns: dict[str, int] = {}  # and their widths
        self._bar: tqdm | None = None
        self._first_step = 0
        self._mark: tuple[float, int] | None = None  # time and tokens at the last row

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._first_step = state.global_step
        if not state.is_world_process_zero or state.global_step >= state.max_steps:
            return
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
            disable=True if args.disable_tqdm else None,
        )

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._mark is None:  # a resumed run has by now found its place in the data
            self._mark = time.perf_counter(), self.tokens

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self.tokens += self.batch_tokens or 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step > state.max_steps:  # see _LeaveFinished
            return
        self.tokens += self.batch_tokens or 0
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.set_description_str("evaluating")

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.set_description_str("training")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        if self.batch_tokens is None and "num_tokens" in logs:
            self.tokens = int(logs["num_tokens"])
        if "train_runtime" in logs:
            self.close()
            say(self._summary(min(state.global_step, state.max_steps), logs["train_runtime"]))
        elif any(name in logs for name in _shown()):
            self._row(args, state, logs)

    def _row(self, args: Any, state: Any, logs: dict[str, Any]) -> None:
        values = {name: logs[name] for name in _shown() if name in logs}
        if "loss" in logs and (speed := self._speed()) is not None:
            values["tokens/s"] = speed
        if not values.keys() <= self._columns.keys():
            self._lay_out(args, state, {*values, *self._columns})
        cells = [f"{state.global_step:>{self._columns['step']}}"]
        for name, width in list(self._columns.items())[1:]:
            cells.append(f"{_number(name, values.get(name)):>{width}}")
        say("  ".join(cells).rstrip())
        self._mark = time.perf_counter(), self.tokens

    def _speed(self) -> float | None:
        """Tokens a second since the last row; None where they are not counted."""
        if self._mark is None or self.tokens == self._mark[1]:
            return None
        start, before = self._mark
        return (self.tokens - before) / max(time.perf_counter() - start, 1e-9)

    def _lay_out(self, args: Any, state: Any, names: set[str]) -> None:
        """Decide on columns and widths, and print the header."""
        names |= {"mean_abs_spike"} if self.spiking else set()
        names |= {"eval_loss"} if args.eval_strategy != "no" else set()
        titles = {name: title for name, (title, _) in _shown().items() if name in names}
        self._columns = {"step": max(len("step"), len(str(state.max_steps)))}
        self._columns |= {name: max(len(title), _NARROWEST) for name, title in titles.items()}
        if "tokens/s" in names:
            titles["tokens/s"], self._columns["tokens/s"] = "tokens/s", 10
        titles = {"step": "step"} | titles
        say("  ".join(f"{title:>{self._columns[name]}}" for name, title in titles.items()))

    def _summary(self, last: int, seconds: float) -> str:
        steps = last - self._first_step
        if steps <= 0:
            return f"All {last} steps were done before."
        text = f"{steps} step{'s' if steps > 1 else ''}"
        if self._first_step:
            text += f" from step {self._first_step} on"
        if self.tokens:
            text += f", {_amount(self.tokens)} tokens"
        return f"{text} in {_duration(seconds)}"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "tokens/s":
        return f"{value:,.0f}"
    if math.isfinite(value) and value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:.{_shown()[name][1]}f}"


def _amount(tokens: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if tokens >= size / 10:
            return f"{tokens / size:.1f} {name}"
    return f"{tokens:,}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
