"""dx of a convolution: an input pixel visits the non-zeros of all output pixels it took part in.

Each of them names a row of the weight, ``W[kh, kw, o, :]``. Output pixels side by side are one run of the list of
non-zeros: an index that counts its own column backwards leaves the same to be added for all of them. Index letters as
in `retrograde.kernels.cpu_convolution`.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import prange, types
from torch import Tensor

from retrograde.kernels.cpu_convolution_lists import Sparse
from retrograde.kernels.cpu_lanes import I32, LANES, address, intrinsic, load, splat, store, turn, vector
from retrograde.kernels.cpu_memory import array, in_memory_order, room
from retrograde.kernels.cpu_rows import accumulate
from retrograde.kernels.cpu_threads import jit, serial, use_threads
from retrograde.kernels.geometry import Geometry

_TILE = 8
"""Vectors of inputs for which dx is computed at a time."""
_PIXELS = 256
"""Pixels, or a few more, of the input for which one task computes dx."""


@intrinsic
def _move(typingctx: Any, target: Any, source: Any, times: Any, more: Any) -> Any:
    """Copy sixteen 4-byte integers, each `times` some and `more`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, times, more = arguments
        found = builder.mul(load(builder, source, vector(I32)), splat(builder, times))
        store(builder, builder.add(found, splat(builder, more)), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32, types.int32), codegen


@serial
def _unpack(part: Any, c: Any, dx: Any, at: Any, stride: Any, scale: Any) -> None:
    """Sums (pixel, c rounded up), times `scale`, to (c, pixel), rows `stride` apart."""
    pixels, width = part.shape
    if pixels < LANES or c < LANES:
        for i in range(c):
            for p in range(pixels):
                dx[at + i * stride + p] = part[p, i] * scale
        return
    places = np.empty(LANES, np.int32)
    for i in range(LANES):
        places[i] = i * stride
    for i0 in range(0, c, LANES):
        # The last block begins earlier, so that it is a whole one.
        i = min(i0, c - LANES)
        for p0 in range(0, pixels, LANES):
            p = min(p0, pixels - LANES)
            turn(
                address(dx, at + i * stride + p),
                address(places, 0),
                address(part, p * width + i),
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


@serial
def _runs(size: Any, out_size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """For each input column, runs of output columns lo … hi that it took part in, and kw + stride · column of each."""
    number = 1 if dilation == 1 else kernel
    lo = np.empty((size, number), np.int64)
    hi, shift = np.empty_like(lo), np.empty_like(lo)
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
    index: Any,
    value: Any,
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
        # Places of W[0, −stride · column, o, :]: what is added to them later depends on the input pixel alone.
        near = np.empty(start[m, final * out_w] - begin + LANES, np.int32)
        for y in range(first, final):
            for x in range(out_w):
                at, end = start[m, y * out_w + x], start[m, y * out_w + x + 1]
                while True:
                    # At least once: a test would be mispredicted.
                    _move(
                        address(near, at - begin),
                        address(index, at),
                        np.int32(width),
                        np.int32(-x * stride_w * along_w),
                    )
                    at += LANES
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
                        accumulate(
                            address(part, (((y - top) * w + x) * tiles + tile) * width),
                            address(packed, dense),
                            address(near, 0),
                            address(value, begin),
                            address(runs, 0),
                            columns,
                            width // LANES,
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
    lists = sparse.by_pixel()
    threads = use_threads(math.prod(input_shape))
    n, c_in, h, w = input_shape
    outputs, c, kh, kw = weight.shape
    groups = geometry.groups
    vectors = -(-c // LANES)
    tiles = -(-vectors // _TILE)
    shape = (groups, tiles, kh * kw * (outputs // groups), -(-vectors // tiles) * LANES)
    packed = room("weight", shape, np.float32)
    _pack_weight(array(weight).reshape(outputs, c, kh * kw), packed)
    order = torch.channels_last if sparse.channels_last else torch.contiguous_format
    dx = torch.empty((n, c_in, h, w), memory_format=order)
    # How an image is cut is no matter for the bits.
    block = min(h, -(-_PIXELS // w), -(-n * groups * h // (4 * threads)))
    _input_grad(
        lists.start,
        lists.index,
        lists.value,
        packed,
        in_memory_order(dx)[1],
        sparse.channels_last,
        (c, h, w, *sparse.shape[2:], kh, kw),
        (*geometry.stride, *geometry.padding, *geometry.dilation),
        block,
        np.float32(sparse.step),
    )
    return dx
