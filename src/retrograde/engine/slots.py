"""The slot protocol: what a method may do at one layer.

A slot is a method of `Rule`. `docs/design.md` shows where each sits in the layer's program and who fills it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from retrograde.accounting.counters import Counters
from retrograde.engine.maps.base import LayerKind, Map
from retrograde.engine.statistics import InputStatistics, StatisticsSpec
from retrograde.errors import OptionError
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.work import Work

if TYPE_CHECKING:
    from retrograde.engine.program import LayerProgram


class Tier(IntEnum):
    """How much work a gate grants one backward call."""

    SKIP = 0
    """No weight gradient; the input gradient is still computed, for the layers behind."""
    LOW = 1
    """Low precision, by whichever rule fills the `delta` slot for it."""
    FULL = 2
    """Nothing reduced."""


class Needs(NamedTuple):
    """Which gradients autograd asked for in a call."""

    input: bool
    weight: bool
    bias: bool


@dataclass(slots=True, repr=False)
class Call:
    """One application of a layer in one backward pass: what the slots of the backward pass see.

    Attributes:
        delta: δ, gradient at the layer's output, as it arrived.
        saved: what the slot `save` kept: the layer's own input, unless a rule says otherwise; empty when no weight
            gradient is needed.
        weight: the weight that the forward pass multiplied.
        input_shape: shape of the layer's input.
        map: how the layer multiplies; see `retrograde.engine.maps.base.Map`.
        needs: gradients asked for.
        flops: of one dense product.
        small: whether products are so small that only torch's own kernels come into question.
        program: the layer's.
        number: of the call within its step.
        tier: what the layer's block and the gates have granted so far.
        min_precision: the least precision that kernels may round the other operands of δ̃'s products to.
        rounded: the precision that a rule has rounded these operands to; None for the weight's own dtype.
        low_weight: W as `Map.factor` lays it out, rounded by the forward pass or by a rule: dx comes from it.
        low_input: ``saved[0]`` rounded likewise: dW comes from it.
        products: both backward products with δ̃; set when δ̃ is known.
    """

    delta: Tensor
    saved: Sequence[Tensor]
    weight: Tensor
    input_shape: Sequence[int]
    map: Map
    needs: Needs
    flops: float
    small: bool
    program: "LayerProgram"
    number: int
    tier: Tier = Tier.FULL
    min_precision: str = "float32"
    rounded: str | None = None
    low_weight: Tensor | Quantised | None = None
    low_input: Tensor | Quantised | None = None
    products: Products = field(init=False)

    @property
    def key(self) -> int:
        """64-bit random key of this call."""
        return self.program.key(self.number)

    @property
    def counters(self) -> Counters:
        """The layer's sums; a rule adds its fallbacks."""
        return self.program.total

    @property
    def operand(self) -> Tensor | Quantised:
        """What δ̃ᵀ multiplies: ``saved[0]``, as it was rounded where it was."""
        return self.saved[0] if self.low_input is None else self.low_input

    def spend(self, flops: float) -> None:
        """Count FLOPs of the method's own."""
        self.program.tally.spend(flops)


@dataclass(frozen=True)
class Block:
    """A part of a model whose backward work is granted as a whole.

    Attributes:
        name: full name in the model.
        kind: ``"branch"``: its output is added to a shortcut, so SKIP may drop its whole backward pass;
            ``"chain"``: one layer with others behind it, so SKIP drops the weight gradient alone.
        module: whose result is the block's output.
        members: modules that belong to the block alone, `module` or others before its output.
        method: the method of `module` that returns the output.
        why: how it was found.
        owners: modules around it, inner ones first, whose first pass of training shows whether the gradient goes round
            it; empty where that is known.
        trusted: whether it may be skipped before.
    """

    name: str
    kind: Literal["branch", "chain"]
    module: nn.Module
    members: tuple[nn.Module, ...]
    method: str = "forward"
    why: str = ""
    owners: tuple[nn.Module, ...] = ()
    trusted: bool = True


