"""The products of spikes and integer weights, as functions in LLVM IR for a given kind of processor.

Two layouts of the weights (:mod:`neurons.cpu.packing`). *Rows*: one input's weights for all outputs lie
together, and only the rows of inputs that fire are read. *Tiles*: the weights of ``2 * width`` outputs lie
together, four inputs of each side by side; everything is read, in one stream. 4-bit weights have a scale for
every 32 inputs of an output, an integer too, so that all sums of spikes are exact; activations that are no
spikes have a float for every 32 inputs, and so have their sums.

What is asked of memory decides the speed: a row at a time hides no latency, so eight rows are read side by
side, and every line is asked for ``AHEAD`` rows before it is needed.
"""

from collections.abc import Callable

from llvmlite import ir

from .instructions import Portable
from .vectors import Writer, define, f32, i8, i16, i32, i64, ptr, vector

__all__ = ["AHEAD", "GROUP", "rows_int4", "rows_int8", "tile_outputs", "tiles"]

GROUP = 32  # inputs that share a scale
AHEAD = 24  # rows between a row's prefetch and its use
STREAM_AHEAD = 4096  # bytes between a tile's prefetch and its use


def tile_outputs(kind: Portable) -> int:
    """How many outputs a tile holds: eight accumulators of them."""
    return 8 * kind.quad_lanes


