"""Rivals of fine-tuning that keep the model as it is: L2-SP and batch spectral shrinkage.

Sources: Li, Grandvalet, Davoine, https://arxiv.org/abs/1802.01483, ICML 2018 (L2-SP); Chen et al., *Catastrophic
forgetting meets negative transfer: batch spectral shrinkage for safe transfer learning*, NeurIPS 2019 (BSS).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def l2_sp(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], strength: float) -> None:
    """L2-SP, (α/2)‖w − w₀‖² with w₀ the present values, as a step after each of the optimizer's.

    The paper adds its gradient to the loss's and uses SGD. Adam would divide it by the root of squares, as it does
    plain L2: it is decoupled here as AdamW's decay is, w ← w − ηα (w − w₀).

    Args:
        optimizer: whose steps, with one learning rate for all.
        parameters: of the features; a new head has no w₀.
        strength: α.
    """
    pairs = [(p, p.detach().clone()) for p in parameters]

    def pull(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        share = min(1.0, optimizer.param_groups[0]["lr"] * strength)
        with torch.no_grad():
            for p, before in pairs:
                p.lerp_(before, share)

    optimizer.register_step_post_hook(pull)


def batch_spectral_shrinkage(features: Tensor, smallest: int = 1) -> Tensor:
    """BSS: Σ σ² over the `smallest` singular values of a batch's features (n, d); the paper has one, times η = 1e-3."""
    return torch.linalg.svdvals(features)[-smallest:].square().sum()