@dataclass(frozen=True)
class BlockCall:
    """One application of a block in one backward pass, before any of its backward work.

    Attributes:
        delta: δ, gradient at the block's output.
        key: 64-bit random key of this call, the same on all ranks.
        step: optimizer steps of the block so far.
        counters: the block's sums; a rule adds its fallbacks and overhead.
        may_skip: whether SKIP is known to cut no gradient but the block's own; granted all the same it becomes LOW.
    """

    delta: Tensor
    key: int
    step: int
    counters: Counters
    may_skip: bool = True


@dataclass(frozen=True)
class Grant:
    """What a block's rule grants a call.

    Attributes:
        tier: for all layers of the block that no block inside it speaks for.
        scale: factor on what the block learns: on δ of a branch, on dW of a chain.
    """

    tier: Tier
    scale: float = 1.0


@dataclass(slots=True)
class Step:
    """One optimizer step, as `Rule.grad` and `Rule.local` see it.

    Attributes:
        layer: the attached layer.
        index: steps of this layer so far, from 0.
        optimizer: the optimizer that owns the layer's parameters.
        program: the layer's.
        refreshed: whether the statistics of the layer's input are new in this step.
    """

    layer: nn.Module
    index: int
    optimizer: torch.optim.Optimizer
    program: "LayerProgram"
    refreshed: bool = False

    @property
    def map(self) -> Map | None:
        """How the layer multiplied in its last backward call; None before the first."""
        return self.program.map

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter that the layer multiplies; None where it is computed."""
        return self.layer._parameters.get(self.program.names[0])  # pyright: ignore[reportPrivateUsage]

    @property
    def bias(self) -> nn.Parameter | None:
        """The parameter that the layer adds."""
        return self.layer._parameters.get(self.program.names[1])  # pyright: ignore[reportPrivateUsage]

    @property
    def zeros(self) -> float | None:
        """Share of zeros in δ̃ since the last step; None where there was no backward pass."""
        return self.program.tally.zeros_of_step()

    def spend(self, flops: float) -> None:
        """Count FLOPs of the method's own."""
        self.program.tally.spend(flops)


@dataclass(frozen=True)
class Site:
    """A layer that a method is asked about when attaching.

    Attributes:
        name: full name in the model.
        layer: the layer itself.
        map: how it multiplies, as it is set now.
        weight: the parameter that it multiplies; None where the weight is computed in every forward pass.
        bias: the parameter that it adds.
        kind: what reads the layer.
        tied: whether another layer shares a parameter of this one.
        last: whether it is the last of several layers that were chosen: the head, as a rule.
        fused_by: modules around it that multiply by its weight themselves in evaluation, without calling it.
        adapter: its part in low-rank adapters (LoRA): ``"factor"``, whose weight is merged into another layer's;
            ``"peft"``, any layer of a model whose adapters the package peft saves and merges.
        shape: of the weight that it multiplies, a parameter or not; None where only a forward pass can tell.
    """

    name: str
    layer: nn.Module
    map: Map
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    kind: LayerKind
    tied: bool = False
    last: bool = False
    fused_by: tuple[nn.Module, ...] = ()
    adapter: Literal["factor", "peft"] | None = None
    shape: torch.Size | None = None


