"""dW of a convolution: an output channel lists its non-zeros, several images at a time.

Each names a row of the padded input, ``x[y + kh, x : x + kw, :]``, for every ``kh``. Images are cut into a number of
chunks that depends on shapes alone, and their sums are added in order. Index letters as in
`retrograde.kernels.cpu_convolution`.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from retrograde.kernels.cpu_convolution_lists import Sparse
from retrograde.kernels.cpu_lanes import LANES, address, turn
from retrograde.kernels.cpu_memory import array, in_memory_order, lent
from retrograde.kernels.cpu_rows import accumulate
from retrograde.kernels.cpu_threads import jit, serial, use_threads
from retrograde.kernels.geometry import Geometry

CACHE = 512 * 1024
"""Bytes of padded input that one pass over an output channel's non-zeros may touch: a part of a second-level cache."""
_CHUNKS, _PARTIAL = 8, 8 * 1024 * 1024
"""At most so many partial sums, and at most so many bytes of them."""


@serial
def _pack_image(x: Any, at: Any, last: Any, all_c: Any, c: Any, places: Any, out: Any) -> None:
    """One plane of x to the inside of `out`, (padded h, padded w, c), where pixel p is at ``places[p]``."""
    pixels = places.size
    if last:
        for p in range(pixels):
            for i in range(c):
                out[places[p] + i] = x[at + p * all_c + i]
    elif pixels < LANES or c < LANES:
        for i in range(c):
            for p in range(pixels):
                out[places[p] + i] = x[at + i * pixels + p]
    else:
        for p0 in range(0, pixels, LANES):
            # The last block begins earlier, so that it is a whole one.
            p = min(p0, pixels - LANES)
            for i0 in range(0, c, LANES):
                i = min(i0, c - LANES)
                turn(
                    address(out, i),
                    address(places, p),
                    address(x, at + i * pixels + p),
                    4 * pixels,
                    np.float32(1),
                )


@jit
def _weight_grad(
    start: Any,
    index: Any,
    value: Any,
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
        here_index = np.empty(together * out_h * out_w, np.int32)
        here_value = np.empty(together * out_h * out_w, np.float32)
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
                        here_index[used] = np.int32(places[index[k]] + b * inside)
                        here_value[used] = value[k]
                        used += 1
                runs[1] = used
                for s in range(segments):
                    shift = (s // apart * dil_h * wide + s % apart * dil_w) * c
                    accumulate(
                        address(partial, ((chunk * all_outputs + g * outputs + o) * segments + s) * width),
                        address(buffer, shift),
                        address(here_index, 0),
                        address(here_value, 0),
                        address(runs, 0),
                        1,
                        width // LANES,
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
    lists = sparse.by_channel()
    threads = use_threads(x.numel())
    outputs, c, kh, kw = weight_shape
    n, _, h, w = x.shape
    groups = geometry.groups
    channels_last, flat = in_memory_order(x.detach())
    # A row of the kernel meets one stretch of the input; pixels apart from one another do not.
    segments, taps = (kh, kw) if geometry.dilation[1] == 1 else (kh * kw, 1)
    width = -(-taps * c // LANES) * LANES
    chunks = max(1, min(n, _CHUNKS, _PARTIAL // (outputs * segments * width * 4)))
    # How the outputs of a chunk are split is no matter for their bits.
    split = min(outputs // groups, -(-2 * threads // (chunks * groups)))
    inside = (h + 2 * geometry.padding[0]) * (w + 2 * geometry.padding[1]) * c
    together = max(1, min(-(-n // chunks), CACHE // (4 * inside)))
    partial = lent((chunks, outputs, segments, width), np.float32)
    _weight_grad(
        lists.start,
        lists.index,
        lists.value,
        flat,
        channels_last,
        (groups, c, h, w, *sparse.shape[2:], kw),
        (*geometry.stride, *geometry.padding, *geometry.dilation),
        split,
        together,
        partial,
    )
    dw = torch.empty(tuple(weight_shape))
    _collect(partial, np.float32(sparse.step), c, array(dw).reshape(outputs, c, kh * kw))
    return dw
