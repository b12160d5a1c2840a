"""Non-zeros of matrices as index lists, by rows and by columns.

A *plane* is a matrix (rows, columns) in memory, its rows a fixed number of entries apart; one call lists many of them,
or one. Few planes are cut into parts, one for each thread. A part's non-zeros are counted first, which gives the
place where its list begins, so lists have no gaps, and how planes are cut is no matter for what they hold.

Sixty-four bytes are read at a time. Where the processor has instructions that move the non-zeros of a vector together
(AVX-512), they do; elsewhere non-zeros are visited one after the other, which pays because they are few.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from torch import Tensor

from retrograde.kernels.cpu_lanes import (
    F32,
    I1,
    I8,
    I32,
    I64,
    LANES,
    address,
    call,
    constant,
    intrinsic,
    load,
    name_of,
    offset,
    splat,
    store,
    vector,
)
from retrograde.kernels.cpu_memory import flat, lent
from retrograde.kernels.cpu_threads import inlined, jit, serial, use_threads

_LINE = 64
"""Bytes that are read at a time."""
_COLUMNS = 256
"""Columns whose lists are written at a time: the ends of so many stay in the first-level cache."""


# One line of a plane. The mask of a line has a bit for each of its entries, the first one lowest.


def _read(builder: Any, values: Any, at: Any) -> Any:
    """The entries at an address in the array of type `values`, int8 or float32."""
    element = F32 if values.dtype == types.float32 else I8
    return load(builder, at, vector(element, _LINE * 8 // values.dtype.bitwidth))


@intrinsic
def _mask(typingctx: Any, values: Any, at: Any) -> Any:
    """Which entries of the line at an address in the array `values` are not zero."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = _read(builder, values, arguments[1])
        lanes = found.type.count
        # Unordered: NaN is no zero.
        compare = builder.fcmp_unordered if found.type.element == F32 else builder.icmp_signed
        mask = builder.bitcast(compare("!=", found, ir.Constant(found.type, None)), ir.IntType(lanes))
        return mask if lanes == _LINE else builder.zext(mask, I64)

    return types.int64(values, types.int64), codegen


@intrinsic
def _ones(typingctx: Any, mask: Any) -> Any:
    """Number of bits that are set."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.ctpop.i64", I64, list(arguments))

    return types.int64(types.int64), codegen


@intrinsic
def _lowest(typingctx: Any, mask: Any) -> Any:
    """The lowest bit that is set; one is."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.cttz.i64", I64, [*arguments, ir.Constant(I1, 1)])

    return types.int64(types.int64), codegen


@intrinsic
def _compresses(typingctx: Any, values: Any) -> Any:
    """Whether the processor has instructions for `_compress` of these entries: a constant to the compiler."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, features = context.codegen().magic_tuple()
        wanted = "+avx512f" if values.dtype == types.float32 else "+avx512vbmi2"
        return ir.Constant(I1, int(wanted in features.split(",")))

    return types.boolean(values), codegen


@intrinsic
def _compress(typingctx: Any, values: Any, at: Any, mask: Any, first: Any, index: Any, value: Any) -> Any:
    """Write the entries of a line that `mask` names, and their numbers from `first` on, at `value` and `index`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, at, mask, first, index, value = arguments
        found = _read(builder, values, at)
        lanes, small = found.type.count, found.type.element == I8
        chosen = builder.bitcast(builder.trunc(mask, ir.IntType(lanes)), vector(I1, lanes))
        number = call(builder, "llvm.ctpop.i64", I64, [mask])
        count = splat(builder, builder.trunc(number, I32))

        def together(entries: Any) -> Any:
            kind = entries.type
            name = f"llvm.experimental.vector.compress.{name_of(kind)}"
            return call(builder, name, kind, [entries, chosen, ir.Constant(kind, ir.Undefined)])

        # Places within a line fit a byte.
        places, entries = together(constant(I8 if small else I32, range(lanes))), together(found)
        done = builder.append_basic_block("done")
        for start in range(0, lanes, LANES):
            part = constant(I32, range(start, start + LANES))
            place, entry = (builder.shuffle_vector(v, v, part) for v in (places, entries))
            if small:
                place, entry = builder.zext(place, vector(I32)), builder.sitofp(entry, vector(F32))
            place = builder.add(place, splat(builder, first))
            # What lies behind may be another thread's.
            inside = builder.icmp_unsigned("<", part, count)
            store(builder, place, offset(builder, index, 4 * start), inside)
            store(builder, entry, offset(builder, value, 4 * start), inside)
            following = builder.append_basic_block("following") if start + LANES < lanes else done
            more = builder.icmp_unsigned(">", number, ir.Constant(I64, start + LANES))
            builder.cbranch(more, following, done)
            builder.position_at_end(following)
        return context.get_dummy_value()

    return types.void(values, *[types.int64] * 2, types.int32, *[types.int64] * 2), codegen


