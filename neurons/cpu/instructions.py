"""How each kind of processor multiplies bytes and adds up the products in 32 bits, exactly.

All of them do two things. Four rows of weights, one an input, and the four inputs' spikes: ``mix`` lays the
rows side by side and ``dot`` adds ``sum over the four of s_i * row_i``. Or weights that lie in memory by four
inputs of one output: ``dot_quads`` adds them. Spikes come packed, four int8 in a 32-bit word.
"""

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from llvmlite import binding, ir

from .vectors import Writer, i8, i16, i32, vector

__all__ = ["INSTRUCTIONS", "Avx2", "DotProduct", "Portable", "Vnni", "best", "runs_here"]

Values = list[ir.Value]


class Portable:
    """Products in 16 bits, where every product of two int8 fits, widened and added up: for any target.

    Attributes:
        name: of the instruction set. width: bytes of a vector of weights. step: bytes of a row that a pass of
        a loop takes. lanes: outputs in one accumulator. offset: whether int8 weights lie in memory plus 128.
        features: what LLVM calls them, any of the alternatives.
        crossover: shares of inputs that fire, by the weights' bits, from which on reading everything in one
            stream is faster than the rows of those that do; measured, but on ARM.
    """

    name = "portable"
    width, step, lanes, offset = 16, 32, 16, False
    features: tuple[str, ...] = ()
    crossover: ClassVar = {8: 0.75, 4: 0.75}

    @property
    def accumulators(self) -> int:
        """How many accumulators hold the sums of ``width`` outputs."""
        return self.width // self.lanes

    @property
    def quad_lanes(self) -> int:
        """Outputs in one accumulator of :meth:`dot_quads`."""
        return self.width // 4

    def order(self) -> list[int]:
        """Which output each byte of ``width`` holds, so that the sums come out in their order."""
        return list(range(self.width))

    def mix(self, w: Writer, rows: Sequence[ir.Value]) -> Values:
        """Four rows of ``width`` bytes as :meth:`dot` wants them."""
        return list(rows)

    def dot(self, w: Writer, sums: Values, mixed: Values, spikes: ir.Value) -> Values:
        """The sums with four rows times their spikes added."""
        total = sums[0]
        for i, row in enumerate(mixed):
            product = w.b.mul(w.b.sext(row, vector(i16, self.width)), w.splat(self._spike(w, spikes, i), 16))
            total = w.b.add(total, w.b.sext(product, vector(i32, self.width)))
        return [total]

    def dot_quads(
        self, w: Writer, total: ir.Value, quads: ir.Value, spikes: ir.Value, of: str = "any"
    ) -> ir.Value:
        """``total`` of ``quad_lanes`` outputs with four inputs of each added.

        Args:
            w: what writes the instructions. total, quads: int32 sums, and bytes of weights, four of each
            spikes: int32, the four inputs' bytes.
                output.
            of: what is known of the bytes: 'any', nothing; 'nibbles', that weights are from 0 to 15;
                'rounded', that no input is -128.
        """
        four = w.splat(self._spike(w, spikes, 0), 4)
        for i in range(1, 4):
            four = w.b.insert_element(four, self._spike(w, spikes, i), i32(i))
        repeated = w.shuffle(four, four, [0, 1, 2, 3] * self.quad_lanes)
        product = w.b.mul(w.b.sext(quads, vector(i16, self.width)), repeated)
        for i in range(4):
            part = w.shuffle(product, product, range(i, self.width, 4))
            total = w.b.add(total, w.b.sext(part, vector(i32, self.quad_lanes)))
        return total

    @staticmethod
    def _spike(w: Writer, spikes: ir.Value, i: int) -> ir.Value:
        return w.b.sext(w.b.trunc(w.b.lshr(spikes, i32(8 * i)), i8), i16)


