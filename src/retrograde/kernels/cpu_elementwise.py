"""Passes over every entry of a gradient: its statistics, its zeros, its dithering.

Work is cut into blocks of fixed size, and sums over blocks are taken in order: the same bits on any number of threads.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import prange
from numba.np.numpy_support import carray
from torch import Tensor

from retrograde.kernels.cpu_memory import flat, in_memory_order, lent, lies_channels_last, patterns
from retrograde.kernels.cpu_threads import address, inlined, jit, serial, use_threads
from retrograde.kernels.delta import Levels

BLOCK = 4096
"""Entries in a block: its noise stays in the first-level cache."""
_INFINITE = 0x7F800000
"""The pattern of an infinite float32; those of NaN are larger."""


@inlined
def _block(x: Any, bits: Any, b: Any, sums: Any, squares: Any, peaks: Any, zeros: Any) -> None:
    block = x[b * BLOCK : min(x.size, (b + 1) * BLOCK)]
    pattern = bits[b * BLOCK : min(x.size, (b + 1) * BLOCK)]
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


@jit
def _statistics(x: Any, bits: Any, sums: Any, squares: Any, peaks: Any, zeros: Any) -> None:
    for b in prange(sums.size):
        _block(x, bits, b, sums, squares, peaks, zeros)


@serial
def _together(size: Any, sums: Any, squares: Any, peaks: Any, zeros: Any) -> Any:
    """Standard deviation, pattern of the peak, number of zeros. In one call: a small gradient has one block."""
    mean = sums.sum() / size
    spread, peak, none = 0.0, np.int32(0), np.int64(0)
    for b in range(sums.size):
        # Each block's deviations are from its own mean (Chan et al.): nothing cancels.
        entries = min(BLOCK, size - b * BLOCK)
        away = sums[b] / entries - mean
        spread += squares[b] + entries * away * away
        peak = max(peak, peaks[b])
        none += zeros[b]
    return math.sqrt(spread / size), peak, none


@dataclass(frozen=True)
class Statistics:
    """Of all entries of a gradient; `std` and `peak` are not finite where an entry is not."""

    std: float
    peak: float
    zeros: int


def statistics(delta: Tensor) -> Statistics:
    """Standard deviation (biased), largest magnitude and number of zeros of a float32 gradient, in one pass."""
    _, entries = in_memory_order(delta)
    use_threads(entries.size)
    blocks = -(-entries.size // BLOCK)
    sums, squares = np.empty(blocks), np.empty(blocks)
    peaks, zeros = np.empty(blocks, np.int32), np.empty(blocks, np.int64)
    _statistics(entries, entries.view(np.int32), sums, squares, peaks, zeros)
    std, peak, none = _together(entries.size, sums, squares, peaks, zeros)
    return Statistics(std, float(np.int32(peak).view(np.float32)), none)


@jit
def _count_zeros(bits: Any, mask: Any, zeros: Any) -> None:
    for b in prange(zeros.size):
        block = bits[b * BLOCK : min(bits.size, (b + 1) * BLOCK)]
        none = np.int32(0)
        for j in range(block.size):
            none += np.int32((block[j] & mask) == 0)
        zeros[b] = none


def count_zeros(tensor: Tensor) -> int:
    """Number of zero entries, of a dtype in `cpu_memory.PATTERNS`."""
    bits, mask = patterns(tensor.permute(0, 2, 3, 1) if lies_channels_last(tensor) else tensor)
    use_threads(bits.size)
    zeros = np.empty(-(-bits.size // BLOCK), np.int64)
    _count_zeros(bits.reshape(-1), mask, zeros)
    return int(zeros.sum())


@inlined
def _random(counter: Any, key0: Any, key1: Any) -> Any:
    """Four random numbers of 24 bits (Philox4x32-7: see `retrograde.maths.philox`)."""
    half, eighth = np.uint64(32), np.uint32(8)
    c0, c1, c2, c3 = np.uint32(counter), np.uint32(counter >> half), np.uint32(0), np.uint32(0)
    k0, k1 = np.uint32(key0), np.uint32(key1)
    for _ in range(7):
        # Products of 32-bit words: one instruction, where 64-bit ones take three.
        p0, p1 = np.uint64(c0) * np.uint64(0xD2511F53), np.uint64(c2) * np.uint64(0xCD9E8D57)
        c0, c2 = np.uint32(p1 >> half) ^ c1 ^ k0, np.uint32(p0 >> half) ^ c3 ^ k1
        c1, c3 = np.uint32(p1), np.uint32(p0)
        k0, k1 = np.uint32(k0 + np.uint32(0x9E3779B9)), np.uint32(k1 + np.uint32(0xBB67AE85))
    return (
        np.float32(np.int32(c0 >> eighth)),
        np.float32(np.int32(c1 >> eighth)),
        np.float32(np.int32(c2 >> eighth)),
        np.float32(np.int32(c3 >> eighth)),
    )


@inlined
def fill_noise(b: Any, size: Any, key0: Any, key1: Any, noise: Any) -> None:
    """Of block number `b` of a gradient: one counter for four entries side by side."""
    for i in range((size + 3) // 4):
        found = _random(np.uint64(b * (BLOCK // 4) + i), key0, key1)
        noise[4 * i], noise[4 * i + 1], noise[4 * i + 2], noise[4 * i + 3] = found


@inlined
def _levels(block: Any, step: Any, limit: Any, levels: Any) -> Any:
    """Levels of a block, as float32, in place of their noise; the number that are 0, and the largest magnitude."""
    for j in range(block.size):
        ratio = block[j] / step
        whole = np.floor(ratio)
        if levels[j] * np.float32(2.0**-24) < ratio - whole:
            whole += np.float32(1)
        levels[j] = min(max(whole, -limit), limit)
    none, most = np.int32(0), np.int32(0)
    for j in range(block.size):
        level = np.int32(levels[j])
        none += np.int32(level == 0)
        most = max(most, abs(level))
    return none, most


@jit
def _nsd(x: Any, q: Any, step: Any, key0: Any, key1: Any, limit: Any, zeros: Any, largest: Any) -> None:
    for b in prange(zeros.size):
        block = x[b * BLOCK : min(x.size, (b + 1) * BLOCK)]
        out = q[b * BLOCK : min(x.size, (b + 1) * BLOCK)]
        levels = np.empty(BLOCK, np.float32)
        fill_noise(b, block.size, key0, key1, levels)
        zeros[b], largest[b] = _levels(block, step, limit, levels)
        for j in range(block.size):
            out[j] = np.int8(np.int32(levels[j]))


@jit
def _nsd_last(
    x: Any, q: Any, pixels: Any, step: Any, key0: Any, key1: Any, limit: Any, zeros: Any, largest: Any
) -> None:
    """`_nsd` of x (four pixels, channels), channels last, with the noise that each entry has channels first."""
    channels = x.shape[1] // 4
    quarter = pixels // 4
    for b in prange(zeros.size):
        levels = np.empty(x.shape[1], np.float32)
        first, second = levels[:channels], levels[channels : 2 * channels]
        third, fourth = levels[2 * channels : 3 * channels], levels[3 * channels :]
        none, most = np.int64(0), np.int32(0)
        for four in range(b * x.shape[0] // zeros.size, (b + 1) * x.shape[0] // zeros.size):
            counter = np.uint64(four // quarter * channels * quarter + four % quarter)
            for i in range(channels):
                first[i], second[i], third[i], fourth[i] = _random(counter, key0, key1)
                counter += np.uint64(quarter)
            zero, peak = _levels(x[four], step, limit, levels)
            none, most = none + zero, max(most, peak)
            out = q[four]
            for j in range(levels.size):
                out[j] = np.int8(np.int32(levels[j]))
        zeros[b], largest[b] = none, most


@serial
def _dither(source: Any, target: Any, size: Any, scale: Any, limit: Any, key0: Any, key1: Any) -> Any:
    """A small gradient in one call, on one thread: statistics, then δ̃ itself in place of its levels.

    By address: to make arrays of two small tensors takes longer than to dither one.
    """
    x, out = carray(address(source), size, np.float32), carray(address(target), size, np.float32)
    bits = carray(address(source), size, np.int32)
    blocks = (size + BLOCK - 1) // BLOCK
    sums, squares = np.empty(blocks), np.empty(blocks)
    peaks, zeros = np.empty(blocks, np.int32), np.empty(blocks, np.int64)
    for b in range(blocks):
        _block(x, bits, b, sums, squares, peaks, zeros)
    std, pattern, own_zeros = _together(size, sums, squares, peaks, zeros)
    if pattern >= np.int32(_INFINITE) or not std > 0:
        return 0.0, pattern, own_zeros, np.int64(0), np.int32(0)
    # The pattern of a float32: sign, exponent, mantissa.
    exponent, mantissa = pattern >> 23, pattern & 0x7FFFFF
    fraction = mantissa / 8388608.0
    largest = math.ldexp(fraction, -126) if exponent == 0 else math.ldexp(1 + fraction, exponent - 127)
    wide_step = max(scale * std, largest / limit)
    step = np.float32(wide_step)
    if not (step > 0 and step < np.inf):
        return 0.0, pattern, own_zeros, np.int64(0), np.int32(0)
    none, most = np.int64(0), np.int32(0)
    levels = np.empty(min(size + 3, BLOCK), np.float32)
    for b in range(blocks):
        block = x[b * BLOCK : min(size, (b + 1) * BLOCK)]
        fill_noise(b, block.size, key0, key1, levels)
        zero, peak = _levels(block, step, np.float32(limit), levels)
        for j in range(block.size):
            out[b * BLOCK + j] = levels[j] * step
        none, most = none + zero, max(most, peak)
    return wide_step, pattern, own_zeros, none, most


def dither(delta: Tensor, scale: float, key: int, bits: int) -> tuple[Tensor, float, bool, int, int, int]:
    """Statistics, step and rounding of a small float32 gradient in one call: what `nsd` gives, times its step.

    Returns:
        δ̃ (whatever was in memory where Δ is 0); Δ, 0 where δ does not vary or is not finite; whether it is finite;
        zeros of δ and of δ̃; the largest level.
    """
    delta = delta.resolve_neg().contiguous()
    out, limit = torch.empty_like(delta), float(2 ** (bits - 1) - 1)
    step, pattern, own, zeros, largest = _dither(
        delta.data_ptr(), out.data_ptr(), delta.numel(), scale, limit, key & 0xFFFFFFFF, key >> 32
    )
    return out, step, pattern < _INFINITE, own, zeros, largest


def nsd(delta: Tensor, step: float, key: int, bits: int) -> Levels:
    """Integer levels of the dithered float32 gradient, in its memory order; the noise is `philox.uniform`'s."""
    use_threads(delta.numel())
    levels = lent((delta.numel(),), np.int8)
    blocks = -(-delta.numel() // BLOCK)
    zeros, largest = np.empty(blocks, np.int64), np.empty(blocks, np.int32)
    limit = np.float32(2 ** (bits - 1) - 1)
    rest = (np.float32(step), np.int64(key & 0xFFFFFFFF), np.int64(key >> 32), limit, zeros, largest)
    last, values = lies_channels_last(delta), torch.from_numpy(levels)
    if last and delta.shape[2:].numel() % 4 == 0:
        n, c, h, w = delta.shape
        entries = flat(delta.permute(0, 2, 3, 1)).reshape(-1, 4 * c)
        _nsd_last(entries, levels.reshape(-1, 4 * c), h * w, *rest)
        values = values.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        # Four entries that share a random number are not side by side for every channel.
        _nsd(flat(delta), levels, *rest)
        values = values.view(delta.shape)
        values = values.contiguous(memory_format=torch.channels_last) if last else values
    return Levels(values, int(zeros.sum()), int(largest.max(initial=0)))
