"""Backward products of a 2-D convolution on a CPU that visit the non-zeros of δ̃ alone.

Both products are sums of rows, and nothing else: one non-zero of δ̃ adds a contiguous row of the dense operand, times
itself, to a tile of the result that stays in registers.

- ``dx``: an input pixel visits the non-zeros of all output pixels it took part in; each of them names a row of the
  weight, ``W[kh, kw, o, :]``. Output pixels side by side are one run of the list of non-zeros: a key that counts its
  own column backwards leaves the same to be added for all of them.
- ``dW``: an output channel lists its non-zeros, several images at a time; each names a row of the padded input,
  ``x[y + kh, x : x + kw, :]``, for every ``kh``. Images are cut into a number of chunks that depends on shapes alone,
  and their sums are added in order.

So the bits of both are the same on any number of threads. NaN and Inf propagate from and to the non-zeros of δ̃; a
zero of δ̃ is skipped whatever it would have met.

Index letters: ``n`` images, ``g`` groups, ``o`` outputs and ``c`` inputs of a group, ``kh kw`` kernel, ``p`` pixels of
the output. A *plane* is one group of one image.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import get_num_threads, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from retrograde.kernels.cpu import in_memory_order, jit, use_threads
from retrograde.kernels.geometry import Geometry

_LANES = 16
_SLACK = 2 * _LANES
"""Entries kept free behind the list of a plane: lists are written and copied sixteen entries at a time."""
_CACHE = 512 * 1024
"""Bytes of padded input that one pass over an output channel's non-zeros may touch: a part of a second-level cache."""
_TILE = 8
"""Vectors of inputs for which dx is computed at a time."""
_PIXELS = 256
"""Pixels, or a few more, of the input for which one task computes dx."""
_CHUNKS, _PARTIAL = 8, 8 * 1024 * 1024
"""At most so many partial sums of dW, and at most so many bytes of them."""

_serial: Any = njit(cache=True, nogil=True)
_intrinsic: Any = intrinsic


# Sixteen lanes at a time. Addresses are integers, keys int32, values float32.

_I1, _I8, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _vector(element: Any, lanes: int = _LANES) -> Any:
    return ir.VectorType(element, lanes)


def _splat(builder: Any, number: Any) -> Any:
    none = ir.Constant(_vector(number.type), ir.Undefined)
    one = builder.insert_element(none, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, none, ir.Constant(_vector(_I32), [0] * _LANES))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def _call(builder: Any, name: str, kind: Any, arguments: list[Any]) -> Any:
    function = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _offset(builder: Any, address: Any, number: int) -> Any:
    return builder.add(address, ir.Constant(_I64, number))


def _times_4(builder: Any, number: Any) -> Any:
    return builder.shl(number, ir.Constant(_I64, 2))


