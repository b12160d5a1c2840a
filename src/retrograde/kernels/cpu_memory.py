"""Tensors as flat arrays, entries in the order in which they lie in memory."""

from typing import Any

import torch
from torch import Tensor


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