@serial
def _last_mask(values: Any, at: Any, number: Any) -> Any:
    """The mask of the first `number` entries of a line that reaches behind the array."""
    mask = 0
    for j in range(number):
        mask |= np.int64(values[at + j] != 0) << j
    return mask


@inlined
def _tail_mask(values: Any, at: Any, number: Any, width: Any) -> Any:
    """The mask of the first `number` entries of the line at `at`, fewer than its `width`."""
    if at + width <= values.size:
        return _mask(values, address(values, at)) & ((1 << number) - 1)
    return _last_mask(values, at, number)


@serial
def _visit(values: Any, at: Any, mask: Any, first: Any, index: Any, value: Any, used: Any) -> Any:
    """`_append`, one entry after the other."""
    while mask != 0:
        j = _lowest(mask)
        index[used] = first + j
        value[used] = np.float32(values[at + j])
        used += 1
        mask &= mask - 1
    return used


@inlined
def _append(values: Any, at: Any, mask: Any, first: Any, index: Any, value: Any, used: Any) -> Any:
    """List the entries of the line at `at` that `mask` names, numbered from `first` on; returns the new end."""
    if not _compresses(values):
        return _visit(values, at, mask, first, index, value, used)
    line, places, entries = address(values, at), address(index, used), address(value, used)
    _compress(values, line, mask, np.int32(first), places, entries)
    return used + _ones(mask)


# Whole planes, cut into parts of their rows.


@jit
def _count(values: Any, first: Any, rows: Any, columns: Any, stride: Any, counts: Any) -> None:
    planes, parts = counts.shape
    width = _LINE if values.itemsize == 1 else LANES
    for task in prange(planes * parts):
        m, part = task // parts, task % parts
        low, high = part * rows // parts, (part + 1) * rows // parts
        # Rows without gaps are one row.
        number, length = (1, (high - low) * columns) if columns == stride else (high - low, columns)
        found = 0
        for r in range(number):
            at, j = first[m] + (low + r) * stride, 0
            while j + width <= length:
                found += _ones(_mask(values, address(values, at + j)))
                j += width
            if j < length:
                found += _ones(_tail_mask(values, at + j, length - j, width))
        counts[m, part] = found


@jit
def _list(
    values: Any, first: Any, columns: Any, stride: Any, ends: Any, start: Any, index: Any, value: Any
) -> None:
    planes, rows = start.shape[0], start.shape[1] - 1
    parts = ends.size // planes
    width = _LINE if values.itemsize == 1 else LANES
    for task in prange(ends.size):
        m, part = task // parts, task % parts
        used = ends[task - 1] if task else 0
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            start[m, r] = used
            at, j = first[m] + r * stride, 0
            while j + width <= columns:
                used = _append(values, at + j, _mask(values, address(values, at + j)), j, index, value, used)
                j += width
            if j < columns:
                mask = _tail_mask(values, at + j, columns - j, width)
                if at + j + width <= values.size:
                    used = _append(values, at + j, mask, j, index, value, used)
                else:
                    used = _visit(values, at + j, mask, j, index, value, used)
        if part == parts - 1:
            start[m, rows] = used


