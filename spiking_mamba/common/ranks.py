"""Which of a launcher's processes this one is; without torch, which takes seconds to import."""

import os

__all__ = ["is_first_process"]


def is_first_process() -> bool:
    """Whether this is the first of a launcher's processes, or the only one: the one that speaks."""
    return int(os.environ.get("RANK", 0)) == 0
