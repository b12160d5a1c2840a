"""Dithering on a GPU, in Triton: a pass over the gradient for its step, and one that rounds it and counts.

The contract is that of the CPU's: levels are those of `retrograde.kernels.reference.nsd` on the CPU bit for bit. Every
result is the same in every run: sums over blocks are taken in a fixed order, and atomic operations touch whole numbers
alone. `dither` never waits for the device, `statistics` and `nsd` wait for it once.

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

from retrograde.kernels.delta import Levels
from retrograde.maths import dither as maths

_INTERPRETED: bool = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
_HALVES = {torch.float32: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Dtypes that the kernels take, and what Triton calls those of half precision."""
_BLOCK = 4096
"""Entries in a block of a pass."""
_CHUNK = 1024
"""Blocks whose partial sums are combined at a time."""
_BITS = (2, 8)
_CAPABILITY = (8, 0)

_jit: Any = triton.jit


def supports(delta: Tensor) -> bool:
    """Whether the kernels take this gradient: for others there is plain torch."""
    return delta.dtype in _HALVES and delta.numel() > 0 and _capable(delta.device)


@functools.cache
def _capable(device: torch.device) -> bool:
    if _INTERPRETED:
        return device.type == "cpu"
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= _CAPABILITY
    )


# The step, and what it comes from.


