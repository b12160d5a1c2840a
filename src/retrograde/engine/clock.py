"""The clock: optimizer steps drive the methods, so a training loop has nothing to call."""

import contextlib
import gc
import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from retrograde.engine.blocks import Blocks
from retrograde.engine.program import LayerProgram, autocasting
from retrograde.engine.slots import Conductor
from retrograde.errors import AttachError, NoEffectError, RetrogradeWarning

_IDLE_STEPS = 3
_STRAY_STEPS = 16
"""More than a critic's steps between two of its generator's."""

Attached = Sequence[tuple[nn.Module, LayerProgram]]


class Listener(ABC):
    """Hears of every optimizer step of the process; of steps inside each other, of the outermost that it owns.

    Some optimizers step another one inside their own step (sharpness-aware, lookahead): the outer one counts. A step
    that ``GradScaler`` skips is not heard of.
    """

    def __init__(self) -> None:
        self._outermost = threading.local()

    def listen(self) -> None:
        """Hear of steps from now on, as long as someone keeps this object."""
        _listen(self)

    def stop(self) -> None:
        """Hear no more steps."""
        _running.discard(self)

    @abstractmethod
    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer is one of ours."""

    def inside(self, outer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Another step begins within one of `outer`, which counts."""

    def begin(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step that begins counts: no other one is under way around it, in this thread."""
        outer = getattr(self._outermost, "optimizer", None)
        outer = None if outer is None else outer()
        if outer is not None and _depth(outer) > (outer is optimizer):
            self.inside(outer)
            return False
        # One that owns nothing here is no step of ours, and others inside it are.
        if self.owns(optimizer):
            self._outermost.optimizer = weakref.ref(optimizer)
        return True

    def end(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step that ends is one that counted."""
        outer = getattr(self._outermost, "optimizer", None)
        if outer is None or outer() is not optimizer or _depth(optimizer) > 1:
            return False
        self._outermost.optimizer = None
        return True

    def before(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """The gradients are there, and the optimizer is about to use them."""

    @abstractmethod
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""


class Clock(Listener):
    """Calls the programs of the layers whose parameters an optimizer owns, before and after each of its steps.

    Ownership is by parameter identity, and whatever could change it is looked at in every step, so sharding, added
    parameter groups, replaced parameters and several optimizers over one model are followed. A step that ``GradScaler``
    skips never reaches the hooks. Where a step is given a closure, which computes the gradient, what is due before the
    step happens when the closure has run.

    Args:
        attached: the layers with their programs.
        conductors: told of every step, after the programs.
        optimizer: listen to this optimizer alone, which must own an attached parameter; None listens to every
            optimizer of the process and acts on those that own one.
        strict: raise, rather than warn, when several steps in a row pass every attached layer by.
        blocks: the blocks whose backward work a method decides about, if any.
    """

    def __init__(
        self,
        attached: Attached,
        conductors: Sequence[Conductor],
        optimizer: torch.optim.Optimizer | None,
        strict: bool,
        blocks: Blocks | None = None,
    ) -> None:
        super().__init__()
        self._attached = list(attached)
        self._conductors = conductors
        self._blocks = blocks
        self._strict = strict
        self._known: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Any, Any, Attached]] = (
            weakref.WeakKeyDictionary()
        )
        self._steps = 0
        """Of all optimizers that have to do with the attached layers."""
        self._calls = 0
        """Backward calls when an optimizer last stepped that owned none of the layers."""
        self._last = [0] * len(self._attached)
        """Of these, the last one that was each layer's own."""
        # What was frozen already was attached for its input's gradient alone, and the plan says so.
        self._passed = {
            i
            for i, (layer, program) in enumerate(self._attached)
            if _first_trainable(layer, program.names[0]) is None
        }
        if optimizer is not None and attached and not self._owned(optimizer):
            raise AttachError(
                "the optimizer that attach was given owns no parameter of an attached layer, so its steps would drive "
                "nothing. Make it over the parameters of the attached model."
            )
        self._only = None if optimizer is None else weakref.ref(optimizer)
        self.listen()

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a layer is this optimizer's."""
        return bool(self._owned(optimizer))

    def inside(self, outer: torch.optim.Optimizer) -> None:
        """The layers still learn that they are stepped by `outer`."""
        for layer, program in self._owned(outer):
            program.remember(layer, outer)

    def _owned(self, optimizer: torch.optim.Optimizer) -> Attached:
        """The layers whose first trainable parameter (the weight, if it trains) is this optimizer's."""
        theirs = [id(p) for group in optimizer.param_groups for p in group["params"]]
        mine = [id(_weight(layer, program)) for layer, program in self._attached]
        known = self._known.get(optimizer)
        if known is not None and known[0] == theirs and known[1] == mine:
            return known[2]
        parameters = set(theirs)
        found = [pair for pair, first in zip(self._attached, mine, strict=True) if first in parameters]
        self._known[optimizer] = theirs, mine, found
        return found

    def begin(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step that begins counts."""
        if self._only is not None and self._only() is not optimizer:
            return False
        counts = super().begin(optimizer)
        if counts and not self._owned(optimizer) and self._concerns(optimizer):
            self._look_for_strays(())
        return counts

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients are there, and the optimizer is about to use them."""
        # Blocks first: what they take away, no rule should see.
        if self._blocks is not None:
            self._blocks.before_step(optimizer)
        owned = self._owned(optimizer)
        if any(program.loaded and not program.step for _, program in owned):
            self._look_for_a_resumed_run(optimizer, owned)
        for layer, program in owned:
            program.before_step(layer, optimizer)
        for conductor in self._conductors:
            conductor.before_step(optimizer)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""
        owned = self._owned(optimizer)
        if owned:
            self._look_for_strays(owned)
        idle = not any(program.calls for _, program in owned)
        if idle:
            # What was added to a frozen layer has no backward pass before it is in use.
            self._refuse_idleness([program for layer, program in owned if _learns(layer, program)])
        for layer, program in owned:
            program.after_step(layer, optimizer, idle=idle)
        if self._blocks is not None:
            self._blocks.after_step(optimizer)
        if owned:
            for conductor in self._conductors:
                conductor.after_step(optimizer)

    def _look_for_a_resumed_run(self, optimizer: torch.optim.Optimizer, owned: Attached) -> None:
        """The first step after the model's state was loaded: an optimizer with a past is one that was loaded too."""
        for _, program in owned:
            program.loaded = False
        past = [
            (layer, program)
            for layer, program in owned
            if optimizer.state.get(cast(Any, _weight(layer, program)))
        ]
        if past:
            warnings.warn(
                f"the model's and the optimizer's state were loaded, and the session's was not: at {len(past)} layers "
                "the methods' own state (scales, bases, thresholds, random numbers) starts from the beginning, so the "
                "run differs from an uninterrupted one. Write session.save(path) beside the checkpoint, and call "
                "rg.resume(model, path) before the model's state is loaded.",
                RetrogradeWarning,
                stacklevel=2,
            )

    def _look_for_strays(self, owned: Attached) -> None:
        """Warn once of layers that no optimizer has stepped for long: frozen, or replaced, since they were attached."""
        self._steps += 1
        mine = {id(program) for _, program in owned}
        strays: list[int] = []
        for i, (_, program) in enumerate(self._attached):
            if id(program) in mine:
                self._last[i] = self._steps
            elif self._steps - self._last[i] >= _STRAY_STEPS and i not in self._passed:
                strays.append(i)
        if not strays:
            return
        self._passed.update(strays)
        layer, program = self._attached[strays[0]]
        frozen = _first_trainable(layer, program.names[0]) is None
        why = (
            "its parameters were frozen after attaching"
            if frozen
            else "no optimizer that steps has its parameters: they were replaced after the optimizer was made "
            "(load_state_dict(assign=True)), or the model has another layer in its place"
        )
        warnings.warn(
            f"{_STRAY_STEPS} optimizer steps have passed by {len(strays)} of {len(self._attached)} attached layers. "
            f"Of the first, {program.name!r}, {why}. The methods' own state there (scales, bases, dendrites) is never "
            "updated. Make the optimizer from model.parameters() after the last change to the model; after a change "
            "to its layers, detach and attach again.",
            RetrogradeWarning,
            stacklevel=2,
        )

    def _concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of an optimizer that owns no trainable layer is one of a training that uses the layers."""
        calls = sum(program.calls for _, program in self._attached)
        if calls != self._calls:
            self._calls = calls
            return calls > 0
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in theirs for layer, _ in self._attached for p in layer.parameters(recurse=False))

    def _refuse_idleness(self, programs: list[LayerProgram]) -> None:
        """One step without gradients may initialise an optimizer's state; several in a row are a run without effect."""
        if not programs or any(p.may_idle for p in programs):
            return
        idle = min(p.idle_steps for p in programs) + 1
        what = (
            f"{idle} optimizer step(s) in a row, and no backward pass went through any of the {len(programs)} attached "
            f"layers that this optimizer owns ({programs[0].name!r} is the first): their methods had no effect. Layers "
            "run their programs only in training mode and with grad enabled: call model.train(), and train the model "
            "object that was attached, not a copy of it."
        )
        if idle == 1:
            warnings.warn(what, RetrogradeWarning, stacklevel=2)
        elif idle >= _IDLE_STEPS and self._strict:
            raise NoEffectError(what + " (strict=False turns this error into the warning alone.)")


def _learns(layer: nn.Module, program: LayerProgram) -> bool:
    own = layer._parameters.get(program.names[0])  # pyright: ignore[reportPrivateUsage]
    return own is None or own.requires_grad


def _weight(layer: nn.Module, program: LayerProgram) -> nn.Parameter | None:
    return _first_trainable(layer, program.names[0])


def _first_trainable(layer: nn.Module, weight: str) -> nn.Parameter | None:
    # Asked at every step: `parameters()` walks through submodules, which plain layers do not have.
    own = layer._parameters  # pyright: ignore[reportPrivateUsage]
    for parameter in (own.get(weight), *own.values()):
        if parameter is not None and parameter.requires_grad:
            return parameter
    if not layer._modules:  # pyright: ignore[reportPrivateUsage]
        return None
    return next((p for p in layer.parameters() if p.requires_grad), None)


# Clocks come and go, by garbage collection too, which may strike while torch walks through its hooks: so the process
# has one pair of hooks, made with the first clock and never removed, and a weak set of the listeners that it tells.
_running: "weakref.WeakSet[Listener]" = weakref.WeakSet()
_hooks: list[Any] = []
_few = 32
"""Listeners that every step of the process may tell without a thought."""
_tidy_at = [_few]


def _listen(clock: Listener) -> None:
    _running.add(clock)
    # A session and its model hold each other, so one that is gone listens until it is collected, and the collector
    # counts objects, of which models have few: a process that attached to many models would tell all of them.
    if len(_running) >= _tidy_at[0]:
        gc.collect()
        _tidy_at[0] = max(_few, 2 * len(_running))
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_tell_before))
        _hooks.append(register_optimizer_step_post_hook(_tell_after))


def _tell_before(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    clocks = [clock for clock in list(_running) if clock.begin(optimizer)]
    if not clocks:
        return None

    def due() -> None:
        with torch.no_grad(), _own_precision():
            for clock in clocks:
                clock.before(optimizer)

    # The first of `args` is the optimizer itself.
    if len(args) > 1 and callable(args[1]):
        return (args[0], _followed(args[1], due), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _followed(kwargs["closure"], due)}
    due()
    return None


def _followed(closure: Callable[..., Any], due: Callable[[], None]) -> Callable[..., Any]:
    """`closure`, and then what is due."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found = closure(*args, **kwargs)
        due()
        return found

    return run


def _tell_after(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    with _own_precision():
        for clock in list(_running):
            if clock.end(optimizer):
                clock.after(optimizer)


def _depth(optimizer: torch.optim.Optimizer) -> int:
    """How many steps of `optimizer` are under way in this thread: one that raised never told its end."""
    frame, depth = sys._getframe(), 0  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        # torch's wrapper around every optimizer's step.
        depth += frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return depth


def _own_precision() -> contextlib.AbstractContextManager[object]:
    """Without autocast, where a user steps inside it."""
    if not autocasting():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
