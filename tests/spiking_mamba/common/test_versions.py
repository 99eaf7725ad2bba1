"""A transformers that was not tested is warned of, once, when the package is imported."""

import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from spiking_mamba.common import versions
from spiking_mamba.common.versions import TESTED_TRANSFORMERS

ROOT = Path(__file__).parents[3]


def test_the_range_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"transformers{TESTED_TRANSFORMERS}" in project["dependencies"]


@pytest.mark.parametrize(
    ("installed", "warned"),
    [("5.22.2", 1), ("5.23.0", 0), ("5.24.7", 0), ("5.25.0", 1), ("6.0.0.dev0", 1)],
)
def test_others_are_warned_of(installed, warned, monkeypatch):
    monkeypatch.setattr(versions, "version", {"transformers": installed}.__getitem__)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        versions.warn_if_untested()
    said = [str(each.message) for each in found]
    assert len(said) == warned
    assert all(f"transformers {installed} is outside the range" in each for each in said)
    assert all(TESTED_TRANSFORMERS in each for each in said)


@pytest.mark.parametrize(("version", "warned"), [("5.24.7", 0), ("6.0.0.dev0", 1)])
def test_importing_warns_once_of_others(version, warned, tmp_path):
    """The installed code under another release's name."""
    named = tmp_path / f"transformers-{version}.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    code = "import spiking_mamba, spiking_mamba.common.versions, spiking_mamba.model.modeling"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"transformers {version} is outside the range") == warned
    assert done.stderr.count(TESTED_TRANSFORMERS) == warned
