"""Who is at a folder: one process at a time.

with claim_folder(Path("runs/student")):
    ...  # another process that claims it gets a ClaimedError

The lock is the kernel's (``flock``), on the folder itself or on a file, so it ends with its process, however
that ends, and nothing of it stays.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import refuse_file

__all__ = ["LOCK", "ClaimedError", "claim_folder", "claimed", "scratch_folder", "whole_folder"]

LOCK = ".lock"  # in a folder that cannot itself be locked, as on NFS
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of some network file systems

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
    """Whether no one else holds this lock; it is this block's until the block, or the process, ends.

    Args:
        path: a folder; or a file, which is made where it is not there, and stays as it is.
        wait: until it is free, instead of giving False.
    """
    descriptor, free = _locked(path, wait)
    owner = os.getpid()
    _open.add(descriptor)
    try:
        yield free
    finally:
        if os.getpid() == owner:  # in a forked child it is closed already
            _open.discard(descriptor)
            os.close(descriptor)


def _locked(path: Path, wait: bool) -> tuple[int, bool]:
    """An open file descriptor, and whether the lock on it was free."""
    if path.is_dir():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    else:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return descriptor, False
    except OSError as error:
        if error.errno == errno.EBADF and path.is_dir():  # NFS locks only what is open for writing
            os.close(descriptor)
            return _locked(path / LOCK, wait)
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        said = f"warning: {path} cannot be locked ({error.strerror}): start no second process"
        print(said, file=sys.stderr)
    return descriptor, True


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """The folder, made where it is not there, is this block's alone.

    Raises:
        ClaimedError: another process is at it.
        RunError: a file is in its place; nothing was made.
    """
    refuse_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder) as free:
        if not free:
            raise ClaimedError(f"Another process is at {folder}: wait for its end or choose another folder.")
        yield


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder below ``parent`` for the block; those that a kill has left there are removed.

    Args:
        parent: where it is made.
        prefix: of its name; all below ``parent`` that begin so are taken for scratch folders.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), claimed(left) as free:  # another process may remove it, too
            if free:
                shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        folder = _new_folder(parent, prefix, stack)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft of a folder: not made yet, and given the folder's name when the block has ended well.

    Args:
        folder: a new or empty one; what its drafts were that a kill has left is removed.
    """
    with scratch_folder(folder.parent, f".{folder.name}-") as scratch:
        draft = scratch / folder.name
        yield draft
        draft.replace(folder)


def _new_folder(parent: Path, prefix: str, stack: contextlib.ExitStack) -> Path:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        with contextlib.suppress(OSError):
            if stack.enter_context(claimed(folder)) and folder.is_dir():
                return folder
        if not parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(parent))
        # another process took it for one that was left: between its making and its lock
