"""Bytes that a forward pass keeps for the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of distinct storages that autograd saves while `forward` runs, the model's parameters not counted.

    Args:
        model: whose parameters are left out: they are there anyway.
        forward: runs the forward pass (and the loss) with grad enabled; its result is dropped.
    """
    return sum(saved_storages(model, forward).values())


def saved_storages(
    model: nn.Module, forward: Callable[[], object], noticed: Callable[[int], None] = lambda address: None
) -> dict[int, int]:
    """The storages that `saved_bytes` counts: bytes by address, which says nothing more once `forward` is over.

    Args:
        model: as for `saved_bytes`.
        forward: likewise.
        noticed: told the address of whatever is saved, while `forward` runs; the parameters' too.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        noticed(storage.data_ptr())
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live until the storages are known, or a freed one's address could come back and be missed.
        kept = forward()
    del kept
    return sizes
