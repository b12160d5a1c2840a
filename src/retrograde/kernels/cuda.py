"""CUDA kernels in Triton: dithering in one pass over the gradient, and the products of a linear layer's backward pass.

The contract is that of the CPU's: levels are those of `retrograde.kernels.reference.nsd` on the CPU bit for bit, and
the products those of `retrograde.kernels.linear.run` but for rounding. Every result is the same in every run: sums over
blocks are taken in a fixed order, atomic operations touch whole numbers alone, and tiles follow from shapes, never
from a clock. Each function waits for the device once at most.

Needs Triton, which torch's CUDA builds bring along, and a GPU of compute capability 8.0 or later. With
``TRITON_INTERPRET=1`` in the environment before Triton is imported, everything runs on the CPU, slowly, for tests.
"""
# Kernels' parameters live on the device: Python's types do not describe them.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrograde.kernels.cuda_products import (
    INTERPRETED,
    blocks_of,
    device_of,
    int8_product,
    quantised_product,
    skip_product,
)
from retrograde.kernels.delta import Levels
from retrograde.kernels.int8 import Quantised
from retrograde.maths import dither

NAME = "cuda"
KERNELS = ("dense", "bfloat16", "int8", "skip-blocks")
SKIPPING = ("skip-blocks",)
"""Those that leave zeros out, a strip of `cuda_products.BLOCK_A` entries at a time: not each zero, as on the CPU."""
PRECISION = {"bfloat16": "bfloat16", "int8": "int8"}
"""What a kernel rounds to; others leave the operand's own precision."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 4096
"""Entries in a block of an elementwise pass."""
_CHUNK = 1024
"""Blocks whose partial sums are combined at a time."""
_BITS = (2, 8)
_CAPABILITY = (8, 0)

_jit: Any = triton.jit


def supports(values: Tensor, dense: Tensor | Quantised) -> bool:
    """Whether `run` takes these operands, by every kernel that their dtypes allow: for others there is the reference.

    Args:
        values: the gradient or its levels, of any shape.
        dense: the other operand.
    """
    bare = dense.values if isinstance(dense, Quantised) else dense
    known = values.dtype in (torch.int8, *_DTYPES) and dense.dtype in _DTYPES
    return (
        known
        and min(values.numel(), bare.numel()) > 0
        and values.device == bare.device
        and _capable(values.device)
    )


@functools.cache
def _capable(device: torch.device) -> bool:
    if INTERPRETED:
        return device.type == "cpu"
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= _CAPABILITY
    )


def run(
    kernel: str, values: Tensor, step: float | None, dense: Tensor | Quantised, *, transposed: bool = False
) -> Tensor:
    """``G D``, shape (a, i), in the dtype of D: `retrograde.kernels.linear.run` on a GPU.

    Kernels, by what they round and what they visit:

    - ``dense``: everything, in the operand's own precision (torch's settings decide about TF32);
    - ``bfloat16``: everything, D rounded to bfloat16, and so is the result;
    - ``int8``: everything, each column of D rounded to 8 bits, sums in int32: `cuda_products.int8_product`;
    - ``skip-blocks``: what lies in strips that are not all zero: `cuda_products.skip_product`.

    Args:
        kernel: one of `KERNELS`.
        values: G, (a, m), or (m, a) when `transposed`: int8 levels, float32, bfloat16 or float16.
        step: of the levels; None for a gradient that is no multiple of one.
        dense: D, (m, i): float32, bfloat16, float16, or what an 8-bit forward pass left quantised.
        transposed: whether `values` holds Gᵀ.

    Raises:
        ValueError: a kernel that there is not, or operands that it does not take.
    """
    if isinstance(dense, Quantised):
        if kernel == "int8":
            return quantised_product(
                values, step, dense.values, dense.scale, dense.dtype, transposed=transposed
            )
        dense = dense.dense()
    if kernel == "int8":
        return int8_product(values, step, dense, transposed=transposed)
    if kernel == "skip-blocks":
        return skip_product(values, step, dense, transposed=transposed)
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} must be one of {', '.join(map(repr, KERNELS))}.")
    factor = values.T if transposed else values
    dtype = torch.bfloat16 if kernel == "bfloat16" else dense.dtype
    if dtype == torch.float16:
        # Sums of bare levels could overflow on the way.
        return (factor.to(dtype) if step is None else factor.to(dtype) * step) @ dense
    # The step is applied to the sums before they are rounded, at no cost. What is added, times 0, is not read.
    nothing = dense.new_empty((), dtype=dtype).expand(factor.shape[0], dense.shape[1])
    return torch.addmm(
        nothing, factor.to(dtype), dense.to(dtype), beta=0, alpha=1.0 if step is None else step
    ).to(dense.dtype)


# Statistics.


@_jit
def _moments_kernel(delta, peaks, means, squares, size, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
    # Magnitudes compare as their bit patterns do; those of NaN are the largest.
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    # Scaled by the peak's power of two, which is exact: squares of small gradients would vanish in float32.
    exponent = tl.minimum(tl.maximum(peak & 0x7F800000, 0x00800000), 0x7E800000)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    y = x * inverse
    count = tl.minimum(size - block * BLOCK, BLOCK)
    mean = tl.div_rn(tl.sum(y, 0), count.to(tl.float32))
    away = tl.where(mask, y - mean, 0.0)
    square = tl.sum(away * away, 0)
    scale = exponent.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(peaks + block, peak)
    tl.store(means + block, mean.to(tl.float64) * scale)
    tl.store(squares + block, square.to(tl.float64) * scale * scale)


@_jit(do_not_specialize=["size", "blocks"])
def _combine_kernel(peaks, means, squares, found, size, blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    lanes = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK,), tl.float64)
    largest = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, blocks, CHUNK):
        at = start + lanes
        count = tl.maximum(tl.minimum(size - at.to(tl.int64) * BLOCK, BLOCK), 0).to(tl.float64)
        sums += count * tl.load(means + at, mask=at < blocks, other=0.0)
        largest = tl.maximum(largest, tl.load(peaks + at, mask=at < blocks, other=0))
    mean = tl.sum(sums, 0) / size
    # Each block's deviations are from its own mean (Chan et al.): nothing cancels.
    sums = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, blocks, CHUNK):
        at = start + lanes
        count = tl.maximum(tl.minimum(size - at.to(tl.int64) * BLOCK, BLOCK), 0).to(tl.float64)
        away = tl.load(means + at, mask=at < blocks, other=0.0) - mean
        sums += tl.load(squares + at, mask=at < blocks, other=0.0) + count * away * away
    tl.store(found, tl.sum(sums, 0) / size)
    tl.store(found + 1, tl.max(largest, 0).to(tl.float32, bitcast=True).to(tl.float64))


def statistics(delta: Tensor) -> tuple[float, float]:
    """Standard deviation (biased) and peak of a gradient: `retrograde.maths.dither.statistics`, in one pass.

    Args:
        delta: float32, bfloat16 or float16, any shape, with at least one entry.

    Returns:
        ``(std, peak)``; neither is finite where an entry is not.

    Raises:
        ValueError: another dtype, or no entries.
    """
    _check(delta)
    if not delta.numel():
        raise ValueError("statistics of a gradient without entries: there are none.")
    flat = delta.contiguous()
    blocks = blocks_of(flat.numel(), _BLOCK)
    peaks = flat.new_empty(blocks, dtype=torch.int32)
    means, squares, found = (flat.new_empty(n, dtype=torch.float64) for n in (blocks, blocks, 2))
    with device_of(flat):
        _moments_kernel[(blocks,)](flat, peaks, means, squares, flat.numel(), BLOCK=_BLOCK)
        _combine_kernel[(1,)](peaks, means, squares, found, flat.numel(), blocks, BLOCK=_BLOCK, CHUNK=_CHUNK)
    variance, peak = found.tolist()
    return math.sqrt(variance), peak


# Dithering.


@_jit(do_not_specialize=["key"])
def _nsd_kernel(delta, levels, found, step, key, limit, size, QUADS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    # Philox4x32-10, one counter for four entries: see retrograde.maths.philox.
    counter = block * QUADS + tl.arange(0, QUADS)
    nothing = tl.zeros((QUADS,), tl.uint32)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    first, second, third, fourth = tl.philox(key, low, high, nothing, nothing)
    words = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    noise = (words >> 8).to(tl.float32) * (2.0**-24)
    at = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    mask = at < size
    x = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
    # Rounded to nearest: the plain division of GPUs is not, and levels would differ from the CPU's.
    ratio = tl.div_rn(x, step)
    whole = tl.floor(ratio)
    whole += tl.where(noise < ratio - whole, 1.0, 0.0)
    level = tl.minimum(tl.maximum(whole, -limit), limit)
    tl.store(levels + at, level.to(tl.int8), mask=mask)
    zeros = tl.sum(((level == 0.0) & mask).to(tl.int32), 0)
    largest = tl.max(tl.abs(level), 0)
    tl.atomic_add(found, zeros.to(tl.int64), sem="relaxed")
    tl.atomic_max(found + 1, largest.to(tl.int64), sem="relaxed")


def nsd(delta: Tensor, step: float, key: int, bits: int) -> Levels:
    """Integer levels of the dithered gradient, and what there is to count of them, in one pass.

    Equation (2) of `retrograde.maths.dither`, with the noise of `retrograde.maths.philox.uniform`: the levels are those
    of `retrograde.kernels.reference.nsd` on the CPU, bit for bit. (torch's own division by a number, on a GPU, is a
    multiplication by its inverse, so the reference there may differ where a sum is within rounding of an integer.)

    Args:
        delta: δ, finite, any shape: float32, bfloat16 or float16, computed in float32.
        step: Δ > 0.
        key: 64-bit key of the noise.
        bits: width of the signed levels, 2 to 8.

    Returns:
        int8 levels with the shape of `delta`, contiguous.

    Raises:
        ValueError: another dtype or width.
    """
    _check(delta)
    if not _BITS[0] <= bits <= _BITS[1]:
        raise ValueError(
            f"bits={bits}: levels of {_BITS[0]} to {_BITS[1]} bits only; the reference has others."
        )
    flat = delta.contiguous()
    levels = torch.empty_like(flat, dtype=torch.int8)
    if not flat.numel():
        return Levels(levels, 0, 0)
    found = torch.zeros(2, dtype=torch.int64, device=flat.device)
    # The signed number of the same bits: unsigned ones would be another type, and a compilation more.
    signed = key - (1 << 64) if key >> 63 else key
    limit = float(dither.largest_level(bits))
    with device_of(flat):
        _nsd_kernel[(blocks_of(flat.numel(), _BLOCK),)](
            flat, levels, found, step, signed, limit, flat.numel(), QUADS=_BLOCK // 4
        )
    zeros, largest = found.tolist()
    return Levels(levels, zeros, largest)


def _check(delta: Tensor) -> None:
    if delta.dtype not in _DTYPES:
        raise ValueError(f"a gradient in {delta.dtype}: kernels take float32, bfloat16 and float16 only.")
