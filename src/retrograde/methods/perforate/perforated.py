"""The perforated rule at one layer: dendrites without error flow, and candidates that learn in a phase of their own."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrograde.engine.maps.base import LayerKind, wide
from retrograde.engine.slots import Call, Site, Step
from retrograde.errors import RetrogradeWarning
from retrograde.kernels.delta import Delta
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.pool import Pool
from retrograde.methods.perforate.rule import DendriteRule

if TYPE_CHECKING:
    from retrograde.methods.perforate import Perforate


class PerforatedRule(DendriteRule):
    """The papers' rule: dendrites read x without passing error back, and learn by correlation in their own phase."""

    detached = True
    needs_input = True

    def __init__(self, site: Site, kind: LayerKind, method: "Perforate") -> None:
        super().__init__(site, kind, method)
        self._pool: Pool | None = None

    def begin(self, attempt: int) -> None:
        """New candidates for every neuron."""
        self._pool = self._new_pool(attempt)

    def _new_pool(self, attempt: int) -> Pool:
        index = self.state.growths
        drawn = [self._draw(index, attempt, j) for j in range(self._method.candidates)]
        # Adam's squares of a half-precision gradient would be zero.
        stacked = {part: wide(torch.stack([values[part] for values in drawn])) for part in drawn[0]}
        weight = stacked["weight"]
        cascade = stacked.get("cascade", weight.new_zeros(len(drawn), 0, self._outputs))
        return Pool(weight, stacked.get("bias"), cascade, self._method.activation, self._outputs, self._map)

    def observe(self, call: Call, delta: Delta) -> None:
        """Dendrite phase: candidates read δ and the layer's input."""
        super().observe(call, delta)
        if self._pool is None or not self.stage.learning or not call.delta.numel():
            return
        readable = self._readable(call, f"candidate dendrites of layer {self.name!r} need")
        self._follow()
        if not readable:
            return
        x = call.saved[0]
        weight = self._pool.values["weight"]
        call.spend((2 * weight.shape[0] + self.active) * call.flops)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            own = x.to(self.growths[0].weight.dtype)
            count = self.state.growths if self._method.cascade else 0
            accepted = dendrites.activations(self.layer, own, count, self._method.activation, call.map)
            self._pool.observe(call, x.to(weight), [a.to(weight) for a in accepted])

    def _follow(self) -> None:
        """The candidates where the layer is now, in its precision: a model may be moved or cast at any time."""
        if self._pool is None:
            return
        mine, theirs = self._pool.values["weight"], wide(self.growths[0].weight)
        if (mine.dtype, mine.device) != (theirs.dtype, theirs.device):
            state, self._pool = self._pool.state_dict(), self._new_pool(0)
            self._pool.load_state_dict(state)

    def local(self, step: Step) -> None:
        """Candidates make one step uphill."""
        super().local(step)
        if self._pool is not None and self.stage.learning:
            self._pool.learn(self._method.candidate_rate, self._method.momentum)

    def improved(self) -> bool:
        """Whether any neuron's best |r| has grown by a tenth."""
        if self._pool is None:
            return False
        better = self._pool.improved()
        self.score = float(self._pool.best()[0].max())
        return better

    def _new_values(self, attempt: int) -> dict[str, Tensor]:
        """The best candidate of each neuron, frozen from here on."""
        pool = self._pool if self._pool is not None else self._new_pool(attempt)
        if not pool.moments.steps:
            warnings.warn(
                f"the candidate dendrites of layer {self.name!r} saw no gradient in their phase, and are accepted as "
                "they were drawn. Train with the attached model between reports, or leave the layer out (where=…).",
                RetrogradeWarning,
                stacklevel=2,
            )
        score, values = pool.best()
        self.score, self._pool = float(score.max()), None
        return values

    def state_dict(self) -> dict[str, Any]:
        """What every rule keeps, and the candidates."""
        return {**super().state_dict(), "pool": None if self._pool is None else self._pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self._pool = None
        if state["pool"] is not None:
            self._pool = self._new_pool(0)
            self._pool.load_state_dict(state["pool"])
