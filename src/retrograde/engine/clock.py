"""The clock: optimizer steps drive the methods, so a training loop has nothing to call."""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from retrograde.engine.blocks import Blocks
from retrograde.engine.program import LayerProgram
from retrograde.engine.slots import Conductor
from retrograde.errors import AttachError, NoEffectError, RetrogradeWarning

_IDLE_STEPS = 3


class Clock:
    """Calls the programs of the layers whose parameters an optimizer owns, before and after each of its steps.

    Ownership is looked up by parameter identity at every step, so sharding, added parameter groups and several
    optimizers over one model are followed. A step that ``GradScaler`` skips never reaches the hooks.

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
        attached: Sequence[tuple[nn.Module, LayerProgram]],
        conductors: Sequence[Conductor],
        optimizer: torch.optim.Optimizer | None,
        strict: bool,
        blocks: Blocks | None = None,
    ) -> None:
        self._attached = list(attached)
        self._conductors = conductors
        self._blocks = blocks
        self._strict = strict
        self._outermost: torch.optim.Optimizer | None = None
        self._stepping: list[tuple[nn.Module, LayerProgram]] = []
        if optimizer is not None and attached and not self._owned(optimizer):
            raise AttachError(
                "the optimizer that attach was given owns no parameter of an attached layer, so its steps would drive "
                "nothing. Make it over the parameters of the attached model."
            )
        self._only = None if optimizer is None else weakref.ref(optimizer)
        _listen(self)

    def stop(self) -> None:
        """Hear no more steps."""
        _running.discard(self)

    def _owned(self, optimizer: torch.optim.Optimizer) -> list[tuple[nn.Module, LayerProgram]]:
        """The layers whose first trainable parameter (the weight, if it trains) is this optimizer's."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        firsts = ((layer, program, _first_trainable(layer)) for layer, program in self._attached)
        return [(layer, program) for layer, program, first in firsts if id(first) in mine]

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to step."""
        if self._only is not None and self._only() is not optimizer:
            return
        # Some optimizers step another one inside their own step (sharpness-aware, lookahead): the outer one counts.
        if self._outermost is None:
            self._outermost = optimizer
        if self._outermost is not optimizer:
            return
        self._stepping = self._owned(optimizer)
        for layer, program in self._stepping:
            program.before_step(layer, optimizer)
        for conductor in self._conductors:
            conductor.before_step(optimizer)
        if self._blocks is not None:
            self._blocks.before_step(optimizer)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""
        if self._outermost is not optimizer:
            return
        self._outermost = None
        owned, self._stepping = self._stepping, []
        idle = not any(program.calls for _, program in owned)
        if idle:
            self._refuse_idleness([program for _, program in owned])
        for layer, program in owned:
            program.after_step(layer, optimizer, idle=idle)
        if self._blocks is not None:
            self._blocks.after_step(optimizer)
        if owned:
            for conductor in self._conductors:
                conductor.after_step(optimizer)

    def _refuse_idleness(self, programs: list[LayerProgram]) -> None:
        """One step without gradients may initialise an optimizer's state; several in a row are a run without effect."""
        if not programs or any(p.excused for p in programs):
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


def _first_trainable(layer: nn.Module) -> nn.Parameter | None:
    # Asked at every step: `parameters()` walks through submodules, which plain layers do not have.
    own = layer._parameters.values()  # pyright: ignore[reportPrivateUsage]
    found = next((p for p in own if p is not None and p.requires_grad), None)
    return found if found is not None else next((p for p in layer.parameters() if p.requires_grad), None)


# Clocks come and go, by garbage collection too, which may strike while torch walks through its hooks: so the process
# has one pair of hooks, made with the first clock and never removed, and a weak set of the clocks that it tells.
_running: "weakref.WeakSet[Clock]" = weakref.WeakSet()
_hooks: list[Any] = []


def _listen(clock: Clock) -> None:
    _running.add(clock)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_tell_before))
        _hooks.append(register_optimizer_step_post_hook(_tell_after))


def _tell_before(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    for clock in list(_running):
        clock.before(optimizer)


def _tell_after(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    for clock in list(_running):
        clock.after(optimizer)
