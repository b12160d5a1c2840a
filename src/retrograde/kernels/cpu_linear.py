"""Products of a sparse matrix, given as index lists, and a dense one.

A product reads one row of its dense operand for each non-zero. A tile of sums stays in registers while the non-zeros of
a row pass by, so what bounds it is the cache that holds the operand: stored as bfloat16 it takes half the bytes, with
sums in float32 all the same.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from torch import Tensor

from retrograde.kernels.cpu_lanes import (
    F32,
    I32,
    I64,
    LANES,
    address,
    call,
    constant,
    features,
    intrinsic,
    load,
    name_of,
    offset,
    splat,
    store,
    times_4,
    vector,
)
from retrograde.kernels.cpu_lists import Lists
from retrograde.kernels.cpu_memory import array, room
from retrograde.kernels.cpu_threads import jit, serial, use_threads

_VECTORS = 8 if "+avx512f" in features() else 6
"""Sums in registers, in vectors of sixteen: where a register holds eight numbers there are sixteen of them, which eight
vectors would fill to the last, so that operands take a detour through memory."""
TILE = LANES * _VECTORS
"""Columns of the dense operand that one pass over a row's non-zeros takes."""
_ROWS = 32
"""Rows in a task."""


def _accumulator(*, half: bool) -> Any:
    """``out[:] = scale · Σ_k value[k] · dense[index[k], :]`` over one tile of columns, the sums in registers.

    `dense` is a tile as `pack` leaves it, in bfloat16 (`half`) or float32; `out`, `dense`, `index` and `value` are
    addresses.
    """

    def build(builder: Any, out: Any, dense: Any, index: Any, value: Any, count: Any, scale: Any) -> None:
        wide, nothing = vector(F32), ir.Constant(I64, 0)
        zero = constant(F32, [0.0] * LANES)
        before, loop = builder.block, builder.append_basic_block("nonzeros")
        done = builder.append_basic_block("store")
        builder.cbranch(builder.icmp_signed(">", count, nothing), loop, done)

        builder.position_at_end(loop)
        k, sums = builder.phi(I64), [builder.phi(wide) for _ in range(_VECTORS)]
        row = builder.sext(load(builder, builder.add(index, times_4(builder, k)), I32), I64)
        start = builder.add(dense, builder.mul(row, ir.Constant(I64, TILE * (2 if half else 4))))
        factor = splat(builder, load(builder, builder.add(value, times_4(builder, k)), F32))
        entries: list[Any] = []
        for place in range(_VECTORS // 2 if half else _VECTORS):
            found = load(builder, offset(builder, start, place * LANES * 4), vector(I32 if half else F32))
            if half:
                # A bfloat16 is the upper half of a float32; two share a word, the sixteen later columns above.
                first = builder.shl(found, constant(I32, [16] * LANES))
                second = builder.and_(found, constant(I32, [-65536] * LANES))
                entries += [builder.bitcast(first, wide), builder.bitcast(second, wide)]
            else:
                entries.append(found)
        results = [
            call(builder, f"llvm.fma.{name_of(wide)}", wide, [found, factor, total])
            for found, total in zip(entries, sums, strict=True)
        ]
        following = offset(builder, k, 1)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)

        builder.position_at_end(done)
        totals, step = [builder.phi(wide) for _ in results], splat(builder, scale)
        for place, total in enumerate(totals):
            store(builder, builder.fmul(total, step), offset(builder, out, place * LANES * 4))

        k.add_incoming(nothing, before)
        k.add_incoming(following, loop)
        for phi, result in zip(sums + totals, results * 2, strict=True):
            phi.add_incoming(zero, before)
            phi.add_incoming(result, loop)

    @intrinsic
    def accumulate(
        typingctx: Any, out: Any, dense: Any, index: Any, value: Any, count: Any, scale: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            build(builder, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32), codegen

    return accumulate


def _product_kernel(accumulate: Any) -> Any:
    @jit
    def product(starts: Any, index: Any, value: Any, packed: Any, scale: Any, out: Any) -> None:
        rows, columns = out.shape
        tiles, length, words = packed.shape
        groups = (rows + _ROWS - 1) // _ROWS
        # Tiles outermost: a tile of the dense operand stays in cache while all rows pass.
        for task in prange(groups * tiles):
            tile, group = task // groups, task % groups
            start = tile * TILE
            whole = start + TILE <= columns
            spare = np.empty(TILE, np.float32)
            for r in range(group * _ROWS, min(rows, (group + 1) * _ROWS)):
                accumulate(
                    address(out, r * columns + start) if whole else address(spare, 0),
                    address(packed, tile * length * words),
                    address(index, starts[r]),
                    address(value, starts[r]),
                    starts[r + 1] - starts[r],
                    scale,
                )
                if not whole:
                    out[r, start:] = spare[: columns - start]

    return product


_product_single = _product_kernel(_accumulator(half=False))
_product_half = _product_kernel(_accumulator(half=True))


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


@serial
def _bits(number: Any) -> Any:
    return np.float32(number).view(np.uint32)


@serial
def _bits_of_bfloat16(number: Any) -> Any:
    return np.uint32(number) << np.uint32(16)


def _pack_half_kernel(bits: Any) -> Any:
    @jit
    def pack_half(dense: Any, packed: Any) -> None:
        tiles, rows, _ = packed.shape
        columns = dense.shape[1]
        for r in prange(rows):
            halves = np.zeros(TILE, np.uint32)
            for tile in range(tiles):
                source = dense[r, tile * TILE : min(columns, (tile + 1) * TILE)]
                for j in range(source.size):
                    b = bits(source[j])
                    # To nearest, ties to even; NaN stays NaN.
                    rounded = b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))
                    nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                    halves[j] = np.uint32(0x7FC00000) if nan else rounded
                halves[source.size :] = 0
                for group in range(TILE // (2 * LANES)):
                    target = packed[tile, r, group * LANES : (group + 1) * LANES]
                    pair = halves[group * 2 * LANES : (group + 1) * 2 * LANES]
                    for j in range(LANES):
                        above = pair[j + LANES] & np.uint32(0xFFFF0000)
                        target[j] = (pair[j] >> np.uint32(16)) | above

    return pack_half


_pack_half = _pack_half_kernel(_bits)
_pack_bfloat16 = _pack_half_kernel(_bits_of_bfloat16)


def pack(dense: Tensor, *, half: bool) -> Any:
    """A dense operand (m, i), float32, bfloat16 or int8, tile by tile, in bfloat16 (`half`) or float32.

    A tile is then contiguous: rows a power of two apart would share the same few places of the cache. Both hold int8
    exactly; its scales, one for each column, are for the caller to apply to the columns of a product. The result holds
    until the next call.
    """
    use_threads(dense.numel())
    dense = dense.contiguous()
    tiles, rows = -(-dense.shape[1] // TILE), dense.shape[0]
    if not half:
        packed = room("single", (tiles, rows, TILE), np.float32)
        _pack(array(dense.float() if dense.dtype == torch.bfloat16 else dense), packed)
        return packed
    packed = room("half", (tiles, rows, TILE // 2), np.uint32)
    if dense.dtype == torch.bfloat16:
        _pack_bfloat16(array(dense.view(torch.uint16)), packed)
    else:
        _pack_half(array(dense), packed)
    return packed


def product(sparse: Lists, packed: Any, columns: int, scale: float) -> Tensor:
    """``scale · S D`` (n, i) in float32 for the sparse S (n, m) and D (m, i) as `pack` left it."""
    starts = sparse.start[0]
    out = torch.empty(starts.size - 1, columns)
    use_threads(sparse.size * columns)
    kernel = _product_half if packed.dtype == np.uint32 else _product_single
    kernel(starts, sparse.index, sparse.value, packed, np.float32(scale), array(out))
    return out
