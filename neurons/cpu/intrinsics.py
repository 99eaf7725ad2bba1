"""The kernels as functions that code compiled by numba can call; addresses are integers there."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from . import kernels
from .instructions import INSTRUCTIONS

__all__ = ["products"]

address, count = types.intp, types.int64


def _calling(make: Callable[[ir.Module], ir.Function]) -> Callable:
    """numba's code generator for a call of the kernel that ``make`` writes."""

    def generate(context, builder, signature, arguments):
        function = make(builder.module)
        wanted = function.function_type.args
        builder.call(
            function,
            [
                builder.inttoptr(value, kind) if isinstance(kind, ir.PointerType) else value
                for value, kind in zip(arguments, wanted, strict=True)
            ],
        )
        return context.get_dummy_value()

    return generate


@cache
def products(name: str) -> SimpleNamespace:
    """The kernels for these instructions.

    ``rows_int8``, ``rows_int4``, and by bits and whether inputs have factors ``tile[bits, floats]``;
    arguments as in :mod:`neurons.cpu.kernels`.
    """
    kind = INSTRUCTIONS[name]

    @intrinsic
    def rows_int8(typing, weights, offsets, spikes, eights, columns, sums):
        signature = types.void(address, address, address, count, count, address)
        return signature, _calling(lambda module: kernels.rows_int8(module, kind))

    @intrinsic
    def rows_int4(typing, weights, offsets, spikes, begins, totals, scales, stride, groups, columns, sums):
        signature = types.void(*[address] * 6, count, count, count, address)
        return signature, _calling(lambda module: kernels.rows_int4(module, kind))

    def tile_of(bits: int, floats: bool):
        @intrinsic
        def tile(typing, weights, inputs, totals, scales, factors, groups, sums):
            signature = types.void(*[address] * 5, count, address)
            return signature, _calling(lambda module: kernels.tiles(module, kind, bits, floats))

        return tile

    tile = {(bits, floats): tile_of(bits, floats) for bits in (8, 4) for floats in (False, True)}
    return SimpleNamespace(rows_int8=rows_int8, rows_int4=rows_int4, tile=tile)
