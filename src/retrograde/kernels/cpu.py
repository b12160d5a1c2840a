"""CPU kernels in numba: one pass for statistics, one for dithering, and products that visit the non-zeros alone.

Index letters as in `retrograde.kernels.reference`: ``n`` rows, ``o`` outputs, ``i`` inputs. Every kernel gives the
same bits on any number of threads: work is cut into blocks of fixed size, and sums over blocks are taken in order.

A product reads one row of its dense operand for each non-zero. Eight vectors of sixteen numbers stay in registers
while the non-zeros of a row pass by, so what bounds it is the cache that holds the operand: stored as bfloat16 it takes
half the bytes, with sums in float32 all the same.
"""

import functools
import math
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, config
from numba.extending import intrinsic
from numba.np.ufunc import parallel as numba_parallel
from torch import Tensor

NAME = "cpu"

if sys.platform == "linux" and "NUMBA_THREADING_LAYER" not in os.environ:
    # The layer that runs in torch's own OpenMP threads: two pools on the same cores would wait for each other.
    config.THREADING_LAYER = "omp"  # pyright: ignore[reportAttributeAccessIssue]

_GRAIN = 32768
"""Entries below which one thread works alone, as in torch."""
_BLOCK = 4096
"""Entries in a block of an elementwise pass: its noise stays in the first-level cache."""
_LANES, _VECTORS = 16, 8
TILE = _LANES * _VECTORS
"""Columns of the dense operand that one pass over a row's non-zeros takes."""
_ROWS = 32
"""Rows in a task of a product."""
_COLUMNS = 64
"""Columns in a task of the transposition of index lists."""

# Sums may be contracted and reordered, which vectorises them; NaN and Inf keep their meaning.
_FAST = {"contract", "reassoc", "nsz"}
jit: Any = njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)


@functools.cache
def _launch() -> None:
    # Starting its threads, numba sets the process's number of OpenMP threads, which is torch's too.
    before = torch.get_num_threads()
    numba_parallel._launch_threads()  # pyright: ignore[reportPrivateUsage]
    torch.set_num_threads(before)


def use_threads(size: int) -> None:
    """Use as many threads as torch would for `size` entries: waking them costs more than a short loop."""
    _launch()
    most: int = config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    wanted = min(torch.get_num_threads(), most) if size >= _GRAIN else 1
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)


# Elementwise passes.


@jit
def _statistics(x: Any, bits: Any, sums: Any, squares: Any, peaks: Any, zeros: Any) -> None:
    for b in prange(sums.size):
        block = x[b * _BLOCK : min(x.size, (b + 1) * _BLOCK)]
        pattern = bits[b * _BLOCK : min(x.size, (b + 1) * _BLOCK)]
        # Sums in float64: squares of small gradients would vanish in float32.
        total, peak, none = 0.0, np.int32(0), np.int32(0)
        for j in range(block.size):
            total += block[j]
            # Magnitudes compare as their bit patterns do, which vectorises; those of NaN are the largest.
            magnitude = pattern[j] & np.int32(0x7FFFFFFF)
            peak = max(peak, magnitude)
            none += np.int32(magnitude == 0)
        mean = total / block.size
        square = 0.0
        for j in range(block.size):
            away = np.float64(block[j]) - mean
            square += away * away
        sums[b], squares[b], peaks[b], zeros[b] = total, square, peak, none


@dataclass(frozen=True)
class Statistics:
    """Of all entries of a gradient; `std` and `peak` are not finite where an entry is not."""

    std: float
    peak: float
    zeros: int


