"""Which of a launcher's processes this one is; without torch, which takes seconds to import."""

import os

__all__ = ["is_first_process", "process_count"]


def is_first_process() -> bool:
    """Whether this is the first of a launcher's processes, or the only one: the one that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def process_count() -> int:
    """How many processes a launcher, torchrun or ``accelerate launch``, has started; 1 without one.

    A job's environment may have a WORLD_SIZE where nobody has started several.
    """
    return int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "RANK", "MASTER_ADDR"} <= os.environ.keys() else 1
