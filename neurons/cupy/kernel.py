"""Compiling and launching ``si_lif.cu``; every number one may tune stands in :class:`Tuning`."""

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["TUNING", "Layout", "Tuning", "launch", "layout", "module_options", "pack"]

SOURCE = Path(__file__).with_name("si_lif.cu")

# The storage types of the source. Every pair (input, spikes) compiles; those that differ come from autocast.
STORAGE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_FP32_MAX = torch.finfo(torch.float32).max
DEVICE_TYPES = ("cuda",)  # the tests, which run the source on the CPU, add theirs

# One contracted multiply-add tips spikes: the source spells its arithmetic in PTX, this is the second lock.
COMPILE_OPTIONS = ("--fmad=false",)


@dataclass(frozen=True)
class Tuning:
    """What was chosen for the speed, not for the result.

    Bytes to move set the floor. With x and s the bytes of an input and of a spike, forward x + s + 1/8,
    backward the same, an element; a node adds 4 a neuron, its last potential. For bf16 at 2.9 TB/s:
    64Mi elements statelessly 554 MB, 0.191 ms; with the potential 822 MB, 0.284 ms.
    """

    block: int = 256
    """Threads of a block of the wide kernels."""
    wide_ring: int = 4
    """Steps that a wide kernel loads ahead (16 or 32 bytes a thread each)."""
    tall_block: int = 64
    """Threads of a block of the tall kernels: small, so that few neurons spread over all multiprocessors."""
    tall_ring: int = 32
    """Steps that a tall kernel loads ahead, a multiple of 8. 24576 neurons are 186 threads on each of 132
    multiprocessors; to keep 2 MB in flight, each must have tens of 2-byte loads under way."""
    vec_stateless: int = 8
    """16-bit elements of one access where no fp32 potential is touched: 16 bytes."""
    vec_state: int = 4
    """The same beside an fp32 potential: 4 of those are 16 bytes, so its accesses are dense too."""
    tall_steps: int = 32
    """From that many steps on, fewer than `wide_neurons` neurons take a tall kernel."""
    wide_neurons: int = 1 << 20
    """From that many neurons on, 8 a thread fill the GPU."""


TUNING = Tuning()


@dataclass(frozen=True)
class Layout:
    """How ``T`` steps of ``N`` neurons are laid over threads; the mask of the backward pass depends on it."""

    family: str  # 'single', 'wide' or 'tall', as in si_lif.cu
    grid: int  # blocks
    block: int  # threads a block
    mask_bytes: int


def layout(T: int, N: int) -> Layout:
    """The layout for ``T`` steps of ``N`` neurons. Forward and backward must agree, so only sizes decide."""
    tuning = TUNING
    if T == 1 or (N % 8 == 0 and (tuning.tall_steps > T or tuning.wide_neurons <= N)):
        grid = (N + tuning.block * 8 - 1) // (tuning.block * 8)
        return Layout("single" if T == 1 else "wide", grid, tuning.block, T * grid * tuning.block)
    grid = (N + tuning.tall_block - 1) // tuning.tall_block
    return Layout("tall", grid, tuning.tall_block, (T + 7) // 8 * N)


def module_options(
    name: str,
    x_dtype: torch.dtype,
    spike_dtype: torch.dtype,
    v_threshold: float,
    stateful: bool,
    v_seq: bool = False,
    grad_spike: bool = True,
    mode: str = "blend",
    function: str = "tanh",
) -> tuple[str, ...]:
    """The compiler's options for one instantiation of kernel ``name`` ('forward_single', ...); ``mode`` and
    ``function`` matter to the compensated ones only."""
    unit = v_threshold == 1.0
    return _options(TUNING, name, x_dtype, spike_dtype, unit, stateful, v_seq, grad_spike, mode, function)


@functools.cache  # called at every launch
def _options(
    tuning: Tuning,
    name: str,
    x_dtype: torch.dtype,
    spike_dtype: torch.dtype,
    unit_threshold: bool,
    stateful: bool,
    v_seq: bool,
    grad_spike: bool,
    mode: str,
    function: str,
) -> tuple[str, ...]:
    if torch.float32 in (x_dtype, spike_dtype):
        vec = 4  # 16 bytes of the widest tensor
    else:
        vec = tuning.vec_state if stateful else tuning.vec_stateless
    values = {
        f"ONLY_{name}": 1,
        "X": STORAGE[x_dtype],
        "S": STORAGE[spike_dtype],
        "UNIT_THRESHOLD": int(unit_threshold),
        "V_SEQ": int(v_seq),
        "GRAD_SPIKE": int(grad_spike),
        "MODE": mode.upper(),
        "SMOOTH": function.upper(),
        "VEC": vec,
        "BLOCK": tuning.block,
        "WIDE_RING": tuning.wide_ring,
        "TALL_BLOCK": tuning.tall_block,
        "TALL_RING": tuning.tall_ring,
    }
    return COMPILE_OPTIONS + tuple(f"-D{key}={value}" for key, value in values.items())


def pack(
    tensors: Sequence[torch.Tensor | None], T: int, N: int, floats: Sequence[float], flags: Sequence[int] = ()
) -> tuple[Any, ...]:
    """A kernel's arguments as typed scalars: pointers (0 for an absent tensor), ``T``, ``N``, fp32 numbers,
    flags, and whether 16-byte accesses are allowed: rows start aligned if the tensors do and 8 divides N."""
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    aligned = all(p % 16 == 0 for p in pointers) and (T == 1 or N % 8 == 0)
    # A window beyond fp32 is an infinite one, as in torch.
    numbers = [np.float32(f if abs(f) <= _FP32_MAX else math.copysign(math.inf, f)) for f in floats]
    return (
        *(np.uint64(p) for p in pointers),
        np.int32(T),
        np.int64(N),
        *numbers,
        *(np.int32(f) for f in flags),
        np.int32(aligned),
    )


_compile_lock = threading.Lock()  # a backward pass compiles in autograd's thread


@functools.cache
def _kernel(device_index: int, options: tuple[str, ...], name: str) -> Any:
    """One instantiation, compiled once a device (CuPy also keeps the binaries on disk)."""
    import cupy

    with _compile_lock:
        module = cupy.RawModule(code=SOURCE.read_text(), options=options, backend="nvrtc")
        return module.get_function(name).kernel  # what takes a stream as an argument


@functools.lru_cache(maxsize=64)
def _cupy_stream(stream: torch.cuda.Stream) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)  # CuPy 13 and earlier


def launch(
    name: str, device: torch.device, options: tuple[str, ...], grid: int, block: int, args: tuple[Any, ...]
) -> None:
    """Run kernel ``name`` of the instantiation ``options`` on torch's current stream of ``device``."""
    from ..backend import check_cupy

    check_cupy()
    stream = torch.cuda.current_stream(device)
    if device.index == torch.cuda.current_device():
        _kernel(device.index, options, name)((grid,), (block,), args, stream=_cupy_stream(stream))
    else:
        with torch.cuda.device(device):
            _kernel(device.index, options, name)((grid,), (block,), args, stream=_cupy_stream(stream))
