"""What attaching would save at each layer and in a step, in time and in memory: the figures, and what they start from.

A layer's time depends on its shape, on the zeros of its gradient and on the machine, and so does the kernel that is
chosen for it. So one example batch is run through the plain model, and `retrograde.trials` then runs each layer by
itself with what the example brought it, plain and attached. A layer that would lose is declined: it stays as it is.

Of the bytes that are kept for the backward pass a layer's own are only a part: ReLU keeps its output whether or not the
next layer keeps it too. What a whole step keeps is therefore found by storage: those of the plain model, less the ones
that no other operation keeps.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree  # pyright: ignore[reportPrivateUsage]

from retrograde.accounting.memory import saved_storages
from retrograde.errors import OptionError

Example = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[], Tensor]
"""Inputs of one batch (a tensor, positional or keyword arguments), or a function that returns the loss of one."""

MARGIN = 0.95
"""A layer is attached where it takes at most this share of the plain one's time: closer ones are not told apart."""

_STEPS = 5


@dataclass(frozen=True)
class LayerForecast:
    """One layer's forward and backward pass in one step, as its methods run it once they have warmed up.

    Where a method does other things in some steps than in others, these are means over its steps.

    Attributes:
        plain: seconds as it is.
        attached: seconds with its methods, and with what they do around the optimizer's step.
        backward: seconds of the attached backward pass alone.
        zeros: share of zeros in δ̃.
        kernels: share of the backward products by kernel.
        quartiles: of `attached` over the rounds; far apart on a machine that does other things meanwhile.
        plain_bytes: that the layer's own calls keep for the backward pass as it is, its parameters not counted.
        attached_bytes: likewise, with its methods.
    """

    plain: float
    attached: float
    backward: float
    zeros: float
    kernels: dict[str, float]
    quartiles: tuple[float, float]
    plain_bytes: float = 0.0
    attached_bytes: float = 0.0

    @property
    def loses(self) -> bool:
        """Whether attaching would not make the layer faster."""
        return self.attached > MARGIN * self.plain

    def times(self, factor: float) -> "LayerForecast":
        """For so many times the work; the bytes stay as they are."""
        return replace(
            self,
            plain=self.plain * factor,
            attached=self.attached * factor,
            backward=self.backward * factor,
            quartiles=(self.quartiles[0] * factor, self.quartiles[1] * factor),
        )


@dataclass(frozen=True)
class StepForecast:
    """Forward and backward pass of the whole model.

    Attributes:
        plain: measured seconds of the plain model.
        attached: what they should become: plain, less what the attached layers save.
        quartiles: the same, where every layer takes a quartile of its rounds.
        plain_bytes: that the plain model keeps for the backward pass, each storage counted once.
        attached_bytes: what they should become.
        notes: what the forecast takes for granted, a sentence for each method that has one.
    """

    plain: float
    attached: float
    quartiles: tuple[float, float]
    plain_bytes: float = 0.0
    attached_bytes: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Of the attached model's time to the plain one's."""
        return self.attached / self.plain


@dataclass(frozen=True)
class Kept:
    """What one layer keeps for its backward pass, on average over the kinds of steps.

    Attributes:
        inputs: of each tensor that the layer is given, the share of steps in which its storage is kept.
        own: bytes of all other storages, in one step.
    """

    inputs: tuple[float, ...]
    own: float

    def bytes(self, calls: Sequence[Sequence[Tensor]]) -> float:
        """Bytes of a step, given the tensors of each call: distinct storages."""
        shares: dict[int, float] = {}
        for tensors in calls:
            for tensor, share in zip(tensors, self.inputs, strict=False):
                storage = tensor.untyped_storage()
                shares[storage.data_ptr()] = max(
                    shares.get(storage.data_ptr(), 0.0), share * storage.nbytes()
                )
        return self.own + sum(shares.values())


@dataclass(frozen=True)
class Memory:
    """What the plain model keeps for the backward pass of the example, by storage.

    Attributes:
        sizes: bytes of each storage that is kept or that a layer is given.
        keepers: of each storage, the layers whose calls keep it; ``""`` is whatever is no layer of ours.
        inputs: of each layer, the storages of the tensors that each of its calls is given.
    """

    sizes: dict[int, int]
    keepers: dict[int, set[str]]
    inputs: dict[str, list[tuple[int, ...]]]

    @property
    def plain(self) -> int:
        """Bytes of the plain model."""
        return sum(self.sizes[storage] for storage in self.keepers)

    def keeps(self, name: str) -> bool:
        """Whether calls of a layer keep anything: inside activation checkpointing they do not."""
        return any(name in names for names in self.keepers.values())

    def attached(self, layers: Mapping[str, tuple[Kept, Kept]]) -> float:
        """Bytes of the model where some layers keep other things.

        Args:
            layers: what each of them keeps plain and attached, by name.
        """
        total = float(self.plain)
        shares: dict[int, float] = {}
        for name, (before, after) in layers.items():
            total += after.own - before.own
            for storages in self.inputs[name]:
                for storage, share in zip(storages, after.inputs, strict=False):
                    # Layers that are given the same keep it in the same steps.
                    shares[storage] = max(shares.get(storage, 0.0), share)
        for storage, share in shares.items():
            keepers = self.keepers.get(storage, set[str]())
            if keepers <= layers.keys():
                total += self.sizes[storage] * (share - bool(keepers))
        return total


@dataclass(frozen=True)
class Seen:
    """One application of a layer in the example."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: torch.dtype | None
    delta: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All that the layer is given."""
        return _tensors((self.args, self.kwargs))


@dataclass(frozen=True)
class Observation:
    """What the example shows of the plain model.

    Attributes:
        seconds: of a forward and backward pass.
        layers: applications of each layer, by name.
        memory: what is kept for the backward pass.
    """

    seconds: float
    layers: dict[str, list[Seen]]
    memory: Memory


def observe(model: nn.Module, layers: Mapping[str, nn.Module], example: Example) -> Observation:
    """Run the example's forward and backward pass on the plain model, timed, and twice more to see each layer's part.

    Buffers, gradients and torch's random state are left as they were.

    Args:
        model: the plain model.
        layers: of it, by name.
        example: see `Example`.

    Raises:
        OptionError: the example is of no known kind, or has nothing to differentiate.
    """
    loss = _loss(model, example)
    with untouched(model), torch.enable_grad():
        try:
            return Observation(
                _time_steps(model, loss), _see(layers, loss), _look_at_memory(model, layers, loss)
            )
        except Exception as error:
            error.add_note(
                "This happened while the example was run, to forecast what attaching would save. Check `example`."
            )
            raise


@contextlib.contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Whatever runs inside, buffers and torch's random state are in the end what they were."""
    lazy = nn.parameter.UninitializedBuffer
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not isinstance(buffer, lazy)
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    # A forward pass may have put another tensor in its place.
                    setattr(module, name, buffer)
                    buffer.copy_(before)


