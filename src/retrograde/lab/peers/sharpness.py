"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from retrograde.lab.peers.base import Base, Peer, trainable


@dataclass(frozen=True)
class Sam(Peer):
    """SAM: step with ∇L(w + ρ g/‖g‖), g = ∇L(w), by the recipe's optimizer.

    Each step takes two forward and backward passes. The first leaves g; ``step(closure)`` moves the weights, clears
    the gradients, runs the closure, moves the weights back and steps. Running statistics of batch
    normalisation see both passes unless the closure keeps them out of the second.

    Source: Foret et al., https://arxiv.org/abs/2010.01412, 2020.

    Attributes:
        rho: ρ, the radius.
    """

    package: ClassVar[str | None] = "pytorch-optimizer"
    second_pass: ClassVar[bool] = True
    adaptive: ClassVar[bool] = False

    rho: float = 0.05

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base
    ) -> torch.optim.Optimizer:
        """The recipe's optimizer, wrapped."""
        sam = self._load("pytorch_optimizer").SAM
        return sam(trainable(model), base, rho=self.rho, adaptive=self.adaptive)


@dataclass(frozen=True)
class Asam(Sam):
    """ASAM: SAM in units of the weights, w + ρ w²⊙g / ‖w⊙g‖.

    The package leaves out the paper's η = 0.01, which is added to |w|, so weights at zero are not perturbed.

    Source: Kwon et al., https://arxiv.org/abs/2102.11600, 2021.

    Attributes:
        rho: ρ, the radius; the paper's is ten times SAM's.
    """

    adaptive: ClassVar[bool] = True

    rho: float = 0.5
