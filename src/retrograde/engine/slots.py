"""The slot protocol: what a method may do at one layer.

`docs/design.md` shows where each slot sits in the layer's program and how the methods fill them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retrograde.accounting.counters import Counters
from retrograde.engine.statistics import InputStatistics, StatisticsSpec
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised


class Tier(IntEnum):
    """How much work a gate grants one backward call."""

    SKIP = 0
    """No weight gradient; the input gradient is still computed, for the layers behind."""
    LOW = 1
    """Low precision, by whichever rule fills the `delta` slot for it."""
    FULL = 2
    """Nothing reduced."""


@dataclass(frozen=True)
class Operands:
    """What the layer's product is made of; slot 1 may transform any of it.

    Attributes:
        x: input, (…, i) for a linear layer, (N, C_in, spatial…) for a convolution, padded where needed.
        weight: (o, i), or the convolution's kernel in torch's layout.
        bias: (o,) or None.
        geometry: None for a linear layer.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry | None = None


@dataclass(frozen=True)
class Needs:
    """Which gradients autograd asked for in a call."""

    input: bool
    weight: bool
    bias: bool


@dataclass
class Call:
    """One application of a layer in one backward pass: what slots 4 to 6 see.

    Attributes:
        delta: δ, gradient at the layer's output, as it arrived.
        saved: what slot 3 kept; empty when no weight gradient is needed. After a forward pass in 8 bits, x̂ as it was
            rounded, where a rule observes.
        int8_weight: the weight in 8 bits, where the forward pass or a rule rounded it: dx comes from it.
        int8_x: x̂ in 8 bits, as rows (n, i), where the forward pass or a rule rounded it: dW comes from it.
        products: slot 6, both backward products with δ̃; set when slot 5 is done.
        weight: the weight that the forward pass multiplied.
        input_shape: shape of x̂.
        geometry: None for a linear layer.
        key: 64-bit random key of this call.
        needs: gradients asked for.
        counters: the layer's sums; a rule adds its fallbacks and overhead.
        tier: what the layer's block and the gates have granted so far.
        allowed: the least precision that kernels may round the other operands of δ̃'s products to.
        precision: what a rule has rounded the operands of the backward products to (a key of
            `retrograde.accounting.flops.DISCOUNTS`); None for the weight's own dtype.
    """

    delta: Tensor
    saved: Sequence[Tensor]
    weight: Tensor
    input_shape: Sequence[int]
    geometry: Geometry | None
    key: int
    needs: Needs
    counters: Counters
    tier: Tier = Tier.FULL
    allowed: str = "float32"
    precision: str | None = None
    int8_weight: Quantised | None = None
    int8_x: Quantised | None = None
    products: Products = field(init=False)


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
    """

    name: str
    kind: Literal["branch", "chain"]
    module: nn.Module
    members: tuple[nn.Module, ...]
    method: str = "forward"
    why: str = ""


@dataclass(frozen=True)
class BlockCall:
    """One application of a block in one backward pass, before any of its backward work.

    Attributes:
        delta: δ, gradient at the block's output.
        key: 64-bit random key of this call, the same on all ranks.
        step: optimizer steps of the block so far.
        counters: the block's sums; a rule adds its fallbacks and overhead.
    """

    delta: Tensor
    key: int
    step: int
    counters: Counters


@dataclass(frozen=True)
class Grant:
    """What a block's rule grants a call.

    Attributes:
        tier: for all layers of the block that no block inside it speaks for.
        scale: factor on what the block learns: on δ of a branch, on dW of a chain.
    """

    tier: Tier
    scale: float = 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step, as slots 7 and 8 see it.

    Attributes:
        layer: the attached layer.
        index: steps of this layer so far, from 0.
        refreshed: whether the statistics of the layer's input are new in this step.
        optimizer: the optimizer that owns the layer's parameters.
        counters: what the layer's backward calls since the last step counted.
    """

    layer: nn.Module
    index: int
    optimizer: torch.optim.Optimizer
    counters: Counters
    refreshed: bool = False


@dataclass(frozen=True)
class Site:
    """A layer that a method is asked about when attaching.

    Attributes:
        name: full name in the model.
        layer: the layer itself.
        kind: ``"linear"`` or ``"convolution"``.
        tied: whether another layer shares a parameter of this one.
        last: whether it is the last of several layers that were chosen: the head, as a rule.
    """

    name: str
    layer: nn.Module
    kind: str
    tied: bool = False
    last: bool = False


