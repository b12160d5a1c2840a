"""The slot protocol: what a method may do at one layer.

`docs/design.md` shows where each slot sits in the layer's program and how the methods fill them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retrograde.accounting.counters import Counters
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry


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
        saved: what slot 3 kept; empty when no weight gradient is needed.
        weight: the weight that the forward pass multiplied.
        input_shape: shape of x̂.
        geometry: None for a linear layer.
        key: 64-bit random key of this call.
        needs: gradients asked for.
        counters: the layer's sums; a rule adds its fallbacks and overhead.
        tier: what the gates have granted so far.
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


@dataclass(frozen=True)
class Step:
    """One optimizer step, as slots 7 and 8 see it.

    Attributes:
        layer: the attached layer.
        index: steps of this layer so far, from 0.
        optimizer: the optimizer that owns the layer's parameters.
        counters: what the layer's backward calls since the last step counted.
    """

    layer: nn.Module
    index: int
    optimizer: torch.optim.Optimizer
    counters: Counters


@dataclass(frozen=True)
class Site:
    """A layer that a method is asked about when attaching.

    Attributes:
        name: full name in the model.
        layer: the layer itself.
        kind: ``"linear"`` or ``"convolution"``.
    """

    name: str
    layer: nn.Module
    kind: str


class Rule:
    """What one method does at one layer. Override the slots that the method needs; the others cost nothing.

    Rules keep their state in plain attributes and tensors, change it only in the backward pass (slots 4 to 6) and
    in the step hooks (slots 7 and 8), never in the forward pass, which activation checkpointing runs twice.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        """Full name of the layer, for messages."""

    def input(self, operands: Operands) -> Operands:
        """Slot 1, forward, under autograd: transform the operands of the product."""
        raise NotImplementedError

    def output(self, x: Tensor, z: Tensor) -> Tensor:
        """Slot 2, forward, under autograd: ``(x̂, z) → z'``."""
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

    def product(self, call: Call, delta: Delta) -> Tensor:
        """Slot 6, backward: the weight gradient from what `save` kept."""
        raise NotImplementedError

    def grad(self, step: Step) -> None:
        """Slot 7, before the optimizer's step, after any all-reduce: change ``layer.weight.grad``."""
        raise NotImplementedError

    def local(self, step: Step) -> None:
        """Slot 8, after the optimizer's step: the method's own learning."""
        raise NotImplementedError

    def fold(self, layer: nn.Module) -> None:
        """Slot 9: make `layer`, a plain copy, compute alone what the attached one computes."""
        raise NotImplementedError

    def validated(self, score: float) -> None:
        """The user reported a validation score (`Session.report`)."""

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


class Method:
    """A method's configuration: a frozen dataclass that makes one `Rule` for each layer.

    Attributes:
        name: the method's short name, as on the command line.
    """

    name: ClassVar[str]

    def rule(self, site: Site) -> Rule | str:
        """The rule for `site`, or the reason why this method leaves the layer alone."""
        raise NotImplementedError
