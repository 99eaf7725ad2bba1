"""Runs the CUDA sources on the CPU: by the host's C++ compiler and ctypes."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from neurons.cupy import launcher
from neurons.cupy.event_linear import ops as event_linear
from neurons.cupy.si_lif import kernel
from spiking_mamba.model.cuda import kernels as token

COMPILER = shutil.which("c++") or shutil.which("g++")
FAMILIES = ("single", "wide", "tall")
DRIVERS = {  # of the sources whose threads meet at barriers
    event_linear.SOURCE: "host_event_linear.cpp",
    token.PROJECT: "host_project.cpp",
    token.MIX: "host_mix.cpp",
}
C_TYPES = {"u8": ctypes.c_void_p, "i4": ctypes.c_int, "i8": ctypes.c_longlong, "f4": ctypes.c_float}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="si_lif_host_")


@functools.cache
def _library(driver: str, source: launcher.Source, options: tuple[str, ...]) -> ctypes.CDLL:
    assert COMPILER is not None
    defines = [o for o in options if o.startswith("-D")]
    name = hashlib.sha256(repr((driver, defines)).encode()).hexdigest()[:16]
    out = Path(_folder().name) / f"{name}.so"
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w"]
    file = Path(__file__).with_name(driver)
    command = [
        COMPILER,
        *flags,
        f"-I{source.path.parent}",
        f"-I{launcher.HEADERS}",
        *defines,
        str(file),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(out))


def launch(
    source: launcher.Source,
    name: str,
    device: torch.device,
    options: tuple[str, ...],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: tuple[np.generic, ...],
    overlap: bool = False,
) -> None:
    """Stands in for ``launcher.launch``."""
    assert device.type == "cpu"
    typed = [C_TYPES[a.dtype.str[1:]](a.item()) for a in args]
    if source in DRIVERS:
        getattr(_library(DRIVERS[source], source, options), f"run_{name}")(*grid, *block, *typed)
        return
    assert source is kernel.SOURCE
    direction, family = name.split("_")
    library = _library("host_cuda.cpp", source, tuple(o for o in options if "ONLY" not in o))
    if family == "compensated":
        getattr(library, f"run_{name}")(*grid, *block, *typed)
    else:
        getattr(library, f"run_{direction}")(FAMILIES.index(family), *grid, *block, *typed)