class Rule:
    """What one method does at one layer. Override the slots that the method needs; the others cost nothing.

    Rules keep their state in plain attributes and tensors, change it only in the backward pass (slots 4 to 6) and
    in the step hooks (slots 7 and 8), never in the forward pass, which activation checkpointing runs twice.
    """

    needs_statistics: StatisticsSpec | None = None
    """Set by a rule that reads `statistics`."""

    statistics: InputStatistics
    """Statistics of the layer's input, given by the program to rules that need them, refreshed before slot 8."""

    seed: int = 0
    """The session's seed, given by the program."""

    int8_forward: bool = False
    """Slots 3 and 6: the product of a linear layer's forward pass runs in 8 bits and leaves x̂ and W quantised
    (`retrograde.kernels.int8`)."""

    remark: str = ""
    """What the plan should say about this layer."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Full name of the layer, for messages."""

    def prepare(self, layer: nn.Module) -> None:
        """Once, when attaching: add the parameters and buffers that the forward pass needs to `layer`.

        They are part of ``model.state_dict()``; `Rule.release` takes them away again.
        """

    def release(self, layer: nn.Module) -> None:
        """Once, when detaching: undo `prepare`."""

    def input(self, operands: Operands) -> Operands:
        """Slot 1, forward, under autograd: transform the operands of the product."""
        raise NotImplementedError

    def output(self, x: Tensor, z: Tensor) -> Tensor:
        """Slot 2, forward, under autograd: ``(x, z) → z'``, x as it came, before slot 1."""
        raise NotImplementedError

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        """Slot 3, forward, inside the boundary: what is kept of x̂. Comes with `product`."""
        raise NotImplementedError

    def gate(self, call: Call) -> Tier:
        """Slot 4, backward, first: the tier of this call. The lowest of all gates counts."""
        raise NotImplementedError

    def delta(self, call: Call, delta: Delta) -> Delta:
        """Slot 5, backward: δ → δ̃."""
        raise NotImplementedError

    def observe(self, call: Call, delta: Delta) -> None:
        """Between slots 5 and 6, backward: read δ (``call.delta``), δ̃ and what was saved; accumulate only."""
        raise NotImplementedError

    def product(self, call: Call, delta: Delta) -> Tensor:
        """Slot 6, backward: the weight gradient from what `save` kept."""
        raise NotImplementedError

    def grad(self, step: Step) -> None:
        """Slot 7, before the optimizer's step, after any all-reduce: change ``layer.weight.grad``."""
        raise NotImplementedError

    def local(self, step: Step) -> None:
        """Slot 8, after the optimizer's step: the method's own learning."""
        raise NotImplementedError

    def fold(self, layer: nn.Module) -> nn.Module:
        """Slot 9: the plain module that computes alone what the attached one computes.

        Args:
            layer: a plain copy of the attached layer, to be changed in place or replaced by what is returned.
        """
        raise NotImplementedError

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
    """Slot 4 for a whole block. State changes in the backward pass (`gate`) and after the step (`local`) only."""

    def gate(self, call: BlockCall) -> Grant:
        """What this call is worth; the answer must be the same on all ranks."""
        raise NotImplementedError

    def local(self) -> None:
        """After the optimizer's step."""

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
        """An optimizer, any of the process, is about to step; the rules' own slot 7 has run."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that owns attached parameters made a step; the rules' own slot 8 has run."""

    def validated(self, score: float) -> None:
        """The user reported a validation score, higher is better (`Session.report`)."""

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

    Attributes:
        name: the method's short name, as on the command line.
    """

    name: ClassVar[str]

    saves_time: ClassVar[bool] = False
    """Whether a faster step is what the method is for, and its work in every call is the same: what it saves can then
    be forecast, and a layer where it would lose may be declined."""

    def conductor(self, model: nn.Module, rules: Mapping[str, Rule]) -> "Conductor | None":
        """What decides for the whole model, if the method needs that.

        Args:
            model: the attached model.
            rules: this method's rules by layer name.
        """
        return None

    def branches(self, model: nn.Module) -> Sequence[Block] | None:
        """The branches of `model`, where the method grants work to whole blocks; None where it does not.

        Attached layers outside them become chains of one layer.
        """
        return None

    def block_rules(self, blocks: Sequence[Block]) -> Sequence[BlockRule]:
        """One rule for each block of a model; `blocks` are in the model's order."""
        raise NotImplementedError

    def make_rule(self, site: Site) -> Rule | str:
        """The rule for `site`, or the reason why this method leaves the layer alone."""
        raise NotImplementedError
