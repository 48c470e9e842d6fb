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


_BLOCK = 4096


def pack(field: np.ndarray, thin: bool = False) -> np.ndarray:
    """A field (batch, channel, node) as rows (batch, group, node, 4), the last group filled up with zeros.

    A single channel stays what it is: (batch, 1, node). Valid until this thread packs again.

    Args:
        thin: the last axis of the grid has one node: one more is put at the end, so that the last one has a pair.
    """
    if thin:
        field = np.concatenate([field, np.zeros_like(field[:, :, :1])], axis=2)
    if field.shape[1] == 1:
        return field
    groups = -(-field.shape[1] // LANES)
    rows = working_memory("rows", (field.shape[0], groups, field.shape[2], LANES), field.dtype)
    _pack(field, rows)
    return rows


def buffers_of(parts: int, batch: int, channels: int, nodes: int, dtype) -> np.ndarray:
    """Memory (part, batch, group, node, 4) to add to, or (part, batch, 1, node) for a single channel; whoever adds
    sets it to zero. Valid until this thread asks again."""
    shape = (parts, batch, 1, nodes) if channels == 1 else (parts, batch, -(-channels // LANES), nodes, LANES)
    return working_memory("buffers", shape, dtype)


def unpack(rows: np.ndarray, field: np.ndarray) -> None:
    """The sum over the parts of rows, into a field (batch, channel, node)."""
    if rows.ndim == 4:
        np.sum(rows, axis=0, out=field)
    else:
        _unpack(rows, field)


@njit(parallel=True, cache=True)
def _pack(field, rows):
    count = field.shape[2]
    blocks = (count + _BLOCK - 1) // _BLOCK
    for task in prange(field.shape[0] * blocks):
        b, start = task // blocks, (task % blocks) * _BLOCK
        for group in range(rows.shape[1]):
            for place in range(LANES):
                c = group * LANES + place
                for o in range(start, min(start + _BLOCK, count)):
                    rows[b, group, o, place] = field[b, c, o] if c < field.shape[1] else 0


@njit(parallel=True, cache=True)
def _unpack(rows, field):
    count = field.shape[2]
    blocks = (count + _BLOCK - 1) // _BLOCK
    for task in prange(field.shape[0] * blocks):
        b, start = task // blocks, (task % blocks) * _BLOCK
        for c in range(field.shape[1]):
            group, place = c // LANES, c % LANES
            for o in range(start, min(start + _BLOCK, count)):
                value = rows[0, b, group, o, place]
                for part in range(1, rows.shape[0]):
                    value += rows[part, b, group, o, place]
                field[b, c, o] = value
