r"""Dithered backpropagation with a constant step, as in the thesis that came before the paper.

    Δ = step / B                           (1)   B examples in the batch: `step` is in units of per-sample gradients
    q = floor(δ/Δ + u),  u ~ U[0, 1)       (2)   non-subtractive dither: E[Δq] = δ, P(q = 0) = max(0, 1 − |δ|/Δ)
    dx = Δ (q W),  dW = Δ (qᵀ x),  db = Σ δ  (3)

The thesis quantises the gradient of each example's own loss. The δ that arrives here belongs to the mean loss, so one
example's part of it is its own gradient divided by B: B is the first dimension of δ, and the loss **must be the mean
over it** (a sum, or a gradient scaled for float16, needs a `step` to match). A step that stays while gradients shrink
makes ever more zeros as training proceeds, where the paper's Δ = s·std(δ) holds their share.

Deviations from the thesis: Δ is widened to max|δ|/127 where int8 levels would saturate, which would bias them; δ with a
non-finite entry is left exact, and counted (`fallbacks`); the last layer is quantised like the others.

Cost for each entry of δ: as `retrograde.methods.dither`, about 28 operations.

Reference:
    Kepp. *Quantized Back Propagation for Efficient Deep Learning.* MSc thesis, TU Berlin 2018.
"""

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from retrograde.engine.slots import Call, Method, Rule, Site
from retrograde.kernels import dispatch
from retrograde.kernels.delta import Delta
from retrograde.lab.peers.base import Peer
from retrograde.maths import dither

_BITS = 8
_FLOPS_PER_ENTRY = 28


def count_examples(call: Call) -> int:
    """B, the first dimension of δ; 1 where a linear layer was given a single row (convolutions always see a batch)."""
    return 1 if call.delta.dim() == 1 else call.delta.shape[0]


@dataclass(frozen=True)
class ConstantDither(Peer, Method):
    """Dither with a constant step (module docstring: equations, deviations, source).

    Args:
        step: the quantisation step of per-sample gradients.
    """

    name: ClassVar[str] = "constant-dither"

    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def make_rule(self, site: Site) -> Rule:
        """Every linear-like layer."""
        return _ConstantRule(site.name, self.step)


class _ConstantRule(Rule):
    def __init__(self, name: str, step: float) -> None:
        super().__init__(name)
        self._step = step
        self._largest_level = 0
        self._step_size = 0.0

    def delta(self, call: Call, delta: Delta) -> Delta:
        """Equations (1) and (2)."""
        if delta.quantised or delta.values.numel() == 0:
            return delta
        _, peak = dispatch.statistics(delta.values, delta)
        call.spend(_FLOPS_PER_ENTRY * delta.values.numel())
        if not math.isfinite(peak):
            call.counters.fallbacks += 1
            return delta
        # A per-sample gradient of one takes the place of the standard deviation.
        step = dither.step_size(1 / count_examples(call), peak, self._step, _BITS)
        quantised, largest = dispatch.nsd(delta.values, step, call.key, _BITS)
        self._largest_level = max(self._largest_level, largest)
        self._step_size = step
        return quantised

    def metrics(self) -> dict[str, float]:
        """Last Δ, largest level so far and the bits that it needs with its sign."""
        bits = self._largest_level.bit_length() + 1 if self._largest_level else 0
        return {**self.state_dict(), "bits": bits}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step_size, "largest_level": self._largest_level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step_size, self._largest_level = float(state["step"]), int(state["largest_level"])