@_intrinsic
def _move(typingctx: Any, target: Any, source: Any, times: Any, more: Any) -> Any:
    """Copy sixteen 4-byte integers, each `times` some and `more`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, times, more = arguments
        found = builder.mul(_load(builder, source, _vector(_I32)), _splat(builder, times))
        _store(builder, builder.add(found, _splat(builder, more)), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32, types.int32), codegen


@_intrinsic
def _turn(typingctx: Any, target: Any, places: Any, source: Any, stride: Any, scale: Any) -> Any:
    """Transpose sixteen rows of sixteen numbers, times `scale`.

    Row i is read `stride` bytes behind row i - 1; what was column i is written at the place ``places[i]``, an int32
    counted in floats.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, places, source, stride, scale = arguments
        factor = _splat(builder, scale)
        rows: list[Any] = []
        for _ in range(_LANES):
            rows.append(builder.fmul(_load(builder, source, _vector(_F32)), factor))
            source = builder.add(source, stride)
        width = 1
        while width < _LANES:
            # Swap the off-diagonal blocks of every 2 x 2 blocks of this width.
            low = [j if not j & width else j - width + _LANES for j in range(_LANES)]
            high = [j + width if not j & width else j + _LANES for j in range(_LANES)]
            for i in range(_LANES):
                if not i & width:
                    a, b = rows[i], rows[i + width]
                    rows[i] = builder.shuffle_vector(a, b, ir.Constant(_vector(_I32), low))
                    rows[i + width] = builder.shuffle_vector(a, b, ir.Constant(_vector(_I32), high))
            width *= 2
        for i, row in enumerate(rows):
            place = builder.sext(_load(builder, _offset(builder, places, 4 * i), _I32), _I64)
            _store(builder, row, builder.add(target, _times_4(builder, place)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32), codegen


def _reader(element: Any, lanes: int) -> Any:
    """Load `lanes` entries as float32 (or as they are), with a mask of those that are not zero."""

    def read(builder: Any, address: Any) -> Any:
        found = _load(builder, address, _vector(element, lanes))
        if element is _F32:
            # Unordered: NaN is no zero.
            return found, builder.fcmp_unordered("!=", found, ir.Constant(found.type, [0.0] * lanes))
        return found, builder.icmp_signed("!=", found, ir.Constant(found.type, [0] * lanes))

    return read


def _ones(builder: Any, mask: Any, lanes: int) -> Any:
    """Number of lanes set."""
    bits: Any = ir.IntType(lanes)
    number = _call(builder, f"llvm.ctpop.i{lanes}", bits, [builder.bitcast(mask, bits)])
    return number if lanes == 64 else builder.zext(number, _I64)


def _element(kind: Any) -> Any:
    return _F32 if kind.dtype == types.float32 else _I8


@_intrinsic
def _count_64(typingctx: Any, values: Any, address: Any) -> Any:
    """Number of non-zeros among the 64 entries at `address` in the array `values`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, mask = _reader(_element(values), 64)(builder, arguments[1])
        return _ones(builder, mask, 64)

    return types.int64(values, types.int64), codegen


@_intrinsic
def _compress(typingctx: Any, values: Any, address: Any, first: Any, keys: Any, numbers: Any) -> Any:
    """Append the non-zeros of sixteen entries, numbered from `first`, to `keys` and `numbers`; returns how many."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, first, keys, numbers = arguments
        found, mask = _reader(_element(values), _LANES)(builder, address)
        if _element(values) is _I8:
            found = builder.sitofp(found, _vector(_F32))
        places = builder.add(_splat(builder, first), ir.Constant(_vector(_I32), list(range(_LANES))))
        for vector, name, target in ((places, "v16i32", keys), (found, "v16f32", numbers)):
            none = ir.Constant(vector.type, ir.Undefined)
            packed = _call(
                builder, f"llvm.experimental.vector.compress.{name}", vector.type, [vector, mask, none]
            )
            _store(builder, packed, target)
        return _ones(builder, mask, _LANES)

    return types.int64(values, types.int64, types.int32, types.int64, types.int64), codegen


def _accumulator(vectors: int) -> Any:
    """``out[: 16 · vectors] += Σ_k numbers[k] · dense[keys[k] + shift :]`` over the entries k of several runs.

    `runs` holds (first k, last k + 1, shift) of each; sums stay in registers until the last run is done.
    """

    # A sum waits four cycles for the one before it: eight of them keep two multipliers busy.
    unroll = max(1, 8 // vectors)

    def build(builder: Any, out: Any, dense: Any, keys: Any, numbers: Any, runs: Any, count: Any) -> None:
        vector, nothing, wide = _vector(_F32), ir.Constant(_I64, 0), 4 * _LANES
        places = [_offset(builder, out, wide * v) for v in range(vectors)]
        zero = ir.Constant(vector, [0.0] * _LANES)
        before = builder.block
        start = [_load(builder, place, vector) for place in places] + [zero] * (vectors * (unroll - 1))
        run, entry = builder.append_basic_block("run"), builder.append_basic_block("entry")
        after, done = builder.append_basic_block("after"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", count, nothing), run, done)

        builder.position_at_end(run)
        r = builder.phi(_I64)
        sums = [builder.phi(vector) for _ in start]
        at = builder.add(runs, builder.mul(r, ir.Constant(_I64, 24)))
        first, last, shift = (_load(builder, _offset(builder, at, 8 * i), _I64) for i in range(3))
        base = builder.add(dense, _times_4(builder, shift))
        final = _offset(builder, last, -1)
        builder.cbranch(builder.icmp_signed("<", first, last), entry, after)

        builder.position_at_end(entry)
        k = builder.phi(_I64)
        inner = [builder.phi(vector) for _ in start]
        later: list[Any] = []
        for u in range(unroll):
            at, inside = k, None
            if u:
                # Behind the end the last entry stands in, times zero: which row is read matters where it is not finite.
                ahead = _offset(builder, k, u)
                inside = builder.icmp_signed("<", ahead, last)
                at = builder.select(inside, ahead, final)
            key = builder.sext(_load(builder, builder.add(keys, _times_4(builder, at)), _I32), _I64)
            number = _load(builder, builder.add(numbers, _times_4(builder, at)), _F32)
            if inside is not None:
                number = builder.select(inside, number, ir.Constant(_F32, 0.0))
            factor = _splat(builder, number)
            row = builder.add(base, _times_4(builder, key))
            for v in range(vectors):
                found = _load(builder, _offset(builder, row, wide * v), vector)
                total = inner[u * vectors + v]
                later.append(_call(builder, "llvm.fmuladd.v16f32", vector, [found, factor, total]))
        following = _offset(builder, k, unroll)
        builder.cbranch(builder.icmp_signed("<", following, last), entry, after)

        builder.position_at_end(after)
        totals = [builder.phi(vector) for _ in start]
        next_run = _offset(builder, r, 1)
        builder.cbranch(builder.icmp_signed("<", next_run, count), run, done)

        builder.position_at_end(done)
        results = [builder.phi(vector) for _ in start]
        for v, place in enumerate(places):
            total = results[v]
            for u in range(1, unroll):
                total = builder.fadd(total, results[u * vectors + v])
            _store(builder, total, place)

        r.add_incoming(nothing, before)
        r.add_incoming(next_run, after)
        k.add_incoming(first, run)
        k.add_incoming(following, entry)
        for v in range(len(start)):
            sums[v].add_incoming(start[v], before)
            sums[v].add_incoming(totals[v], after)
            inner[v].add_incoming(sums[v], run)
            inner[v].add_incoming(later[v], entry)
            totals[v].add_incoming(sums[v], run)
            totals[v].add_incoming(later[v], entry)
            results[v].add_incoming(start[v], before)
            results[v].add_incoming(totals[v], after)

    @_intrinsic
    def accumulate(
        typingctx: Any, out: Any, dense: Any, keys: Any, numbers: Any, runs: Any, count: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            build(builder, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return accumulate


_accumulate_1, _accumulate_2, _accumulate_4 = _accumulator(1), _accumulator(2), _accumulator(4)
_accumulate_8, _accumulate_12 = _accumulator(8), _accumulator(12)


@_serial
def _accumulate(out: Any, dense: Any, keys: Any, numbers: Any, runs: Any, count: Any, vectors: Any) -> None:
    """Any number of vectors."""
    while vectors > 0:
        if vectors >= 12:
            done = 12
            _accumulate_12(out, dense, keys, numbers, runs, count)
        elif vectors >= 8:
            done = 8
            _accumulate_8(out, dense, keys, numbers, runs, count)
        elif vectors >= 4:
            done = 4
            _accumulate_4(out, dense, keys, numbers, runs, count)
        elif vectors >= 2:
            done = 2
            _accumulate_2(out, dense, keys, numbers, runs, count)
        else:
            done = 1
            _accumulate_1(out, dense, keys, numbers, runs, count)
        vectors -= done
        out += 4 * _LANES * done
        dense += 4 * _LANES * done


# Lists of non-zeros.


@jit
def _count(values: Any, rows: Any, columns: Any, stride: Any, first: Any, count: Any) -> None:
    for m in prange(count.size):
        total = 0
        for r in range(rows):
            at = first[m] + r * stride
            whole = columns // 64 * 64
            for j in range(0, whole, 64):
                total += _count_64(values, values.ctypes.data + (at + j) * values.itemsize)
            for j in range(at + whole, at + columns):
                total += values[j] != 0
        count[m] = total


@jit
def _compact(
    values: Any, columns: Any, stride: Any, first: Any, base: Any, start: Any, keys: Any, numbers: Any
) -> None:
    planes, rows = start.shape[0], start.shape[1] - 1
    for m in prange(planes):
        used = base[m]
        start[m, 0] = used
        for r in range(rows):
            at = first[m] + r * stride
            whole = columns // _LANES * _LANES
            for j in range(0, whole, _LANES):
                used += _compress(
                    values,
                    values.ctypes.data + (at + j) * values.itemsize,
                    np.int32(j),
                    keys.ctypes.data + 4 * used,
                    numbers.ctypes.data + 4 * used,
                )
            for j in range(whole, columns):
                # Written always, kept where it is no zero: a branch would be mispredicted.
                v = values[at + j]
                keys[used] = j
                numbers[used] = np.float32(v)
                used += v != 0
            start[m, r + 1] = used


@jit
def _transpose(start: Any, keys: Any, numbers: Any, t_start: Any, t_keys: Any, t_numbers: Any) -> None:
    planes, rows = start.shape[0], start.shape[1] - 1
    columns = t_start.shape[1] - 1
    for m in prange(planes):
        place = np.zeros(columns + 1, np.int64)
        for k in range(start[m, 0], start[m, rows]):
            place[keys[k] + 1] += 1
        total = start[m, 0]
        for c in range(columns + 1):
            total += place[c]
            place[c] = total
            t_start[m, c] = total
        for r in range(rows):
            for k in range(start[m, r], start[m, r + 1]):
                c = keys[k]
                at = place[c]
                t_keys[at] = r
                t_numbers[at] = numbers[k]
                place[c] = at + 1


@dataclass(frozen=True)
class Lists:
    """Non-zeros of every plane, row by row.

    Row r of plane m holds the entries ``start[m, r] … start[m, r + 1]`` of ``keys`` (columns, ascending) and
    ``numbers`` (float32).
    """

    start: Any
    keys: Any
    numbers: Any

    def transposed(self, columns: int) -> "Lists":
        """The same column by column."""
        start = np.empty((self.start.shape[0], columns + 1), np.int64)
        keys, numbers = np.empty_like(self.keys), np.empty_like(self.numbers)
        _transpose(self.start, self.keys, self.numbers, start, keys, numbers)
        return Lists(start, keys, numbers)


@dataclass(frozen=True)
class Sparse:
    """Non-zeros of δ̃ of shape (N, C_out, H', W'), for both products.

    Attributes:
        lists: the non-zeros, in the order of memory.
        shape: of δ̃.
        step: what every number is to be multiplied with.
        groups: of the convolution.
        channels_last: whether the rows of `lists` are pixels (and its columns channels of the group), not channels.
    """

    lists: Lists
    shape: tuple[int, int, int, int]
    step: float
    groups: int
    channels_last: bool

    def by_pixel(self) -> Lists:
        """For every output pixel, channels of the group."""
        return self.lists if self.channels_last else self.lists.transposed(self.shape[2] * self.shape[3])

    def by_channel(self) -> Lists:
        """For every channel of the group, output pixels."""
        return self.lists.transposed(self.shape[1] // self.groups) if self.channels_last else self.lists


def supports(values: Tensor, weight: Tensor, x_shape: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether these kernels can serve; otherwise take `retrograde.kernels.reference`.

    Args:
        values: int8 levels or float32 δ, (N, C_out, H', W').
        weight: float32, (C_out, C_in/groups, kh, kw); the layer's input has its dtype.
        x_shape: (N, C_in, H, W).
        geometry: of an ordinary 2-D convolution.
    """
    if geometry.transposed or len(geometry.stride) != 2 or values.dim() != 4 or len(x_shape) != 4:
        return False
    if values.dtype not in (torch.int8, torch.float32) or weight.dtype != torch.float32:
        return False
    if values.device.type != "cpu" or weight.device.type != "cpu" or min(values.numel(), weight.numel()) == 0:
        return False
    # Keys are 32-bit numbers, counted in floats.
    h, w = (x_shape[2] + 2 * geometry.padding[0], x_shape[3] + 2 * geometry.padding[1])
    return max(x_shape[1] * h * w + _CACHE, 32 * weight.numel(), values.shape[1:].numel()) < 2**31


def compact(values: Tensor, step: float | None, groups: int = 1) -> Sparse:
    """List the non-zeros of δ̃ once, for both products.

    Args:
        values: int8 levels or float32 δ, (N, C_out, H', W'), contiguous or channels-last; others are copied.
        step: of the levels; None for a dense gradient.
        groups: of the convolution.
    """
    use_threads(values.numel())
    channels_last, flat = in_memory_order(values)
    n, o, h, w = values.shape
    planes, outputs, pixels = n * groups, o // groups, h * w
    rows, columns, stride = (pixels, outputs, o) if channels_last else (outputs, pixels, pixels)
    within = outputs if channels_last else outputs * pixels
    first = (np.arange(n)[:, None] * (o * pixels) + np.arange(groups) * within).reshape(-1)
    count = np.empty(planes, np.int64)
    if columns == stride:
        _count(flat, 1, rows * columns, 0, first, count)
    else:
        _count(flat, rows, columns, stride, first, count)
    ends = np.cumsum(count + _SLACK)
    base = ends - count - _SLACK
    start = np.empty((planes, rows + 1), np.int64)
    keys, numbers = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    _compact(flat, columns, stride, first, base, start, keys, numbers)
    scale = 1.0 if step is None else step
    return Sparse(Lists(start, keys, numbers), (n, o, h, w), scale, groups, channels_last)


# dx


@_serial
def _unpack(part: Any, c: Any, dx: Any, at: Any, stride: Any, scale: Any) -> None:
    """Sums (pixel, c rounded up), times `scale`, to (c, pixel), rows `stride` apart."""
    pixels, width = part.shape
    if pixels < _LANES or c < _LANES:
        for i in range(c):
            for p in range(pixels):
                dx[at + i * stride + p] = part[p, i] * scale
        return
    places = np.empty(_LANES, np.int32)
    for i in range(_LANES):
        places[i] = i * stride
    for i0 in range(0, c, _LANES):
        # The last block begins earlier, so that it is a whole one.
        i = min(i0, c - _LANES)
        for p0 in range(0, pixels, _LANES):
            p = min(p0, pixels - _LANES)
            _turn(
                np.int64(dx.ctypes.data) + 4 * (at + i * stride + p),
                np.int64(places.ctypes.data),
                np.int64(part.ctypes.data) + 4 * (p * width + i),
                4 * width,
                scale,
            )


@jit
def _pack_weight(weight: Any, packed: Any) -> None:
    """(C_out, c, kh · kw) → (g, tile of c, kh · kw · o, place in the tile), zeros behind the last c."""
    outputs, c, kernel = weight.shape
    groups, tiles, _, width = packed.shape
    each = outputs // groups
    for o in prange(outputs):
        for tile in range(tiles):
            for k in range(kernel):
                row = packed[o // each, tile, k * each + o % each]
                for i in range(width):
                    row[i] = weight[o, tile * width + i, k] if tile * width + i < c else 0


@_serial
def _runs(size: Any, out_size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """For each input column, runs of output columns lo … hi that it took part in, and kw + stride · column of each."""
    number = 1 if dilation == 1 else kernel
    lo, hi, shift = (
        np.empty((size, number), np.int64),
        np.empty((size, number), np.int64),
        np.empty((size, number), np.int64),
    )
    for x in range(size):
        t = x + padding
        if dilation == 1:
            lo[x, 0] = min(out_size, max(0, (t - kernel + stride) // stride))
            hi[x, 0] = max(lo[x, 0], min(out_size, t // stride + 1))
            shift[x, 0] = t
        else:
            for k in range(kernel):
                at = (t - k * dilation) // stride
                hit = at * stride == t - k * dilation and 0 <= at < out_size
                lo[x, k], hi[x, k] = (at, at + 1) if hit else (0, 0)
                shift[x, k] = k + at * stride
    return lo, hi, shift


@jit
def _input_grad(
    start: Any,
    keys: Any,
    numbers: Any,
    packed: Any,
    dx: Any,
    last: Any,
    sizes: Any,
    geometry: Any,
    block: Any,
    scale: Any,
) -> None:
    groups, tiles, rows, width = packed.shape
    c, h, w, out_h, out_w, kh, kw = sizes
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w = geometry
    outputs = rows // (kh * kw)
    blocks = (h + block - 1) // block
    along_w, along_h = outputs * width, kw * outputs * width
    for task in prange(start.shape[0] * blocks):
        m, top = task // blocks, task % blocks * block
        bottom = min(h, top + block)
        lo, hi, shift = _runs(w, out_w, kw, stride_w, pad_w, dil_w)
        columns = lo.shape[1]
        first = max(0, (top + pad_h - (kh - 1) * dil_h) // stride_h)
        final = max(first, min(out_h, (bottom - 1 + pad_h) // stride_h + 1))
        begin = start[m, first * out_w]
        # A key is the place of W[0, −stride · column, o, :]: what is added later depends on the input pixel alone.
        near = np.empty(start[m, final * out_w] - begin + _SLACK, np.int32)
        # Addresses are taken where they are used: an array is freed after its last mention.
        for y in range(first, final):
            for x in range(out_w):
                at, end = start[m, y * out_w + x], start[m, y * out_w + x + 1]
                while True:
                    # At least once: a test would be mispredicted.
                    _move(
                        np.int64(near.ctypes.data) + 4 * (at - begin),
                        np.int64(keys.ctypes.data) + 4 * at,
                        np.int32(width),
                        np.int32(-x * stride_w * along_w),
                    )
                    at += _LANES
                    if at >= end:
                        break
        part = np.zeros(((bottom - top) * w, tiles * width), np.float32)
        runs = np.empty((columns, 3), np.int64)
        # One row of the kernel at a time, and a tile of inputs, so that their part of the weight stays close.
        for tile in range(tiles):
            for k in range(kh):
                dense = ((m % groups * tiles + tile) * kh + k) * along_h
                for y in range(top, bottom):
                    t = y + pad_h - k * dil_h
                    if t % stride_h != 0 or t < 0 or t // stride_h >= out_h:
                        continue
                    met = t // stride_h * out_w
                    for x in range(w):
                        for r in range(columns):
                            runs[r, 0] = start[m, met + lo[x, r]] - begin
                            runs[r, 1] = start[m, met + hi[x, r]] - begin
                            runs[r, 2] = shift[x, r] * along_w
                        _accumulate(
                            np.int64(part.ctypes.data) + 4 * (((y - top) * w + x) * tiles + tile) * width,
                            np.int64(packed.ctypes.data) + 4 * dense,
                            np.int64(near.ctypes.data),
                            np.int64(numbers.ctypes.data) + 4 * begin,
                            np.int64(runs.ctypes.data),
                            columns,
                            width // _LANES,
                        )
        if last:
            at = ((m // groups * h + top) * w * groups + m % groups) * c
            for p in range(part.shape[0]):
                for i in range(c):
                    dx[at + p * groups * c + i] = part[p, i] * scale
        else:
            _unpack(part, c, dx, (m * c * h + top) * w, h * w, scale)


def convolution_input_grad(
    sparse: Sparse, weight: Tensor, input_shape: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """Gradient of a convolution for its input: float32, (N, C_in, H, W), in the memory order of δ̃.

    Args:
        sparse: δ̃ of shape (N, C_out, H', W').
        weight: float32, (C_out, C_in/groups, kh, kw).
        input_shape: (N, C_in, H, W).
        geometry: of the convolution.
    """
    use_threads(math.prod(input_shape))
    n, c_in, h, w = input_shape
    outputs, c, kh, kw = weight.shape
    groups = geometry.groups
    vectors = -(-c // _LANES)
    tiles = -(-vectors // _TILE)
    packed = np.empty(
        (groups, tiles, kh * kw * (outputs // groups), -(-vectors // tiles) * _LANES), np.float32
    )
    _pack_weight(weight.detach().contiguous().numpy().reshape(outputs, c, kh * kw), packed)
    order = torch.channels_last if sparse.channels_last else torch.contiguous_format
    dx = torch.empty((n, c_in, h, w), memory_format=order)
    lists = sparse.by_pixel()
    # How an image is cut is no matter for the bits.
    block = min(h, -(-_PIXELS // w), -(-n * groups * h // (4 * get_num_threads())))
    _input_grad(
        lists.start,
        lists.keys,
        lists.numbers,
        packed,
        in_memory_order(dx)[1],
        sparse.channels_last,
        (c, h, w, *sparse.shape[2:], kh, kw),
        (*geometry.stride, *geometry.padding, *geometry.dilation),
        block,
        np.float32(sparse.step),
    )
    return dx


# dW


@_serial
def _pack_image(x: Any, at: Any, last: Any, all_c: Any, c: Any, places: Any, out: Any) -> None:
    """One plane of x to the inside of `out`, (padded h, padded w, c), where pixel p is at ``places[p]``."""
    pixels = places.size
    if last:
        for p in range(pixels):
            for i in range(c):
                out[places[p] + i] = x[at + p * all_c + i]
    elif pixels < _LANES or c < _LANES:
        for i in range(c):
            for p in range(pixels):
                out[places[p] + i] = x[at + i * pixels + p]
    else:
        for p0 in range(0, pixels, _LANES):
            # The last block begins earlier, so that it is a whole one.
            p = min(p0, pixels - _LANES)
            for i0 in range(0, c, _LANES):
                i = min(i0, c - _LANES)
                _turn(
                    np.int64(out.ctypes.data) + 4 * i,
                    np.int64(places.ctypes.data) + 4 * p,
                    np.int64(x.ctypes.data) + 4 * (at + i * pixels + p),
                    4 * pixels,
                    np.float32(1),
                )


@jit
def _weight_grad(
    start: Any,
    keys: Any,
    numbers: Any,
    x: Any,
    last: Any,
    sizes: Any,
    geometry: Any,
    split: Any,
    together: Any,
    partial: Any,
) -> None:
    """Sums of each chunk of images; `partial` is (chunk, C_out, segment, row of the segment rounded up)."""
    chunks, all_outputs, segments, width = partial.shape
    groups, c, h, w, out_h, out_w, kw = sizes
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w = geometry
    images, outputs = start.shape[0] // groups, all_outputs // groups
    wide = w + 2 * pad_w
    apart = kw if dil_w > 1 else 1
    inside = (h + 2 * pad_h) * wide * c
    for task in prange(chunks * groups * split):
        chunk, g, part = task // (groups * split), task // split % groups, task % split
        # A row read from the last pixel of the last image may reach behind it.
        buffer = np.zeros(together * inside + width, np.float32)
        places = np.empty(out_h * out_w, np.int32)
        for p in range(places.size):
            places[p] = (p // out_w * stride_h * wide + p % out_w * stride_w) * c
        pixels = np.empty(h * w, np.int32)
        for p in range(pixels.size):
            pixels[p] = ((p // w + pad_h) * wide + p % w + pad_w) * c
        here_keys = np.empty(together * out_h * out_w, np.int32)
        here_numbers = np.empty(together * out_h * out_w, np.float32)
        runs = np.zeros(3, np.int64)
        o_from, o_to = part * outputs // split, (part + 1) * outputs // split
        for o in range(g * outputs + o_from, g * outputs + o_to):
            partial[chunk, o] = 0
        n_to = (chunk + 1) * images // chunks
        for n_from in range(chunk * images // chunks, n_to, together):
            number = min(together, n_to - n_from)
            for b in range(number):
                n = n_from + b
                at = (n * h * w * groups + g) * c if last else (n * groups + g) * c * h * w
                _pack_image(x, at, last, groups * c, c, pixels, buffer[b * inside :])
            for o in range(o_from, o_to):
                used = 0
                for b in range(number):
                    m = (n_from + b) * groups + g
                    for k in range(start[m, o], start[m, o + 1]):
                        here_keys[used] = np.int32(places[keys[k]] + b * inside)
                        here_numbers[used] = numbers[k]
                        used += 1
                runs[1] = used
                for s in range(segments):
                    shift = (s // apart * dil_h * wide + s % apart * dil_w) * c
                    _accumulate(
                        partial.ctypes.data
                        + 4 * (((chunk * all_outputs + g * outputs + o) * segments + s) * width),
                        buffer.ctypes.data + 4 * shift,
                        here_keys.ctypes.data,
                        here_numbers.ctypes.data,
                        runs.ctypes.data,
                        1,
                        width // _LANES,
                    )


@jit
def _collect(partial: Any, scale: Any, c: Any, dw: Any) -> None:
    """Σ over chunks, in order: (chunk, C_out, segment, row) → (C_out, c, taps)."""
    chunks, outputs, segments, width = partial.shape
    in_row = dw.shape[2] // segments
    for o in prange(outputs):
        total = partial[0, o].copy()
        for chunk in range(1, chunks):
            for s in range(segments):
                for j in range(width):
                    total[s, j] += partial[chunk, o, s, j]
        for i in range(c):
            for s in range(segments):
                for k in range(in_row):
                    dw[o, i, s * in_row + k] = total[s, k * c + i] * scale


def convolution_weight_grad(
    sparse: Sparse, x: Tensor, weight_shape: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """Gradient of a convolution for its weight: float32, (C_out, C_in/groups, kh, kw).

    Args:
        sparse: δ̃ of shape (N, C_out, H', W').
        x: the layer's input, float32, (N, C_in, H, W), contiguous or channels-last; others are copied.
        weight_shape: (C_out, C_in/groups, kh, kw).
        geometry: of the convolution.
    """
    use_threads(x.numel())
    outputs, c, kh, kw = weight_shape
    n, _, h, w = x.shape
    groups = geometry.groups
    channels_last, flat = in_memory_order(x.detach())
    # A row of the kernel meets one stretch of the input; pixels apart from one another do not.
    segments, taps = (kh, kw) if geometry.dilation[1] == 1 else (kh * kw, 1)
    width = -(-taps * c // _LANES) * _LANES
    chunks = max(1, min(n, _CHUNKS, _PARTIAL // (outputs * segments * width * 4)))
    # How the outputs of a chunk are split is no matter for their bits.
    split = min(outputs // groups, -(-2 * get_num_threads() // (chunks * groups)))
    inside = (h + 2 * geometry.padding[0]) * (w + 2 * geometry.padding[1]) * c
    together = max(1, min(-(-n // chunks), _CACHE // (4 * inside)))
    lists = sparse.by_channel()
    partial = np.empty((chunks, outputs, segments, width), np.float32)
    _weight_grad(
        lists.start,
        lists.keys,
        lists.numbers,
        flat,
        channels_last,
        (groups, c, h, w, *sparse.shape[2:], kw),
        (*geometry.stride, *geometry.padding, *geometry.dilation),
        split,
        together,
        partial,
    )
    dw = torch.empty(tuple(weight_shape))
    _collect(partial, np.float32(sparse.step), c, dw.numpy().reshape(outputs, c, kh * kw))
    return dw
