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


class Tent:
    """Online adaptation: γ and β of `model` move, in place, by one step of Adam for each test batch.

    The model's running statistics, its mode, which parameters require gradients and their gradients are left as they
    were.

    Args:
        model: a classifier; called with x, it returns logits (n, classes).
        lr: Adam's learning rate.

    Raises:
        OptionError: no batch normalisation with γ and β.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3) -> None:
        moved = {id(p) for module in _norms(model) for p in module.parameters()}
        if not moved:
            raise OptionError(
                f"{type(model).__name__} has no batch normalisation with scale and shift, which is all that TENT "
                "moves. Use a model with nn.BatchNorm layers."
            )
        self._model = model
        # They share their storage with the model's, and have gradients of their own.
        self._shared = {
            name: p.detach().requires_grad_(id(p) in moved) for name, p in model.named_parameters()
        }
        self._optimizer = torch.optim.Adam([p for p in self._shared.values() if p.requires_grad], lr)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of inputs (n, …), before the step that they cause: the paper's online prediction."""
        self._optimizer.zero_grad()
        with batch_statistics(self._model), torch.enable_grad():
            logits = torch.func.functional_call(self._model, self._shared, (x,))
            entropy(logits).mean().backward()
            self._optimizer.step()
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
