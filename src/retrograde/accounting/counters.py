"""What one layer's backward passes have counted so far."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from retrograde.accounting.flops import Flops, Product


@dataclass
class Counters:
    """Sums over backward calls of one layer. Flat on purpose: it is added to on every call.

    Attributes:
        calls: backward passes through the layer.
        entries: entries of δ seen.
        own_zeros: zeros that δ arrived with; between counts, as many as at the last one.
        zeros: zeros of δ̃, after the methods.
        fallbacks: calls in which a method stepped aside for a stated reason (non-finite or zero-variance δ).
        skipped: calls whose weight gradient a gate dropped.
        overhead: the methods' own arithmetic (FLOPs).
        forward_dense: and the eleven others: FLOPs by product and kind, see `retrograde.accounting.flops`.
    """

    calls: int = 0
    entries: int = 0
    own_zeros: float = 0
    zeros: float = 0
    fallbacks: int = 0
    skipped: int = 0
    overhead: float = 0.0
    forward_dense: float = 0.0
    forward_needed: float = 0.0
    forward_executed: float = 0.0
    forward_discounted: float = 0.0
    input_grad_dense: float = 0.0
    input_grad_needed: float = 0.0
    input_grad_executed: float = 0.0
    input_grad_discounted: float = 0.0
    weight_grad_dense: float = 0.0
    weight_grad_needed: float = 0.0
    weight_grad_executed: float = 0.0
    weight_grad_discounted: float = 0.0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def add(self, product: str, dense: float, needed: float, executed: float, discounted: float) -> None:
        """Add the FLOPs of one product: ``"forward"``, ``"input_grad"`` or ``"weight_grad"``."""
        mine = self.__dict__
        mine[f"{product}_dense"] += dense
        mine[f"{product}_needed"] += needed
        mine[f"{product}_executed"] += executed
        mine[f"{product}_discounted"] += discounted

    def copy(self) -> "Counters":
        """An independent copy."""
        return Counters(**self.__dict__)  # asdict would copy each number, slowly

    def flops(self) -> Flops:
        """The FLOP columns as one table."""

        def product(name: str) -> Product:
            return Product(*(getattr(self, f"{name}_{f.name}") for f in fields(Product)))

        return Flops(product("forward"), product("input_grad"), product("weight_grad"), self.overhead)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
