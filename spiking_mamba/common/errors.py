"""What ends a command in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError

from spiking_mamba.common.interruption import end_interrupted

__all__ = ["CheckpointError", "DataError", "DivergedError", "RunError", "fail_clearly"]


class RunError(ValueError):
    """A run cannot start: its folder holds another one, or its settings contradict each other."""


class DivergedError(RunError, FloatingPointError):
    """A training has left the finite numbers."""


@contextlib.contextmanager
def fail_clearly() -> Iterator[None]:
    """End a recipe with one line instead of a traceback when its input is at fault, or at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        end_interrupted(interrupt)
    except (CheckpointError, DataError, RunError, StrictDataclassError, ValueError, TypeError) as error:
        if os.environ.get("SPIKING_MAMBA_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")


class DataError(RuntimeError):
    """Data that cannot be had or cannot be used; the message says what to do about it."""


class CheckpointError(ValueError):
    """A checkpoint is incomplete, or its weights and its configuration disagree."""
