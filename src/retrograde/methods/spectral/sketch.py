r"""What the unbiased form keeps of a layer's input: its part in a subspace, and some of its channels.

Let U (d × k) be orthonormal, and p (d) the probabilities with which channels are drawn, Σp = j. With J the channels
drawn and Π = diag(1[i ∈ J]/p_i), so that E[Π] = I,

    X̂ = X U Uᵀ + (X − X U Uᵀ) Π = [X U, X_J] [(I − Π) U, E_J/p]ᵀ,   E[X̂] = X                (7)
    E‖G − Ĝ‖² ≈ Σ_i (1/p_i − 1) ‖(G − G U Uᵀ)_i‖²                                            (8)   for Ĝ = DᵀX̂
    p_i ∝ √v_i,  v_i = E[(x − U Uᵀx)_i²]                                                     (9)   capped at 1

(9) minimises (8) where columns of G grow as those of X do: what U leaves little of is seldom kept. Drawing channels,
not random combinations of all, costs no product to narrow and none to widen, and where activations are uneven, as
behind ReLU, a third less variance. Channels are drawn by systematic sampling in random order, which keeps p exactly.

Reference: Madow, *On the theory of systematic sampling*, Ann. Math. Stat. 20, 1949.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograde.engine import ranks
from retrograde.engine.maps.base import Widening
from retrograde.maths import spectral

_ROUNDING = 1e-9
_EVEN = 0.05
"""Share of the mean of v that every channel has: one that was silent may speak."""


class Sketch:
    """The random part of equation (7) at one layer; all groups of a convolution have the same J.

    Attributes:
        groups: of the layer.
        channels: of a group.
        chosen: J, (j,), ascending; of the step that follows.
        factors: 1/p of these.
    """

    def __init__(self, groups: int, channels: int, drawn: int) -> None:
        self.groups, self.channels, self._drawn = groups, channels, drawn
        self._p = np.full(channels, drawn / channels)
        self.chosen: Tensor | None = None
        self.factors: Tensor | None = None

    def refresh(self, rows: Tensor, basis: Tensor) -> None:
        """Equation (9), for rows (g, n, d) and U (g, d, k)."""
        rest = rows - spectral.project_rows(rows, basis)
        # The same on all ranks, so that they draw the same channels.
        v = ranks.mean(rest.square().mean((0, 1))).double().cpu()
        self._p = inclusion((v + _EVEN * v.mean()).sqrt().numpy(), self._drawn)

    def redraw(self, key: int, like: Tensor) -> None:
        """J and its factors anew, on the device of `like` and in its dtype."""
        chosen = systematic(self._p, self._drawn, key)
        self.chosen = torch.from_numpy(chosen).to(like.device)
        self.factors = torch.from_numpy(1 / self._p[chosen]).to(like)

    def state_dict(self) -> dict[str, Any]:
        """Probabilities and the last draw."""
        return {"p": torch.from_numpy(self._p), "chosen": self.chosen, "factors": self.factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._p = state["p"].cpu().numpy()
        self.chosen, self.factors = state["chosen"], state["factors"]


def widening(basis: Tensor, chosen: Tensor, factors: Tensor) -> Widening:
    """``[(I − Π) U, E_J/p]`` for U (g, d, k)."""
    rest = basis.index_copy(1, chosen, basis[:, chosen] * (1 - factors).unsqueeze(1))
    return Widening(rest, chosen, factors)


def inclusion(weights: Any, number: int) -> Any:
    """Probabilities proportional to weights (d,), capped at 1, that add up to `number`; even ones where all are 0."""
    weights = weights if np.isfinite(weights).all() and weights.sum() > 0 else np.ones_like(weights)
    certain = np.zeros(weights.size, bool)
    while True:
        rest = np.where(certain, 0, weights)
        total = rest.sum()
        left = number - certain.sum()
        p = np.where(certain, 1, rest * (left / total) if total else left / max(1, (~certain).sum()))
        over = (p >= 1) & ~certain
        if not over.any():
            return p
        certain |= over


def systematic(p: Any, number: int, key: int) -> Any:
    """`number` different indices, ascending, each i with probability p_i exactly, for p (d,) that adds up to it."""
    certain = np.flatnonzero(p > 1 - _ROUNDING)
    left = number - certain.size
    if not left:
        return certain
    generator = np.random.Generator(np.random.Philox(key=key))
    order = generator.permutation(np.flatnonzero(p <= 1 - _ROUNDING))
    ends = np.cumsum(p[order])
    marks = np.floor(ends * (left / ends[-1]) + generator.random()).astype(np.int64)
    # Rounding must not cost the last one.
    marks[-1] = left
    return np.sort(np.concatenate((certain, order[np.diff(marks, prepend=0) > 0])))
