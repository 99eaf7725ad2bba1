"""Finished measurements on disk, so that an evaluation that was interrupted or extended repeats none.

A measurement is one file, ``<what>-<first 16 digits of the key's sha256>.json``, written whole. Its key holds
everything that the numbers depend on; a file is used only for exactly that key.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiking_mamba.common.claims import claimed
from spiking_mamba.common.files import write_whole

__all__ = ["ResultsCache", "TakenError"]

_LOCKS = ".locks"  # of measurements that processes share among them


class TakenError(RuntimeError):
    """Another process makes this measurement."""


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _sha256(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


class ResultsCache:
    """The measurements in ``folder``.

    Args:
        folder: made with the first one.
        waits: what to do where another process makes a measurement: wait for it, or raise
            :class:`TakenError`; None: no other process is there.
    """

    def __init__(self, folder: Path, waits: bool | None = None) -> None:
        self.folder, self.waits = folder, waits

    def path(self, name: str, key: dict[str, Any]) -> Path:
        """Where the result of this name for ``key`` is kept."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{_sha256(key)[:16]}.json"

    def get(self, name: str, key: dict[str, Any], measure: Callable[[], Any]) -> tuple[Any, bool]:
        """The result for ``key``, and whether it was there already; else of ``measure()``, kept from now on.

        A damaged file is set aside as ``<file>.damaged``, with a warning, and its measurement repeated:
        nothing is lost but time.

        Raises:
            TakenError: another process makes this measurement, and this one does not wait.
        """
        path = self.path(name, key)
        if self.waits is None:
            return self._get(path, key, measure)
        if path.is_file() and (cached := _read(path, key)) is not None:
            return cached, True
        locks = self.folder / _LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with claimed(locks / path.name, wait=self.waits) as free:
            if not free:
                raise TakenError(name)
            return self._get(path, key, measure)  # another may have made it meanwhile

    def tidy_up(self) -> None:
        """Remove the locks, when every measurement has been made."""
        shutil.rmtree(self.folder / _LOCKS, ignore_errors=True)

    def _get(self, path: Path, key: dict[str, Any], measure: Callable[[], Any]) -> tuple[Any, bool]:
        if path.is_file():
            if (cached := _read(path, key)) is not None:
                return cached, True
            aside = _set_aside(path)
            print(
                f"warning: {path} is damaged; it is kept as {aside.name} and measured again", file=sys.stderr
            )
        result = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "result": result, "sha256": _sha256(result)}))
        return json.loads(json.dumps(result)), False  # as a later reader will see it


def _read(path: Path, key: dict[str, Any]) -> Any | None:
    """The result in a file, None unless the file is what ``ResultsCache.get`` wrote for this key."""
    try:
        kept = json.loads(path.read_text())
        intact = _canonical(kept["key"]) == _canonical(key) and kept["sha256"] == _sha256(kept["result"])
    except (OSError, ValueError, KeyError, TypeError):  # UnicodeDecodeError is a ValueError
        return None
    return kept["result"] if intact else None


def _set_aside(path: Path) -> Path:
    """Rename a file to one that does not exist."""
    number, aside = 1, path.with_name(path.name + ".damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)