def _nibbles(w: Writer, values: ir.Value, high: bool) -> ir.Value:
    """The lower or the higher four bits of every byte, 0 to 15."""
    kind = vector(i16, values.type.count // 2)  # no instruction shifts bytes
    if high:
        shifted = w.b.lshr(w.b.bitcast(values, kind), ir.Constant(kind, [4] * kind.count))
        values = w.b.bitcast(shifted, values.type)
    return w.b.and_(values, ir.Constant(values.type, [15] * values.type.count))


def rows_int8(module: ir.Module, kind: Portable) -> ir.Function:
    """``sums[o] += sum over the rows of s * weight[row, o]``, eight rows at a time.

    Arguments: the weights; byte offsets of the rows, int32, ``8 * eights`` and ``AHEAD`` more that are only
    prefetched; their spikes, int8; ``eights``; bytes of a row to read, a multiple of ``kind.step``; the sums,
    int32, aligned to 64 bytes.
    """
    function, new = define(module, f"event_rows_int8_{kind.name}", [ptr, ptr, ptr, i64, i64, ptr])
    if not new:
        return function
    w = Writer(function)
    weights, offsets, spikes, eights, columns, sums = function.args
    row_type, sum_type = vector(i8, kind.width), vector(i32, kind.lanes)
    with w.loop(i64(0), eights) as eight:
        first = w.b.mul(eight, i64(8))
        rows, ahead = (
            [w.at(weights, w.b.sext(w.word(offsets, w.b.add(first, i64(shift + i))), i64)) for i in range(8)]
            for shift in (0, AHEAD)
        )
        quads = [w.word(spikes, w.b.add(w.b.mul(eight, i64(2)), i64(i))) for i in range(2)]
        with w.loop(i64(0), columns, kind.step) as column:
            for row in ahead:
                w.prefetch(w.at(row, column))
            for part in range(0, kind.step, kind.width):
                place = w.b.add(column, i64(part))
                target = w.at(sums, w.b.mul(place, i64(4)))
                places = [w.at(target, 4 * kind.lanes * i) for i in range(kind.accumulators)]
                align = min(64, 4 * kind.lanes)
                total = [w.load(address, sum_type, align) for address in places]
                for half in range(2):
                    four = [
                        w.load(w.at(row, place), row_type, kind.width)
                        for row in rows[4 * half : 4 * half + 4]
                    ]
                    total = kind.dot(w, total, kind.mix(w, four), quads[half])
                for value, address in zip(total, places, strict=True):
                    w.store(value, address, align)
    w.finish()
    return function


def rows_int4(module: ir.Module, kind: Portable) -> ir.Function:
    """``sums[o] += sum over groups of scale[group, o] * sum over the group's rows of s * (weight - 8)``.

    Arguments: the weights, two a byte, plus 8; byte offsets of the rows, int32, in fours of one group, and
    ``AHEAD`` more; their spikes, int8; where each group's fours begin and the last one's end, int32
    ``[groups + 1]``; each group's sum of spikes, int32; the scales, uint8; bytes between two groups' scales;
    ``groups``; bytes of a row to read, a multiple of ``kind.step``; the sums, int32, aligned to 64 bytes.
    """
    arguments = [ptr, ptr, ptr, ptr, ptr, ptr, i64, i64, i64, ptr]
    function, new = define(module, f"event_rows_int4_{kind.name}", arguments)
    if not new:
        return function
    w = Writer(function)
    weights, offsets, spikes, begins, totals, scales, stride, groups, columns, sums = function.args
    row_type, sum_type = vector(i8, kind.width), vector(i32, kind.lanes)
    parts = range(0, kind.step, kind.width)
    variables = [[w.variable(sum_type) for _ in range(2 * kind.accumulators)] for _ in parts]
    all_variables = [variable for own in variables for variable in own]
    with w.loop(i64(0), groups) as group:
        begin, end = (w.b.sext(w.word(begins, w.b.add(group, i64(i))), i64) for i in range(2))
        start = w.splat(w.b.mul(w.word(totals, group), i32(-8)), kind.lanes)
        own_scales = w.at(scales, w.b.mul(group, stride))
        # a group without spikes is passed over
        until = w.b.select(w.b.icmp_signed("<", begin, end), columns, i64(0))
        with w.loop(i64(0), until, kind.step) as column:
            for variable in all_variables:
                w.set(variable, start)
            with w.loop(begin, end) as four:
                first, quad = w.b.mul(four, i64(4)), w.word(spikes, four)
                rows, ahead = (
                    [
                        w.at(
                            weights,
                            w.b.add(w.b.sext(w.word(offsets, w.b.add(first, i64(s + i))), i64), column),
                        )
                        for i in range(4)
                    ]
                    for s in (0, AHEAD)
                )
                for row in ahead:
                    w.prefetch(row)
                for part, own in zip(parts, variables, strict=True):
                    mixed = kind.mix(w, [w.load(w.at(row, part), row_type, kind.width) for row in rows])
                    for high in range(2):
                        some = own[kind.accumulators * high :][: kind.accumulators]
                        values = [_nibbles(w, value, bool(high)) for value in mixed]
                        total = kind.dot(w, [w.get(v, sum_type) for v in some], values, quad)
                        for variable, value in zip(some, total, strict=True):
                            w.set(variable, value)
            output = w.b.mul(column, i64(2))
            for i, variable in enumerate(all_variables):
                place = w.b.add(output, i64(kind.lanes * i))
                scale = w.b.zext(w.load(w.at(own_scales, place), vector(i8, kind.lanes)), sum_type)
                target = w.at(sums, w.b.mul(place, i64(4)))
                product = w.b.mul(w.get(variable, sum_type), scale)
                w.store(w.b.add(w.load(target, sum_type, 4 * kind.lanes), product), target, 4 * kind.lanes)
    w.finish()
    return function


def tiles(module: ir.Module, kind: Portable, bits: int, floats: bool) -> ir.Function:
    """One tile's sums over all inputs, of int8 or 4-bit weights.

    ``sums[o] = sum over groups of a[group] * scale[group, o] * sum over the group of x * weight``, without
    ``scale`` for int8 weights; without ``a`` and in integers unless ``floats``.

    Arguments: the tile's weights; the inputs, int8, a whole number of groups of 32; each group's sum of them,
    int32; the tile's scales, uint8 ``[groups, outputs]``; ``a``, float32; ``groups``; the sums, int32 or
    float32.
    """
    name = f"event_tile_int{bits}_{'float' if floats else 'int'}_{kind.name}"
    function, new = define(module, name, [ptr, ptr, ptr, ptr, ptr, i64, ptr])
    if not new:
        return function
    w = Writer(function)
    weights, inputs, totals, scales, factors, groups, sums = function.args
    lanes = kind.quad_lanes
    whole_type = vector(f32 if floats else i32, lanes)
    whole = [w.variable(whole_type) for _ in range(8)]
    for variable in whole:
        w.set(variable, ir.Constant(whole_type, [0] * lanes))
    vectors = 8 if bits == 8 else 4
    size = vectors * kind.width  # bytes of four inputs
    minus = -8 if bits == 4 else -128 if kind.offset else 0
    finish = _group_end(w, kind, bits, floats)
    with w.loop(i64(0), groups) as group:
        own = [w.splat(w.b.mul(w.word(totals, group), i32(minus)), lanes)] * 8
        base = w.at(weights, w.b.mul(group, i64(GROUP // 4 * size)))
        for quad in range(GROUP // 4):
            x = w.word(inputs, w.b.add(w.b.mul(group, i64(GROUP // 4)), i64(quad)))
            for line in range(0, size, 64):
                w.prefetch(w.at(base, STREAM_AHEAD + quad * size + line))
            for i in range(vectors):
                value = w.load(w.at(base, quad * size + i * kind.width), vector(i8, kind.width), kind.width)
                if bits == 8:
                    own[i] = kind.dot_quads(w, own[i], value, x)
                    continue
                for high in range(2):
                    place = i + vectors * high
                    own[place] = kind.dot_quads(w, own[place], _nibbles(w, value, bool(high)), x)
        for i, value in enumerate(own):
            before = w.get(whole[i], whole_type)
            scale = w.at(scales, w.b.add(w.b.mul(group, i64(8 * lanes)), i64(i * lanes)))
            w.set(whole[i], finish(before, value, scale, w.at(factors, w.b.mul(group, i64(4)))))
    for i, variable in enumerate(whole):
        w.store(w.get(variable, whole_type), w.at(sums, 4 * lanes * i), 4)
    w.finish()
    return function


def _group_end(w: Writer, kind: Portable, bits: int, floats: bool) -> Callable[..., ir.Value]:
    """How a group's sums join those of the groups before it."""
    lanes = kind.quad_lanes

    def integers(before: ir.Value, own: ir.Value, scale: ir.Value, _: ir.Value) -> ir.Value:
        if bits == 4:
            own = w.b.mul(own, w.b.zext(w.load(scale, vector(i8, lanes)), own.type))
        return w.b.add(before, own)

    def reals(before: ir.Value, own: ir.Value, scale: ir.Value, factor: ir.Value) -> ir.Value:
        if bits == 4:
            own = w.b.mul(own, w.b.zext(w.load(scale, vector(i8, lanes)), own.type))
        value = w.b.sitofp(own, vector(f32, lanes))
        return w.call(
            f"llvm.fmuladd.v{lanes}f32", value.type, value, w.splat(w.load(factor, f32, 4), lanes), before
        )

    return reals if floats else integers
