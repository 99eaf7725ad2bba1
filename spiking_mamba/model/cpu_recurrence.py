"""One head's step of the selective scan as LLVM IR: the states are read and written once, in one pass.

S = dA * S + B (dt x)^T        y = C S        (Dao & Gu, arXiv 2405.21060, with S as [N, P])
"""

from functools import cache

from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from neurons.cpu.vectors import Writer, define, f32, i16, i32, i64, ptr, vector

__all__ = ["LANES", "recurrence", "state_bytes"]

LANES = 16  # a head's channels go in vectors of so many


class _BFloat(ir.Type):
    """LLVM's ``bfloat``, for which llvmlite has no name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def state_bytes(states: str) -> int:
    """Bytes of one element of a state kept in 'float32' or 'bfloat16'."""
    return {"float32": 4, "bfloat16": 2}[states]


def _read(w: Writer, address: ir.Value, states: str) -> ir.Value:
    if states == "float32":
        return w.load(address, vector(f32, LANES), 4)
    half = w.b.zext(w.load(address, vector(i16, LANES), 2), vector(i32, LANES))
    return w.b.bitcast(w.b.shl(half, ir.Constant(half.type, [16] * LANES)), vector(f32, LANES))


def _write(w: Writer, value: ir.Value, address: ir.Value, states: str) -> None:
    if states == "float32":
        w.store(value, address, 4)
    elif binding.get_host_cpu_features().get("avx512bf16"):
        kind = vector(_BFloat(), LANES)
        w.store(w.call("llvm.x86.avx512bf16.cvtneps2bf16.512", kind, value), address, 2)
    else:  # to the nearest, ties to even
        bits = w.b.bitcast(value, vector(i32, LANES))
        constant = lambda x: ir.Constant(bits.type, [x] * LANES)  # noqa: E731
        odd = w.b.and_(w.b.lshr(bits, constant(16)), constant(1))
        rounded = w.b.lshr(w.b.add(bits, w.b.add(odd, constant(0x7FFF))), constant(16))
        w.store(w.b.trunc(rounded, vector(i16, LANES)), address, 2)


def _function(module: ir.Module, channels: int, states: str) -> ir.Function:
    name = f"mamba_recurrence_{channels}_{states}"
    function, new = define(module, name, [ptr, ptr, ptr, ptr, f32, f32, f32, i64, ptr])
    if not new:
        return function
    w = Writer(function)
    state, b_values, c_values, inputs, time, decay, skip, size, outputs = function.args
    kind, vectors = vector(f32, LANES), channels // LANES
    x = [w.load(w.at(inputs, 4 * LANES * i), kind, 4) for i in range(vectors)]
    y = [w.variable(kind) for _ in range(vectors)]
    for variable, value in zip(y, x, strict=True):
        w.set(variable, w.b.fmul(value, w.splat(skip, LANES)))
    x = [w.b.fmul(value, w.splat(time, LANES)) for value in x]
    keep, row = w.splat(decay, LANES), channels * state_bytes(states)
    fma = f"llvm.fmuladd.v{LANES}f32"
    with w.loop(i64(0), size) as n:
        place = w.b.mul(n, i64(4))
        b, c = (w.splat(w.load(w.at(v, place), f32, 4), LANES) for v in (b_values, c_values))
        base = w.at(state, w.b.mul(n, i64(row)))
        for i in range(vectors):
            address = w.at(base, i * LANES * state_bytes(states))
            new_state = w.call(fma, kind, b, x[i], w.b.fmul(_read(w, address, states), keep))
            w.set(y[i], w.call(fma, kind, new_state, c, w.get(y[i], kind)))
            _write(w, new_state, address, states)
    for i, variable in enumerate(y):
        w.store(w.get(variable, kind), w.at(outputs, 4 * LANES * i), 4)
    w.finish()
    return function


@cache
def recurrence(channels: int, states: str):
    """The step for heads of so many channels, a multiple of ``LANES``, callable by code of numba.

    Arguments: addresses of the state ``[N, channels]`` in the given dtype, of ``B``, ``C`` ``[N]`` and
    ``x`` ``[channels]``, float32; ``dt``, ``dA`` and ``D``, float32; ``N``; that of ``y`` ``[channels]``.
    """

    @intrinsic
    def step(typing, state, b, c, x, time, decay, skip, size, y):
        number = types.float32
        signature = types.void(*[types.intp] * 4, number, number, number, types.int64, types.intp)

        def generate(context, builder, signature, arguments):
            function = _function(builder.module, channels, states)
            values = [
                builder.inttoptr(value, ptr) if kind == ptr else value
                for value, kind in zip(arguments, function.function_type.args, strict=True)
            ]
            builder.call(function, values)
            return context.get_dummy_value()

        return signature, generate

    return step