class Rule:
    """What one method does at one layer. Override the slots that the method needs; the others cost nothing.

    Rules keep their state in plain attributes and tensors, change it only in the backward pass (`gate` to
    `product`) and in the step hooks (`grad`, `local`), never in the forward pass, which checkpointing runs twice.
    """

    precedence: ClassVar[int] = 0
    """Within a slot rules run by precedence, then by their methods' names: the user's order means nothing."""

    needs_input: ClassVar[bool] = False
    """Whether ``call.saved`` must hold the layer's own input: no other rule may then fill `save`."""

    needs_statistics: StatisticsSpec | None = None
    """Set by a rule that reads `statistics`."""

    statistics: InputStatistics
    """Statistics of the layer's input, given by the program to rules that need them, refreshed before `local`."""

    seed: int = 0
    """The session's seed, given by the program."""

    cycle: int = 1
    """Steps after which what this rule does in a pass begins again, past its method's warm-up; a forecast tries all."""

    int8_forward: bool = False
    """The product of a linear layer's forward pass runs in 8 bits and leaves x and W quantised
    (`retrograde.kernels.int8`)."""

    remark: str = ""
    """What the plan should say about this layer."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Full name of the layer, for messages."""

    def prepare(self, layer: nn.Module) -> None:
        """Once, when attaching: add what the forward pass needs to `layer`.

        A rule that fills `output` also sets ``layer.__class__`` to a subclass that computes the same by itself:
        evaluation, copies and pickles are of that class. `Rule.release` undoes both.
        """

    def release(self, layer: nn.Module) -> None:
        """Once, when detaching: undo `prepare`."""

    def adjust(self, method: "Method") -> None:
        """Take another setting of the method, which differs in options that are `Method.adjustable`."""
        raise NotImplementedError

    def output(self, x: Tensor, z: Tensor, map: Map) -> Tensor:
        """Forward, under autograd: ``(x, z) → z'``."""
        raise NotImplementedError

    def save(self, x: Tensor, weight: Tensor, map: Map) -> tuple[Tensor, ...]:
        """Forward, inside the boundary: what is kept of x. Comes with `product`."""
        raise NotImplementedError

    def gate(self, call: Call) -> Tier:
        """Backward, first: the tier of this call. The lowest of all gates counts."""
        raise NotImplementedError

    def delta(self, call: Call, delta: Delta) -> Delta:
        """Backward: δ → δ̃. What another rule has turned into levels stays so."""
        raise NotImplementedError

    def observe(self, call: Call, delta: Delta) -> None:
        """Backward, between `delta` and `product`: read δ (``call.delta``), δ̃ and what was saved; accumulate only."""
        raise NotImplementedError

    def product(self, call: Call, delta: Delta) -> Work:
        """Backward: the weight gradient from what `save` kept."""
        raise NotImplementedError

    def grad(self, step: Step) -> None:
        """Before the optimizer's step, after any all-reduce: change ``step.weight.grad``."""
        raise NotImplementedError

    def remember(self, step: Step) -> None:
        """Where an optimizer steps another one inside its own step: the inner step begins."""

    def local(self, step: Step) -> None:
        """After the optimizer's step: the method's own learning."""
        raise NotImplementedError

    def fold(self, layer: nn.Module) -> nn.Module:
        """On request: the plainest module that computes what the attached layer computes.

        Args:
            layer: a plain copy of the attached layer, to be changed in place or replaced by what is returned.
        """
        raise NotImplementedError

    def read(self) -> None:
        """Fetch what lies on a GPU; the host waits, so never in the backward pass."""

    def metrics(self) -> dict[str, float]:
        """The method's own figures for this layer, for logs and reports."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def fills(self, slot: str) -> bool:
        """Whether this rule overrides `slot`."""
        return getattr(type(self), slot) is not getattr(Rule, slot)


class BlockRule:
    """`gate` for a whole block. State changes in the backward pass (`gate`) and after the step (`local`) only."""

    def gate(self, call: BlockCall) -> Grant:
        """What this call is worth; the answer must be the same on all ranks."""
        raise NotImplementedError

    def local(self) -> None:
        """After the optimizer's step."""

    def shares(self) -> Mapping[Tier, float]:
        """The share of calls that each tier is granted once the method has warmed up, as far as it is known before."""
        return {Tier.FULL: 1.0}

    def adjust(self, method: "Method") -> None:
        """As for `Rule.adjust`. A method's layers share their blocks' rules, so this may be called several times."""

    def metrics(self) -> dict[str, float]:
        """The rule's figures, for logs and reports."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Conductor:
    """What a method decides for a whole model rather than for one layer: phases, restarts, the best state so far."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before any optimizer of the process makes a step, after the rules' `grad`."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after an optimizer that owns attached parameters made a step, after the rules' `local`."""

    def validated(self, score: float, train: float | None = None) -> None:
        """Called with a validation score, higher is better, when the user reports one (`Session.validated`).

        Args:
            score: the validation score.
            train: the same of the training data, passed where the user gives it.
        """

    def fold(self, model: nn.Module) -> None:
        """Called with a folded copy of the model, to undo what concerns more than single layers."""

    def metrics(self) -> dict[str, Any]:
        """The method's figures for the whole model, ready for JSON."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Method:
    """A method's configuration: a frozen dataclass that makes one `Rule` for each layer.

    A field called ``warmup`` is understood as steps before the method begins: short runs and benchmarks shorten it.
    Options that count steps may be shares of the run instead (`shares`).

    Attributes:
        name: the method's short name, as on the command line.
    """

    name: ClassVar[str]

    saves_time: ClassVar[bool] = False
    """Whether the method is there to make steps faster. A layer that is forecast slower is then left plain."""

    forecast_note: ClassVar[str] = ""
    """What a forecast takes for granted that training may make otherwise, as a sentence for the plan."""

    adjustable: ClassVar[Collection[str]] = ()
    """Options that `Session.set` may change while training; the method's rules then implement `Rule.adjust`."""

    shares: ClassVar[Collection[str]] = ()
    """Options in optimizer steps that may be given as a share of the run instead, a float between 0 and 1: rules are
    made by a method in which `for_run` has put steps in their place."""

    adds_parameters: ClassVar[bool] = False
    """Whether the trained model may have more parameters than the plain one. Tables then show their number."""

    short_run: ClassVar[Mapping[str, Any]] = {}
    """Options with which a run of a few hundred steps shows what the method does, where the defaults are for longer
    ones: ``retrograde compare --method all`` takes them."""

    whole_run: ClassVar[str] = ""
    """Why a few hundred steps cannot judge the method; empty where they can. ``retrograde advise`` then leaves it out
    and gives this reason."""

    benchmarks: ClassVar[Mapping[str, Sequence[Mapping[str, Any]]]] = {}
    """Options with which ``retrograde bench steps`` times the method beside its defaults, by the precision that the
    model runs in: ``"float32"``, or ``"bfloat16"`` for autocast."""

    def __str__(self) -> str:
        """The method with the options that are not at their defaults."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"

    def for_run(self, steps: int | None) -> Self:
        """The method with whole steps in place of shares of the run.

        Args:
            steps: the run's optimizer steps; None where nobody knows.

        Raises:
            OptionError: there is a share, and the run's length is not known.
        """
        found = {name: getattr(self, name) for name in self.shares}
        given = {name: value for name, value in found.items() if isinstance(value, float)}
        if not given:
            return self
        if steps is None:
            name, value = next(iter(given.items()))
            raise OptionError(
                f"{type(self).__name__}: {name}={value} is a share of the run, whose length is not known. Pass "
                "attach(…, steps=…), the run's optimizer steps, or give the option as a number of steps."
            )
        counted = {name: max(1, round(value * steps)) for name, value in given.items()}
        return dataclasses.replace(cast(Any, self), **counted)

    def conductor(self, model: nn.Module, rules: Mapping[str, Rule]) -> "Conductor | None":
        """What decides for the whole model, if the method needs that.

        Args:
            model: the attached model.
            rules: this method's rules by layer name.
        """
        return None

    def notes(self, model: nn.Module, rules: Mapping[str, Rule]) -> Sequence[str]:
        """What the plan should say about the whole model, as sentences.

        Args:
            model: the model, before it is attached.
            rules: this method's rules by layer name; at least one.
        """
        return ()

    def branches(self, model: nn.Module) -> Sequence[Block] | None:
        """The branches of `model`, where the method grants work to whole blocks; None where it does not.

        Attached layers outside them become chains of one layer.
        """
        return None

    def block_rules(self, blocks: Sequence[Block]) -> Sequence[BlockRule]:
        """One rule for each block of a model; `blocks` are in the model's order."""
        raise NotImplementedError

    @property
    def lightens(self) -> bool:
        """Whether layers keep so little of their inputs that ReLUs should keep less too (`engine.activations`)."""
        return False

    def make_rule(self, site: Site) -> Rule | str:
        """The rule for `site`, or the reason why this method leaves the layer alone."""
        raise NotImplementedError
