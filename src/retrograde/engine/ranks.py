"""What ranks tell each other; in one process nothing is sent."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped() -> bool:
    """Whether this process belongs to a group of ranks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count() -> int:
    """Number of ranks."""
    return torch.distributed.get_world_size() if grouped() else 1


def rank() -> int:
    """This one's number."""
    return torch.distributed.get_rank() if grouped() else 0


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks; `tensor` itself in one process."""
    ranks = count()
    if ranks == 1:
        return tensor
    tensor = tensor.contiguous()
    torch.distributed.all_reduce(tensor)
    return tensor / ranks


def add(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over all ranks, in place, by one reduction."""
    if count() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def first(tensor: Tensor) -> Tensor:
    """What rank 0 has, on all; in place."""
    if count() > 1:
        torch.distributed.broadcast(tensor, 0)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """All of what ``fully_shard`` has spread over ranks, which must ask for it together; other tensors themselves."""
    shards: Any = tensor
    return shards.full_tensor() if _is_sharded(tensor) else tensor


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """``target ← value``, the same on all ranks; of a sharded target each rank writes its part."""
    if _is_sharded(target):
        shards: Any = target
        from torch.distributed.tensor import distribute_tensor  # loaded already, where there are any

        # Every rank has the value: none is sent.
        value = distribute_tensor(value, shards.device_mesh, shards.placements, src_data_rank=None)
    target.copy_(value)


def _is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
