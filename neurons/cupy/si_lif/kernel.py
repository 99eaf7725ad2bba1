"""How ``kernel.cu`` is compiled, laid over threads and fed; what one may tune stands in :class:`Tuning`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import launcher

__all__ = ["SOURCE", "TUNING", "Layout", "Tuning", "Variant", "layout", "module_options", "pack", "run"]

SOURCE = launcher.Source(Path(__file__).with_name("kernel.cu"))


@dataclass(frozen=True, eq=False)  # by identity, since options are looked up by it at every launch
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


class Layout(NamedTuple):
    """How ``T`` steps of ``N`` neurons are laid over threads; the mask of the backward pass depends on it."""

    family: str  # 'single', 'wide' or 'tall', as in kernel.cu
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


class Variant(NamedTuple):
    """What an instantiation of a kernel is made for."""

    x_dtype: torch.dtype
    spike_dtype: torch.dtype
    unit_threshold: bool  # v_threshold is 1
    stateful: bool  # with a potential in or out
    v_seq: bool = False  # with v_seq or its gradient
    grad_spike: bool = True  # the spikes got a gradient
    mode: str = "blend"  # of the compensated kernels, as is
    function: str = "tanh"


def module_options(name: str, variant: Variant) -> tuple[str, ...]:
    """The compiler's options for one instantiation of kernel ``name`` ('forward_single', ...)."""
    return _options(TUNING, name, variant)


@functools.cache  # called at every launch
def _options(tuning: Tuning, name: str, variant: Variant) -> tuple[str, ...]:
    if torch.float32 in (variant.x_dtype, variant.spike_dtype):
        vec = launcher.vector_width(torch.float32)
    else:
        vec = tuning.vec_state if variant.stateful else tuning.vec_stateless
    return launcher.defines(
        {
            f"ONLY_{name}": 1,
            "X": launcher.STORAGE[variant.x_dtype],
            "S": launcher.STORAGE[variant.spike_dtype],
            "UNIT_THRESHOLD": int(variant.unit_threshold),
            "V_SEQ": int(variant.v_seq),
            "GRAD_SPIKE": int(variant.grad_spike),
            "MODE": variant.mode.upper(),
            "SMOOTH": variant.function.upper(),
            "VEC": vec,
            "BLOCK": tuning.block,
            "WIDE_RING": tuning.wide_ring,
            "TALL_BLOCK": tuning.tall_block,
            "TALL_RING": tuning.tall_ring,
        }
    )


def pack(
    tensors: Sequence[torch.Tensor | None],
    T: int,
    N: int,
    numbers: Sequence[float],
    flags: Sequence[int] = (),
) -> tuple[Any, ...]:
    """A kernel's arguments: pointers, ``T``, ``N``, fp32 numbers and flags.

    The last flag says whether 16-byte accesses are allowed: rows start aligned if the tensors do and 8
    divides N.
    """
    pointers, aligned = launcher.pointers(tensors)
    return (
        *pointers,
        np.int32(T),
        np.int64(N),
        *launcher.float32s(numbers),
        *(np.int32(f) for f in flags),
        np.int32(aligned and (T == 1 or N % 8 == 0)),
    )


def run(name: str, variant: Variant, device: torch.device, plan: Layout, arguments: tuple[Any, ...]) -> None:
    """Launch kernel ``name`` with :func:`pack`'s ``arguments`` over ``plan``."""
    options = module_options(name, variant)
    launcher.launch(SOURCE, name, device, options, (plan.grid,), (plan.block,), arguments)
