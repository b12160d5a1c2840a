"""`attach` and the session that it returns."""

import contextlib
import copy
import dataclasses
import importlib
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from retrograde import saving
from retrograde.accounting.counters import Counters
from retrograde.accounting.flops import Flops
from retrograde.assignment import Assignment, Given, assign, distinct, exactly
from retrograde.engine.activations import Lightened
from retrograde.engine.blocks import BlockProgram, Blocks
from retrograde.engine.branches import AttachedBlock, swap_in_blocks, swap_out_blocks
from retrograde.engine.clock import Clock
from retrograde.engine.layers import AttachedLayer, swap_in, swap_out
from retrograde.engine.program import LayerProgram
from retrograde.engine.slots import Block, Conductor, Method, Rule
from retrograde.errors import (
    AttachError,
    DetachError,
    NoEffectError,
    OptionError,
    RetrogradeWarning,
    StateError,
)
from retrograde.forecast import Example
from retrograde.kernels import compiled
from retrograde.patterns import ROOT, Choice
from retrograde.plan import Plan, mebibytes
from retrograde.planning import BlockPlacement, Decision, decide, refuse_no_effect

_STATE_FORMAT = 2
_CHOOSE = "retrograde.kernels.choose"
"""Loaded where a product first needs it: a compiler comes with it."""
_ORDER = (
    "The order is: build, load pretrained weights, attach, activation checkpointing, compile, DDP or fully_shard, "
    "optimizer, train."
)


