"""Tensors as flat arrays, entries in the order in which they lie in memory, and memory kept between calls."""

import contextlib
import ctypes
import math
import mmap
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.int16: np.int16,
    torch.uint16: np.uint16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
PATTERNS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF),
    torch.int8: (torch.int8, -1),
}
"""Patterns of entries, and the bits of them of which one is set where the entry is not zero."""
_scratch = threading.local()

_LENT = 1 << 17
"""Bytes from which on memory is kept: the allocator keeps less than that itself."""
_KEPT = 4
"""Arrays of one size that are kept while no call uses them: index and value of a list, by rows and by columns."""
_returned: dict[int, list[Any]] = {}
"""By size, what `lent` gave and got back."""

_HUGE_PAGE = 1 << 21
"""Bytes of a huge page. Rows of an operand are read in no order: among pages of 4096 bytes each address would have to
be looked up anew, which takes a third of a product's time."""


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
    return last, flat(tensor.permute(0, 2, 3, 1) if last else tensor)


def array(tensor: Tensor) -> Any:
    """A tensor's memory as an array of its shape; what is not contiguous is copied.

    ``Tensor.numpy`` would forbid for ever to resize the memory, which FSDP does with every weight.
    """
    tensor = tensor.resolve_neg().contiguous()
    kind: Any = _TYPES[tensor.dtype]
    if not tensor.numel():
        return np.empty(tensor.shape, kind)
    memory: Any = (ctypes.c_byte * tensor.nbytes).from_address(tensor.data_ptr())
    # Kept alive by whatever is made of the array.
    memory.tensor = tensor
    return np.frombuffer(memory, kind).reshape(tensor.shape)


def patterns(tensor: Tensor) -> tuple[Any, Any]:
    """The patterns of a tensor's entries as integers, and the mask of the bits that are all 0 in a zero."""
    kind, mask = PATTERNS[tensor.dtype]
    bits = array(tensor.detach().resolve_neg().view(kind))
    return bits, bits.dtype.type(mask)


def flat(tensor: Tensor) -> Any:
    """Entries in the order of indices; what is not contiguous is copied."""
    return array(tensor).reshape(-1)


def room(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array kept between calls, one for each name and thread: fresh pages cost more than what is done in them.

    What it holds is anyone's guess, and lasts until the next call for the same name.
    """
    size = math.prod(shape)
    held = getattr(_scratch, name, None)
    if held is None or held.size < size:
        held = _memory(size * np.dtype(dtype).itemsize).view(dtype)
        setattr(_scratch, name, held)
    return held[:size].reshape(shape)


def lent(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array whose memory is kept for the next call that asks for as much, once no view of it is left.

    The system takes back large arrays that are freed, and gives fresh pages for each new one: with lists of non-zeros
    made in every step, that took a quarter of a convolutional network's step. What it holds is anyone's guess.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size < _LENT:
        return np.empty(shape, kind)
    # The number of non-zeros differs from step to step; pages that are never touched cost nothing.
    whole = np.asarray(_Loan(1 << (size - 1).bit_length())).view(kind)
    return whole[: math.prod(shape)].reshape(shape)


class _Loan:
    """Memory that numpy keeps alive as the base of an array, and that goes back when the array is gone."""

    def __init__(self, size: int) -> None:
        try:
            self.memory = _returned.get(size, []).pop()
        except IndexError:  # there is none, or another thread took the last one
            self.memory = _memory(size)
        self.__array_interface__ = self.memory.__array_interface__

    def __del__(self, returned: dict[int, list[Any]] = _returned, most: int = _KEPT) -> None:
        # Bound here: at the end of a process modules are gone before the last arrays.
        kept = returned.setdefault(self.memory.size, [])
        if len(kept) < most:
            kept.append(self.memory)


def _memory(size: int) -> Any:
    """So many bytes, on huge pages where they are many and the system has some."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if size < _HUGE_PAGE // 4 or advice is None:
        return np.empty(size, np.uint8)
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    # Private: a process that is forked from this one writes to its own.
    pages = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(advice)
    memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE
    return memory[start : start + size]


def bfloat16_room(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same as a tensor of bfloat16, for which numpy has no type."""
    return torch.from_numpy(room(name, shape, np.int16)).view(torch.bfloat16)
