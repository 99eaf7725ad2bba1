"""What ends a command in one line instead of a traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from spiking_mamba.common.interruption import end_interrupted

__all__ = ["CheckpointError", "DataError", "DivergedError", "RunError", "fail_clearly"]


class RunError(ValueError):
    """A run cannot start: its folder holds another one, or its settings contradict each other."""


class DivergedError(RunError, FloatingPointError):
    """A training has left the finite numbers."""


# Of the machine and the libraries: a full disk, no memory, numbers that C++ or Rust cannot hold.
_OF_THE_MACHINE = (OSError, RuntimeError, MemoryError, OverflowError, SafetensorError)
_LONGEST = 1000  # characters of what an error says


@contextlib.contextmanager
def fail_clearly() -> Iterator[None]:
    """End a recipe with one line instead of a traceback where input or machine are at fault, or at Ctrl-C.

    With ``SPIKING_MAMBA_TRACEBACK`` set there is a traceback. What is left, such as an AttributeError, is a
    fault of this program and has one always.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        end_interrupted(interrupt)
    except (CheckpointError, DataError, RunError, StrictDataclassError, ValueError, TypeError) as error:
        _end(error, "")
    except _OF_THE_MACHINE as error:
        known = isinstance(error, OSError | MemoryError)
        _end(error, "" if known else " (SPIKING_MAMBA_TRACEBACK=1 shows where)")
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
            raise
        _end(error, " (SPIKING_MAMBA_TRACEBACK=1 shows where)")


def _end(error: BaseException, hint: str) -> NoReturn:
    if os.environ.get("SPIKING_MAMBA_TRACEBACK"):
        raise error
    if isinstance(
        error, BrokenPipeError
    ):  # who reads our output has left; Python would say so again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(f"error: {_said(error)}{hint}")


def _said(error: BaseException) -> str:
    """One line."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, RunError):
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = f"{' to '.join(files)}: {error.strerror}" if files else error.strerror
    elif isinstance(error, MemoryError):
        text = f"There is not enough memory. {error}"
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


class DataError(RuntimeError):
    """Data that cannot be had or cannot be used; the message says what to do about it."""


class CheckpointError(ValueError):
    """A checkpoint is incomplete, or its weights and its configuration disagree."""
