r"""meProp: of each example's gradient at a layer's output only the k largest entries go on.

    δ̃ = δ ⊙ 1[|δ| is among the k largest of its row]    (1)   row: one example, or one position of a sequence
    dx = δ̃ W,  dW = δ̃ᵀ x                                (2)   both products; δ̃ is what travels further down

Biased: what is cut is never made up for.

Deviations from the paper: convolutions, which it does not treat, keep the k largest **channels** at each position of
each example; db sums the whole δ, as everywhere in this library. As in the paper hidden layers alone are cut: the last
layer's δ is kept whole.

Cost for each entry of δ: its magnitude and a selection, about 4 operations.

Reference:
    Sun, Ren, Ma, Wang. *meProp: Sparsified back propagation for accelerated deep learning with reduced overfitting.*
    ICML 2017, arXiv 1706.06197.
"""

from typing import ClassVar

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from retrograde.engine.slots import Call, Method, Rule, Site
from retrograde.kernels.delta import Delta
from retrograde.lab.peers.base import Peer

_FLOPS_PER_ENTRY = 4


@dataclass(frozen=True)
class MeProp(Peer, Method):
    """meProp (module docstring: equations, deviations, source).

    Args:
        k: entries kept of each row of δ; a layer with no more outputs than k keeps all.
        skip_head: leave the δ of the model's last linear-like layer whole.
    """

    name: ClassVar[str] = "meprop"

    k: PositiveInt = 50
    skip_head: bool = True

    def make_rule(self, site: Site) -> Rule:
        """Every linear-like layer; the head's rule only counts."""
        if self.skip_head and site.last:
            head = Rule(site.name)
            head.remark = "head: its δ is kept whole (skip_head=False cuts it too)"
            return head
        return _TopRule(site.name, self.k)


class _TopRule(Rule):
    def __init__(self, name: str, k: int) -> None:
        super().__init__(name)
        self._k = k

    def delta(self, call: Call, delta: Delta) -> Delta:
        """Equation (1)."""
        values = delta.values
        axis = call.map.axis(values)
        if values.numel() == 0 or values.shape[axis] <= self._k:
            return delta
        call.spend(_FLOPS_PER_ENTRY * values.numel())
        chosen = values.abs().topk(self._k, dim=axis, sorted=False).indices
        kept = torch.zeros_like(values).scatter_(axis, chosen, values.gather(axis, chosen))
        return Delta(kept, delta.step)
