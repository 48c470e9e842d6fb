"""Several numbers of one type as one Numba value: a load, a store and an operation each for all of them at once.

A node of a field with up to four channels is a row of four; trilinear arithmetic on rows needs a quarter of the
instructions, and on pairs of rows, the two neighbours along the last axis, an eighth. Kernels written with the
functions here serve both forms, as the rank of the array decides at compile time: ``(node, 4)`` gives lanes,
``(node,)`` plain numbers (and a pair of them two lanes).

Compilers find such code in loops by themselves, but not across the gathers of a sampler.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, overload, register_model

from deepatlas.kernels_cpu.memory import working_memory

LANES = 4
_ROUNDING = ("contract",)
_INDEX = ir.IntType(32)


class Lanes(types.Type):
    """The Numba type of so many lanes."""

    def __init__(self, dtype: types.Float, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, manager, kind: Lanes) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.dtype).get_value_type(), kind.count))


def _address(context, builder, kind, array, row, count=LANES):
    """Pointer to so many numbers from a row of an array on, as a vector, and the alignment of a single number."""
    data = context.make_array(kind)(context, builder, array)
    shape, strides = (cgutils.unpack_tuple(builder, part) for part in (data.shape, data.strides))
    first = [row, context.get_constant(types.intp, 0)][: kind.ndim]
    pointer = cgutils.get_item_pointer2(context, builder, data.data, shape, strides, kind.layout, first)
    vector = context.get_value_type(Lanes(kind.dtype, count))
    align = context.get_abi_sizeof(context.get_value_type(kind.dtype))
    return builder.bitcast(pointer, ir.PointerType(vector)), align


@intrinsic
def _load(_, rows, row):
    def generate(context, builder, signature, args):
        pointer, align = _address(context, builder, signature.args[0], *args)
        return builder.load(pointer, align=align)

    return Lanes(rows.dtype, LANES)(rows, types.intp), generate


@intrinsic
def load_pair(_, rows, row):
    """A row and the one after it, side by side; the last row has none after it."""
    width = LANES if rows.ndim == 2 else 1

    def generate(context, builder, signature, args):
        pointer, align = _address(context, builder, signature.args[0], *args, count=2 * width)
        return builder.load(pointer, align=align)

    return Lanes(rows.dtype, 2 * width)(rows, types.intp), generate


def _half(pair: Lanes, first: int):
    """One half of a pair: lanes, or a plain number of a pair of numbers."""
    width = pair.count // 2

    def generate(context, builder, signature, args):
        if width == 1:
            return builder.extract_element(args[0], ir.Constant(_INDEX, first))
        mask = ir.Constant(ir.VectorType(_INDEX, width), [first * width + place for place in range(width)])
        return builder.shuffle_vector(args[0], ir.Constant(args[0].type, ir.Undefined), mask)

    return (pair.dtype if width == 1 else Lanes(pair.dtype, width))(pair), generate


@intrinsic
def first(_, pair):
    """The first row of a pair."""
    return _half(pair, 0)


@intrinsic
def second(_, pair):
    """The second row of a pair."""
    return _half(pair, 1)


@intrinsic
def _store(_, rows, row, value):
    def generate(context, builder, signature, args):
        pointer, align = _address(context, builder, signature.args[0], *args[:2], count=value.count)
        builder.store(args[2], pointer, align=align)
        return context.get_dummy_value()

    return types.void(rows, types.intp, value), generate


@intrinsic
def _twice(_, four):
    """Four lanes, and the same again."""

    def generate(context, builder, signature, args):
        mask = ir.Constant(ir.VectorType(_INDEX, 2 * LANES), 2 * list(range(LANES)))
        return builder.shuffle_vector(args[0], ir.Constant(args[0].type, ir.Undefined), mask)

    return Lanes(four.dtype, 2 * LANES)(four), generate


@intrinsic
def _sums(_, a, b, c, d):
    """Of four pairs of rows the sums over the lanes: those of the first rows, then those of the second."""

    def generate(context, builder, signature, args):
        kind = ir.VectorType(_INDEX, 2 * LANES)

        def neighbours(x, y):
            even, odd = ([n + k for n in (0, 2, 8, 10, 4, 6, 12, 14)] for k in (0, 1))
            parts = [builder.shuffle_vector(x, y, ir.Constant(kind, mask)) for mask in (even, odd)]
            return builder.fadd(*parts, flags=_ROUNDING)

        return neighbours(neighbours(*args[:2]), neighbours(*args[2:]))

    return a(a, b, c, d), generate


@intrinsic
def _spread(_, number, like):
    """A number in every lane of something like another value."""

    def generate(context, builder, signature, args):
        vector = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for place in range(signature.return_type.count):
            vector = builder.insert_element(vector, args[0], ir.Constant(_INDEX, place))
        return vector

    return like(number, like), generate


@intrinsic
def lane(_, four, place):
    """One of the four numbers; ``place`` is a literal."""
    if not isinstance(place, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, args):
        return builder.extract_element(args[0], ir.Constant(_INDEX, place.literal_value))

    return four.dtype(four, place), generate


def _operation(operation, instruction: str) -> None:
    @intrinsic
    def both(_, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=_ROUNDING)

        return a(a, b), generate

    @overload(operation, inline="always")
    def mixed(a, b):
        if isinstance(a, Lanes) and a == b:
            return lambda a, b: both(a, b)
        if isinstance(a, Lanes) and b == a.dtype:
            return lambda a, b: both(a, _spread(b, a))
        return None


for _operator, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _operation(_operator, _instruction)


def load(rows, row):
    """The row of a node: four lanes of an array (node, 4), a number of an array (node,)."""
    raise NotImplementedError  # compiled code only


def store(rows, row, value):
    """Write what `load` reads."""
    raise NotImplementedError


def store_products(table, row, value, v00, v01, v10, v11):
    """Write to a row of a table (row, 8) the products of a value with the eight rows in four pairs, each summed over
    its lanes: those of the first rows, then those of the second."""
    raise NotImplementedError


@overload(load, inline="always")
def _(rows, row):
    return (lambda rows, row: _load(rows, row)) if rows.ndim == 2 else (lambda rows, row: rows[row])


@overload(store, inline="always")
def _(rows, row, value):
    if rows.ndim == 2:
        return lambda rows, row, value: _store(rows, row, value)

    def plain(rows, row, value):
        rows[row] = value

    return plain


@overload(store_products, inline="always")
def _(table, row, value, v00, v01, v10, v11):
    if isinstance(value, Lanes):

        def lanes(table, row, value, v00, v01, v10, v11):
            two = _twice(value)
            _store(table, row, _sums(v00 * two, v01 * two, v10 * two, v11 * two))

        return lanes

    def plain(table, row, value, v00, v01, v10, v11):
        for place, pair in enumerate((v00, v01, v10, v11)):
            table[row, place] = value * first(pair)
            table[row, 4 + place] = value * second(pair)

    return plain


def fill(rows, field, start, stop):
    """Pack some nodes of a field (channel, node) into rows (group, node, 4); a single channel needs no packing."""
    raise NotImplementedError


@overload(fill, inline="always")
def _(rows, field, start, stop):
    if rows.ndim == 2:
        return lambda rows, field, start, stop: None

    def lanes(rows, field, start, stop):
        for group in range(rows.shape[0]):
            for place in range(LANES):
                c = group * LANES + place
                for o in range(start, stop):
                    rows[group, o, place] = field[c, o] if c < field.shape[0] else 0

    return lanes


# ── memory for rows: a plane of nodes is packed, or set to zero, when the first point of a thread comes to it ────────

_BLOCK = 4096


@njit(inline="always")
def meet(met, node, count, plane, field, rows, sums, want_rows, want_sums):
    """Pack the planes that some cells have corners in into rows, and set their sums to zero, where no cell was before.

    ``met`` (plane,) notes which they are; ``node`` holds the lowest corners of ``count`` cells, ``plane`` nodes each.
    """
    low, high = node[0], node[0]
    for m in range(count):
        low, high = min(low, node[m]), max(high, node[m])
    for p in range(low // plane, min(high // plane + 2, len(met))):
        if not met[p]:
            met[p] = True
            if want_rows:
                fill(rows, field, p * plane, (p + 1) * plane)
            if want_sums:
                sums[:, p * plane : (p + 1) * plane] = 0


def rows_of(parts: int, field: np.ndarray) -> np.ndarray:
    """Memory to `fill` with a field (batch, channel, node), once for each part: (part, batch, group, node, 4). A single
    channel stays what it is: (1, batch, 1, node). Valid until this thread asks again."""
    batch, channels, nodes = field.shape
    if channels == 1:
        return field[None]
    return working_memory("rows", (parts, batch, -(-channels // LANES), nodes, LANES), field.dtype)


def pack(field: np.ndarray) -> np.ndarray:
    """`rows_of` a field for one part, filled: (batch, group, node, 4)."""
    (rows,) = rows_of(1, field)
    _pack(field, rows)
    return rows


def buffers_of(parts: int, batch: int, channels: int, nodes: int, dtype) -> np.ndarray:
    """Memory (part, batch, group, node, 4) to add to, or (part, batch, 1, node) for a single channel; whoever adds
    sets it to zero. Valid until this thread asks again."""
    shape = (parts, batch, 1, nodes) if channels == 1 else (parts, batch, -(-channels // LANES), nodes, LANES)
    return working_memory("buffers", shape, dtype)


def unpack(buffers: np.ndarray, met: np.ndarray, field: np.ndarray) -> None:
    """The sum over the parts of buffers, into a field (batch, channel, node).

    Args:
        met: (part, batch, plane), the planes that were added to; the others hold whatever was there.
    """
    _unpack(buffers if buffers.ndim == 5 else buffers[..., None], met, field)


@njit(parallel=True, cache=True)
def _pack(field, rows):
    count = field.shape[2]
    blocks = (count + _BLOCK - 1) // _BLOCK
    for task in prange(field.shape[0] * blocks):
        b, start = task // blocks, (task % blocks) * _BLOCK
        fill(rows[b], field[b], start, min(start + _BLOCK, count))


@njit(parallel=True, cache=True)
def _unpack(buffers, met, field):
    parts, planes, lanes = len(buffers), met.shape[2], buffers.shape[4]
    plane = field.shape[2] // planes
    for task in prange(field.shape[0] * planes):
        b, p = task // planes, task % planes
        for c in range(field.shape[1]):
            group, place = c // lanes, c % lanes
            first_part = True
            for part in range(parts):
                if not met[part, b, p]:
                    continue
                for o in range(p * plane, (p + 1) * plane):
                    value = buffers[part, b, group, o, place]
                    field[b, c, o] = value if first_part else field[b, c, o] + value
                first_part = False
            if first_part:
                field[b, c, p * plane : (p + 1) * plane] = 0
