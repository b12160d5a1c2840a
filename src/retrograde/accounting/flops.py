"""FLOPs of a layer's three products, kept as four numbers that must not be confused.

- *dense*: what plain backpropagation multiplies (dense-equivalent).
- *needed*: the non-zero FLOPs, of multiply-adds whose δ operand is not zero.
- *executed*: what the kernel in use did; `Flops.overhead` holds the methods' own work beside it.
- *discounted*: executed, with low-precision products counted at `retrograde.kernels.work.DISCOUNTS`.

Two FLOPs for each multiply-add, as in `torch.utils.flop_counter`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Product:
    """Cost of one of a layer's three products (FLOPs)."""

    dense: float = 0.0
    needed: float = 0.0
    executed: float = 0.0
    discounted: float = 0.0


@dataclass
class Flops:
    """Cost of the attached layers over some stretch of training (FLOPs).

    Attributes:
        forward: ``z = W x``, counted once for each backward pass through the layer.
        input_grad: ``dx = δ W``.
        weight_grad: ``dW = δᵀ x``.
        overhead: the methods' own arithmetic: statistics, noise, rounding.
    """

    forward: Product = field(default_factory=Product)
    input_grad: Product = field(default_factory=Product)
    weight_grad: Product = field(default_factory=Product)
    overhead: float = 0.0

    def _sum(self, name: str) -> float:
        return sum(getattr(p, name) for p in (self.forward, self.input_grad, self.weight_grad))

    @property
    def dense(self) -> float:
        """Dense-equivalent FLOPs of forward, input and weight gradient."""
        return self._sum("dense")

    @property
    def needed(self) -> float:
        """Non-zero FLOPs, whose δ operand is not zero (the forward pass counted whole), with the overhead."""
        return self._sum("needed") + self.overhead

    @property
    def executed(self) -> float:
        """FLOPs that the chosen kernels did, with the overhead."""
        return self._sum("executed") + self.overhead

    @property
    def discounted(self) -> float:
        """Executed FLOPs, bfloat16 counted as a half and int8 as a quarter, with the overhead."""
        return self._sum("discounted") + self.overhead

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, sums first, ready for JSON."""
        sums = {name: getattr(self, name) for name in ("dense", "needed", "executed", "discounted")}
        return {**sums, **asdict(self)}
