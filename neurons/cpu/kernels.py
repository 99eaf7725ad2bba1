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
SCALES_AHEAD = 512  # bytes between the prefetch of a tile's scales and their use


def tile_outputs(kind: Portable) -> int:
    """How many outputs a tile holds: eight accumulators of them."""
    return 8 * kind.quad_lanes


def _add_nibbles(w: Writer, kind: Portable, add: Callable, own: list[ir.Value], values: list) -> None:
    """Add products of both halves of every byte, by ``add(sums, values)``, to the two lists in ``own``.

    Where bytes multiply unsigned, the second sums are 16 times the upper halves' and the first are the whole
    bytes': one operation less than to part them. :func:`_part_nibbles` undoes it.
    """
    byte = values[0].type
    upper = ir.Constant(byte, [0xF0 - 256] * byte.count)
    lower = ir.Constant(byte, [15] * byte.count)
    if kind.offset:
        first, second = values, [w.b.and_(value, upper) for value in values]
    else:
        wide = vector(i16, byte.count // 2)  # no instruction shifts bytes
        four = ir.Constant(wide, [4] * wide.count)
        first = [w.b.and_(value, lower) for value in values]
        shifted = [w.b.bitcast(w.b.lshr(w.b.bitcast(value, wide), four), byte) for value in values]
        second = [w.b.and_(value, lower) for value in shifted]
    own[0], own[1] = add(own[0], first), add(own[1], second)


def _nibble_starts(w: Writer, kind: Portable, total: ir.Value, lanes: int) -> list[ir.Value]:
    """What both lists of sums begin with for a group whose spikes sum to ``total``; weights are plus 8."""
    factors = (-136, -128) if kind.offset else (-8, -8)
    return [w.splat(w.b.mul(total, i32(factor)), lanes) for factor in factors]


def _part_nibbles(w: Writer, kind: Portable, first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The lower and the upper halves' sums."""
    if not kind.offset:
        return first, second
    return w.b.sub(first, second), w.b.ashr(second, ir.Constant(second.type, [4] * second.type.count))


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
                for line in range(0, kind.step, 64):
                    w.prefetch(w.at(w.at(row, column), line))
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
    count = kind.accumulators
    variables = [[[w.variable(sum_type) for _ in range(count)] for _ in range(2)] for _ in parts]
    with w.loop(i64(0), groups) as group:
        begin, end = (w.b.sext(w.word(begins, w.b.add(group, i64(i))), i64) for i in range(2))
        starts = _nibble_starts(w, kind, w.word(totals, group), kind.lanes)
        own_scales = w.at(scales, w.b.mul(group, stride))
        # a group without spikes is passed over
        until = w.b.select(w.b.icmp_signed("<", begin, end), columns, i64(0))
        with w.loop(i64(0), until, kind.step) as column:
            for pair in variables:
                for own, start in zip(pair, starts, strict=True):
                    for variable in own:
                        w.set(variable, start)
            base = w.at(weights, column)
            with w.loop(begin, end) as four:
                first, quad = w.b.mul(four, i64(4)), w.word(spikes, four)
                rows, ahead = (
                    [
                        w.at(base, w.b.sext(w.word(offsets, w.b.add(first, i64(shift + i))), i64))
                        for i in range(4)
                    ]
                    for shift in (0, AHEAD)
                )
                for row in ahead:
                    for line in range(0, kind.step, 64):
                        w.prefetch(w.at(row, line))
                for part, pair in zip(parts, variables, strict=True):
                    values = [w.load(w.at(row, part), row_type, kind.width) for row in rows]
                    _add_four_rows(w, kind, pair, values, quad)
            for line in range(0, 2 * kind.step, 64):  # the next group's scales
                w.prefetch(w.at(w.at(w.at(own_scales, stride), w.b.mul(column, i64(2))), line))
            for part, pair in zip(parts, variables, strict=True):
                output = w.b.mul(w.b.add(column, i64(part)), i64(2))
                _add_scaled(w, kind, pair, own_scales, output, sums)
    w.finish()
    return function


def _add_four_rows(
    w: Writer, kind: Portable, pair: list[list[ir.Value]], rows: list[ir.Value], spikes: ir.Value
) -> None:
    """Add the products of four rows' bytes and their spikes to a group's variables, of both halves."""
    sum_type = vector(i32, kind.lanes)
    mixed = kind.mix(w, rows)
    sums = [[w.get(variable, sum_type) for variable in own] for own in pair]
    _add_nibbles(w, kind, lambda totals, four: kind.dot(w, totals, four, spikes), sums, mixed)
    for own, values in zip(pair, sums, strict=True):
        for variable, value in zip(own, values, strict=True):
            w.set(variable, value)


def _add_scaled(
    w: Writer, kind: Portable, pair: list[list[ir.Value]], scales: ir.Value, output: ir.Value, sums: ir.Value
) -> None:
    """Add a group's variables, times the scales of its outputs from ``output`` on, to the sums in memory."""
    sum_type, align = vector(i32, kind.lanes), min(64, 4 * kind.lanes)
    for i in range(kind.accumulators):
        halves = _part_nibbles(w, kind, *(w.get(own[i], sum_type) for own in pair))
        for high, half in enumerate(halves):
            place = w.b.add(output, i64(kind.width * high + kind.lanes * i))
            scale = w.b.zext(w.load(w.at(scales, place), vector(i8, kind.lanes)), sum_type)
            target = w.at(sums, w.b.mul(place, i64(4)))
            before = w.load(target, sum_type, align)
            w.store(w.b.add(before, w.b.mul(half, scale)), target, align)


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
    finish = _group_end(w, kind, bits, floats)
    with w.loop(i64(0), groups) as group:
        total = w.word(totals, group)
        if bits == 8:
            own = [[w.splat(w.b.mul(total, i32(-128 if kind.offset else 0)), lanes)] * 8]
        else:
            own = [[start] * 4 for start in _nibble_starts(w, kind, total, lanes)]
        base = w.at(weights, w.b.mul(group, i64(GROUP // 4 * size)))
        for quad in range(GROUP // 4):
            x = w.word(inputs, w.b.add(w.b.mul(group, i64(GROUP // 4)), i64(quad)))
            for line in range(0, size, 64):
                w.prefetch(w.at(base, STREAM_AHEAD + quad * size + line))
            places = [w.at(base, quad * size + i * kind.width) for i in range(vectors)]
            values = [w.load(place, vector(i8, kind.width), kind.width) for place in places]
            _add_quad(w, kind, own, values, x, bits, floats)
        if bits == 4:
            for line in range(0, 8 * lanes, 64):
                ahead = w.b.add(w.b.mul(group, i64(8 * lanes)), i64(SCALES_AHEAD + line))
                w.prefetch(w.at(scales, ahead))
            halves = [_part_nibbles(w, kind, *both) for both in zip(*own, strict=True)]
            own = [[half[high] for high in range(2) for half in halves]]
        for i, value in enumerate(own[0]):
            before = w.get(whole[i], whole_type)
            scale = w.at(scales, w.b.add(w.b.mul(group, i64(8 * lanes)), i64(i * lanes)))
            w.set(whole[i], finish(before, value, scale, w.at(factors, w.b.mul(group, i64(4)))))
    for i, variable in enumerate(whole):
        w.store(w.get(variable, whole_type), w.at(sums, 4 * lanes * i), 4)
    w.finish()
    return function


def _add_quad(
    w: Writer,
    kind: Portable,
    own: list[list[ir.Value]],
    values: list[ir.Value],
    x: ir.Value,
    bits: int,
    floats: bool,
) -> None:
    """Add the products of four inputs ``x`` and their weights in a tile to a group's sums ``own``."""
    of = "rounded" if floats else "any"
    if bits == 4 and not kind.offset:
        of = "nibbles"

    def add(sums: list[ir.Value], read: list[ir.Value]) -> list[ir.Value]:
        return [kind.dot_quads(w, *both, x, of) for both in zip(sums, read, strict=True)]

    if bits == 8:
        own[0] = add(own[0], values)
    else:
        _add_nibbles(w, kind, add, own, values)


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
