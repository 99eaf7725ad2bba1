"""Compiled functions that the next process finds on disk.

numba's own cache tells functions apart by their code and by what they close over, and other compiled
functions among that are new to every process. Here the caller says what tells them apart.

Machine code from several processes meets in one, and the linker goes by names: see :func:`name_apart`.
"""

import contextlib
import hashlib
import itertools
import os
import pickle
import platform
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import CompileResultCacheImpl, NullCache
from numba.core.serialize import dumps

__all__ = ["keep_on_disk", "name_apart"]


def name_apart() -> None:
    """Let no other process give a compiled function the name that this one gives; before any is compiled.

    numba tells functions that differ only in what they close over by a number in their names, and counts
    from 1 in every process. Two such functions from two processes' files, loaded by a third, are one to the
    linker: the second calls what the first one does.
    """
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(62))


name_apart()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=name_apart)


def keep_on_disk(function: Any, key: object, sources: Iterable[Path]) -> None:
    """Let a compiled function be compiled once on this machine; before its first call.

    It lies where numba would put it: in ``$NUMBA_CACHE_DIR``, in a ``__pycache__`` that can be written,
    or in the user's cache. A damaged file is written anew, and those of former sources are removed.

    Args:
        function: compiled by numba.
        key: what it was made for; its ``repr`` counts.
        sources: files of which any change makes it another function.
    """
    with contextlib.suppress(RuntimeError):  # there is no place for it
        function._cache = _Files(function.py_func, key, sources)


class _Files(NullCache):
    """One file for each key and signature: two processes may write at once."""

    def __init__(self, function: Any, key: object, sources: Iterable[Path]) -> None:
        self._form = CompileResultCacheImpl(function)
        self._folder = Path(self._form.locator.get_cache_path())
        state = hashlib.sha256()
        for path in sorted({*sources, Path(__file__)}):
            state.update(path.name.encode() + b"\0" + path.read_bytes())
        self._name = f"{function.__module__}.{function.__name__}"
        self._state = state.hexdigest()[:16]
        self._key = repr(key), numba.__version__, llvmlite.__version__, platform.python_version()

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def _path(self, signature: Any, codegen: Any) -> Path:
        told_apart = repr((self._key, str(signature), codegen.magic_tuple()))
        digest = hashlib.sha256(told_apart.encode()).hexdigest()[:16]
        return self._folder / f"{self._name}-{self._state}-{digest}.nbc"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        try:
            kept = pickle.loads(self._path(sig, target_context.codegen()).read_bytes())
        except Exception:  # there is none, or it is damaged in whatever way
            return None
        return self._form.rebuild(target_context, kept)

    def save_overload(self, sig: Any, data: Any) -> None:
        if not self._form.check_cachable(data):
            return
        path = self._path(sig, data.codegen)
        with contextlib.suppress(OSError):  # compiled it is, all the same
            for former in self._folder.glob(f"{self._name}-*.nbc"):
                if not former.name.startswith(f"{self._name}-{self._state}-"):
                    former.unlink(missing_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}")
            try:
                draft.write_bytes(dumps(self._form.reduce(data)))
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
