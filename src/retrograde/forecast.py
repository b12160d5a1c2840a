"""What attaching would save at each layer, found by trying: one example batch, then each layer by itself, both ways.

A layer's time depends on its shape, on the zeros of its gradient and on the machine, and so does the kernel that is
chosen for it. So the layers are run with what the example brings them: plain and attached in turns, forward and
backward pass. A layer that would lose is declined: it stays as it is.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree  # pyright: ignore[reportPrivateUsage]

from retrograde.engine.layers import swap_in
from retrograde.engine.maps.base import LayerKind
from retrograde.engine.program import LayerProgram
from retrograde.engine.slots import Rule
from retrograde.errors import OptionError

Example = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[], Tensor]
"""Inputs of one batch (a tensor, positional or keyword arguments), or a function that returns the loss of one."""

MARGIN = 0.95
"""A layer is attached where it takes at most this share of the plain one's time: closer ones are not told apart."""

_BUDGET = 0.25
"""Seconds for the rounds of one layer."""
_ROUNDS = (5, 40)
_WARMUPS = 2
_STEPS = 5
_GRAIN = 32
"""Shares of zeros are told apart in steps of one part in so many: layers alike in all else are tried once."""


@dataclass(frozen=True)
class LayerForecast:
    """One layer's forward and backward pass in one step.

    Attributes:
        plain: seconds as it is.
        attached: seconds with its methods.
        backward: seconds of the attached backward pass alone.
        zeros: share of zeros in δ̃.
        kernels: share of the backward products by kernel.
        quartiles: of `attached` over the rounds; far apart on a machine that does other things meanwhile.
    """

    plain: float
    attached: float
    backward: float
    zeros: float
    kernels: dict[str, float]
    quartiles: tuple[float, float]

    @property
    def loses(self) -> bool:
        """Whether attaching would not make the layer faster."""
        return self.attached > MARGIN * self.plain

    def times(self, factor: float) -> "LayerForecast":
        """For so many times the work."""
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
    """

    plain: float
    attached: float
    quartiles: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Of the attached model's time to the plain one's."""
        return self.attached / self.plain


@dataclass(frozen=True)
class _Seen:
    """One application of a layer in the example."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: torch.dtype | None
    delta: Tensor


@dataclass
class _Observation:
    seconds: float
    layers: dict[str, list[_Seen]] = field(default_factory=dict)


def observe(model: nn.Module, layers: Mapping[str, nn.Module], example: Example) -> _Observation:
    """Run the example's forward and backward pass on the plain model, timed, and once more to see each layer's part.

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
            return _Observation(_time_steps(model, loss), _see(layers, loss))
        except Exception as error:
            error.add_note(
                "This happened while the example was run, to forecast what attaching would save. Check `example`."
            )
            raise


@contextlib.contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Whatever runs inside, buffers and torch's random state are in the end what they were."""
    lazy = nn.parameter.UninitializedBuffer
    buffers = {buffer: buffer.clone() for buffer in model.buffers() if not isinstance(buffer, lazy)}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers.items():
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


