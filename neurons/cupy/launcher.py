"""Compiling and launching CUDA sources: once a device, on torch's current stream."""

import contextlib
import contextvars
import functools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backend import check_cupy

__all__ = [
    "STORAGE",
    "Source",
    "cannot_overlap",
    "check_input",
    "defines",
    "float32s",
    "launch",
    "overlapping",
    "pointers",
    "vector_width",
]

# The storage types of arithmetic.cuh, by the dtypes that they hold.
STORAGE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

DEVICE_TYPES = ("cuda",)  # the tests, which run the sources on the CPU, add theirs

ACCESS_BYTES = 16  # the widest access to memory that a thread has

# One contracted multiply-add tips spikes. arithmetic.cuh spells arithmetic in PTX; this is the second lock.
COMPILE_OPTIONS = ("--fmad=false",)

_FP32_MAX = torch.finfo(torch.float32).max


HEADERS = Path(__file__).parent  # where what is included lies, if it does not lie beside a source


class Source:
    """A CUDA source file; one object a file, since kernels are kept by it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def text(self) -> str:
        """The source with its own includes put in.

        CuPy keeps binaries by the text that it is given, and would not notice that an included file has
        changed.
        """
        return _expand(self.path)


def _expand(path: Path) -> str:
    lines = [f'#line 1 "{path.name}"']  # so that the compiler's messages name the file
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith('#include "'):
            name = line.split('"')[1]
            found = next(f / name for f in (path.parent, HEADERS) if (f / name).exists())
            lines += [_expand(found), f'#line {number + 1} "{path.name}"']
        else:
            lines.append(line)
    return "\n".join(lines)


def vector_width(*dtypes: torch.dtype) -> int:
    """How many elements one access takes, the widest of ``dtypes`` filling it."""
    return ACCESS_BYTES // max(dtype.itemsize for dtype in dtypes)


def defines(values: Mapping[str, object]) -> tuple[str, ...]:
    """The compiler's options for an instantiation, which the preprocessor's ``values`` name."""
    return COMPILE_OPTIONS + tuple(f"-D{key}={value}" for key, value in values.items())


# ---- Arguments: typed scalars, as a launch wants them. Sizes that an index is made of are np.int64. ----


def pointers(tensors: Iterable[torch.Tensor | None]) -> tuple[list[np.uint64], bool]:
    """The addresses of contiguous tensors, 0 for an absent one, and whether all allow the widest access."""
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    return [np.uint64(a) for a in addresses], all(a % ACCESS_BYTES == 0 for a in addresses)


def float32s(numbers: Iterable[float]) -> list[np.float32]:
    """Numbers in float32; those beyond it are infinite, as in torch."""
    return [np.float32(f if abs(f) <= _FP32_MAX else math.copysign(math.inf, f)) for f in numbers]


def check_input(x: torch.Tensor, dtypes: Iterable[torch.dtype] = tuple(STORAGE)) -> None:
    """Raise what says why no kernel can take ``x``.

    Raises:
        TypeError: its dtype is not of ``dtypes``.
        RuntimeError: it is not on CUDA.
    """
    if x.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        known = f"{', '.join(names)} or {last}" if names else last
        raise TypeError(f"backend='cupy' takes {known}, got {x.dtype}; use backend='torch'.")
    if x.device.type not in DEVICE_TYPES:
        raise RuntimeError(
            f"backend='cupy' runs on CUDA tensors, got one on {x.device}; move the net and its input, or use "
            f"backend='torch'."
        )


# ---- The launch ----

_compile_lock = threading.Lock()  # a backward pass compiles in autograd's thread


@functools.cache
def _kernel(device_index: int, source: Source, name: str, options: tuple[str, ...]) -> Any:
    """One instantiation, compiled once a device (CuPy also keeps the binaries on disk)."""
    import cupy

    with _compile_lock:
        module = cupy.RawModule(code=source.text, options=options, backend="nvrtc")
        return module.get_function(name).kernel  # what takes a stream as an argument


@functools.lru_cache(maxsize=64)
def _cupy_stream(stream: torch.cuda.Stream) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)  # CuPy 13 and earlier


def launch(
    source: Source,
    name: str,
    device: torch.device,
    options: tuple[str, ...],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: Sequence[np.generic],
    overlap: bool = False,
) -> None:
    """Run kernel ``name`` of ``source``, compiled with ``options``, on torch's current stream of ``device``.

    Args:
        source: where the kernel stands. name: the kernel's. device: of the tensors. options: of the compiler.
        grid, block: blocks, and threads of a block, along each of up to three axes.
        args: the kernel's arguments in their order, typed as its parameters are.
        overlap: the kernel may begin while the one before it ends: it calls ``wait_for_previous`` of
            ``threads.cuh`` before it reads what others wrote. See :func:`overlapping`.
    """
    check_cupy()
    stream = torch.cuda.current_stream(device)
    here = device.index == torch.cuda.current_device()
    with contextlib.nullcontext() if here else torch.cuda.device(device):
        kernel = _kernel(device.index, source, name, options)
        asked = _overlaps.get()
        if overlap and (cannot_overlap(device) is None if asked is None else asked):
            _launch_overlapping(kernel.ptr, grid, block, args, stream.cuda_stream)
        else:
            kernel(grid, block, args, stream=_cupy_stream(stream))


# ---- Launches that begin while the one before ends (CUDA's programmatic dependent launch) ----

_overlaps: contextvars.ContextVar[bool | None] = contextvars.ContextVar("overlaps", default=None)


@contextlib.contextmanager
def overlapping(overlaps: bool | None) -> Iterator[None]:
    """Let launches that allow it begin while the kernel before them ends; None: where the device can.

    Where they are captured into a graph, its replays do so too. Without this it is as with None. Nobody may
    ask for it unless :func:`cannot_overlap` is None.
    """
    token = _overlaps.set(overlaps)
    try:
        yield
    finally:
        _overlaps.reset(token)


@functools.cache
def cannot_overlap(device: torch.device) -> str | None:
    """Why launches on a device cannot overlap; None where they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "Only GPUs of compute capability 9.0 and newer have it."
    try:
        import_module("cuda.bindings.driver")
    except ImportError as error:
        return f"cuda-bindings is missing: {error}"
    return None


def _launch_overlapping(
    function: int, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[np.generic], stream: int
) -> None:
    driver = import_module("cuda.bindings.driver")
    config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = (*block, 1, 1)[:3]
    config.sharedMemBytes, config.hStream = 0, driver.CUstream(stream)
    config.attrs, config.numAttrs = [attribute], 1
    values = [np.asarray(arg).reshape(1) for arg in args]
    addresses = np.array([value.ctypes.data for value in values], dtype=np.uint64)
    (error,) = driver.cuLaunchKernelEx(config, driver.CUfunction(function), addresses.ctypes.data, 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"An overlapping launch failed: {error}.")
