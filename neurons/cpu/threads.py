"""Threads that work on one token together: what they wait at, for code compiled by numba.

Between two parts of a token a thread waits for less time than the system takes to wake one, so it spins; on a
processor that another process has taken that would last for good, so after a while it yields.
"""

import ctypes
import platform
import sys
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import extending
from numba.core import types

from .events import compiled

__all__ = [
    "BARRIER",
    "GONE",
    "IDLE",
    "STATE",
    "WORK",
    "add",
    "barrier",
    "cycles",
    "exchange",
    "load",
    "register_yield",
    "relax",
    "store",
    "wait_for_work",
    "yield_thread",
]

BARRIER = 32  # int64 words of a barrier: two counters, each on cache lines of its own
STATE = 16  # int64 words of a helper's state, on cache lines of its own
IDLE, WORK, GONE = 0, 1, 2  # what that state says
_SPINS = 4000
_YIELDS = 2000  # about a millisecond on an idle processor: between two tokens somebody samples and prints
_WORD = ir.IntType(64)
intrinsic: Any = extending.intrinsic
_YIELD = "neurons_yield_thread"


@cache
def register_yield() -> None:
    """Tell the compiler where the system's function is that gives up the processor; before the first use."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    binding.add_symbol(_YIELD, ctypes.cast(function, ctypes.c_void_p).value)


@intrinsic
def add(typing, address, value):
    """Add to an int64 at an address; what stood there before."""

    def generate(context, builder, signature, arguments):
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", word, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def exchange(typing, address, value):
    """Write an int64 to an address; what stood there before."""

    def generate(context, builder, signature, arguments):
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.atomic_rmw("xchg", word, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def load(typing, address):
    """The int64 at an address, and everything that was written before it."""

    def generate(context, builder, signature, arguments):
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(word, "seq_cst", 8)

    return types.int64(types.intp), generate


@intrinsic
def store(typing, address, value):
    """Write an int64, after everything that was written before it."""

    def generate(context, builder, signature, arguments):
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], word, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), generate


def _call(builder, name, *arguments):
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, arguments)


@intrinsic
def relax(typing):
    """Tell the processor that this thread spins."""

    def generate(context, builder, signature, arguments):
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            _call(builder, "llvm.x86.sse2.pause")
        elif machine in ("arm64", "aarch64"):
            _call(builder, "llvm.aarch64.hint", ir.IntType(32)(1))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def cycles(typing):
    """The processor's counter of cycles, of constant rate on x86; other processors may forbid to read it."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_WORD, [])
        name = "llvm.readcyclecounter"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [])

    return types.int64(), generate


@intrinsic
def yield_thread(typing):
    """Let another thread have the processor."""

    def generate(context, builder, signature, arguments):
        _call(builder, _YIELD)
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def barrier(words, threads):
    """Wait until all threads are here. ``words``: address of ``BARRIER`` int64 words, zero at first."""
    if threads == 1:
        return
    round_word = words + 128
    this_round = load(round_word)
    if add(words, 1) == threads - 1:
        store(words, 0)
        store(round_word, this_round + 1)
        return
    spins = 0
    while load(round_word) == this_round:
        spins += 1
        if spins < _SPINS:
            relax()
        else:
            yield_thread()


@compiled
def wait_for_work(state):
    """Wait until somebody has written ``WORK`` to a helper's state, and make it ``IDLE``.

    Returns:
        Whether there is work; otherwise nobody came for a while, and the state is ``GONE``.
    """
    spins = 0
    while load(state) != WORK:
        spins += 1
        if spins < _SPINS:
            relax()
        elif spins < _SPINS + _YIELDS:
            yield_thread()
        elif exchange(state, GONE) == WORK:  # it came at the last moment
            break
        else:
            return False
    store(state, IDLE)
    return True