def statistics(delta: Tensor) -> Statistics:
    """Standard deviation (biased), largest magnitude and number of zeros of a float32 gradient, in one pass."""
    flat = _flat(delta)
    use_threads(flat.size)
    blocks = -(-flat.size // _BLOCK)
    sums, squares = np.empty(blocks), np.empty(blocks)
    peaks, zeros = np.empty(blocks, np.int32), np.empty(blocks, np.int64)
    _statistics(flat, flat.view(np.int32), sums, squares, peaks, zeros)
    sizes = np.full(blocks, float(_BLOCK))
    sizes[-1] = flat.size - (blocks - 1) * _BLOCK
    # Each block's deviations are from its own mean (Chan et al.): nothing cancels.
    with np.errstate(invalid="ignore", over="ignore"):
        mean = sums.sum() / flat.size
        spread = squares.sum() + (sizes * (sums / sizes - mean) ** 2).sum()
        std = float(np.sqrt(spread / flat.size))
    peak = float(peaks.max(keepdims=True).view(np.float32)[0])
    return Statistics(std, peak, int(zeros.sum()))


@jit
def _count_zeros(x: Any, zeros: Any) -> None:
    for b in prange(zeros.size):
        block = x[b * _BLOCK : min(x.size, (b + 1) * _BLOCK)]
        none = 0
        for j in range(block.size):
            none += block[j] == 0
        zeros[b] = none


def count_zeros(tensor: Tensor) -> int:
    """Number of zero entries."""
    _, flat = in_memory_order(tensor)
    use_threads(flat.size)
    zeros = np.empty(-(-flat.size // _BLOCK), np.int64)
    _count_zeros(flat, zeros)
    return int(zeros.sum())


@jit
def _nsd(x: Any, q: Any, step: Any, key0: Any, key1: Any, limit: Any, zeros: Any, largest: Any) -> None:
    half, eighth = np.uint64(32), np.uint32(8)
    for b in prange(zeros.size):
        block = x[b * _BLOCK : min(x.size, (b + 1) * _BLOCK)]
        levels = q[b * _BLOCK : min(x.size, (b + 1) * _BLOCK)]
        noise = np.empty(_BLOCK, np.float32)
        # Philox4x32-10, one counter for four entries: see retrograde.maths.philox.
        for i in range((block.size + 3) // 4):
            counter = np.uint64(b * (_BLOCK // 4) + i)
            c0, c1, c2, c3 = np.uint32(counter), np.uint32(counter >> half), np.uint32(0), np.uint32(0)
            k0, k1 = np.uint32(key0), np.uint32(key1)
            for _ in range(10):
                # Products of 32-bit words: one instruction, where 64-bit ones take three.
                p0, p1 = np.uint64(c0) * np.uint64(0xD2511F53), np.uint64(c2) * np.uint64(0xCD9E8D57)
                c0, c2 = np.uint32(p1 >> half) ^ c1 ^ k0, np.uint32(p0 >> half) ^ c3 ^ k1
                c1, c3 = np.uint32(p1), np.uint32(p0)
                k0, k1 = np.uint32(k0 + np.uint32(0x9E3779B9)), np.uint32(k1 + np.uint32(0xBB67AE85))
            noise[4 * i] = np.float32(np.int32(c0 >> eighth))
            noise[4 * i + 1] = np.float32(np.int32(c1 >> eighth))
            noise[4 * i + 2] = np.float32(np.int32(c2 >> eighth))
            noise[4 * i + 3] = np.float32(np.int32(c3 >> eighth))
        for j in range(block.size):
            ratio = block[j] / step
            whole = np.floor(ratio)
            if noise[j] * np.float32(2.0**-24) < ratio - whole:
                whole += np.float32(1)
            levels[j] = np.int8(min(max(np.int32(whole), -limit), limit))
        none, most = np.int32(0), np.int32(0)
        for j in range(block.size):
            level = np.int32(levels[j])
            none += np.int32(level == 0)
            most = max(most, abs(level))
        zeros[b], largest[b] = none, most


@dataclass(frozen=True)
class Levels:
    """Integer levels of a gradient, their number of zeros and their largest magnitude."""

    values: Tensor
    zeros: int
    largest: int


def nsd(delta: Tensor, step: float, key: int, bits: int) -> Levels:
    """Integer levels of the dithered float32 gradient; the noise is `retrograde.maths.philox.uniform`'s."""
    use_threads(delta.numel())
    values = torch.empty(delta.shape, dtype=torch.int8)
    blocks = -(-delta.numel() // _BLOCK)
    zeros, largest = np.empty(blocks, np.int64), np.empty(blocks, np.int32)
    limit = np.int32(2 ** (bits - 1) - 1)
    _nsd(
        _flat(delta),
        values.numpy().reshape(-1),
        np.float32(step),
        np.int64(key & 0xFFFFFFFF),
        np.int64(key >> 32),
        limit,
        zeros,
        largest,
    )
    return Levels(values, int(zeros.sum()), int(largest.max(initial=0)))


# Index lists.


@jit
def _count(values: Any, rows: Any, columns: Any) -> None:
    n, o = values.shape
    blocks = (o + _COLUMNS - 1) // _COLUMNS
    for r in prange(n):
        row, used = values[r], np.int32(0)
        for j in range(o):
            used += np.int32(row[j] != 0)
        rows[r] = used
    for b in prange(blocks):
        used = columns[b * _COLUMNS : min(o, (b + 1) * _COLUMNS)]
        used[:] = 0
        for r in range(n):
            row = values[r, b * _COLUMNS : min(o, (b + 1) * _COLUMNS)]
            for j in range(row.size):
                used[j] += np.int32(row[j] != 0)


@jit
def _fill(values: Any, words: Any, start: Any, index: Any, value: Any) -> None:
    n, o = values.shape
    each = o // words.shape[1] if words.shape[1] else o
    for r in prange(n):
        row, word = values[r], words[r]
        # Written always, kept where it is no zero: a branch would often be mispredicted. Hence the room of its own.
        at, with_ = np.empty(o + 1, np.int32), np.empty(o + 1, np.float32)
        used = 0
        for w in range(word.size):
            # Eight zeros at a time.
            if word[w] != 0:
                for j in range(w * each, (w + 1) * each):
                    at[used] = j
                    with_[used] = np.float32(row[j])
                    used += row[j] != 0
        for j in range(word.size * each, o):
            at[used] = j
            with_[used] = np.float32(row[j])
            used += row[j] != 0
        index[start[r] : start[r] + used] = at[:used]
        value[start[r] : start[r] + used] = with_[:used]


@jit
def _transpose(start: Any, index: Any, value: Any, t_start: Any, t_index: Any, t_value: Any) -> None:
    n, o = start.size - 1, t_start.size - 1
    blocks = (o + _COLUMNS - 1) // _COLUMNS
    for b in prange(blocks):
        low, high = b * _COLUMNS, min(o, (b + 1) * _COLUMNS)
        free = t_start[low:high].copy()
        for r in range(n):
            # Indices ascend within a row.
            k, end = start[r], start[r + 1]
            if low:
                k += np.searchsorted(index[k:end], low)
            while k < end and index[k] < high:
                at = free[index[k] - low]
                t_index[at] = r
                t_value[at] = value[k]
                free[index[k] - low] = at + 1
                k += 1


@dataclass(frozen=True)
class Lists:
    """Non-zeros of a matrix (n, o): row r's are the entries from ``start[r]`` to ``start[r + 1]``."""

    start: Any
    index: Any
    value: Any
    columns: Any
    """Where each column's would start, in the order of the transposed matrix."""

    def transposed(self) -> "Lists":
        """The same column by column."""
        use_threads(self.index.size)
        index, value = np.empty_like(self.index), np.empty_like(self.value)
        _transpose(self.start, self.index, self.value, self.columns, index, value)
        return Lists(self.columns, index, value, self.start)


def lists(values: Tensor) -> Lists:
    """Index lists of a matrix (n, o), int8 levels or a float32 gradient."""
    matrix = values.contiguous().numpy()
    use_threads(matrix.size)
    n, o = matrix.shape
    start, columns = np.zeros(n + 1, np.int64), np.zeros(o + 1, np.int64)
    _count(matrix, start[1:], columns[1:])
    np.cumsum(start, out=start)
    np.cumsum(columns, out=columns)
    index, value = np.empty(start[-1], np.int32), np.empty(start[-1], np.float32)
    each = 8 // matrix.itemsize
    # Rows that are no whole number of words are read one by one.
    words = matrix.view(np.int64) if o and o % each == 0 else np.empty((n, 0), np.int64)
    _fill(matrix, words, start, index, value)
    return Lists(start, index, value, columns)


# Products.


def _accumulate_ir(builder: Any, arguments: Any, *, half: bool) -> None:
    """Σ_k value[k] · dense[index[k]] · scale over one tile of columns, the sums in registers."""
    out, dense, index, value, count, scale = arguments
    byte, i64, i32, f32 = ir.IntType(8), ir.IntType(64), ir.IntType(32), ir.FloatType()
    vector, integers = ir.VectorType(f32, _LANES), ir.VectorType(i32, _LANES)
    width = 2 if half else 4  # bytes of a number
    base = builder.inttoptr(dense, byte.as_pointer())
    indices = builder.inttoptr(index, i32.as_pointer())
    values = builder.inttoptr(value, f32.as_pointer())
    target = builder.inttoptr(out, byte.as_pointer())
    signature = ir.FunctionType(vector, [vector] * 3)
    fma = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{_LANES}f32")
    zero, nothing = ir.Constant(vector, [0.0] * _LANES), ir.Constant(i64, 0)

    def splat(number: Any) -> Any:
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(i32, 0))
        return builder.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(integers, [0] * _LANES)
        )

    before, loop = builder.block, builder.append_basic_block("nonzeros")
    done = builder.append_basic_block("store")
    builder.cbranch(builder.icmp_signed(">", count, nothing), loop, done)

    builder.position_at_end(loop)
    k, sums = builder.phi(i64), [builder.phi(vector) for _ in range(_VECTORS)]
    row = builder.sext(builder.load(builder.gep(indices, [k])), i64)
    start = builder.gep(base, [builder.mul(row, ir.Constant(i64, TILE * width))])
    factor = splat(builder.load(builder.gep(values, [k])))
    results: list[Any] = []
    dense_rows: list[Any] = []
    for place in range(_VECTORS // 2 if half else _VECTORS):
        at = builder.gep(start, [ir.Constant(i64, place * _LANES * 4)])
        kind = integers if half else vector
        found = builder.load(builder.bitcast(at, kind.as_pointer()), align=4)
        if half:
            # A bfloat16 is the upper half of a float32; two share a word, the sixteen later columns above.
            first = builder.shl(found, ir.Constant(integers, [16] * _LANES))
            second = builder.and_(found, ir.Constant(integers, [-65536] * _LANES))
            dense_rows += [builder.bitcast(first, vector), builder.bitcast(second, vector)]
        else:
            dense_rows.append(found)
    for total, found in zip(sums, dense_rows, strict=True):
        results.append(builder.call(fma, [found, factor, total]))
        total.add_incoming(zero, before)
        total.add_incoming(results[-1], loop)
    following = builder.add(k, ir.Constant(i64, 1))
    k.add_incoming(nothing, before)
    k.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)

    builder.position_at_end(done)
    totals = [builder.phi(vector) for _ in results]
    for total, result in zip(totals, results, strict=True):
        total.add_incoming(zero, before)
        total.add_incoming(result, loop)
    step = splat(scale)
    for place, total in enumerate(totals):
        at = builder.bitcast(builder.gep(target, [ir.Constant(i64, place * _LANES * 4)]), vector.as_pointer())
        builder.store(builder.fmul(total, step), at, align=4)


def _accumulator(*, half: bool) -> Any:
    @intrinsic
    def accumulate(
        typingctx: Any, out: Any, dense: Any, index: Any, value: Any, count: Any, scale: Any
    ) -> Any:
        """Addresses as integers."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _accumulate_ir(builder, arguments, half=half)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32), codegen

    return accumulate


def _product_kernel(accumulate: Any, width: int) -> Any:
    @jit
    def product(starts: Any, index: Any, value: Any, packed: Any, scale: Any, out: Any) -> None:
        rows, columns = out.shape
        tiles, length = packed.shape[:2]
        groups = (rows + _ROWS - 1) // _ROWS
        # Tiles outermost: a tile of the dense operand stays in cache while all rows pass.
        for task in prange(groups * tiles):
            tile, group = task // groups, task % groups
            start = tile * TILE
            dense = packed.ctypes.data + width * tile * length * TILE
            whole = start + TILE <= columns
            spare = np.empty(TILE, np.float32)
            for r in range(group * _ROWS, min(rows, (group + 1) * _ROWS)):
                accumulate(
                    out.ctypes.data + 4 * (r * columns + start) if whole else spare.ctypes.data,
                    dense,
                    index.ctypes.data + 4 * starts[r],
                    value.ctypes.data + 4 * starts[r],
                    starts[r + 1] - starts[r],
                    scale,
                )
                if not whole:
                    out[r, start:] = spare[: columns - start]

    return product


_product_single = _product_kernel(_accumulator(half=False), 4)
_product_half = _product_kernel(_accumulator(half=True), 2)


@jit
def _pack(dense: Any, packed: Any) -> None:
    tiles, rows, _ = packed.shape
    columns = dense.shape[1]
    for r in prange(rows):
        for tile in range(tiles):
            source = dense[r, tile * TILE : min(columns, (tile + 1) * TILE)]
            target = packed[tile, r]
            target[: source.size] = source
            target[source.size :] = 0


@jit
def _pack_half(bits: Any, shift: Any, packed: Any) -> None:
    tiles, rows, _ = packed.shape
    columns = bits.shape[1]
    for r in prange(rows):
        halves = np.zeros(TILE, np.uint32)
        for tile in range(tiles):
            source = bits[r, tile * TILE : min(columns, (tile + 1) * TILE)]
            for j in range(source.size):
                b = np.uint32(source[j]) << shift
                # To nearest, ties to even; NaN stays NaN.
                rounded = b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))
                nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                halves[j] = np.uint32(0x7FC00000) if nan else rounded
            halves[source.size :] = 0
            for group in range(TILE // (2 * _LANES)):
                target = packed[tile, r, group * _LANES : (group + 1) * _LANES]
                pair = halves[group * 2 * _LANES : (group + 1) * 2 * _LANES]
                for j in range(_LANES):
                    above = pair[j + _LANES] & np.uint32(0xFFFF0000)
                    target[j] = (pair[j] >> np.uint32(16)) | above


_scratch = threading.local()


def _room(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory kept between calls: fresh pages cost more than the packing."""
    size = math.prod(shape)
    held = getattr(_scratch, name, None)
    if held is None or held.size < size:
        held = np.empty(size, dtype)
        setattr(_scratch, name, held)
    return held[:size].reshape(shape)


def pack(dense: Tensor, *, half: bool) -> Any:
    """A dense operand (o, i), float32 or bfloat16, tile by tile, in bfloat16 (`half`) or float32.

    A tile is then contiguous: rows a power of two apart would share the same few places of the cache. The result holds
    until the next call.
    """
    use_threads(dense.numel())
    dense = dense.contiguous()
    tiles, rows = -(-dense.shape[1] // TILE), dense.shape[0]
    if not half:
        packed = _room("single", (tiles, rows, TILE), np.float32)
        _pack(dense.float().numpy(), packed)
        return packed
    packed = _room("half", (tiles, rows, TILE // 2), np.uint32)
    if dense.dtype == torch.bfloat16:
        _pack_half(dense.view(torch.uint16).numpy(), np.uint32(16), packed)
    else:
        _pack_half(dense.numpy().view(np.uint32), np.uint32(0), packed)
    return packed


def product(sparse: Lists, packed: Any, columns: int, scale: float) -> Tensor:
    """``scale · S D`` (n, i) in float32 for the sparse S (n, o) and D (o, i) as `pack` left it."""
    out = torch.empty(sparse.start.size - 1, columns)
    use_threads(sparse.index.size * columns)
    kernel = _product_half if packed.dtype == np.uint32 else _product_single
    kernel(sparse.start, sparse.index, sparse.value, packed, np.float32(scale), out.numpy())
    return out


def lies_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is channels-last in memory, and not contiguous as well."""
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def in_memory_order(tensor: Tensor) -> tuple[bool, Any]:
    """Whether a tensor is channels-last, and its entries as they lie in memory; other layouts are copied."""
    last = lies_channels_last(tensor)
    return last, _flat(tensor.permute(0, 2, 3, 1) if last else tensor)


def _flat(tensor: Tensor) -> Any:
    return tensor.contiguous().numpy().reshape(-1)
