"""TENT: adapting to shifted test data by minimising the entropy of the predictions.

Source: Wang et al., https://arxiv.org/abs/2006.10726, 2021. Only the scale γ and shift β of batch normalisation move,
and the statistics are those of the test batch. Cost: a forward and a backward pass per step; the backward pass needs
no weight gradients.
"""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn

from retrograde.errors import OptionError

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def adapt(model: nn.Module, x: Tensor, lr: float = 1e-3, steps: int = 1) -> Tensor:
    """Adapt γ and β of `model`, in place, to one test batch by Adam.

    Predict with the adapted model under `batch_statistics`. The model's running statistics, its mode, which parameters
    require gradients and their gradients are left as they were.

    Args:
        model: a classifier; called with `x`, it returns logits (n, classes).
        x: inputs (n, …), without labels.
        lr: Adam's learning rate.
        steps: updates; the paper makes one a batch.

    Returns:
        Logits (n, classes) of the last forward pass, which is before the last update: the paper's online prediction.

    Raises:
        OptionError: no batch normalisation with γ and β, or fewer than one step.
    """
    moved = {id(p) for module in _norms(model) for p in module.parameters()}
    if not moved:
        raise OptionError(
            f"{type(model).__name__} has no batch normalisation with scale and shift, which is all that TENT moves. "
            "Use a model with nn.BatchNorm layers."
        )
    if steps < 1:
        raise OptionError(f"tent: steps={steps} makes no update. Give 1 or more.")
    # They share their storage with the model's, and have gradients of their own.
    shared = {name: p.detach().requires_grad_(id(p) in moved) for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in shared.values() if p.requires_grad], lr)
    logits = x
    with batch_statistics(model), torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            logits = torch.func.functional_call(model, shared, (x,))
            entropy(logits).mean().backward()
            optimizer.step()
    return logits.detach()


def entropy(logits: Tensor) -> Tensor:
    """H(ŷ) = −Σ_c p(ŷ_c) log p(ŷ_c) of each row of (n, classes), in nats: (n,)."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Generator[None]:
    """Within: batch normalisations use the batch's mean and variance, and leave the running ones alone."""
    kept = [(m, m.training, m.track_running_stats) for m in _norms(model)]
    try:
        for m, _, _ in kept:
            # Untracked statistics in training mode: neither read nor written.
            m.training, m.track_running_stats = True, False
        yield
    finally:
        for m, training, tracked in kept:
            m.training, m.track_running_stats = training, tracked


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]
