"""`retrograde.kernels.pack` on a CPU: one pass to pack, one to unpack, the same bits on any number of threads."""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from retrograde.kernels.cpu_elementwise import BLOCK, fill_noise
from retrograde.kernels.cpu_memory import array
from retrograde.kernels.cpu_threads import inlined, jit, use_threads

_GROUP = 256


@inlined
def _round(x: Any, levels: Any, most: Any) -> Any:
    """Levels of a group in place of their noise; its least entry and Δ."""
    low, high, bad = x[0], x[0], np.float32(0)
    for j in range(x.size):
        low, high = min(low, x[j]), max(high, x[j])
        bad += x[j] * np.float32(0)  # 0, or NaN
    step = (high - low) / most
    unit = step if step > 0 else np.float32(1)
    for j in range(x.size):
        ratio = (x[j] - low) / unit
        whole = np.floor(ratio)
        if levels[j] * np.float32(2.0**-24) < ratio - whole:
            whole += np.float32(1)
        levels[j] = min(max(whole, np.float32(0)), most)
    return low + bad, step + bad


@jit
def _pack(x: Any, out: Any, ranges: Any, key0: Any, key1: Any, bits: Any) -> None:
    parts = 8 // bits
    width, most = _GROUP // parts, np.float32((1 << bits) - 1)
    for b in prange((x.size + BLOCK - 1) // BLOCK):
        levels = np.zeros(BLOCK + 4, np.float32)
        end = min(x.size, (b + 1) * BLOCK)
        fill_noise(b, end - b * BLOCK, key0, key1, levels)
        for g in range(b * (BLOCK // _GROUP), (end + _GROUP - 1) // _GROUP):
            at = g * _GROUP
            inside = levels[at - b * BLOCK : at - b * BLOCK + _GROUP]
            size = min(end, at + _GROUP) - at
            ranges[g, 0], ranges[g, 1] = _round(x[at : at + size], inside[:size], most)
            for j in range(size, _GROUP):
                inside[j] = np.float32(0)
            row = out[g * width : (g + 1) * width]
            for i in range(width):
                row[i] = np.uint8(np.int32(inside[i]))
            for part in range(1, parts):
                for i in range(width):
                    row[i] |= np.uint8(np.int32(inside[part * width + i]) << (part * bits))


@jit
def _unpack(levels: Any, ranges: Any, out: Any, bits: Any) -> None:
    parts = 8 // bits
    width, mask = _GROUP // parts, np.uint8((1 << bits) - 1)
    for g in prange(ranges.shape[0]):
        low, step = ranges[g, 0], ranges[g, 1]
        row = levels[g * width : (g + 1) * width]
        for part in range(parts):
            first = g * _GROUP + part * width
            shift = np.uint8(part * bits)
            for i in range(min(width, out.size - first)):
                out[first + i] = low + np.float32((row[i] >> shift) & mask) * step


def pack(flat: Tensor, key: int, bits: int) -> tuple[Tensor, Tensor]:
    """Levels and ranges of float32 entries."""
    groups = -(-flat.numel() // _GROUP)
    levels = torch.empty(groups * _GROUP * bits // 8, dtype=torch.uint8)
    ranges = torch.empty(groups, 2)
    if groups:
        use_threads(flat.numel())
        _pack(
            array(flat), array(levels), array(ranges), np.int64(key & 0xFFFFFFFF), np.int64(key >> 32), bits
        )
    return levels, ranges


def unpack(levels: Tensor, ranges: Tensor, size: int) -> Tensor:
    """The first `size` entries, float32."""
    out = torch.empty(size)
    if size:
        use_threads(size)
        bits = 8 * levels.numel() // (ranges.shape[0] * _GROUP)
        _unpack(array(levels), array(ranges), array(out), bits)
    return out


@jit
def _signs(x: Any, out: Any) -> None:
    for b in prange(out.size):
        byte = np.uint8(0)
        for j in range(min(8, x.size - 8 * b)):
            byte |= np.uint8(x[8 * b + j] > 0) << np.uint8(j)
        out[b] = byte


@jit
def _where_positive(x: Any, bits: Any, out: Any) -> None:
    for b in prange(bits.size):
        byte = bits[b]
        for j in range(min(8, x.size - 8 * b)):
            out[8 * b + j] = x[8 * b + j] if (byte >> np.uint8(j)) & np.uint8(1) else 0


def signs(flat: Tensor) -> Tensor:
    """Whether entries are above zero, eight to a byte, the first one lowest."""
    out = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8)
    use_threads(flat.numel())
    _signs(array(flat), array(out))
    return out


def where_positive(delta: Tensor, bits: Tensor) -> Tensor:
    """Contiguous δ where a bit is set, 0 elsewhere."""
    out = torch.empty_like(delta)
    use_threads(delta.numel())
    _where_positive(array(delta).reshape(-1), array(bits), array(out).reshape(-1))
    return out
