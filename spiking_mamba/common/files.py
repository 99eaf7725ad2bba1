"""Files that are written whole or not at all, folders that are removed whole, and checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from spiking_mamba.common.errors import RunError

__all__ = [
    "PART",
    "file_sha256",
    "full",
    "refuse_above",
    "remove_whole",
    "replace_folder",
    "sweep",
    "unused",
    "write_whole",
]

PART = ".part"  # behind the name of what is not yet whole, or no more


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + PART)
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power failure leaves an empty file under the name
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    draft.replace(path)


def remove_whole(path: Path) -> None:
    """Remove a file or folder so that, whenever this is killed, it is there whole or not under its name.

    Of a symbolic link, the link alone.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    going = path.with_name(path.name + PART)
    shutil.rmtree(going, ignore_errors=True)
    path.replace(going)
    shutil.rmtree(going)


def replace_folder(draft: Path, target: Path) -> None:
    """Give a finished folder its name, in place of the folder that has it."""
    if target.exists():
        old = target.with_name(f"{target.name}.old{PART}")
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
        draft.replace(target)
        shutil.rmtree(old)
    else:
        draft.replace(target)


def unused(folder: Path, besides: Iterable[str] = ()) -> bool:
    """Whether a folder is not there, or holds nothing but drafts (``*.part``) and these names."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    return all(entry.name.endswith(PART) or entry.name in besides for entry in folder.iterdir())


def sweep(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the drafts that a kill has left in a folder, of names that match one of the patterns."""
    drafts = [f"{pattern}{PART}" for pattern in patterns] + [f"{pattern}.old{PART}" for pattern in patterns]
    for entry in list(folder.glob(f"*{PART}")):
        if any(fnmatchcase(entry.name, draft) for draft in drafts):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def full(folder: Path, size: int = 2**20) -> str | None:
    """Why a file of that many bytes cannot be written in the folder; None if it can be.

    Libraries that write in C++ or Rust say of a full disk what they please.
    """
    probe = folder / f"probe{PART}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or os.strerror(error.errno or errno.EIO)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_above(folder: Path, what: str) -> None:
    """Raise a RunError where the working directory lies in the folder: nobody means to empty that."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise RunError(
            f"{what} would empty {folder}, in which this command was given: choose another folder."
        )
