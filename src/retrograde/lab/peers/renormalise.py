"""Batch normalisation re-estimated on test data.

Source: Schneider et al., *Improving robustness against common corruptions by covariate shift adaptation*, NeurIPS 2020,
and Nado et al., arXiv 2006.10963. With `window` the statistics are remembered from batch to batch, beginning with those
of training; without, they are those of each batch alone.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from retrograde.errors import OptionError


class Renormalised:
    """`model` with the statistics of test batches in its batch normalisations; the model itself stays as it is.

    Args:
        model: in evaluation mode; called with x, it returns logits.
        window: examples by which what is remembered fades to 1/e; 0 for none.

    Raises:
        OptionError: no batch normalisation with running statistics.
    """

    def __init__(self, model: nn.Module, window: float = 0.0) -> None:
        self._model, self._window = model, window
        self._known: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for m in model.modules():
            norm = isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
            if norm and m.running_mean is not None and m.running_var is not None:
                self._known[m] = (m.running_mean, m.running_var)
        if not self._known:
            raise OptionError(
                f"{type(model).__name__} has no batch normalisation with running statistics to re-estimate. Use a "
                "model with nn.BatchNorm layers."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of inputs (n, …)."""
        kept = {m: (m.running_mean, m.running_var) for m in self._known}
        handles = [m.register_forward_pre_hook(self._estimate) for m in kept]
        try:
            with torch.no_grad():
                return self._model(x)
        finally:
            for handle in handles:
                handle.remove()
            for m, (mean, variance) in kept.items():
                m.running_mean, m.running_var = mean, variance

    def _estimate(self, m: Any, args: tuple[Tensor, ...]) -> None:
        h = args[0]
        variance, mean = torch.var_mean(h, [i for i in range(h.dim()) if i != 1], correction=0)
        share = 1.0 if self._window <= 0 else 1 - math.exp(-h.shape[0] / self._window)
        old_mean, old_variance = self._known[m]
        moved = mean - old_mean
        variance = old_variance.lerp(variance + (1 - share) * moved.square(), share)
        self._known[m] = m.running_mean, m.running_var = old_mean + share * moved, variance
