"""What this machine computes on, and how to let it compute faster."""

import ctypes
import os
import sys

import torch

__all__ = ["bf16_pays", "check_threads", "cores", "device_name", "keep_freed_memory"]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    On a CPU every large activation is otherwise mapped, faulted in and unmapped again at every step:
    without, a training step of 2.7M parameters took 1.15 times as long (medians of 3 runs, 2 cores).
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)


def bf16_pays() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def device_name() -> str:
    """What this process computes on, for reports."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> None:
    """Raise a ValueError for more threads than this process may use processors; None asks for no number."""
    if threads is not None and not 1 <= threads <= cores():
        raise ValueError(
            f"threads must be from 1 to {cores()}, the cores that this process may use, got {threads}."
        )