@_jit
def _moments_kernel(delta, peaks, means, squares, size, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(delta + block * BLOCK).to(tl.float32)
    # Magnitudes compare as their bit patterns do; those of NaN are the largest.
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    # Scaled by the peak's power of two, which is exact: squares of small gradients would vanish in float32.
    exponent = tl.minimum(tl.maximum(peak & 0x7F800000, 0x00800000), 0x7E800000)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    # From the first entry on: a gradient that does not vary has no deviation, to the bit.
    y = tl.where(mask, x * inverse - first * inverse, 0.0)
    count = tl.minimum(size - block * BLOCK, BLOCK)
    mean = tl.div_rn(tl.sum(y, 0), count.to(tl.float32))
    away = tl.where(mask, y - mean, 0.0)
    square = tl.sum(away * away, 0)
    scale = exponent.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(peaks + block, peak)
    tl.store(means + block, mean.to(tl.float64) * scale + first.to(tl.float64))
    tl.store(squares + block, square.to(tl.float64) * scale * scale)


@_jit(do_not_specialize=["size", "blocks"])
def _combine_kernel(
    peaks, means, squares, found, size, blocks, scale, limit,
    HALF: tl.constexpr, CONSTANT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
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
    variance = tl.sum(sums, 0) / size
    peak = tl.max(largest, 0).to(tl.float32, bitcast=True).to(tl.float64)
    step = tl.maximum(scale * tl.sqrt(variance), peak / limit).to(tl.float32)
    if HALF is not None:
        # Up to a number of δ's own precision: ±Δ, most of what is not zero, is then exact, and nothing saturates.
        near = step.to(HALF)
        above = (near.to(tl.int16, bitcast=True) + 1).to(HALF, bitcast=True)
        step = tl.where(near.to(tl.float32) < step, above, near).to(tl.float32)
    finite = peak < float("inf")
    varies = (peak if CONSTANT else variance) > 0.0
    usable = finite & varies & (step > 0.0) & (step < float("inf"))
    tl.store(found, tl.where(usable, step, 0.0).to(tl.float64))
    tl.store(found + 1, finite.to(tl.float64))
    tl.store(found + 2, variance)
    tl.store(found + 3, peak)


def _find(flat: Tensor, scale: float, limit: float, *, constant: bool) -> Tensor:
    """Δ as `dither` has it, whether δ is finite, its variance and its peak: float64, (4,), on the device."""
    size, blocks = flat.numel(), -(-flat.numel() // _BLOCK)
    peaks = flat.new_empty(blocks, dtype=torch.int32)
    means, squares, found = (flat.new_empty(n, dtype=torch.float64) for n in (blocks, blocks, 4))
    kind = {"HALF": _HALVES[flat.dtype], "CONSTANT": constant, "BLOCK": _BLOCK, "CHUNK": _CHUNK}
    # Triton launches on the current device.
    with torch.cuda.device_of(flat):
        _moments_kernel[(blocks,)](flat, peaks, means, squares, size, BLOCK=_BLOCK)
        _combine_kernel[(1,)](peaks, means, squares, found, size, blocks, float(scale), limit, **kind)
    return found


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
    _, _, variance, peak = _find(delta.contiguous(), 0.0, 1.0, constant=False).tolist()
    return math.sqrt(variance), peak


# Rounding.


@_jit(do_not_specialize=["key"])
def _round_kernel(delta, out, found, counts, key, limit, size, QUADS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    # Philox4x32-7, one counter for four entries: see retrograde.maths.philox.
    counter = block * QUADS + tl.arange(0, QUADS)
    nothing = tl.zeros((QUADS,), tl.uint32)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    first, second, third, fourth = tl.philox(key, low, high, nothing, nothing, n_rounds=7)
    words = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    noise = (words >> 8).to(tl.float32) * (2.0**-24)
    at = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    mask = at < size
    x = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
    step = tl.load(found).to(tl.float32)
    rounds = step > 0.0
    # Rounded to nearest: the plain division of GPUs is not, and levels would differ from the CPU's.
    ratio = tl.div_rn(x, tl.where(rounds, step, 1.0))
    whole = tl.floor(ratio)
    whole += tl.where(noise < ratio - whole, 1.0, 0.0)
    level = tl.where(rounds, tl.minimum(tl.maximum(whole, -limit), limit), 0.0)
    value = level if out.dtype.element_ty == tl.int8 else tl.where(rounds, level * step, x)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
    own = tl.sum(((x == 0.0) & mask).to(tl.int32), 0)
    zeros = tl.sum(((value == 0.0) & mask).to(tl.int32), 0)
    largest = tl.max(tl.abs(level), 0)
    tl.atomic_add(counts, own.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, zeros.to(tl.int64), sem="relaxed")
    tl.atomic_max(counts + 2, largest.to(tl.int64), sem="relaxed")


def _round(flat: Tensor, out: Tensor, found: Tensor, key: int, limit: float) -> Tensor:
    """Fill `out`, with levels where it is int8; zeros of δ, of `out`, and the largest level: int64, on the device."""
    counts = torch.zeros(3, dtype=torch.int64, device=flat.device)
    # The signed number of the same bits: unsigned ones would be another type, and a compilation more.
    signed = key - (1 << 64) if key >> 63 else key
    with torch.cuda.device_of(flat):
        _round_kernel[(-(-flat.numel() // _BLOCK),)](
            flat, out, found, counts, signed, limit, flat.numel(), QUADS=_BLOCK // 4
        )
    return counts


def dither(
    delta: Tensor, scale: float, bits: int, key: int, *, constant: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dithered gradient itself; whatever is found on the way stays on the device, so that the host need not wait.

    Equations (1) and (2) of `retrograde.maths.dither`: the levels are those of `nsd` for the step that is returned. In
    half precision Δ is rounded up to a number of that precision; a δ̃ beyond its range is Inf, as any gradient there.

    Args:
        delta: δ, any shape with at least one entry: float32, bfloat16 or float16, computed in float32.
        scale: s of Δ = max(s · std(δ), max|δ| / limit).
        bits: width of the signed levels, 2 to 8.
        key: 64-bit key of the noise.
        constant: whether a δ that does not vary is rounded too.

    Returns:
        δ̃ in the dtype of δ, contiguous, and 0-dimensional tensors: Δ, which is 0 where δ̃ is δ itself, as it does not
        vary, is all zero or is not finite; the largest level; whether δ is finite (1 or 0); zeros of δ; zeros of δ̃.

    Raises:
        ValueError: another dtype or width, or no entries.
    """
    _check(delta, bits)
    flat = delta.contiguous()
    limit = float(maths.largest_level(bits))
    found = _find(flat, scale, limit, constant=constant)
    out = torch.empty_like(flat)
    own, zeros, largest = _round(flat, out, found, key, limit).unbind()
    return out, found[0], largest, found[1], own, zeros


def nsd(delta: Tensor, step: float, key: int, bits: int) -> Levels:
    """Integer levels of the dithered gradient, and what there is to count of them, in one pass.

    Equation (2) of `retrograde.maths.dither`, with the noise of `retrograde.maths.philox.uniform`: the levels are those
    of `retrograde.kernels.reference.nsd` on the CPU, bit for bit. (torch's own division by a number, on a GPU, is a
    multiplication by its inverse, so the reference there may differ where a sum is within rounding of an integer.)

    Args:
        delta: δ, finite, any shape with at least one entry: float32, bfloat16 or float16, computed in float32.
        step: Δ > 0.
        key: 64-bit key of the noise.
        bits: width of the signed levels, 2 to 8.

    Returns:
        int8 levels with the shape of `delta`, contiguous.

    Raises:
        ValueError: another dtype or width, or no entries.
    """
    _check(delta, bits)
    flat = delta.contiguous()
    levels = torch.empty_like(flat, dtype=torch.int8)
    given = torch.full((), step, dtype=torch.float64, device=flat.device)
    _, zeros, largest = _round(flat, levels, given, key, float(maths.largest_level(bits))).tolist()
    return Levels(levels, zeros, largest)


def _check(delta: Tensor, bits: int = _BITS[1]) -> None:
    if delta.dtype not in _HALVES:
        raise ValueError(f"a gradient in {delta.dtype}: kernels take float32, bfloat16 and float16 only.")
    if not delta.numel():
        raise ValueError("a gradient without entries: there is nothing to round.")
    if not _BITS[0] <= bits <= _BITS[1]:
        raise ValueError(
            f"bits={bits}: levels of {_BITS[0]} to {_BITS[1]} bits only; the reference has others."
        )
