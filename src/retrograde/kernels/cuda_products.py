"""Products of a gradient's levels with a dense operand on a GPU: in 8 bits, and without what is all zero.

``G D`` for G (a, m) and D (m, i), as in `retrograde.kernels.linear`. Tensor cores multiply whole tiles, so a zero here
and there saves nothing. What saves time is 8 bits, and leaving out rows and columns of zeros: samples that a gate
passed over, padding, units of a ReLU that never fired.

*In 8 bits* (`int8_product`): levels are int8 already; D is rounded to nearest with one scale for each column, and laid
down column by column, the order in which tensor cores take 8-bit operands.

*Without zeros* (`skip_product`): rows of G that are all zero are dropped; what remains is cut into blocks of `BLOCK_A`
rows, and each block lists those k in 0 … m − 1 for which its strip ``G[block, k]`` is not all zero. A block's product
then runs over its list alone. Everything is found on the device: the host never waits.
"""
# Kernels' parameters live on the device: Python's types do not describe them.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
"""Whether Triton's interpreter runs the kernels, on the CPU."""
BLOCK_A = 64
"""Entries in a strip of `skip_product`."""

_LONGEST = 1 << 17
"""Terms that a sum in int32 surely holds: 2³¹ / 127² are 133,152."""
_GROUP = 8
"""Rows of tiles that are computed side by side, so that they find each other's operands in the cache."""
_TILE_M = 128
"""Terms that an 8-bit tile sums at a time; operands are filled up with zeros to a multiple of it."""
_SIDE = 64
"""Of the square tiles in which operands are rounded and turned."""
_ROWS = 512
"""Rows of D among which one program looks for the columns' peaks."""
_SCAN = 1024
"""Flags that a program lists at a time."""

_jit: Any = triton.jit


