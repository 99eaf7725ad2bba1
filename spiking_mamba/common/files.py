"""Files that are written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["file_sha256", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
