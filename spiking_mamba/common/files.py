"""Files that are written whole or not at all, folders that are removed whole, and checksums."""

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
    "refuse_file",
    "remove_whole",
    "replace_folder",
    "share_weights",
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


def share_weights(folder: Path) -> None:
    """Let all read a model's weights who may read its ``config.json``: safetensors 0.8 heeds no umask."""
    for weights in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # not all file systems have modes; another rank writes the config
            shutil.copymode(folder / "config.json", weights)


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
    """Give a finished folder its name, in place of the folder that has it.

    What had the name is away for a moment: :func:`restore` gives it back where a kill came just then.
    """
    old = _old(target)
    if not target.exists():
        draft.replace(target)
        return
    shutil.rmtree(old, ignore_errors=True)
    target.replace(old)
    draft.replace(target)
    shutil.rmtree(old)


def _old(target: Path) -> Path:
    target = target.absolute()  # "." has no name
    return target.with_name(f"{target.name}.old{PART}")


def restore(target: Path) -> None:
    """End a :func:`replace_folder` that was killed: the folder is there, the new one or the old one."""
    if (old := _old(target)).is_dir():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.replace(target)


def unused(folder: Path, besides: Iterable[str] = ()) -> bool:
    """Whether a folder is not there, or holds nothing but drafts (``*.part``) and these names."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    return all(entry.name.endswith(PART) or entry.name in besides for entry in folder.iterdir())


def sweep(folder: Path, patterns: Iterable[str]) -> None:
    """Tidy up after a kill: drafts of names that match one of the patterns go, see :func:`restore` too."""
    for draft in list(folder.glob(f"*{PART}")):
        name = draft.name.removesuffix(PART)
        if not any(fnmatchcase(name.removesuffix(".old"), pattern) for pattern in patterns):
            continue
        if name.endswith(".old"):
            restore(folder / name.removesuffix(".old"))
        elif draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


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


def refuse_file(folder: Path) -> None:
    """Raise a RunError where no folder can be made, or nothing written in the one that is there.

    In its place, or of one that it lies in, may be a file or a symbolic link to nothing; or it is read-only.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise RunError(f"{place} is a file, no folder for {folder}: choose another place.")
        if place.is_symlink() and not place.exists():
            raise RunError(f"{place} is a symbolic link to what is not there: choose another place.")
    there = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), None)
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{there} may not be written: choose another place than {folder}.")