@dataclass(frozen=True)
class Tile:
    """How a product is cut up: rows and columns of a tile of the result, warps, and stages of the pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


# Fixed, not tuned by trial: another tile may round otherwise, and a resumed run must compute what it would have.
LARGE, SMALL = Tile(128, 128, 8, 3), Tile(64, 64, 4, 4)
"""Tiles of `int8_product`, whose results agree: sums of whole numbers are exact."""
_ENOUGH = 128
"""Large tiles that keep a GPU busy."""


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover so many entries."""
    return -(-size // block)


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device made the current one, where Triton launches."""
    return torch.cuda.device_of(tensor)


# In 8 bits.


@_jit
def _peaks_kernel(dense, peaks, m, i, ROWS: tl.constexpr, SIDE: tl.constexpr):
    at_i = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    top = tl.zeros((SIDE,), tl.int32)
    for start in range(0, ROWS, SIDE):
        at_m = tl.program_id(1) * ROWS + start + tl.arange(0, SIDE)
        inside = (at_m < m)[:, None] & (at_i < i)[None, :]
        x = tl.load(dense + at_m.to(tl.int64)[:, None] * i + at_i[None, :], mask=inside, other=0.0)
        # Magnitudes compare as their bit patterns do; those of NaN are the largest.
        top = tl.maximum(top, tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    tl.atomic_max(peaks + at_i, top, mask=at_i < i, sem="relaxed")


@_jit
def _round_kernel(dense, peaks, rounded, scales, m, i, width, SIDE: tl.constexpr):
    at_m = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    at_i = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    inside = (at_m < m)[:, None] & (at_i < i)[None, :]
    x = tl.load(dense + at_m.to(tl.int64)[:, None] * i + at_i[None, :], mask=inside, other=0.0).to(tl.float32)
    peak = tl.load(peaks + at_i, mask=at_i < i, other=0.0)
    # A column of zeros, or with an entry that is not finite, is all 0; the latter's scale carries that on.
    factor = tl.div_rn(127.0, tl.where(peak > 0.0, peak, float("inf")))
    factor = tl.where(factor < float("inf"), factor, 0.0)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0) * factor[None, :]
    # To nearest, ties to even: the sum has no bits for fractions.
    x = (x + 12582912.0) - 12582912.0
    column = rounded + at_i.to(tl.int64)[:, None] * width + at_m[None, :]
    tl.store(column, tl.trans(x.to(tl.int8)), mask=(at_i < i)[:, None] & (at_m < width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(scales + at_i, tl.div_rn(peak, 127.0), mask=at_i < i)


@_jit
def _turn_kernel(matrix, packed, rows, columns, row_stride, column_stride, width, SIDE: tl.constexpr):
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    source = matrix + row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    x = tl.load(source, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0)
    target = packed + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, x, mask=(row < rows)[:, None] & (column < width)[None, :])


@_jit(do_not_specialize=["a"])
def _int8_kernel(
    levels, rounded, scales, out, step, a, i, width,
    TILE_A: tl.constexpr, TILE_I: tl.constexpr, TILE_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(a, TILE_A), tl.cdiv(i, TILE_I)
    place = tl.program_id(0)
    row, column = tl.swizzle2d(place // across, place % across, down, across, GROUP)
    at_a = row * TILE_A + tl.arange(0, TILE_A)
    at_i = column * TILE_I + tl.arange(0, TILE_I)
    k = tl.arange(0, TILE_M)
    # Past the end the first row is read: nothing of it is stored.
    left = levels + tl.where(at_a < a, at_a, 0).to(tl.int64)[:, None] * width + k[None, :]
    right = rounded + tl.where(at_i < i, at_i, 0).to(tl.int64)[None, :] * width + k[:, None]
    total = tl.zeros((TILE_A, TILE_I), tl.int32)
    for _ in range(0, width, TILE_M):
        total = tl.dot(tl.load(left), tl.load(right), total, out_dtype=tl.int32)
        left += TILE_M
        right += TILE_M
    scale = tl.load(scales + at_i, mask=at_i < i, other=0.0) * step
    found = total.to(tl.float32) * scale[None, :]
    target = out + at_a.to(tl.int64)[:, None] * i + at_i[None, :]
    tl.store(target, found.to(out.dtype.element_ty), mask=(at_a < a)[:, None] & (at_i < i)[None, :])


def int8_product(
    levels: Tensor, step: float | None, dense: Tensor, *, transposed: bool = False, tile: Tile | None = None
) -> Tensor:
    """``step · levels · D`` with each column of D rounded to 8 bits, sums in int32.

    Args:
        levels: int8, (a, m), or (m, a) when `transposed`.
        step: of the levels; None for 1.
        dense: D, (m, i), float32, bfloat16 or float16.
        transposed: whether `levels` holds the transposed matrix.
        tile: how to cut the product up; by its shape unless given.

    Returns:
        (a, i) in the dtype of D. A column of D with an entry that is not finite gives NaN.

    Raises:
        ValueError: levels that are no int8, or shapes that do not fit.
    """
    a, m, i = _shape(levels, dense, transposed=transposed)
    if m > _LONGEST:

        def part(levels: Tensor, rows: Tensor) -> Tensor:
            return int8_product(levels, step, rows.float(), transposed=transposed, tile=tile)

        return _in_parts(part, levels, dense, transposed=transposed).to(dense.dtype)
    dense = dense.contiguous()
    width = _width(m)
    # The bit patterns of numbers that are not negative order as they do.
    peaks = dense.new_zeros(i, dtype=torch.int32)
    scales = dense.new_empty(i, dtype=torch.float32)
    rounded = dense.new_empty((i, width), dtype=torch.int8)
    if rounded.numel():
        columns = blocks_of(i, _SIDE)
        with device_of(dense):
            _peaks_kernel[(columns, blocks_of(m, _ROWS))](dense, peaks, m, i, ROWS=_ROWS, SIDE=_SIDE)
            # Product and sum apart, as on the CPU: together they would round once, and ties otherwise.
            _round_kernel[(columns, width // _SIDE)](
                *(dense, peaks.view(torch.float32), rounded, scales, m, i, width),
                SIDE=_SIDE,
                enable_fp_fusion=False,
            )
    return _int8(levels, step, rounded, scales, (a, m, i), dense.dtype, transposed=transposed, tile=tile)


def quantised_product(
    levels: Tensor,
    step: float | None,
    values: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """`int8_product` with a D that is quantised already: ``values · scale``, int8 (m, i) and float32 (i,).

    Returns:
        (a, i) in `dtype`.
    """
    a, m, i = _shape(levels, values, transposed=transposed)
    if m > _LONGEST:

        def part(levels: Tensor, rows: Tensor) -> Tensor:
            return quantised_product(
                levels, step, rows, scale, torch.float32, transposed=transposed, tile=tile
            )

        return _in_parts(part, levels, values, transposed=transposed).to(dtype)
    rounded = _turned(values.T, _width(m))
    return _int8(levels, step, rounded, scale, (a, m, i), dtype, transposed=transposed, tile=tile)


def _in_parts(
    product: Callable[[Tensor, Tensor], Tensor], levels: Tensor, dense: Tensor, *, transposed: bool
) -> Tensor:
    """A product as the sum of several, in float32: longer sums could pass int32's range."""
    parts = zip(levels.split(_LONGEST, 0 if transposed else 1), dense.split(_LONGEST), strict=True)
    return functools.reduce(Tensor.add_, (product(*part) for part in parts))


def _int8(
    levels: Tensor,
    step: float | None,
    rounded: Tensor,
    scales: Tensor,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    transposed: bool,
    tile: Tile | None,
) -> Tensor:
    a, m, i = shape
    if levels.dtype != torch.int8:
        raise ValueError(f"levels in {levels.dtype}: a product in 8 bits takes int8 levels only.")
    out = rounded.new_empty((a, i), dtype=dtype)
    if not m or not out.numel():
        return out.zero_()
    width = rounded.shape[1]
    if transposed or m != width or not levels.is_contiguous():
        levels = _turned(levels.T if transposed else levels, width)
    if tile is None:
        tile = LARGE if blocks_of(a, LARGE.rows) * blocks_of(i, LARGE.columns) >= _ENOUGH else SMALL
    with device_of(out):
        _int8_kernel[(blocks_of(a, tile.rows) * blocks_of(i, tile.columns),)](
            *(levels, rounded, scales, out, 1.0 if step is None else step, a, i, width),
            TILE_A=tile.rows,
            TILE_I=tile.columns,
            TILE_M=_TILE_M,
            GROUP=_GROUP,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def _turned(matrix: Tensor, width: int) -> Tensor:
    """A matrix of whatever strides, row by row, each filled up with zeros to `width`."""
    rows, columns = matrix.shape
    packed = matrix.new_empty((rows, width))
    if packed.numel():
        with device_of(matrix):
            _turn_kernel[(blocks_of(rows, _SIDE), width // _SIDE)](
                matrix, packed, rows, columns, *matrix.stride(), width, SIDE=_SIDE
            )
    return packed


def _width(m: int) -> int:
    return blocks_of(m, _TILE_M) * _TILE_M


# Without zeros.


@_jit(do_not_specialize=["length"])
def _list_kernel(flags, index, counts, length, SCAN: tl.constexpr):
    row = tl.program_id(0)
    start = row.to(tl.int64) * length
    used = 0
    for first in range(0, length, SCAN):
        at = first + tl.arange(0, SCAN)
        one = (tl.load(flags + start + at, mask=at < length, other=0) != 0).to(tl.int32)
        tl.store(index + start + used + tl.cumsum(one, 0) - one, at, mask=one != 0)
        used += tl.sum(one, 0)
    tl.store(counts + row, used)


@_jit
def _strips_kernel(
    values, rows, used, packed, flags, m, row_stride, column_stride, width,
    BLOCK_A: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(m, SIDE)
    block = tl.program_id(0) // across
    at = block * BLOCK_A + tl.arange(0, BLOCK_A)
    k = tl.program_id(0) % across * SIDE + tl.arange(0, SIDE)
    there = at < tl.load(used)
    row = tl.load(rows + at, mask=there, other=0).to(tl.int64)
    source = values + row[None, :] * row_stride + k.to(tl.int64)[:, None] * column_stride
    x = tl.load(source, mask=(k < m)[:, None] & there[None, :], other=0)
    flag = tl.max((x != 0).to(tl.int32), 1)
    tl.store(flags + block.to(tl.int64) * m + k, flag.to(tl.int8), mask=k < m)
    target = packed + k.to(tl.int64)[:, None] * width + at[None, :]
    tl.store(target, x.to(packed.dtype.element_ty), mask=(k < m)[:, None])


@_jit(do_not_specialize=["m"])
def _skip_kernel(
    packed, index, counts, rows, used, dense, out, step, m, i, width,
    BLOCK_A: tl.constexpr, TILE_I: tl.constexpr, TILE_M: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    at = block * BLOCK_A + tl.arange(0, BLOCK_A)
    at_i = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    listed = index + block.to(tl.int64) * m
    count = tl.load(counts + block)
    total = tl.zeros((BLOCK_A, TILE_I), tl.float32)
    for start in range(0, count, TILE_M):
        place = start + tl.arange(0, TILE_M)
        there = place < count
        k = tl.load(listed + place, mask=there, other=0).to(tl.int64)
        x = tl.load(packed + k[:, None] * width + at[None, :], mask=there[:, None], other=0.0)
        inside = there[:, None] & (at_i < i)[None, :]
        y = tl.load(dense + k[:, None] * i + at_i[None, :], mask=inside, other=0.0)
        # float32 is a sum of three bfloat16 numbers.
        for _ in tl.static_range(PARTS - 1):
            part = y.to(x.dtype)
            total = tl.dot(tl.trans(x), part, total)
            y -= part.to(y.dtype)
        total = tl.dot(tl.trans(x), y.to(x.dtype), total, input_precision=PRECISION)
    there = at < tl.load(used)
    row = tl.load(rows + at, mask=there, other=0).to(tl.int64)
    target = out + row[:, None] * i + at_i[None, :]
    tl.store(target, (total * step).to(out.dtype.element_ty), mask=there[:, None] & (at_i < i)[None, :])


@dataclass(frozen=True)
class Strips:
    """Where a matrix G (a, m) is not zero, strip by strip; everything lies on the device.

    Attributes:
        rows: those of G that are not all zero come first, int32 (a,).
        used: their number, int32 (1,).
        packed: their transposed matrix, (m, a filled up to whole blocks), in the dtype in which it is multiplied.
        index: for each block of rows, the k of its strips that are not all zero come first, int32 (blocks, m).
        counts: the number of these, int32 (blocks,).
    """

    rows: Tensor
    used: Tensor
    packed: Tensor
    index: Tensor
    counts: Tensor

    def executed(self, columns: int) -> int:
        """Multiply-adds of the product with a D of so many columns, zeros within strips among them. Waits."""
        return int(self.counts.sum()) * BLOCK_A * columns


def strips(values: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Strips:
    """The strips of G that are not all zero.

    Args:
        values: G, (a, m), or (m, a) when `transposed`: int8 levels or floating point.
        dtype: of the operand that it will be multiplied with.
        transposed: whether `values` holds Gᵀ.
    """
    matrix = values.T if transposed else values
    a, m = matrix.shape
    rows, used = _listed(matrix.any(1).view(1, -1))
    blocks = blocks_of(a, BLOCK_A)
    packed = matrix.new_empty((m, blocks * BLOCK_A), dtype=_operand(values.dtype, dtype))
    flags = matrix.new_empty((blocks, m), dtype=torch.int8)
    with device_of(matrix):
        _strips_kernel[(blocks * blocks_of(m, _SIDE),)](
            *(matrix, rows, used, packed, flags, m, *matrix.stride(), packed.shape[1]),
            BLOCK_A=BLOCK_A,
            SIDE=_SIDE,
        )
    return Strips(rows.view(-1), used, packed, *_listed(flags))


def skip_product(
    values: Tensor,
    step: float | None,
    dense: Tensor,
    *,
    transposed: bool = False,
    found: Strips | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``step · G · D`` over the strips of G that are not all zero, sums in float32.

    Multiplied in the dtype of D, on tensor cores. Levels are exact in bfloat16, and a float32 D is the sum of three
    bfloat16 numbers: three products keep all of its 24 bits, and two, of 16 bits, do where torch allows TF32, which has
    11. A float32 gradient that is no levels is multiplied in TF32 where that is allowed, else in three such products.

    Args:
        values: G, (a, m), or (m, a) when `transposed`: int8 levels, float32, bfloat16 or float16.
        step: of the levels; None for 1.
        dense: D, (m, i), float32, bfloat16 or float16.
        transposed: whether `values` holds Gᵀ.
        found: the strips of `values`, where they are known.
        tile: how to cut the product up, into tiles of `BLOCK_A` rows; by its shape unless given.

    Returns:
        (a, i) in the dtype of D. An entry of D that is not finite shows where it meets a strip that is not left out.

    Raises:
        ValueError: shapes that do not fit.
    """
    a, m, i = _shape(values, dense, transposed=transposed)
    out = dense.new_zeros((a, i))
    if not m or not out.numel():
        return out
    dense = dense.contiguous()
    found = strips(values, dense.dtype, transposed=transposed) if found is None else found
    single, split = (found.packed.dtype == dtype for dtype in (torch.float32, torch.bfloat16))
    split = split and dense.dtype == torch.float32
    rounding = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if tile is None:
        tile = Tile(BLOCK_A, 64 if single or i <= 64 else 128, 4, 3 if single or split else 4)
    with device_of(out):
        _skip_kernel[(found.counts.numel(), blocks_of(i, tile.columns))](
            *(found.packed, found.index, found.counts, found.rows, found.used, dense, out),
            *(1.0 if step is None else step, m, i, found.packed.shape[1]),
            BLOCK_A=BLOCK_A,
            TILE_I=tile.columns,
            TILE_M=32 if single or split else 64,
            PARTS=(2 if rounding else 3) if split else 1,
            PRECISION="tf32" if rounding else "tf32x3",
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def _listed(flags: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of flags the places of those that are set, in order, and their number."""
    lists, length = flags.shape
    index = flags.new_empty((lists, length), dtype=torch.int32)
    counts = flags.new_empty(lists, dtype=torch.int32)
    with device_of(flags):
        _list_kernel[(lists,)](flags.view(torch.int8), index, counts, length, SCAN=_SCAN)
    return index, counts


def _operand(values: torch.dtype, dense: torch.dtype) -> torch.dtype:
    """In what a gradient is multiplied with a dense operand."""
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16.
        return torch.float32 if dense == torch.bfloat16 else dense
    return torch.bfloat16 if values == torch.int8 and dense == torch.float32 else dense


def _shape(values: Tensor, dense: Tensor, *, transposed: bool) -> tuple[int, int, int]:
    """(a, m, i), where both operands fit."""
    if values.dim() == dense.dim() == 2:
        a, m = reversed(values.shape) if transposed else values.shape
        if dense.shape[0] == m:
            return a, m, dense.shape[1]
    turned = ", transposed," if transposed else ""
    raise ValueError(
        f"a gradient {tuple(values.shape)}{turned} and an operand {tuple(dense.shape)} do not fit."
    )
