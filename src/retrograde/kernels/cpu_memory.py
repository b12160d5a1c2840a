"""Tensors as flat arrays, entries in the order in which they lie in memory, and memory kept between calls."""

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

_scratch = threading.local()


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


def flat(tensor: Tensor) -> Any:
    """Entries in the order of indices; what is not contiguous is copied."""
    return tensor.contiguous().numpy().reshape(-1)


def room(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array kept between calls, one for each name and thread: fresh pages cost more than what is done in them.

    What it holds is anyone's guess, and lasts until the next call for the same name.
    """
    size = math.prod(shape)
    held = getattr(_scratch, name, None)
    if held is None or held.size < size:
        held = np.empty(size, dtype)
        setattr(_scratch, name, held)
    return held[:size].reshape(shape)


def bfloat16_room(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same as a tensor of bfloat16, for which numpy has no type."""
    return torch.from_numpy(room(name, shape, np.int16)).view(torch.bfloat16)
