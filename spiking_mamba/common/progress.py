"""One bar for a stage of several measurements, on a terminal only, and lines that do not disturb it.

with Stage(len(texts), "Evaluating") as stage:
    for name, rows in texts.items():
        with stage.part(name) as share:
            perplexity(model, rows, progress=share)
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import datasets
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from tqdm import tqdm

from spiking_mamba.common.ranks import is_first_process

__all__ = ["Share", "Stage", "part_of", "quiet", "reporting", "say", "say_once", "watched"]

T = TypeVar("T")
Share = Callable[[float], None]  # takes the share of a part that is done, from 0 to 1
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"  # no forecast: parts are not alike
_PATIENCE = 2  # seconds in which nobody asks how far it is


def say_once(line: str) -> None:
    """As :func:`say`, by the first of several processes."""
    if is_first_process():
        say(line)


def say(line: str) -> None:
    """Print a line at once, above whatever bar is on the terminal."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(line, flush=True)


def watched(rows: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The rows as they are, with a bar where they take seconds: on a terminal, by the first process.

    Args:
        rows: what somebody waits for.
        total: how many there are.
        title: what stands before the bar.
    """
    style: dict[str, Any] = {"dynamic_ncols": True, "leave": False, "delay": _PATIENCE, "bar_format": _FORMAT}
    yield from tqdm(rows, title, total, disable=None if is_first_process() else True, **style)


class Stage:
    """The bar of a stage, on stderr. Where stderr is no terminal there is none; it is gone when it is done.

    Args:
        parts: how many times :meth:`part` will be entered.
        title: what stands before the bar until the first part begins.
        shown: False for no bar at all.

    Attributes:
        label: what all parts have in common from now on, such as the model's name.
    """

    def __init__(self, parts: int, title: str, shown: bool = True) -> None:
        self.label = ""
        self._done = 0
        self._bar = tqdm(
            total=parts,
            desc=title,
            bar_format=_FORMAT,
            dynamic_ncols=True,
            leave=False,
            disable=None if shown else True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Share]:
        """One part; the bar moves by what is told the :data:`Share`, and to its end with the block."""
        self._bar.set_description_str(f"{self.label}: {name}" if self.label else name)

        def share(done: float) -> None:
            target = self._done + min(1.0, done)
            self._bar.update(max(0.0, target - self._bar.n))

        yield share
        self._done += 1
        share(0.0)


def part_of(stage: Stage | None, name: str) -> contextlib.AbstractContextManager[bool | Share]:
    """A part of the stage, or without one: True, for :func:`reporting` to show a bar."""
    return contextlib.nullcontext(True) if stage is None else stage.part(name)


@contextlib.contextmanager
def reporting(progress: bool | Share, name: str) -> Iterator[Share]:
    """Where a measurement tells how far it is: ``progress`` itself, or a bar of its own, or nowhere."""
    if callable(progress):
        yield progress
        return
    with Stage(1, name, shown=progress) as stage, stage.part(name) as share:
        yield share


def quiet() -> None:
    """Silence what transformers says about this machine at every start, and the bars of a moment.

    Missing kernels and the like; bars of downloads stay.
    """
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    downloads = not are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    warnings.filterwarnings("ignore", module="transformers|torch|multiprocess|accelerate")
