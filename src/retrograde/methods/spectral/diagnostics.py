"""What a projected layer reports of itself."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrograde.maths import spectral
from retrograde.methods.spectral.subspace import Subspace


@dataclass
class Diagnostics:
    """Last known figures of one layer.

    Attributes:
        captured: ‖projected G‖²/‖G‖² over a step's calls, known from full steps alone, where G is there.
        saved_fraction: what the last projected call kept, as a share of its input.
        unread: both sums of squares since the last reading; on a GPU nothing waits for them in the backward pass.
    """

    captured: float | None = None
    saved_fraction: float | None = None
    unread: Tensor | None = None

    def measure(self, gradient: Tensor, projected: Tensor) -> None:
        """Take in the energies of one call's full gradient."""
        found = torch.stack((projected.square().sum(), gradient.square().sum()))
        self.unread = found if self.unread is None else self.unread + found

    def read(self) -> None:
        """The captured energy of what was measured; of a vanishing or non-finite gradient it says nothing."""
        if self.unread is None:
            return
        inside, total = self.unread.tolist()
        self.unread = None
        if math.isfinite(total) and total > 0:
            self.captured = inside / total

    def metrics(self, subspace: Subspace, projecting: bool) -> dict[str, float]:
        """The figures by name.

        What is not known yet is left out. λ₁ is of E[xxᵀ], largest of the groups; the effective rank is their mean.
        """
        found: dict[str, float] = {"projecting": float(projecting), "rank": subspace.rank}
        if subspace.eigenvalues is not None and subspace.trace is not None and subspace.basis is not None:
            dimension = subspace.basis.shape[1]
            ranks = spectral.effective_rank(subspace.eigenvalues, subspace.trace, dimension)
            found["drift"] = subspace.drift
            found["lambda_1"] = float(subspace.eigenvalues[:, 0].max())
            found["effective_rank"] = float(ranks.mean())
        if self.captured is not None:
            found["captured_energy"] = self.captured
        if self.saved_fraction is not None:
            found["saved_bytes_fraction"] = self.saved_fraction
        return found

    def state_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(self.__dict__)
