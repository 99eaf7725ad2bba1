"""What a person is told who presses Ctrl-C: what is kept, and how to go on."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spiking_mamba.common.ranks import is_first_process

__all__ = ["end_interrupted", "interruptible", "measured_so_far"]

NOTHING = "nothing was written."
STATUS = 130  # what a shell gives a command that SIGINT ended


@contextlib.contextmanager
def interruptible(say: Callable[[], str]) -> Iterator[None]:
    """Note on a KeyboardInterrupt that passes what is kept and how to go on.

    Of several such blocks, one in another, the outermost decides: it belongs to the command that was given.

    Args:
        say: gives the sentence, which is to be true at that moment.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(say())
        raise


def measured_so_far(rows: Sequence[Any], folder: Path | None, name: str) -> str:
    """The sentence of a benchmark that writes its rows to a file of that name, if it has a folder."""
    if folder is None or not rows:
        return NOTHING
    return f"{folder / name} holds the {len(rows)} rows measured so far; the same command starts again."


def end_interrupted(interrupt: KeyboardInterrupt) -> NoReturn:
    """Say in one line what :func:`interruptible` has noted, and end with status 130.

    A second Ctrl-C ends the process at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    notes = getattr(interrupt, "__notes__", None) or [NOTHING]
    if is_first_process():  # of a distributed run one process speaks
        print(f"interrupted: {notes[-1]}", file=sys.stderr, flush=True)
    sys.exit(STATUS)
