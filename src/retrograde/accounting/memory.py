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
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live until the sum is taken, or a freed storage's address could come back and be missed.
        kept = forward()
        total = sum(sizes.values())
    del kept
    return total
