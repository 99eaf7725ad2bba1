"""The wheel, made from the source distribution: all that it needs is in it; it works in an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from spiking_mamba.commands.configuration import CONFIGURATIONS
from spiking_mamba_console import COMMANDS
from tests.helpers.commands import ROOT, run

ALL_HELP = (
    "import runpy, sys, spiking_mamba_console as console\n"
    "for name in console.COMMANDS:\n"
    "    sys.argv = ['spiking-mamba', name, '--help']\n"
    "    try:\n"
    "        console.main()\n"
    "    except SystemExit as end:\n"
    "        assert not end.code, end.code\n"
    "import neurons, spiking_mamba\n"
    "print(neurons.__file__, spiking_mamba.__file__, console.__file__, file=sys.stderr)\n"
)


def pip(*arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """As from an archive of the files, without git."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in ("neurons", "spiking_mamba", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "docs").mkdir()
    (source / "docs/page.md").write_text("is left out")
    code = "from setuptools import build_meta\nbuild_meta.build_sdist('made')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "made").iterdir()
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, archive)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", target, wheel)
    return target


def test_the_wheel_has_what_it_needs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for package in ("neurons", "spiking_mamba")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".json") or path.name == "py.typed"
    }
    assert sources | {"spiking_mamba_console.py"} <= names
    shared = {name for several in CONFIGURATIONS.values() for name in several}
    for folder in ("recipes/quickstart/teacher", "recipes/quickstart/student"):
        shared |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).iterdir()}
    assert len(shared) > 20
    assert {f"spiking_mamba/commands/{name}" for name in shared} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "neurons", "spiking_mamba", "spiking_mamba_console.py",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".sh") or "/convert/" in name]
    fallback = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    assert wheel.name.split("-")[1] == fallback["fallback_version"]
    assert wheel.stat().st_size < 40e6


def test_a_list_of_commands_comes_without_torch(installed, tmp_path):
    code = (
        "import sys, spiking_mamba_console as console\n"
        "sys.argv = ['spiking-mamba', '--help']\n"
        "console.main()\n"
        "assert not {'torch', 'transformers', 'spiking_mamba'} & set(sys.modules)\n"
    )
    said = run("-c", code, fresh=True, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.returncode == 0, said.stderr
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", said.stdout, re.MULTILINE)


def test_every_command_explains_its_keys(installed, tmp_path):
    said = run("-c", ALL_HELP, fresh=True, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.returncode == 0, said.stderr
    assert said.stderr.count(f"{installed}/") == 3  # what ran is the wheel's
    pages = re.split(r"^usage: ", said.stdout, flags=re.MULTILINE)[1:]
    assert [page.split()[1] for page in pages] == list(COMMANDS)
    for page in pages:
        keys = page.split("\nkeys:\n")[1]
        unexplained = re.findall(r"^  ([a-z_]+): .*\n(?!      )", keys + "\n", flags=re.MULTILINE)
        assert not unexplained, page.split()[1]


def test_the_quickstart_runs_in_an_empty_folder(installed, tmp_path):
    text = " ".join(f"The {n}th city lies on a river of {n * n} miles." for n in range(400))
    (tmp_path / "text.txt").write_text(text)
    done = run(
        installed / "bin/spiking-mamba",
        "quickstart", "data=text.txt", "held_out=text.txt", "held_out_rows=2", "length=32", "tasks=[copa]",
        "limit=1", "training.max_steps=2", "training.per_device_train_batch_size=1", "output=run",
        fresh=True, cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Distillation closed" in done.stdout
    results = json.loads((tmp_path / "run/results.json").read_text())["provenance"]
    assert results["command"].startswith("spiking-mamba quickstart data=text.txt ")
    assert results["settings"]["teacher"].startswith(str(installed))
    assert (tmp_path / "run/student/model/model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "text.txt"}


def test_an_interrupted_import_is_one_line():
    code = (
        "import importlib, sys, spiking_mamba_console as console\n"
        "def stopped(name): raise KeyboardInterrupt\n"
        "importlib.import_module = stopped\n"
        "sys.argv = ['spiking-mamba', 'export']\n"
        "console.main()\n"
    )
    said = run("-c", code)
    assert said.returncode == 130
    assert said.stderr.strip() == "Interrupted before anything was done."