class Avx2(Portable):
    """Pairs of products added in 32 bits by one instruction, ``vpmaddwd``."""

    name = "avx2"
    width, step, lanes = 32, 32, 8
    features = ("avx2",)
    crossover: ClassVar = {8: 1.0, 4: 0.55}  # spikes that may be -128 take the long way through int8 tiles

    def mix(self, w: Writer, rows: Sequence[ir.Value]) -> Values:
        """As :meth:`Portable.mix`, by x86's unpack."""
        a, b, c, d = rows
        return [w.interleave(x, y, 1, high) for x, y in ((a, b), (c, d)) for high in (False, True)]

    def dot(self, w: Writer, sums: Values, mixed: Values, spikes: ir.Value) -> Values:
        """As :meth:`Portable.dot`, by products of pairs in 16 bits."""
        sums = list(sums)
        for pair in range(2):
            s = self._pair(w, spikes, pair)
            for high in range(2):
                for half in range(2):  # outputs 8 * (high + 2 * half) to that + 7
                    part = w.part(mixed[2 * pair + high], 16 * half, 16)
                    place = high + 2 * half
                    sums[place] = w.b.add(sums[place], self._madd(w, w.b.sext(part, vector(i16, 16)), s))
        return sums

    def dot_quads(
        self, w: Writer, total: ir.Value, quads: ir.Value, spikes: ir.Value, of: str = "any"
    ) -> ir.Value:
        """As :meth:`Portable.dot_quads`; where products may not fit in 16 bits, in two halves."""
        if of != "any":
            return w.b.add(total, self._four_products(w, quads, spikes, of))
        one, two = (w.part(w.b.bitcast(self._pair(w, spikes, p), vector(i32, 8)), 0, 8) for p in range(2))
        s = w.b.bitcast(w.shuffle(one, two, [0, 8] * 4), vector(i16, 16))
        halves = [self._madd(w, w.b.sext(w.part(quads, 16 * h, 16), vector(i16, 16)), s) for h in range(2)]
        even, odd = (w.shuffle(halves[0], halves[1], range(first, 16, 2)) for first in range(2))
        return w.b.add(total, w.b.add(even, odd))

    def _four_products(self, w: Writer, quads: ir.Value, spikes: ir.Value, of: str) -> ir.Value:
        """By ``vpmaddubsw``, which multiplies unsigned by signed bytes and adds pairs in 16 bits.

        They fit: 15 * 128 * 2 of nibbles, 128 * 127 * 2 of a weight's size times an input that takes its
        sign.
        """
        s = w.b.bitcast(w.splat(spikes, 8), vector(i8, 32))
        size = quads
        if of == "rounded":
            size = w.call("llvm.abs.v32i8", quads.type, quads, ir.Constant(ir.IntType(1), 0))
            s = w.call("llvm.x86.avx2.psign.b", quads.type, s, quads)
        pairs = w.call("llvm.x86.avx2.pmadd.ub.sw", vector(i16, 16), size, s)
        return self._madd(w, pairs, ir.Constant(vector(i16, 16), [1] * 16))

    def _pair(self, w: Writer, spikes: ir.Value, pair: int) -> ir.Value:
        low, high = (self._spike(w, spikes, 2 * pair + i) for i in range(2))
        both = w.b.or_(w.b.and_(w.b.sext(low, i32), i32(0xFFFF)), w.b.shl(w.b.sext(high, i32), i32(16)))
        return w.b.bitcast(w.splat(both, 8), vector(i16, 16))

    @staticmethod
    def _madd(w: Writer, x: ir.Value, y: ir.Value) -> ir.Value:
        return w.call("llvm.x86.avx2.pmadd.wd", vector(i32, 8), x, y)


class _FourAtOnce(Portable):
    """An instruction that adds four products of bytes to 32 bits."""

    @property
    def lanes(self) -> int:  # type: ignore[override]
        return self.width // 4

    def mix(self, w: Writer, rows: Sequence[ir.Value]) -> Values:
        a, b, c, d = rows
        pairs = [[w.interleave(x, y, 1, high) for high in (False, True)] for x, y in ((a, b), (c, d))]
        return [
            w.interleave(one, two, 2, high) for one, two in zip(*pairs, strict=True) for high in (False, True)
        ]

    def dot(self, w: Writer, sums: Values, mixed: Values, spikes: ir.Value) -> Values:
        """As :meth:`Portable.dot`, by products of pairs in 16 bits."""
        return [self.dot_quads(w, *both, spikes) for both in zip(sums, mixed, strict=True)]


class Vnni(_FourAtOnce):
    """x86's ``vpdpbusd``: unsigned weights, so these lie in memory plus 128, times signed spikes."""

    offset = True

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.width = self.step = bits // 8
        self.name = {512: "avx512vnni", 256: "avxvnni"}[bits]
        self.features = {512: ("avx512vnni",), 256: ("avxvnni", "avx512vnni+avx512vl")}[bits]

    def order(self) -> list[int]:
        """As :attr:`Portable.order`."""
        # what interleaving within lanes of 16 bytes does to the outputs, undone
        return [self.lanes * (p % 16 // 4) + 4 * (p // 16) + p % 4 for p in range(self.width)]

    def dot_quads(
        self, w: Writer, total: ir.Value, quads: ir.Value, spikes: ir.Value, of: str = "any"
    ) -> ir.Value:
        """As :meth:`Portable.dot_quads`, in one instruction."""
        kind = vector(i32, self.lanes)
        name = f"llvm.x86.avx512.vpdpbusd.{self.bits}"
        return w.call(name, kind, total, w.b.bitcast(quads, kind), w.splat(spikes, self.lanes))


class DotProduct(_FourAtOnce):
    """ARM's ``sdot`` of signed bytes (ARMv8.2 with dot products: every core of the last years)."""

    name = "dotprod"
    width, step = 16, 32
    features = ("dotprod",)

    def dot_quads(
        self, w: Writer, total: ir.Value, quads: ir.Value, spikes: ir.Value, of: str = "any"
    ) -> ir.Value:
        """As :meth:`Portable.dot_quads`, in one instruction."""
        s = w.b.bitcast(w.splat(spikes, 4), vector(i8, 16))
        return w.call("llvm.aarch64.neon.sdot.v4i32.v16i8", vector(i32, 4), total, quads, s)


# The best first.
INSTRUCTIONS: dict[str, Portable] = {
    kind.name: kind for kind in (Vnni(512), Vnni(256), Avx2(), DotProduct(), Portable())
}


@cache
def _features() -> frozenset[str]:
    import numba

    told = (getattr(numba.config, name) for name in ("CPU_NAME", "CPU_FEATURES"))
    if any(told):  # numba was told to compile for something else
        return frozenset()
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def runs_here(name: str) -> bool:
    """Whether this processor has these instructions."""
    wanted = INSTRUCTIONS[name].features
    return not wanted or any(_features().issuperset(one.split("+")) for one in wanted)


def best() -> str:
    """The name of the best instructions that this processor has."""
    return next(name for name in INSTRUCTIONS if runs_here(name))
