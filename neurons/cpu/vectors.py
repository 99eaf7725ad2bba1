"""Vectors in LLVM IR: what the kernels are written with, in terms that every target of LLVM knows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

__all__ = ["Writer", "define", "f32", "i8", "i16", "i32", "i64", "ptr", "vector"]

i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
f32 = ir.FloatType()
ptr = ir.PointerType()


def vector(element: ir.Type, count: int) -> ir.VectorType:
    """The type ``<count x element>``."""
    return ir.VectorType(element, count)


def define(module: ir.Module, name: str, arguments: Sequence[ir.Type]) -> tuple[ir.Function, bool]:
    """The function ``void name(arguments)`` of a module, and whether its body is still to be written."""
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        function.linkage = "linkonce_odr"  # several compiled functions of one process may bring it along
    return function, function.is_declaration


class Writer:
    """Writes a function's body; pointers are in bytes, indices in 64 bits.

    Args:
        function: declared, without a body.
    """

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.entry = ir.IRBuilder(function.append_basic_block("entry"))
        self.b = ir.IRBuilder(function.append_basic_block("body"))
        self._body = self.b.block

    def finish(self) -> None:
        """Close the function."""
        self.entry.branch(self._body)
        self.b.ret_void()

    def variable(self, kind: ir.Type) -> ir.Value:
        """A local variable, for :meth:`set` and :meth:`get`; the compiler keeps it in a register."""
        return self.entry.alloca(kind)

    def set(self, variable: ir.Value, value: ir.Value) -> None:
        """Assign."""
        self.b.store(value, variable)

    def get(self, variable: ir.Value, kind: ir.Type) -> ir.Value:
        """The value of a variable."""
        return self.b.load(variable, typ=kind)

    def at(self, base: ir.Value, offset: ir.Value | int) -> ir.Value:
        """``base + offset`` bytes."""
        offset = i64(offset) if isinstance(offset, int) else offset
        return self.b.gep(base, [offset], source_etype=i8)

    def load(self, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
        """What stands at an address."""
        return self.b.load(address, typ=kind, align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int = 1) -> None:
        """Write to an address."""
        self.b.store(value, address, align=align)

    def word(self, base: ir.Value, index: ir.Value) -> ir.Value:
        """The 32-bit integer ``base[index]``."""
        return self.load(self.at(base, self.b.mul(index, i64(4))), i32, 4)

    def splat(self, value: ir.Value, count: int) -> ir.Value:
        """A vector of ``count`` times the value."""
        kind = vector(value.type, count)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, i32(0))
        return self.shuffle(first, first, [0] * count)

    def shuffle(self, x: ir.Value, y: ir.Value, which: Sequence[int]) -> ir.Value:
        """The elements of ``x`` and, behind them, ``y`` that these indices name."""
        return self.b.shuffle_vector(x, y, ir.Constant(vector(i32, len(which)), list(which)))

    def part(self, x: ir.Value, first: int, count: int) -> ir.Value:
        """``count`` elements of ``x`` from ``first`` on."""
        return self.shuffle(x, x, range(first, first + count))

    def interleave(self, x: ir.Value, y: ir.Value, size: int, high: bool) -> ir.Value:
        """Units of ``size`` bytes of ``x`` and ``y`` in turn.

        Out of the lower or the higher half of every 16 bytes, as x86's unpack and, within 16 bytes, ARM's zip
        do it.
        """
        width = x.type.count
        which: list[int] = []
        for lane in range(0, width, 16):
            start = lane + (8 if high else 0)
            for unit in range(start, start + 8, size):
                which += range(unit, unit + size)
                which += range(width + unit, width + unit + size)
        return self.shuffle(x, y, which)

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call one of LLVM's intrinsics."""
        module = self.function.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(function, arguments)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a cache line, into the second level: the first is full of sums."""
        self.call("llvm.prefetch.p0", ir.VoidType(), address, i32(0), i32(2), i32(1))

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """Repeat what is written inside for ``start, start + step, ...`` below ``stop``."""
        before = self.b.block
        head, body, after = (self.function.append_basic_block(n) for n in ("loop", "inside", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(i64)
        index.add_incoming(start, before)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), body, after)
        self.b.position_at_end(body)
        yield index
        index.add_incoming(self.b.add(index, i64(step)), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
