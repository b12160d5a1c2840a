"""Blocks: the boundary at a block's output, what it decides there, and what that means for its parameters.

The boundary is the identity in the forward pass. In the backward pass it sees the block's δ before any of the block's
work and asks the block's rule what that work is worth:

- SKIP at a branch: eager, the boundary returns no gradient, and autograd prunes everything behind it (a builtin node
  that is given no gradient passes none on). Compiled code cannot return None by chance: there the boundary is an opaque
  op that returns zeros, and the attached layers of the block return zeros without multiplying; what lies between them
  (norms, activations, attention products) still runs, on zeros.
  Eager code does the same where a parameter of the block has a hook: torch would call it with None.
- SKIP in a chain: the layer's weight gradient is not computed. A chain is one attached layer and has no boundary but
  the layer's own.
- LOW and FULL: the attached layers inside read the tier, each of the innermost block around it.

Autograd runs the backward of a block's last call first, layers included, before it comes to an earlier call, so the
tier is one value for each block.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from retrograde.accounting.counters import Counters
from retrograde.engine import boundary
from retrograde.engine.slots import Block, BlockCall, BlockRule, Grant, Tier
from retrograde.errors import DoubleBackwardError, RetrogradeWarning
from retrograde.maths.philox import key_of, mix_key

_LIBRARY = torch.library.Library("retrograde", "FRAGMENT")
_LIBRARY.define("block_backward(Tensor delta, Tensor(a!) token) -> Tensor")


class Layer(Protocol):
    """What a block needs of the programs of the layers inside."""

    @property
    def total(self) -> Counters:
        """Sums since attaching."""
        ...

    def pass_by(self, dense: Counters, ratio: float) -> None:
        """Count calls that a block pruned: `ratio` times those that `dense` holds."""
        ...


class BlockProgram:
    """Runs one block.

    Args:
        block: what and where it is.
        rule: decides what a call is worth.
        seed: the session's seed.
        layers: programs of all attached layers inside.
        outer: the next block around this one.
    """

    def __init__(
        self,
        block: Block,
        rule: BlockRule,
        seed: int,
        layers: Sequence[Layer],
        outer: "BlockProgram | None",
    ) -> None:
        self.block = block
        self.rule = rule
        self.seed = seed
        self.active = True
        self.step = 0
        self.calls = 0
        self.skipped = 0
        self.grant = Grant(Tier.FULL)
        self.may_skip = block.trusted
        self.settled = not block.owners
        """Whether `may_skip` is final."""
        self.why = block.why
        self.total = Counters()
        self.tiers = dict.fromkeys(Tier, 0)
        self._layers = tuple(layers)
        self._outer = outer
        self._block_key = key_of(block.name)
        # What one executed call counts at each layer inside, for δ of `_profile_entries` entries.
        self._profile: list[Counters] = []
        self._profile_entries = 0
        self._before: list[Counters] | None = None
        self.token = boundary.token(self)

    @property
    def pruned(self) -> bool:
        """Whether the current call has no backward pass at all."""
        return self.block.kind == "branch" and self.grant.tier is Tier.SKIP

    def heard(self) -> bool:
        """Whether somebody's hook waits for the gradient of a parameter inside (``register_hook``)."""
        return any(p._backward_hooks for member in self.block.members for p in member.parameters())  # pyright: ignore[reportPrivateUsage]

    def gate(self, delta: Tensor) -> Grant:
        """What this call is worth. Everything inside reads `grant` afterwards."""
        if self._outer is not None and self._outer.pruned:
            # Compiled code comes here with the zeros of a pruned block around: no decision is due, nothing is counted.
            self.grant = Grant(Tier.SKIP)
            return self.grant
        if self._before is not None:
            self._measure_profile()
        key = mix_key(self.seed, self.step, self._block_key, self.calls)
        self.grant = self.rule.gate(BlockCall(delta, key, self.step, self.total, self.may_skip))
        if self.grant.tier is Tier.SKIP and not self.may_skip:
            self.grant = Grant(Tier.LOW)
        self.calls += 1
        self.total.calls += 1
        self.tiers[self.grant.tier] += 1
        if self.grant.tier is Tier.SKIP:
            self.skipped += 1
            self.total.skipped += 1
        if self.pruned:
            ratio = delta.numel() / self._profile_entries if self._profile_entries else 0.0
            for layer, dense in zip(self._layers, self._profile, strict=False):
                layer.pass_by(dense, ratio)
        elif self._layers and not self._profile:
            self._before = [layer.total.copy() for layer in self._layers]
            self._profile_entries = delta.numel()
        return self.grant

    def settle(self, *, goes_round: bool) -> None:
        """What a pass has shown of the block."""
        self.may_skip, self.settled = goes_round, True
        self.why = f"{self.block.why}; the first pass has shown that "
        self.why += "the gradient goes round it" if goes_round else "no gradient goes round it: never skipped"
        if not goes_round:
            warnings.warn(
                f"block {self.block.name!r} is not a residual branch: no gradient goes round it, so "
                "skipping it would cut the gradient to everything before it. It runs in LOW or FULL, and is never "
                "skipped. Name the right modules with `blocks`, or put the branch in a retrograde.Residual.",
                RetrogradeWarning,
                stacklevel=2,
            )

    def _measure_profile(self) -> None:
        """After the first executed call of the block: what it counted at the layers inside."""
        if self._before is not None:
            self._profile = [
                layer.total - before for layer, before in zip(self._layers, self._before, strict=True)
            ]
            self._before = None

    def owners(self) -> set[int]:
        """Ids of the modules whose parameters rest with the block."""
        return {id(module) for member in self.block.members for module in member.modules()}

    def after_step(self) -> None:
        """The rule's `local`, then the next step begins."""
        self._measure_profile()
        self.rule.local()
        self.step += 1
        self.calls = self.skipped = 0

    def metrics(self, since: dict[str, int]) -> dict[str, float]:
        """Shares of the tiers since the counts `since` (cumulative without), calls, and the rule's own figures."""
        counts = {tier.name.lower(): self.tiers[tier] - since.get(tier.name.lower(), 0) for tier in Tier}
        calls = sum(counts.values())
        shares = {name: count / calls if calls else 0.0 for name, count in counts.items()}
        return {**shares, "calls": calls, "fallbacks": self.total.fallbacks, **self.rule.metrics()}

    def window(self) -> dict[str, int]:
        """The tier counts so far, for a later `metrics`."""
        return {tier.name.lower(): count for tier, count in self.tiers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit."""
        self._measure_profile()
        return {
            "step": self.step,
            "calls": self.calls,
            "skipped": self.skipped,
            "total": self.total.to_dict(),
            "tiers": self.window(),
            "profile": [counts.to_dict() for counts in self._profile],
            "profile_entries": self._profile_entries,
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step, self.calls, self.skipped = int(state["step"]), int(state["calls"]), int(state["skipped"])
        self.total = Counters(**state["total"])
        self.tiers = {tier: int(state["tiers"][tier.name.lower()]) for tier in Tier}
        self._profile = [Counters(**counts) for counts in state["profile"]]
        self._profile_entries, self._before = int(state["profile_entries"]), None
        self.rule.load_state_dict(state["rule"])


class Blocks:
    """All blocks of a session in the optimizer's hooks.

    A parameter all of whose owners were skipped in every call of a step gets no gradient (None, not zeros), so neither
    momentum nor weight decay moves it. Under data parallelism its gradient arrives as zeros, which this undoes.

    Args:
        model: the attached model.
        programs: its blocks.
    """

    def __init__(self, model: nn.Module, programs: Sequence[BlockProgram]) -> None:
        self._programs = tuple(programs)
        inside = [(program, program.owners()) for program in self._programs if program.block.kind == "branch"]
        self._owners = [
            (module, tuple(program for program, ids in inside if id(module) in ids))
            for module in model.modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        self._chains = [program for program in self._programs if program.block.kind == "chain"]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of skipped parameters away; before rules look at them."""
        # Looked up by module at every step: sharding replaces parameters.
        chained = {
            (id(module), id(parameter)): _idle(program)
            for program in self._chains
            for module, parameter in _weights(program.block.module)
        }
        idle: dict[int, nn.Parameter] = {}
        busy: set[int] = set()
        for module, programs in self._owners:
            skipped = any(_idle(program) for program in programs)
            for parameter in module.parameters(recurse=False):
                if skipped or chained.get((id(module), id(parameter)), False):
                    idle[id(parameter)] = parameter
                else:
                    busy.add(id(parameter))
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for key in idle.keys() & mine - busy:
            idle[key].grad = None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """`local` of the blocks whose first trainable parameter is this optimizer's."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for program in self._programs:
            parameters = (p for member in program.block.members for p in member.parameters())
            if id(next((p for p in parameters if p.requires_grad), None)) in mine:
                program.after_step()


def _idle(program: BlockProgram) -> bool:
    return program.calls > 0 and program.skipped == program.calls


def _weights(layer: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """What a layer's weight gradient reaches, with its owner: the weight, or what a parametrisation makes it from."""
    name = layer.__dict__["_retrograde"].names[0] or "weight"
    parametrised = getattr(layer, "parametrizations", None)
    if parametrised is not None and name in parametrised:
        return [(m, p) for m in parametrised[name].modules() for p in m.parameters(recurse=False)]
    weight = layer._parameters.get(name)  # pyright: ignore[reportPrivateUsage]
    return [] if weight is None else [(layer, weight)]


def cross(y: Tensor, program: Any) -> Tensor:
    """`y`, with the boundary of `program`, a `BlockProgram`, in its backward pass."""
    if not torch.compiler.is_compiling() and (boundary.transforming() or boundary.has_tangent(y)):
        raise boundary.untransformed(f"block {program.block.name!r}")
    return _BlockBoundary.apply(y, program)  # pyright: ignore[reportReturnType]


class _BlockBoundary(torch.autograd.Function):
    """The identity, any shape."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, program: BlockProgram) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.program = program
        # Not `y` itself, nor a view: users add to a branch's output in place, which autograd refuses for those.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None]:
        (delta,) = grad_outputs
        if delta is None:
            return None, None
        if torch.compiler.is_compiling():
            return torch.ops.retrograde.block_backward(delta, ctx.program.token), None
        if boundary.has_batches(delta):
            raise boundary.untransformed(f"block {ctx.program.block.name!r}")
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                f"a gradient of a gradient was asked for (create_graph=True) through block {ctx.program.block.name!r}, "
                "whose backward pass may be skipped. Compute that term inside `with session.paused():`, forward pass "
                "included, where plain autograd runs."
            )
        grant: Grant = ctx.program.gate(delta)
        if grant.tier is Tier.SKIP:
            return torch.zeros_like(delta) if ctx.program.heard() else None, None
        return delta if grant.scale == 1 else delta * grant.scale, None


def _run(delta: Tensor, token: Tensor) -> Tensor:
    grant: Grant = boundary.named(token, "block").gate(delta)
    # An op may not return its input.
    return torch.zeros_like(delta) if grant.tier is Tier.SKIP else delta * grant.scale


def _fake(delta: Tensor, token: Tensor) -> Tensor:
    return torch.empty_like(delta)


_LIBRARY.impl("block_backward", _run, "CompositeExplicitAutograd")
torch.library.register_fake("retrograde::block_backward", _fake, lib=_LIBRARY)