def _see(layers: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> dict[str, list[_Seen]]:
    found: list[tuple[str, tuple[Any, ...], dict[str, Any], torch.dtype | None, Tensor]] = []

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            z = _differentiable(output)
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
    seen: dict[str, list[_Seen]] = {}
    for (name, args, kwargs, precision, _), delta in zip(found, deltas, strict=True):
        if delta is not None:
            seen.setdefault(name, []).append(_Seen(args, kwargs, precision, delta))
    return seen


@dataclass(frozen=True)
class Candidate:
    """A layer to be tried.

    Attributes:
        name: full name.
        layer: the plain layer.
        kind: how it is read.
        make_rules: makes its rules anew, for a copy of it.
    """

    name: str
    layer: nn.Module
    kind: LayerKind
    make_rules: Callable[[nn.Module], Mapping[str, Rule]]


class Trials:
    """Tries layers one by one; those alike are tried once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], LayerForecast] = {}

    def run(self, candidate: Candidate, calls: Sequence[_Seen]) -> LayerForecast:
        """The forecast for all applications of a layer in one step."""
        # One application stands for the others, by size.
        largest = max(calls, key=lambda seen: seen.delta.numel())
        size = sum(seen.delta.numel() for seen in calls) / largest.delta.numel()
        return self._once(candidate, largest).times(size)

    def _once(self, candidate: Candidate, seen: _Seen) -> LayerForecast:
        plain, attached = copy.deepcopy(candidate.layer), copy.deepcopy(candidate.layer)
        names = candidate.kind.names(attached)
        program = LayerProgram(candidate.name, candidate.make_rules(attached), 0, names)
        swap_in(attached, candidate.kind, program)
        theirs, mine = _pass(plain, seen), _pass(attached, seen)
        for _ in range(_WARMUPS):
            theirs()
            mine()
        total = program.total
        zeros = total.zeros / total.entries if total.entries else 0.0
        key = (*_signature(candidate.layer, seen), round(zeros * _GRAIN))
        if key not in self._known:
            self._known[key] = _compare(theirs, mine, program, zeros)
        return self._known[key]


def _compare(
    theirs: Callable[[], float], mine: Callable[[], float], program: LayerProgram, zeros: float
) -> LayerForecast:
    rounds = min(max(int(_BUDGET / (theirs() + mine() + 1e-9)), _ROUNDS[0]), _ROUNDS[1])
    pairs: list[tuple[float, float]] = []
    backward: list[float] = []
    for _ in range(rounds):
        before = program.clocked
        pairs.append((theirs(), mine()))
        backward.append(program.clocked - before)
    # By itself: taking turns with another layer's code and data would cost a small one half as much again.
    plain = median(theirs() for _ in range(rounds))
    # The ratio's median, not the median's ratio: what disturbs a round disturbs both.
    low, ratio, high = quantiles((m / t for t, m in pairs), n=4, method="inclusive")
    return LayerForecast(
        plain,
        plain * ratio,
        median(backward),
        zeros,
        {name: count / program.tally.kernels.total() for name, count in program.tally.kernels.items()},
        (plain * low, plain * high),
    )


def _pass(layer: nn.Module, seen: _Seen) -> Callable[[], float]:
    """A forward and backward pass, which returns its seconds."""
    made: dict[int, Tensor] = {}
    # One input that is given several times stays one: attention asks whether query, key and value are the same.
    args, kwargs = tree.tree_map_only(
        Tensor, lambda t: made.setdefault(id(t), _fresh(t)), (seen.args, seen.kwargs)
    )
    leaves = [t for t in tree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    wanted = [t for t in (*layer.parameters(), *leaves) if t.requires_grad]
    device = seen.delta.device

    def forward() -> Tensor:
        if seen.precision is None:
            return _output(layer(*args, **kwargs))
        with torch.autocast(device.type, seen.precision):
            return _output(layer(*args, **kwargs))

    def run() -> float:
        _wait(device)
        start = time.perf_counter()
        torch.autograd.grad(forward(), wanted, seen.delta, allow_unused=True)
        _wait(device)
        return time.perf_counter() - start

    return run


def _differentiable(output: Any) -> Tensor | None:
    """What of a layer's output has a gradient: attention returns its weights as well, or None in their place."""
    tensors = (leaf for leaf in tree.tree_leaves(output) if isinstance(leaf, Tensor))
    return next((tensor for tensor in tensors if tensor.requires_grad), None)


def _output(output: Any) -> Tensor:
    found = _differentiable(output)
    assert found is not None
    return found


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _signature(layer: nn.Module, seen: _Seen) -> tuple[Any, ...]:
    """What a layer's time depends on, beside its zeros."""
    leaves = tree.tree_leaves((seen.args, seen.kwargs))
    tensors = [
        (tuple(t.shape), t.stride(), t.dtype, t.requires_grad) if isinstance(t, Tensor) else t for t in leaves
    ]
    learning = tuple(p.requires_grad for p in layer.parameters())
    return type(layer), layer.extra_repr(), repr(tensors), seen.delta.stride(), seen.precision, learning
