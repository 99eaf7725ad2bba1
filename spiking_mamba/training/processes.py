"""What one process does for all of a distributed run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from spiking_mamba.common.errors import RunError

__all__ = ["anywhere", "in_several", "on_first_process"]


def in_several() -> bool:
    """Whether this is one of several processes that talk to one another."""
    return distributed.is_available() and distributed.is_initialized()


def on_first_process(action: Callable[..., Any], *arguments: Any) -> None:
    """Call ``action`` once in a distributed run: when every process is here, the others waiting for it.

    Raises:
        Exception: in every process where the first one's action fails; in the others a RunError that says so.
    """
    if not in_several():
        action(*arguments)
        return
    distributed.barrier()
    failure: Exception | None = None
    reason: list[str | None] = [None]
    if distributed.get_rank() == 0:
        try:
            action(*arguments)
        except Exception as error:
            failure, reason = error, [str(error) or type(error).__name__]
    distributed.broadcast_object_list(reason)
    if failure is not None:
        raise failure
    if reason[0] is not None:
        raise RunError(str(reason[0]))


def anywhere(flags: torch.Tensor) -> torch.Tensor:
    """Bool ``[N]``: which of these are true in any process; the host does not wait."""
    if not in_several():
        return flags
    flags_anywhere = flags.to(torch.uint8)
    distributed.all_reduce(flags_anywhere, distributed.ReduceOp.MAX)
    return flags_anywhere.bool()
