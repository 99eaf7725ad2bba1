"""Memory for what is read at random and in streams: aligned, on huge pages where the system has them."""

import contextlib
import mmap
import sys

import numpy as np

__all__ = ["HUGE_PAGE", "Arena", "aligned"]

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
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no huge pages
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=private)
    whole = np.frombuffer(mapped, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel built without them; before the first byte is touched
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return whole[start : start + size]


class Arena:
    """Memory for many arrays that live and die together, side by side on huge pages.

    Apart, an array of less than a huge page would lie on ordinary ones, whose addresses take longer to look
    up than their contents to read. What is never written to takes no room.
    """

    _CHUNK = 2**26

    def __init__(self) -> None:
        self._chunk, self._used = np.zeros(0, np.uint8), 0

    def take(self, size: int, dtype: type = np.uint8) -> np.ndarray:
        """As :func:`aligned`."""
        size_bytes = size * np.dtype(dtype).itemsize
        if size_bytes > self._chunk.size - self._used:
            self._chunk, self._used = aligned(max(self._CHUNK, size_bytes)), 0
        part: np.ndarray = self._chunk[self._used : self._used + size_bytes].view(dtype)
        self._used += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        return part

    def copy(self, array: np.ndarray) -> np.ndarray:
        """A copy in the arena, contiguous, of the same shape."""
        copied = self.take(array.size, array.dtype.type).reshape(array.shape)
        copied[...] = array
        return copied
