"""Where results come from: command, commit, machine and versions."""

import dataclasses
import functools
import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.machine import device_name

__all__ = [
    "MARK",
    "code_state",
    "commit_of",
    "is_clean",
    "package_versions",
    "provenance",
    "refuse_changed_code",
]

MARK = "†"  # beside a number whose code is in no commit
_SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h", ".yaml", ".json")
_PACKAGES = ("spiking-mamba", "torch", "transformers", "spikingjelly", "lm-eval")


def package_versions(names: Iterable[str] | None = None) -> dict[str, str | None]:
    """Versions of packages, or of those that results depend on; None where one is not installed."""
    return {name: _version(name) for name in (_PACKAGES if names is None else names)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def provenance(settings: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run; ``settings`` is a dataclass."""
    return {
        "command": _command(),
        "commit": commit_of(Path(__file__).parents[2]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "device": device_name(),
            "cpu": _cpu(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": package_versions() | {"python": platform.python_version()},
        "settings": dataclasses.asdict(settings),
    }


@functools.cache
def code_state() -> dict[str, str | None]:
    """The state of this code, for keys of kept results: its commit, in a checkout, and a hash of its files.

    A commit alone does not tell two states of changed files apart, and an installed package has none.
    """
    sha256 = hashlib.sha256()
    root = Path(__file__).parents[2]
    for package in ("neurons", "spiking_mamba"):
        for path in sorted((root / package).rglob("*")):
            if path.suffix in _SOURCES and path.is_file():
                sha256.update(f"{path.relative_to(root)}\n{file_sha256(path)}\n".encode())
    return {"commit": commit_of(root), "sha256": sha256.hexdigest()}


def _command() -> str:
    """What was typed: a script's name, a module's, or the console command's, which is two words."""
    name = _relative(sys.argv[0])
    if name.startswith("spiking-mamba "):
        program = name.split()
    elif name.startswith("spiking_mamba/"):
        program = ["python", "-m", name.removesuffix(".py").replace("/", ".")]
    else:
        program = ["python", name]
    return shlex.join([*program, *(_relative(argument) for argument in sys.argv[1:])])


def _relative(argument: str) -> str:
    """A path into this checkout as seen from it: what stands above is nobody's business."""
    path, root = Path(argument), Path(__file__).parents[2]
    return str(path.relative_to(root)) if path.is_absolute() and path.is_relative_to(root) else argument


@functools.cache  # at the first question: later ones are about code that is loaded by then
def commit_of(root: Path) -> str | None:
    """The git commit of a checkout; None if it is none.

    ``-dirty`` says that its files are changed, but for those in ``docs``: results are recorded there while
    the next ones are made.
    """
    if not (root / ".git").exists():  # git would look above it, into whatever it is installed in
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def is_clean(commit: str | None) -> bool:
    """Whether a commit of :func:`commit_of` is all that a reader needs to have the code."""
    return commit is not None and not commit.endswith("-dirty")


def refuse_changed_code(results: Path, root: Path | None = None) -> None:
    """Raise unless results may be recorded where they are to go.

    What stands in a checkout's own ``docs`` is what its pages say, so it comes from code that a reader can
    have. Elsewhere anything may be recorded; its commit is in the record.

    Args:
        results: the file or folder of the records.
        root: of the checkout; None: the one that this code is in.

    Raises:
        RunError: they would go into ``docs`` of a checkout whose code differs from its commit.
    """
    root = Path(__file__).parents[2] if root is None else root
    if results.absolute().resolve().is_relative_to((root / "docs").resolve()) and not is_clean(
        commit_of(root)
    ):
        raise RunError(
            f"{results} keeps results of committed code alone, and this code differs from its commit, or has "
            "none: commit first, or have the results elsewhere."
        )


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
