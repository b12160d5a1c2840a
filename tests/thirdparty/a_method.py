r"""Clipping where gradients arise: every layer's δ by its own running size, its weight gradient by its weight's size.

    m ← EMA(rms(δ)),  δ̃ = clip(δ, −c m, c m)                (1)   in every backward call, from the second step on
    G_i ← G_i · min(1, λ max(‖W_i‖, ε)/‖G_i‖)                (2)   before the step, for each row i of the weight

(2) is adaptive gradient clipping, from Brock, De, Smith, Simonyan, *High-performance large-scale image recognition
without normalization*, ICML 2021, arXiv 2102.06171. (1) keeps one outlier from reaching the layers behind.

Cost for each entry of δ: 4 operations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import retrograde as rg

_FLOPS_PER_ENTRY = 4
_EPSILON = 1e-3


@dataclass(frozen=True)
class Clip(rg.Method):
    """Clipping of δ and of weight gradients (module docstring: equations, source).

    Args:
        spread: c; infinity leaves δ as it is.
        ratio: λ; infinity leaves weight gradients as they are.
        momentum: of the running size m.

    Raises:
        OptionError: a value out of its range.
    """

    name: ClassVar[str] = "clip"
    short_run: ClassVar[Mapping[str, Any]] = {"momentum": 0.9}

    spread: float = 3.0
    ratio: float = 0.1
    momentum: float = 0.99

    def __post_init__(self) -> None:
        if not (self.spread > 0 and self.ratio > 0):
            raise rg.errors.OptionError(
                f"Clip: spread={self.spread} and ratio={self.ratio} must be positive."
            )
        if not 0 <= self.momentum < 1:
            raise rg.errors.OptionError(f"Clip: momentum={self.momentum} must be at least 0 and below 1.")

    def make_rule(self, site: rg.Site) -> rg.Rule | str:
        """Every layer whose weight is a parameter: (2) needs its rows."""
        if site.weight is None:
            return "its weight is computed: there are no rows to clip"
        return _ClipRule(site.name, self)


class _ClipRule(rg.Rule):
    def __init__(self, name: str, method: Clip) -> None:
        super().__init__(name)
        self._method = method
        self._size = 0.0
        # Of this step: sum of squares and entries of δ, and clipped entries.
        self._squares, self._entries, self._clipped = 0.0, 0, 0

    def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
        """Equation (1). Levels of another method stay what they are."""
        values = delta.values
        if delta.step is not None or not values.numel() or math.isinf(self._method.spread):
            return delta
        call.spend(_FLOPS_PER_ENTRY * values.numel())
        square = float(values.square().sum())
        if not math.isfinite(square):
            call.counters.fallbacks += 1
            return delta
        self._squares += square
        self._entries += values.numel()
        most = self._method.spread * self._size
        if not most:
            return delta
        self._clipped += int((values.abs() > most).sum())
        return rg.Delta(values.clamp(-most, most))

    @torch.no_grad()
    def grad(self, step: rg.Step) -> None:
        """Equation (2)."""
        weight, map, ratio = step.weight, step.map, self._method.ratio
        if weight is None or weight.grad is None or map is None or math.isinf(ratio):
            return
        gradient = map.matrix(weight.grad)
        most = ratio * map.matrix(weight).norm(dim=-1, keepdim=True).clamp_min(_EPSILON)
        factor = (most / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
        weight.grad.copy_(map.from_matrix(gradient * factor, weight.shape))
        step.spend(3 * weight.numel())

    def local(self, step: rg.Step) -> None:
        """The running size, once for a step."""
        if self._entries:
            now, momentum = math.sqrt(self._squares / self._entries), self._method.momentum
            self._size = now if not self._size else momentum * self._size + (1 - momentum) * now
        self._squares, self._entries, self._clipped = 0.0, 0, 0

    def metrics(self) -> dict[str, float]:
        """The running size of δ."""
        return {"size": self._size}

    def state_dict(self) -> dict[str, Any]:
        """The running size, and what a step under way has summed."""
        return {"size": self._size, "step": [self._squares, self._entries, self._clipped]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._size = float(state["size"])
        self._squares, self._entries, self._clipped = state["step"]
