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


_INFINITE = np.int32(0x7F800000)
_SIGN_OFF = np.int32(0x7FFFFFFF)
_LARGEST = np.float32(np.finfo(np.float32).max)
_HALF, _WHOLE = np.float32(0.5), np.float32(1)


@inlined
def _ends(bits: Any, found: Any) -> Any:
    """Patterns of the least and the largest float32 of those in `bits`, to `found`; whether all are finite."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for j in range(bits.size):
        # Turned so that whole numbers compare as the floats do, which vectorises; NaN lies beyond infinity.
        turned = bits[j] ^ ((bits[j] >> np.int32(31)) & _SIGN_OFF)
        low, high = min(low, turned), max(high, turned)
    found[0] = low ^ ((low >> np.int32(31)) & _SIGN_OFF)
    found[1] = high ^ ((high >> np.int32(31)) & _SIGN_OFF)
    return high < _INFINITE and low > -_INFINITE - np.int32(1)


@inlined
def _round(x: Any, low: Any, step: Any, most: Any, half: Any, levels: Any) -> None:
    """Levels of a group in place of their noise; `low` and `step` are times `half`, as x is here."""
    unit = step if step > 0 else np.float32(1)
    for j in range(x.size):
        ratio = (x[j] * half - low) / unit
        whole = np.floor(ratio)
        if levels[j] * np.float32(2.0**-24) < ratio - whole:
            whole += np.float32(1)
        levels[j] = min(max(whole, np.float32(0)), most)


@jit
def _pack(x: Any, pattern: Any, out: Any, ranges: Any, ends: Any, key0: Any, key1: Any, bits: Any) -> None:
    """`pattern` and `ends` are the memory of `x` and of `ranges` as whole numbers."""
    parts = 8 // bits
    width, most = _GROUP // parts, np.float32((1 << bits) - 1)
    for b in prange((x.size + BLOCK - 1) // BLOCK):
        levels = np.zeros(BLOCK + 4, np.float32)
        end = min(x.size, (b + 1) * BLOCK)
        fill_noise(b, end - b * BLOCK, key0, key1, levels)
        for g in range(b * (BLOCK // _GROUP), (end + _GROUP - 1) // _GROUP):
            at = g * _GROUP
            last = min(end, at + _GROUP)
            inside = levels[at - b * BLOCK : at - b * BLOCK + _GROUP]
            finite = _ends(pattern[at:last], ends[g])
            half = _HALF if ranges[g, 1] - ranges[g, 0] > _LARGEST else _WHOLE
            low = ranges[g, 0] * half
            step = (ranges[g, 1] * half - low) / most
            if finite:
                _round(x[at:last], low, step, most, half, inside[: last - at])
                ranges[g, 1] = step / half
            else:
                inside[:] = 0
                ranges[g, 0], ranges[g, 1] = np.nan, np.nan
            for j in range(last - at, _GROUP):
                inside[j] = np.float32(0)
            row = out[g * width : (g + 1) * width]
            for i in range(width):
                row[i] = np.uint8(np.int32(inside[i]))
            for part in range(1, parts):
                more, shift = inside[part * width : (part + 1) * width], np.int32(part * bits)
                for i in range(width):
                    row[i] |= np.uint8(np.int32(more[i]) << shift)


@jit
def _unpack(levels: Any, ranges: Any, out: Any, bits: Any) -> None:
    parts = 8 // bits
    width, mask = _GROUP // parts, np.uint8((1 << bits) - 1)
    for g in prange(ranges.shape[0]):
        # The last level may lie beyond float32, where Δ was rounded up too.
        half = _HALF if ranges[g, 0] + np.float32(mask) * ranges[g, 1] > _LARGEST else _WHOLE
        low, step, largest = ranges[g, 0] * half, ranges[g, 1] * half, _LARGEST * half
        row = levels[g * width : (g + 1) * width]
        for part in range(parts):
            first = g * _GROUP + part * width
            shift = np.uint8(part * bits)
            target = out[first : min(out.size, first + width)]
            for i in range(target.size):
                found = low + np.float32((row[i] >> shift) & mask) * step
                # Written so that NaN stays.
                target[i] = (largest if found > largest else found) / half


def pack(flat: Tensor, key: int, bits: int) -> tuple[Tensor, Tensor]:
    """Levels and ranges of float32 entries."""
    groups = -(-flat.numel() // _GROUP)
    levels = torch.empty(groups * _GROUP * bits // 8, dtype=torch.uint8)
    ranges = torch.empty(groups, 2)
    if groups:
        use_threads(flat.numel())
        x, ends = array(flat), array(ranges)
        keys = np.int64(key & 0xFFFFFFFF), np.int64(key >> 32)
        _pack(x, x.view(np.int32), array(levels), ends, ends.view(np.int32), *keys, bits)
    return levels, ranges


def unpack(levels: Tensor, ranges: Tensor, size: int) -> Tensor:
    """The first `size` entries, float32."""
    out = torch.empty(size)
    if size:
        use_threads(size)
        bits = 8 * levels.numel() // (ranges.shape[0] * _GROUP)
        _unpack(array(levels), array(ranges), array(out), bits)
    return out


_LANES = _GROUP // 8
"""Bytes of a group's signs: entry 32·j + i of a group is bit j of byte i, so that neighbours are looked at together."""


@jit
def _signs(x: Any, out: Any) -> None:
    for g in prange(out.size // _LANES):
        row = out[g * _LANES : (g + 1) * _LANES]
        for i in range(_LANES):
            row[i] = 0
        for j in range(8):
            # Parts of arrays: numba looks whether any other index counts from the end.
            first, shift = g * _GROUP + j * _LANES, np.uint8(j)
            part = x[first : min(x.size, first + _LANES)]
            for i in range(part.size):
                row[i] |= np.uint8(not part[i] <= 0) << shift


@jit
def _where_positive(x: Any, bits: Any, out: Any) -> None:
    for g in prange(bits.size // _LANES):
        row = bits[g * _LANES : (g + 1) * _LANES]
        for j in range(8):
            first, shift = g * _GROUP + j * _LANES, np.int32(j)
            last = min(x.size, first + _LANES)
            part, target = x[first:last], out[first:last]
            for i in range(part.size):
                # Of a pattern all bits or none.
                target[i] = part[i] & -((np.int32(row[i]) >> shift) & np.int32(1))


def signs(flat: Tensor) -> Tensor:
    """Whether entries are not ≤ 0, eight to a byte."""
    out = torch.empty(-(-flat.numel() // _GROUP) * _LANES, dtype=torch.uint8)
    use_threads(flat.numel())
    _signs(array(flat), array(out))
    return out


def where_positive(delta: Tensor, bits: Tensor) -> Tensor:
    """Contiguous δ where a bit is set, 0 elsewhere."""
    out = torch.empty_like(delta)
    use_threads(delta.numel())
    whole = np.int32 if delta.dtype == torch.float32 else np.int64
    _where_positive(array(delta).reshape(-1).view(whole), array(bits), array(out).reshape(-1).view(whole))
    return out