def attach(
    model: nn.Module,
    methods: Given,
    *,
    only: Choice | None = None,
    skip: Choice | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    strict: bool = True,
    seed: int | None = None,
    steps: int | None = None,
    example: Example | None = None,
    decline: bool = True,
) -> "Session":
    """Give `model` a better backward pass, in place; the training loop stays as it is.

    Args:
        model: any module; its layers change class, and keep parameters, ``state_dict`` keys and hooks.
        methods: one method or several, whose order means nothing; or a dict of glob patterns over full layer names,
            ``{"features.*": Dither(1), "head": None, "*": Dither(4)}``: the first pattern that matches a layer decides
            about it, and None leaves it plain.
        only: glob patterns over full layer names, or a function ``(name, layer) → bool``; nothing else is attached.
        skip: likewise; layers that it chooses are left alone.
        optimizer: drive the methods by this optimizer's steps alone. None: by every optimizer's that owns a parameter
            of an attached layer, including those made later.
        strict: raise where something would have no effect; False warns where that is possible.
        seed: seed of the methods' random numbers; None takes torch's (`torch.manual_seed`).
        steps: optimizer steps of the whole run, where a method's option is a share of it: ``Spectral(warmup=0.05)``.
        example: one batch, from which the plan forecasts what each layer will save: the model's inputs (a tensor, a
            tuple, a dict), or a function without arguments that returns the loss. It is run a few times, forward and
            backward, which leaves parameters, gradients, buffers and random state as they were.
        decline: with an example, leave plain the layers that attaching would not make faster, where saving time is all
            that their methods are for.

    Returns:
        The `Session`, which holds the plan, the figures and the methods' state, and detaches or folds the model.

    Raises:
        AttachError: the model is attached already, compiled, wrapped for data parallelism, or not yet initialised.
        PatternError: a pattern is empty or matches no layer.
        NoEffectError: a method would touch no layer.
        OptionError: `methods` is empty, holds something else, or a method twice.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(
            f"attach was given {model!r} for its model. The model comes first, an instance of torch.nn.Module, then "
            "the methods: attach(model, retrograde.Dither())."
        )
    return attached(
        model, assign(methods).for_run(steps), only, skip, optimizer, strict, seed, example, decline
    )


def attached(
    model: nn.Module,
    assignment: Assignment,
    only: Choice | None,
    skip: Choice | None,
    optimizer: torch.optim.Optimizer | None,
    strict: bool,
    seed: int | None,
    example: Example | None,
    decline: bool,
    plain: bool = False,
) -> "Session":
    """`attach`, for methods that are assigned to layers already.

    With `plain`, a model all of whose layers are declined trains plain after a warning, strict or not.
    """
    _check_model(model)
    decision = decide(model, assignment, only, skip, strict, example, decline)
    if strict and not plain:
        refuse_no_effect(decision.plan.rows, assignment.methods, strict)
    if not decision.layers:
        names = "+".join(method.name for method in assignment.methods)
        warnings.warn(
            f"{names}: nothing is attached. The example shows that no layer would become faster on this machine, so "
            "the plain model trains. decline=False (--no-decline on the command line) attaches all the same.",
            RetrogradeWarning,
            stacklevel=3,
        )
    if _on_cpu(place.site.layer for place in decision.layers):
        compiled.announce()
    seed = torch.initial_seed() if seed is None else seed
    return Session(model, assignment.methods, decision, optimizer, strict, seed)


def _on_cpu(layers: Iterable[nn.Module]) -> bool:
    return any(parameter.is_cpu for layer in layers for parameter in layer.parameters())


def resume(
    model: nn.Module,
    path: str | os.PathLike[str],
    methods: Given | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    strict: bool = True,
    steps: int | None = None,
) -> "Session":
    """Attach to a fresh `model` what `Session.save` wrote, and continue from there.

    Load the model's own state after this call, which restores the parameters that a method has added. Make the
    optimizer after it as well.

    Args:
        model: a plain model, built like the one that was saved.
        path: the file.
        methods: as for `attach`, for methods that are not registered under their names; None takes the saved ones, on
            the layers that they were on.
        optimizer: as for `attach`.
        strict: as for `attach`.
        steps: as for `attach`; the saved methods have no shares of the run left.

    Raises:
        StateError: the file cannot be read, belongs to another model, or names a method that is not installed.
    """
    layers, shapes, state = saving.read(path, known=methods is None)
    assignment = exactly(layers) if methods is None else assign(methods).for_run(steps)
    mine = _shapes({name or ROOT: module for name, module in model.named_modules()})
    if other := next((n for n in shapes if n in mine and mine[n] != shapes[n]), None):
        raise StateError(
            f"{os.fspath(path)} belongs to another model: the weight of its layer {other!r} is {shapes[other]}, and "
            f"here it is {mine[other]}. Build the model as it was when the session was saved."
        )
    if absent := sorted(layers.keys() - mine.keys()):
        raise StateError(
            f"{os.fspath(path)} belongs to another model: this one has no layer {', '.join(map(repr, absent[:5]))}. "
            "Build the model as it was when the session was saved."
        )
    try:
        session = attached(model, assignment, None, None, optimizer, strict, None, None, decline=False)
    except NoEffectError as error:
        raise StateError(
            f"{os.fspath(path)} belongs to another model: one of its methods finds no layer of this model to act on. "
            "Build the model as it was when the session was saved."
        ) from error
    try:
        session.load_state_dict(state)
    except StateError:
        session.detach()
        raise
    return session


def _shapes(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Of the parameters that are called weight, by layer; empty where there is none."""
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}  # pyright: ignore[reportPrivateUsage]
    return {name: () if weight is None else tuple(weight.shape) for name, weight in weights.items()}


def session_of(model: nn.Module) -> "Session":
    """Return the session of an attached model, or of a model that wraps or contains it.

    Raises:
        AttachError: nothing in `model` is attached, or several sessions are.
    """
    found: list[Session] = []
    for module in model.modules():
        owner = module._retrograde.owner if isinstance(module, AttachedLayer) else None  # pyright: ignore[reportPrivateUsage]
        if isinstance(owner, Session) and owner not in found:
            found.append(owner)
    if len(found) != 1:
        what = f"{len(found)} sessions are attached to parts of it" if found else "nothing in it is attached"
        raise AttachError(
            f"the {type(model).__name__} does not have exactly one session: {what}. Pass the module that was attached."
        )
    return found[0]


