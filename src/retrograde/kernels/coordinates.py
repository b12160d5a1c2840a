"""Changes of a weight's coordinates around an optimizer's step, for z = R (x − μ) with R = γ (I + S Uᵀ).

``dW = (dA − db μᵀ) Rᵀ`` before the step, ``A ← ω A + s R`` after it. Of few directions, on a CPU, each is one compiled
pass over memory; of more torch's own products are as fast.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retrograde.kernels import compiled

_FEW = 8
"""Directions from which torch's products are as fast."""
_SMALL = 2**15
"""Entries below which a compiled call takes longer than it saves."""
_CACHED = 2**17
"""Entries of a block."""


@dataclass(frozen=True)
class Coordinates:
    """R, and μ where one is taken away.

    Attributes:
        scaled: S = U diag(g − 1), (g, d, k), or (g, d, k + 1) with μ as its last column; columns in one piece each.
        basis: U, likewise.
        k: directions.
        scale: γ.
    """

    scaled: Tensor
    basis: Tensor
    k: int
    scale: float

    @classmethod
    def of(cls, basis: Tensor, gain: Tensor, scale: float, mean: Tensor | None) -> "Coordinates":
        """From U (g, d, k), g (g, k), γ and μ (g, d)."""
        scaled = basis * (gain - 1).unsqueeze(-2)
        last = [] if mean is None else [mean.unsqueeze(-1)]
        return cls(
            columns(torch.cat([scaled, *last], -1)),
            columns(torch.cat([basis, *last], -1)),
            gain.shape[-1],
            scale,
        )

    def turn(self, gradient: Tensor, rows: Tensor | None = None) -> None:
        """``G ← (G − db μᵀ) Rᵀ``, in place.

        Args:
            gradient: G, (g, o, d).
            rows: db, (g, o), where μ is taken away.
        """
        if self._compiled(gradient):
            from retrograde.kernels import cpu_coordinates  # where it is needed: a compiler comes with it

            cpu_coordinates.turn(gradient, self.scaled, self.basis, self.k, self.scale, rows)
            return
        turned, basis = gradient @ self.scaled[..., : self.k], self.basis[..., : self.k]
        if rows is not None:
            # (G − db μᵀ) S = G S − db (μᵀS), so that one product adds μ and the directions.
            away, mean = rows.unsqueeze(-1), self.scaled[..., self.k :]
            turned = torch.cat([turned - away * (mean.mT @ self.scaled[..., : self.k]), -away], -1)
            basis = self.basis
        gradient.baddbmm_(turned, basis.mT, beta=self.scale, alpha=self.scale)

    def advance(self, weight: Tensor, before: Tensor, kept: float, centred: bool) -> Tensor | None:
        """``A ← ω A + s R`` for the step s = P − ω A, in place.

        Args:
            weight: P, what the step left, (g, o, d).
            before: A, likewise; overwritten.
            kept: ω.
            centred: whether to return what follows.

        Returns:
            ΔA μ, (g, o), ΔA being all that has changed since `before`.
        """
        if self._compiled(weight, before):
            from retrograde.kernels import cpu_coordinates  # where it is needed: a compiler comes with it

            return cpu_coordinates.advance(
                weight, before, self.scaled, self.basis, self.k, self.scale, kept, centred
            )
        mean, scaled, basis = (
            self.scaled[..., self.k :],
            self.scaled[..., : self.k],
            self.basis[..., : self.k],
        )
        shift = before @ mean if centred else None
        # P + (γ − 1) s + γ s S Uᵀ
        for now, then in _blocks(weight, before):
            step = torch.sub(now, then, alpha=kept, out=then)
            turned = step @ scaled
            if self.scale != 1:
                now.add_(step, alpha=self.scale - 1)
            now.baddbmm_(turned, basis.mT, alpha=self.scale)
        return None if shift is None else (weight @ mean - shift).squeeze(-1)

    def _compiled(self, *matrices: Tensor) -> bool:
        first = matrices[0]
        return (
            self.k <= _FEW
            and first.is_cpu
            and first.numel() >= _SMALL
            and all(m.dtype == torch.float32 and m.is_contiguous() and not m.is_neg() for m in matrices)
            and compiled.usable()
        )


def columns(matrix: Tensor) -> Tensor:
    """The same (g, d, k) with each column in one piece: products with a few of them take a fifth of the time."""
    return matrix.mT.contiguous().mT


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of matrices (g, o, d) that stay in a core's cache while passes go over them; on a GPU all of them."""
    groups, outputs, d = matrices[0].shape
    rows = max(1, _CACHED // (groups * d)) if matrices[0].device.type == "cpu" else outputs
    return zip(*(matrix.split(rows, 1) for matrix in matrices), strict=True)
