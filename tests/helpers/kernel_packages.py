"""Packages that the tests fetch when they run: the environment has neither Triton nor mamba-ssm."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAMBA_SSM = "mamba-ssm==2.3.2.post1"
TRITON = "triton==3.9.0"


def pip(*arguments: str, **variables: str) -> None:
    """Run pip, or skip the test where it cannot do that."""
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip {' '.join(arguments)} fails here: {done.stderr[-300:]}")


def mamba_ssm_wheel(folder: Path) -> Path:
    """mamba-ssm's wheel as pip makes it without CUDA: Python and Triton code only."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    pip("wheel", *options, MAMBA_SSM, MAMBA_SKIP_CUDA_BUILD="TRUE", MAMBA_FORCE_BUILD="TRUE")
    (wheel,) = folder.glob("mamba_ssm*.whl")
    return wheel


def interpreter_environment(folder: Path) -> dict[str, str]:
    """Variables for a process in which mamba-ssm's kernels run in Triton's interpreter.

    What is missing goes to ``folder``, about one gigabyte, and nothing into this environment.
    """
    packages = {"triton": TRITON, "einops": "einops", "mamba_ssm": str(mamba_ssm_wheel(folder))}
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        pip("install", "--quiet", "--no-deps", "--target", str(folder), *missing)
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