def fold(model: nn.Module) -> nn.Module:
    """Return a plain copy of an attached model that computes the same function (`Session.fold`)."""
    return session_of(model).fold()


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` and return the model (`Session.detach`)."""
    return session_of(model).detach()


@dataclass(frozen=True)
class Summary:
    """What a run has saved so far, over all attached layers. Print it, or read its attributes.

    Attributes:
        steps: optimizer steps.
        layers: attached layers.
        zeros: share of zeros in δ̃; None before the first backward pass.
        own_zeros: share of zeros in δ before the methods.
        fallbacks: calls in which a method left δ as it was, because it was not finite or had no variance.
        flops: sums over the run.
        best: step and value of the best validation score; None when no score was reported.
        kept: bytes that inputs of layers take until the backward pass, plain and as they are kept now, on average for a
            call of each layer where a method keeps less than the input; None where none does, or before a backward
            pass of this process. `attach(…, example=batch)` forecasts those of the whole step.
    """

    steps: int
    layers: int
    zeros: float | None
    own_zeros: float | None
    fallbacks: int
    flops: Flops
    best: tuple[int, float] | None
    kept: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**self.__dict__, "flops": self.flops.to_dict()}

    def __str__(self) -> str:
        if self.zeros is None or self.own_zeros is None:
            return f"{self.layers} layers attached; no backward pass yet"
        f = self.flops
        dense = f.dense or 1.0
        lines = [
            f"{self.layers} layers, {self.steps} steps, {self.fallbacks} fallbacks",
            f"zeros in the gradients   {self.zeros:.1%} ({self.own_zeros:.1%} before the methods)",
            f"FLOPs, dense-equivalent  {f.dense:.3g}",
            f"       non-zero          {f.needed:.3g} ({f.needed / dense:.1%})",
            f"       executed          {f.executed:.3g} ({f.executed / dense:.1%})",
            f"       discounted        {f.discounted:.3g} ({f.discounted / dense:.1%})",
        ]
        if self.kept:
            plain, kept = self.kept
            sizes = f"{mebibytes(plain)} → {mebibytes(kept)} MiB ({kept / plain:.1%})"
            lines.append(f"inputs kept for backward {sizes}, where no other operation keeps them")
        if self.best:
            lines.append(f"best validation score    {self.best[1]:.4g} at step {self.best[0]}")
        return "\n".join(lines)


class Session:
    """One model with its methods attached. Made by `attach`.

    Attributes:
        model: the attached model, the object that was given.
        methods: what is attached.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[Method, ...],
        decision: Decision,
        optimizer: torch.optim.Optimizer | None,
        strict: bool,
        seed: int,
    ) -> None:
        self.model = model
        self.methods = methods
        self._plan = decision.plan
        self._programs: dict[str, LayerProgram] = {}
        self._layers: dict[str, nn.Module] = {}
        self._scores: list[tuple[int, float]] = []
        self._seed = seed
        self._window: dict[str, Counters] = {}
        for place in decision.layers:
            names = place.kind.names(place.site.layer)
            self._programs[place.name] = LayerProgram(place.name, place.rules, seed, names)
        self._light = Lightened(())
        self._blocks: dict[str, BlockProgram] = {}
        self._block_window: dict[str, dict[str, int]] = {}
        self._schedules: dict[tuple[str, str], Callable[[int], Any]] = {}
        try:
            self._take_over(decision, optimizer, strict)
        except BaseException:
            # An error leaves the model as it was, so that it can be attached again.
            self._give_back(to_fold=False)
            raise
        self._acting = {place.name: tuple(place.methods.values()) for place in decision.layers}
        self._attached = True
        self._pauses = 0

    def __repr__(self) -> str:
        methods = ", ".join(map(str, self.methods))
        layers = f"{len(self._programs)} of {len(self._plan.rows)} layers"
        end = f"step {self.step}" if self._attached else "detached"
        return f"Session({type(self.model).__name__}: {methods}; {layers}; {end})"

    def _take_over(self, decision: Decision, optimizer: torch.optim.Optimizer | None, strict: bool) -> None:
        model = self.model
        for place in decision.layers:
            swap_in(place.site.layer, place.kind, self._programs[place.name])
            self._layers[place.name] = place.site.layer
        if any(m.lightens for place in decision.layers for m in place.methods.values()):
            self._light = Lightened(model.modules())
        self._blocks = _make_blocks(decision.blocks, self._programs, self._seed)
        swap_in_blocks(list(self._blocks.values()))
        pairs = [(self._layers[name], program) for name, program in self._programs.items()]
        self._conductors = self._make_conductors(decision)
        blocks = Blocks(model, list(self._blocks.values())) if self._blocks else None
        after = weakref.WeakMethod(self._follow_schedules)
        conductors = *self._conductors.values(), _Schedules(after)
        self._clock = Clock(pairs, conductors, optimizer, strict, blocks)
        for program in self._programs.values():
            program.owner = self

    def _give_back(self, *, to_fold: bool) -> None:
        swap_out_blocks(list(self._blocks.values()))
        swap_out(self._layers, to_fold=to_fold)
        self._light.end()

    def _make_conductors(self, decision: Decision) -> dict[str, Conductor]:
        found: dict[str, Conductor] = {}
        for method in self.methods:
            rules = {
                place.name: rule
                for place in decision.layers
                for name, rule in place.rules.items()
                if name == method.name
            }
            conductor = method.conductor(self.model, rules)
            if conductor is not None:
                found[method.name] = conductor
        return found

    @property
    def plan(self) -> Plan:
        """What happens to each layer, and why; blocks as the first pass of training has shown them."""
        rows = tuple(
            row if (block := self._blocks.get(row.name)) is None else replace(row, why=block.why)
            for row in self._plan.blocks
        )
        return replace(self._plan, blocks=rows)

    # Figures.

    @property
    def step(self) -> int:
        """Optimizer steps so far (of the layer that has made most)."""
        return max((program.step for program in self._programs.values()), default=0)

    def metrics(self, *, reset: bool = False) -> dict[str, Any]:
        """Figures of each attached layer since the last reset, for a logger.

        Args:
            reset: start counting anew after this reading.

        Returns:
            ``{"zeros", "own_zeros", "layers": {name: {"zeros", "own_zeros", "fallbacks", "kernel_<name>", …the
            methods' own}}}``, and under a method's name its figures for the whole model. Shares are None before the
            first backward pass; those of kernels are of all products since attaching.
            Where a method grants work to blocks, ``"blocks": {name: {"skip", "low", "full", …the method's own}}``:
            shares of the block's calls.
        """
        layers: dict[str, dict[str, float | None]] = {}
        total = Counters()
        for name, program in self._programs.items():
            program.read()
            counts = program.total - self._window.get(name, Counters())
            total += counts
            layers[name] = {**_shares(counts), "fallbacks": counts.fallbacks, **program.kernel_shares()}
            for rule in program.rules:
                layers[name].update(rule.metrics())
        blocks = {name: b.metrics(self._block_window.get(name, {})) for name, b in self._blocks.items()}
        if reset:
            self._block_window = {name: block.window() for name, block in self._blocks.items()}
            self._window = {name: program.total.copy() for name, program in self._programs.items()}
        whole = {name: figures for name, c in self._conductors.items() if (figures := c.metrics())}
        return {**_shares(total), **whole, "layers": layers, **({"blocks": blocks} if blocks else {})}

    def backward_seconds(self) -> dict[str, tuple[float, int]]:
        """Return seconds of each attached layer's backward passes in this process, and their number of steps.

        On a GPU these are the seconds of launching the work.
        """
        return {name: (program.clocked, program.clocked_steps) for name, program in self._programs.items()}

    def flops(self) -> Flops:
        """Return the FLOPs of the attached layers since attaching."""
        return self._total().flops()

    def summary(self) -> Summary:
        """Return what the run has saved so far."""
        total = self._total()
        best = max(self._scores, key=lambda entry: entry[1], default=None)
        shares = _shares(total)
        kept = [found for program in self._programs.values() if (found := program.kept)]
        return Summary(
            self.step,
            len(self._programs),
            shares["zeros"],
            shares["own_zeros"],
            total.fallbacks,
            total.flops(),
            best,
            (sum(plain for plain, _ in kept), sum(less for _, less in kept)) if kept else None,
        )

    def _total(self) -> Counters:
        for program in self._programs.values():
            program.read()
        programs = (*self._programs.values(), *self._blocks.values())
        return sum((program.total for program in programs), Counters())

    # Control.

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Run plain autograd inside: forward passes of this context have plain backward passes."""
        self._pauses += 1
        self._pause(True)
        try:
            yield
        finally:
            self._pauses -= 1
            self._pause(self._pauses > 0)

    def _pause(self, paused: bool) -> None:
        for program in self._programs.values():
            program.pause(paused)
        for block in self._blocks.values():
            block.active = not paused
        self._light.pause(paused)

    def validated(self, score: float, *, train: float | None = None) -> None:
        """Report a validation score, higher is better; methods with phases act on it.

        Args:
            score: a finite number; the best one so far appears in `summary`.
            train: the same score of the training data, where it is known: methods that add capacity warn where the
                network overfits already.

        Raises:
            OptionError: `score` or `train` is not a finite number.
        """
        value = _finite("score", score)
        # Only where it is given: conductors of third parties may not know it.
        known = {} if train is None else {"train": _finite("train", train)}
        self._scores.append((self.step, value))
        for conductor in self._conductors.values():
            conductor.validated(value, **known)

    def report(self, *, val: float) -> None:
        """Earlier name of `validated`."""
        self.validated(val)

    def set(self, method: str | None = None, /, **options: Any) -> None:
        """Change options of an attached method while it trains.

        Args:
            method: its name; None where one method alone is attached.
            options: new values; a function is called with the number of steps so far, now and after each step, and
                returns the value. Functions are not part of the session's state: set them again after resuming.

        Raises:
            OptionError: the method is not attached, it refuses the value, or the option cannot change while training
                (`Method.adjustable` lists those that can).

        Examples:
            >>> session.set("dither", scale=lambda step: 1.0 if step < 1000 else 4.0)
        """
        self._require_attached()
        names = sorted({each.name for each in self.methods})
        name = names[0] if method is None and len(names) == 1 else method
        if name not in names:
            raise OptionError(f"set: method {method!r} is not attached. Attached: {', '.join(names)}.")
        can = {option for each in self.methods if each.name == name for option in each.adjustable}
        fixed = sorted(options.keys() - can)
        if fixed:
            raise OptionError(
                f"set: {name} cannot change {', '.join(fixed)} in training. It can change "
                f"{', '.join(sorted(can)) or 'nothing'}; for another setting detach, and attach again."
            )
        now = {option: value(self.step) if callable(value) else value for option, value in options.items()}
        self._adjust(name, now)
        for option, value in options.items():
            self._schedules.pop((name, option), None)
            if callable(value):
                self._schedules[name, option] = value

    def _adjust(self, name: str, options: dict[str, Any]) -> None:
        def changed(method: Method) -> Method:
            if method.name != name:
                return method
            try:
                return dataclasses.replace(cast(Any, method), **options)
            except TypeError as error:
                raise OptionError(f"set: {name} refuses {options}: {error}.") from error

        acting = {layer: tuple(map(changed, methods)) for layer, methods in self._acting.items()}
        # One by one: two settings may have become the same.
        self.methods, self._acting = distinct([changed(method)] for method in self.methods), acting
        for layer, program in self._programs.items():
            for method in acting[layer]:
                if method.name == name:
                    program.rule_of(name).adjust(method)
                    if program.block is not None:
                        program.block.rule.adjust(method)

    def _follow_schedules(self) -> None:
        found: dict[str, dict[str, Any]] = {}
        for (name, option), value in self._schedules.items():
            found.setdefault(name, {})[option] = value(self.step)
        for name, options in found.items():
            known = [method for method in self.methods if method.name == name]
            if any(getattr(method, option) != value for method in known for option, value in options.items()):
                self._adjust(name, options)

    def rules_of(self, method: str) -> list[tuple[nn.Module, Rule]]:
        """The attached layers on which a method acts, by its name, with its rule of each."""
        acting = [name for name, methods in self._acting.items() if any(m.name == method for m in methods)]
        return [(self._layers[name], self._programs[name].rule_of(method)) for name in acting]

    def detach(self) -> nn.Module:
        """Undo `attach`: give every layer its own class back, and return the model.

        Raises:
            DetachError: detached already, or something else has changed a layer's class since.
        """
        if not self._attached:
            raise DetachError("this session is detached already: its model is plain.")
        self._swap_out(to_fold=False)
        return self.model

    def _swap_out(self, *, to_fold: bool) -> None:
        self._give_back(to_fold=to_fold)
        self._clock.stop()
        for program in self._programs.values():
            program.owner = None
        self._attached = False

    def fold(self, *, in_place: bool = False) -> nn.Module:
        """Return a plain copy of the model that computes the same function; the attached model stays as it is.

        Unlike a copy by `copy.deepcopy`, it has only the keys that its function needs.

        Args:
            in_place: fold the model itself and end the session, as `detach` does, but keeping what methods have added.
                Nothing is copied, and parameters stay the same objects.

        Raises:
            DetachError: `in_place`, and the session is detached already, or something else has changed a layer's class.
        """
        if in_place:
            self._require_attached()
            self._swap_out(to_fold=True)
        made = self.model if in_place else copy.deepcopy(self.model)
        folded: dict[int, nn.Module] = {}
        for name, program in self._programs.items():
            plain = made.get_submodule("" if name == ROOT else name)
            folded[id(plain)] = program.fold(plain)
        # A layer may have several names.
        for module in list(made.modules()):
            for child, plain in module._modules.items():  # pyright: ignore[reportPrivateUsage]
                if plain is not None and folded.get(id(plain), plain) is not plain:
                    setattr(module, child, folded[id(plain)])
        made = folded.get(id(made), made)
        for conductor in self._conductors.values():
            conductor.fold(made)
        return made

    # State.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `resume` reads: the methods with their settings, their layers, and `state_dict`.

        Save the model's and the optimizer's state as usual, beside it. The file is replaced as a whole.

        Raises:
            OSError: the file cannot be written; an earlier one stays.
        """
        self._require_attached()
        saving.write(path, self._acting, _shapes(self._layers), self.state_dict())

    def _require_attached(self) -> None:
        if not self._attached:
            raise DetachError("this session is detached already: its model is plain. Attach again.")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model's and the optimizer's state: plain values and tensors."""
        return {
            "format": _STATE_FORMAT,
            "seed": self._seed,
            "methods": sorted(map(repr, self.methods)),
            "scores": [list(entry) for entry in self._scores],
            "schedules": sorted(map(list, self._schedules)),
            "window": {name: counts.to_dict() for name, counts in self._window.items()},
            "layers": {name: program.state_dict() for name, program in self._programs.items()},
            "conductors": {name: conductor.state_dict() for name, conductor in self._conductors.items()},
            "blocks": {name: block.state_dict() for name, block in self._blocks.items()},
            "block_window": {name: dict(counts) for name, counts in self._block_window.items()},
            # Kernels round differently: a run goes on with those that it began with.
            "compiled": compiled.installed(),
            "calibration": None if (choose := sys.modules.get(_CHOOSE)) is None else choose.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken. Nothing is changed when the state does not fit.

        Raises:
            StateError: the state has another format, or belongs to other layers or other methods.
        """
        _check_state(state, self._programs)
        mine = sorted(map(repr, self.methods))
        if state["methods"] != mine:
            warnings.warn(
                f"the session's state was saved with {state['methods']}, and training continues with {mine}.",
                RetrogradeWarning,
                stacklevel=2,
            )
        scheduled = [
            ".".join(pair) for pair in state.get("schedules", ()) if tuple(pair) not in self._schedules
        ]
        if scheduled:
            warnings.warn(
                f"the session was saved while {', '.join(scheduled)} followed a function of the step, which no file "
                "can hold: it stays at its last value. Call session.set with the function again.",
                RetrogradeWarning,
                stacklevel=2,
            )
        before = copy.deepcopy(self.state_dict())
        try:
            self._take(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._take(before)
            raise StateError(
                f"the session's state is damaged, or belongs to other methods ({type(error).__name__}: {error}). "
                "Nothing was changed. Attach the methods that the state was saved with."
            ) from error

    def _take(self, state: dict[str, Any]) -> None:
        for name, program in self._programs.items():
            program.load_state_dict(state["layers"][name])
            program.reseed(int(state["seed"]))
        for name, conductor in self._conductors.items():
            conductor.load_state_dict(state["conductors"][name])
        for name, block in self._blocks.items():
            block.load_state_dict(state["blocks"][name])
            block.seed = int(state["seed"])
        self._seed = int(state["seed"])
        self._scores = [(int(step), float(score)) for step, score in state["scores"]]
        self._window = {name: Counters(**counts) for name, counts in state["window"].items()}
        self._block_window = {name: dict(counts) for name, counts in state["block_window"].items()}
        calibration = state.get("calibration")
        if state.get("compiled", calibration is not None or compiled.installed()) != compiled.installed():
            self._warn_other_kernels()
        elif calibration is not None and compiled.usable():
            importlib.import_module(_CHOOSE).load_state_dict(calibration)

    def _warn_other_kernels(self) -> None:
        if not _on_cpu(self._layers.values()):
            return
        began, here = ("without", "with") if compiled.installed() else ("with", "without")
        warnings.warn(
            f"the session was saved {began} numba and goes on {here} it: its kernels, compiled there or torch's own, "
            f"round differently, so the run is not the uninterrupted one bit for bit. Resume it {began} numba to have "
            "the same.",
            RetrogradeWarning,
            stacklevel=4,
        )


class _Schedules(Conductor):
    """Options that follow a function of the step: read after each."""

    def __init__(self, follow: "weakref.WeakMethod[Callable[[], None]]") -> None:
        self._follow = follow

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        follow = self._follow()
        if follow is not None:
            follow()


def _make_blocks(
    places: Sequence[BlockPlacement], layers: dict[str, LayerProgram], seed: int
) -> dict[str, BlockProgram]:
    """The blocks by name, outer ones made first; each attached layer is told its innermost one."""
    made: dict[str, BlockProgram] = {}
    owners: dict[str, set[int]] = {}

    def around(modules: set[int]) -> BlockProgram | None:
        holding = [name for name in made if modules <= owners[name]]
        return made[min(holding, key=lambda name: len(owners[name]))] if holding else None

    def members(block: Block) -> set[int]:
        return {id(module) for member in block.members for module in member.modules()}

    for place in sorted(places, key=lambda place: -len(members(place.block))):
        name, modules = place.block.name, members(place.block)
        inside = [layers[layer] for layer in place.layers]
        made[name] = BlockProgram(place.block, place.rule, seed, inside, around(modules))
        owners[name] = modules
        for layer in inside:
            layer.block = made[name]
    return {place.block.name: made[place.block.name] for place in places}


def _finite(name: str, given: float) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(
            f"validated: {name}={given!r} is not a finite number. Give a score where higher is better."
        )
    return value


def _shares(counts: Counters) -> dict[str, float | None]:
    if not counts.entries:
        return {"zeros": None, "own_zeros": None}
    return {"zeros": counts.zeros / counts.entries, "own_zeros": counts.own_zeros / counts.entries}


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"submodule {name!r}" if name else "the model"
        if isinstance(module, AttachedLayer | AttachedBlock):
            raise AttachError(
                f"{where} is attached already. Detach the earlier session first (session.detach()), and give attach "
                "all methods at once: they compose within one session."
            )
        wrapper = _wrapper(module)
        if wrapper:
            raise AttachError(f"{where} is {wrapper}, and attaching changes the layers inside. {_ORDER}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise AttachError(
                f"parameter {name!r} has no shape yet (a lazy layer). Run one batch through the model, then attach."
            )


def _wrapper(module: nn.Module) -> str | None:
    if type(module).__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl") is not None:
        return "compiled already"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"wrapped in {type(module).__name__} already"
    if any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__):
        return "sharded by FSDP already"
    return None


def _check_state(state: dict[str, Any], programs: dict[str, LayerProgram]) -> None:
    saved_format = state.get("format") if isinstance(state, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if saved_format != _STATE_FORMAT:
        raise StateError(
            f"this is not a session state of format {_STATE_FORMAT}. Pass what session.state_dict() returned, saved by "
            "the same version of retrograde."
        )
    absent = {"seed", "methods", "scores", "window", "layers", "conductors"} - state.keys()
    if absent:
        raise StateError(
            f"the session's state is incomplete: {sorted(absent)} are not in it. Load a complete one."
        )
    missing, surplus = sorted(programs.keys() - state["layers"]), sorted(state["layers"].keys() - programs)
    if missing or surplus:
        raise StateError(
            f"the state belongs to other layers: {missing[:5] or 'none'} attached here are not in it, and "
            f"{surplus[:5] or 'none'} in it are not attached here. Attach with the same `only` and `skip`."
        )
    for name, program in programs.items():
        if len(state["layers"][name]["rules"]) != len(program.rules):
            raise StateError(
                f"the state of layer {name!r} holds {len(state['layers'][name]['rules'])} methods, but "
                f"{len(program.rules)} are attached. Attach the methods that the state was saved with."
            )
