"""Memory for what is read at random and in streams: aligned, on huge pages where the system has them."""

import contextlib
import mmap
import sys

import numpy as np

__all__ = ["HUGE_PAGE", "aligned"]

HUGE_PAGE = 2**21  # bytes, of x86 and of ARM with pages of 4 KiB
_ALIGNMENT = 64  # a cache line, and the widest vector


def aligned(size: int, dtype: type = np.uint8) -> np.ndarray:
    """``size`` zeros in one dimension, the first at a multiple of 64 bytes; large ones begin a huge page.

    Asking for huge pages is a hint: a system without them, or that denies them, gives ordinary ones.
    """
    size_bytes = size * np.dtype(dtype).itemsize
    if size_bytes >= HUGE_PAGE and sys.platform == "linux":
        return _on_huge_pages(size_bytes).view(dtype)
    memory = np.zeros(size_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size_bytes].view(dtype)


def _on_huge_pages(size: int) -> np.ndarray:
    mapped = mmap.mmap(-1, size + HUGE_PAGE)
    whole = np.frombuffer(mapped, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel built without them; before the first byte is touched
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return whole[start : start + size]
