"""Bytes that a forward pass keeps for the backward pass, and the most that a step holds at once."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        # An operation that keeps its own output would keep itself by it, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live until the storages are known, or a freed one's address could come back and be missed.
        kept = forward()
    del kept
    return sizes


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that lived at once of what `run` allocated as tensors; what was there before is not counted.

    It sees what saved-tensor hooks do not: ``torch.func`` transforms refuse those. Memory that a kernel takes and frees
    within itself is not seen.

    Args:
        run: runs the pass; its result is dropped.
    """
    with _Allocations() as allocations:
        run()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._note((args, kwargs), counted=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, counted=True)
        return out

    def _note(self, values: object, *, counted: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            address, size = storage._cdata, storage.nbytes() if counted else 0  # pyright: ignore[reportPrivateUsage]
            if address not in self._known:
                self.live += size
                self.peak = max(self.peak, self.live)
                self._known[address] = weakref.ref(storage, partial(self._freed, address, size))

    def _freed(self, address: int, size: int, _: object) -> None:
        self.live -= size
        del self._known[address]