def _loss(model: nn.Module, example: Example) -> Callable[[], Tensor]:
    """A function that runs the example and returns a scalar."""
    if isinstance(example, Tensor):
        return lambda: _project(model(example))
    if isinstance(example, Mapping):
        return lambda: _project(model(**example))
    if isinstance(example, list | tuple):
        return lambda: _project(model(*example))
    if callable(example) and not isinstance(example, nn.Module):
        return example
    raise OptionError(
        f"example={type(example).__name__} is not a batch: pass the model's input (a tensor), its positional arguments "
        "(a tuple), its keyword arguments (a dict), or a function without arguments that returns the loss."
    )


def _project(output: Any) -> Tensor:
    """A scalar whose gradient at every output entry is an arbitrary number of one size: there is no loss to ask."""
    tensors = [t for t in tree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise OptionError("the example's output has no gradient: no parameter of the model is trained.")
    return torch.stack([(t.float() * torch.randn_like(t.float())).mean() for t in tensors]).sum()


def _time_steps(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]
    times: list[float] = []
    for _ in range(1 + _STEPS):
        start = time.perf_counter()
        value = loss()
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(
                "the function that was given as `example` must return the loss: a tensor of one entry with a gradient."
            )
        torch.autograd.grad(value, parameters, allow_unused=True)
        times.append(time.perf_counter() - start)
    # The first one warms up.
    return median(times[1:])


def _see(layers: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> dict[str, list[Seen]]:
    found: list[tuple[str, tuple[Any, ...], dict[str, Any], torch.dtype | None, Tensor]] = []

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            z = differentiable(output)
            if z is None:
                return output
            kind = z.device.type
            precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            found.append((name, args, kwargs, precision, z))
            # What follows may change its input in place; the gradient wanted is that of the layer's own output.
            copied = z.clone()
            return tree.tree_map_only(Tensor, lambda tensor: copied if tensor is z else tensor, output)

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    outputs = [z for *_, z in found]
    # Typed as if none could be None.
    deltas: Any = torch.autograd.grad(value, outputs, allow_unused=True) if outputs else ()
    seen: dict[str, list[Seen]] = {}
    for (name, args, kwargs, precision, _), delta in zip(found, deltas, strict=True):
        if delta is not None:
            seen.setdefault(name, []).append(Seen(args, kwargs, precision, delta))
    return seen


def _look_at_memory(model: nn.Module, layers: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> Memory:
    """By itself: where each layer's part is seen, outputs are copied, which are then kept in their place."""
    inside = [""]
    given: dict[str, list[list[Tensor]]] = defaultdict(list)
    keepers: dict[int, set[str]] = defaultdict(set)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside.append(name)
            # Held, so that no other storage comes to the same address.
            given[name].append(_tensors((args, kwargs)))

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside.pop()

    handles = [
        layer.register_forward_pre_hook(enter(name), with_kwargs=True) for name, layer in layers.items()
    ]
    handles += [layer.register_forward_hook(leave) for layer in layers.values()]
    try:
        saved = saved_storages(model, loss, lambda address: keepers[address].add(inside[-1]))
    finally:
        for handle in handles:
            handle.remove()
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for calls in given.values()
        for tensors in calls
        for tensor in tensors
    }
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inputs = {
        name: [tuple(tensor.untyped_storage().data_ptr() for tensor in tensors) for tensors in calls]
        for name, calls in given.items()
    }
    return Memory({**sizes, **saved, **dict.fromkeys(own, 0)}, dict(keepers), inputs)


def _tensors(given: Any) -> list[Tensor]:
    return [leaf for leaf in tree.tree_leaves(given) if isinstance(leaf, Tensor)]


def differentiable(output: Any) -> Tensor | None:
    """What of a layer's output has a gradient: attention returns its weights as well, or None in their place."""
    return next((tensor for tensor in _tensors(output) if tensor.requires_grad), None)
