"""What a projected layer reports of itself."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from retrograde.maths import spectral
from retrograde.methods.spectral.subspace import Subspace


@dataclass
class Diagnostics:
    """Last known figures of one layer.

    Attributes:
        captured: ‖projected G‖²/‖G‖², known from full steps alone, where G is there.
        saved_fraction: what the last projected call kept, as a share of its input.
    """

    captured: float | None = None
    saved_fraction: float | None = None

    def measure(self, gradient: Tensor, projected: Tensor) -> None:
        """Take the captured energy of a full gradient; a vanishing or non-finite one says nothing."""
        total = gradient.float().square().sum()
        if bool(torch.isfinite(total)) and total > 0:
            self.captured = float(projected.float().square().sum() / total)

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
        return asdict(self)
