"""What stands in for a GPU: NVIDIA's compiler, and the CUDA source compiled for the CPU."""

import ctypes
import ctypes.util
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from neurons import event_linear, si_lif
from neurons.cupy import launcher
from tests.helpers import host_kernel


def _find_nvrtc() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for pattern in ("cu13/lib/libnvrtc.so.1?", "cuda_nvrtc/lib/libnvrtc.so.1?"):
            for path in sorted(Path(folder).glob(pattern)):
                return str(path)
    return ctypes.util.find_library("nvrtc")


class Nvrtc:
    def __init__(self, path: str) -> None:
        # The builtins library lies beside it, where the loader does not look.
        for builtins in Path(path).parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(path)

    def _string(self, kind: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.lib, f"nvrtcGet{kind}")(program, buffer)
        return buffer.value.decode()

    def ptx(self, source: launcher.Source, options: tuple[str, ...]) -> str:
        program, text = ctypes.c_void_p(), source.text.encode()
        assert self.lib.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None) == 0
        array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = self.lib.nvrtcCompileProgram(program, len(options), array)
        assert status == 0, self._string("ProgramLog", program)
        ptx = self._string("PTX", program)
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return ptx

    def ptx_of_each(self, source: launcher.Source, options: Sequence[tuple[str, ...]]) -> list[str]:
        """PTX for compute_90 by each of these options; every fourth's for compute_80 must be the same."""

        def compile(each: tuple[str, ...], arch: int) -> str:
            return self.ptx(source, (*each, f"-arch=compute_{arch}"))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            newer = list(pool.map(lambda each: compile(each, 90), options))
            older = list(pool.map(lambda each: compile(each, 80), options[::4]))
        for one, other in zip(newer[::4], older, strict=True):
            assert one.replace(".target sm_90", ".target sm_80") == other
        return newer


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    path = _find_nvrtc()
    if path is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return Nvrtc(path)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CuPy backend with its kernels running on the CPU."""
    if host_kernel.COMPILER is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(launcher, "launch", host_kernel.launch)
    monkeypatch.setattr(launcher, "DEVICE_TYPES", ("cpu",))
    for module in (si_lif, event_linear):
        monkeypatch.setattr(module, "check_cupy", lambda: None)