@serial
def _search(index: Any, low: Any, high: Any, column: Any) -> Any:
    """The first entry of a row ``low … high`` that lies in `column` or behind it."""
    while low < high:
        middle = (low + high) // 2
        if index[middle] < column:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _transpose(
    start: Any, index: Any, value: Any, counts: Any, t_start: Any, t_index: Any, t_value: Any
) -> None:
    """By columns; `index` is unsigned, `counts` room for (planes, parts, columns)."""
    planes, parts, columns = counts.shape
    rows = start.shape[1] - 1
    for task in prange(planes * parts):
        m, part = task // parts, task % parts
        for c in range(columns):
            counts[m, part, c] = 0
        for k in range(start[m, part * rows // parts], start[m, (part + 1) * rows // parts]):
            counts[m, part, index[k]] += 1
    for m in prange(planes):
        used = start[m, 0]
        for c in range(columns):
            t_start[m, c] = used
            for part in range(parts):
                used += counts[m, part, c]
        t_start[m, columns] = used
    # Counted by parts of the rows, written by parts of the columns: few of their ends are in use at a time.
    for task in prange(planes * parts):
        m, part = task // parts, task % parts
        low, high = part * columns // parts, (part + 1) * columns // parts
        # Unsigned: numba looks whether any other number counts from the end.
        ends, near = np.empty(columns, np.uint64), np.empty(rows, np.uint64)
        for c in range(low, high):
            ends[c] = t_start[m, c]
        for r in range(rows):
            near[r] = _search(index, start[m, r], start[m, r + 1], low)
        for first in range(low, high, _COLUMNS):
            behind = min(high, first + _COLUMNS)
            for r in range(rows):
                k, end = near[r], np.uint64(start[m, r + 1])
                while k < end and index[k] < behind:
                    at = ends[index[k]]
                    t_index[at] = r
                    t_value[at] = value[k]
                    ends[index[k]] = at + np.uint64(1)
                    k += np.uint64(1)
                near[r] = k


@dataclass(frozen=True)
class Lists:
    """Non-zeros of planes (rows, columns), plane by plane and row by row, without gaps.

    Attributes:
        start: int64, (planes, rows + 1): row r of plane m holds the entries ``start[m, r] … start[m, r + 1]``.
        index: int32, the columns of the entries, ascending within a row. `LANES` numbers more may be read.
        value: float32, the entries.
        columns: of a plane.
    """

    start: Any
    index: Any
    value: Any
    columns: int

    @property
    def size(self) -> int:
        """Number of non-zeros."""
        return int(self.start[-1, -1])

    def transposed(self) -> "Lists":
        """The same column by column."""
        planes, rows = self.start.shape[0], self.start.shape[1] - 1
        counts = np.empty((planes, _parts(planes, rows, 4 * self.size), self.columns), np.int32)
        start = lent((planes, self.columns + 1), np.int64)
        index, value = lent(self.index.shape, np.int32), lent(self.value.shape, np.float32)
        _transpose(self.start, self.index.view(np.uint32), self.value, counts, start, index, value)
        return Lists(start, index, value, rows)


def lists(values: Tensor) -> Lists:
    """Index lists of a matrix (n, o), int8 levels or a float32 gradient; the one plane of the result."""
    rows, columns = values.shape
    return plane_lists(flat(values), np.zeros(1, np.int64), (rows, columns), columns)


def plane_lists(values: Any, first: Any, shape: tuple[int, int], stride: int) -> Lists:
    """Index lists of planes.

    Args:
        values: a flat array, int8 or float32.
        first: int64, where each plane begins in it.
        shape: (rows, columns) of every plane.
        stride: entries from a row to the next.
    """
    (rows, columns), planes = shape, first.size
    counts = np.empty((planes, _parts(planes, rows, values.size)), np.int64)
    _count(values, first, rows, columns, stride, counts)
    ends = np.cumsum(counts)
    start = lent((planes, rows + 1), np.int64)
    index, value = lent((int(ends[-1]) + LANES,), np.int32), lent((int(ends[-1]),), np.float32)
    _list(values, first, columns, stride, ends, start, index, value)
    return Lists(start, index, value, columns)


def _parts(planes: int, rows: int, size: int) -> int:
    """Into how many parts a plane is cut, so that no thread waits for long."""
    threads = use_threads(size)
    return 1 if planes >= 2 * threads else max(1, min(threads, rows))
