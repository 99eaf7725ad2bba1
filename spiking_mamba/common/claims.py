"""Who is at a folder: one process at a time, by a lock on a file in it that also says what wrote the folder.

with claim_folder(Path("runs/student"), "distillation"):
    ...  # another process that claims it gets a ClaimedError

The lock is the kernel's (``flock``), so it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from spiking_mamba.common.errors import RunError

__all__ = ["MARKER", "ClaimedError", "claim_folder", "claimed", "marked", "scratch_folder"]

MARKER = ".spiking_mamba"  # in a claimed folder
_MARK = "folder written by spiking_mamba: "
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of some network file systems
_YOUNG = 60.0  # seconds that a scratch folder may be without its lock: it is being made

_open: set[int] = set()  # file descriptors of the locks that this process holds


class ClaimedError(RunError):
    """Another process is at the folder."""


def _let_go() -> None:
    """A forked child must not keep its parent's locks alive: a data loader's worker outlives a kill."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether no one else holds this lock file; it is this block's until the block, or the process, ends.

    Args:
        path: is made where it is not there, and stays; its content is left alone.
        wait: until it is free, instead of giving False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _open.add(descriptor)
    owner = os.getpid()
    try:
        yield _lock(descriptor, path, wait)
    finally:
        if os.getpid() == owner:  # in a forked child it is closed already
            _open.discard(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: {path} cannot be locked ({error.strerror}): start no second process", file=sys.stderr
        )
    return True


def marked(folder: Path) -> str | None:
    """Of what kind the claim was that wrote the folder; None where no claim has."""
    try:
        text = (folder / MARKER).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text.removeprefix(_MARK).strip() if text.startswith(_MARK) else None


@contextlib.contextmanager
def claim_folder(folder: Path, kind: str) -> Iterator[None]:
    """The folder, made where it is not there, is this block's alone, and known from now on to be of a kind.

    Raises:
        ClaimedError: another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder / MARKER) as free:
        if not free:
            raise ClaimedError(f"Another process is at {folder}: wait for its end or choose another folder.")
        if marked(folder) != kind:
            (folder / MARKER).write_text(f"{_MARK}{kind}\n")  # in place: the lock is on this very file
        yield


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder below ``parent`` for the block; those that a kill has left there are removed.

    Args:
        prefix: of its name; all below ``parent`` that begin so are taken for scratch folders.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{prefix}*"):
        _remove_left(left)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    with claimed(folder / MARKER):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process removes it too, or it is not ours to remove
        if not (folder / MARKER).exists():  # perhaps of a process that is about to lock it
            if folder.is_dir() and time.time() - folder.stat().st_mtime > _YOUNG:
                shutil.rmtree(folder, ignore_errors=True)
            return
        with claimed(folder / MARKER) as free:
            if free:
                shutil.rmtree(folder, ignore_errors=True)
