"""A start fitted to the error, for networks that are finished; then dendrites train by the loss.

In a dendrite phase of a few steps, the network frozen, pairs of the layer's input x and the error δ at its output are
kept. Then Σ_c |r_c| over them is climbed by Adam, each channel of each set by itself:

    r_c = Σ_p (a_pc − ā_c)(δ_pc − δ̄_c) / (‖a_c − ā_c‖ ‖δ_c − δ̄_c‖)       with a of the norm over the same rows
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrograde.engine import ranks
from retrograde.engine.maps.base import LayerKind, map_of, spread, wide
from retrograde.engine.slots import Call, Site
from retrograde.errors import RetrogradeWarning
from retrograde.kernels.delta import Delta
from retrograde.maths.perforate import activate, climb, correlations
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.rule import DendriteRule
from retrograde.methods.perforate.sets import cascaded, rows_of

if TYPE_CHECKING:
    from retrograde.methods.perforate import Perforate

_CALLS = 8
"""Backward calls, at least, that the pairs come from."""
_PATIENCE = 100
"""Steps of a phase after which a layer starts from what it has seen."""
_RATE = 0.1
"""Of Adam, in units of a parameter's standard deviation as it is drawn."""
_EPSILON = 1e-5


class HybridRule(DendriteRule):
    """A fitted start, then the gradient rule."""

    needs_input = True

    def __init__(self, site: Site, kind: LayerKind, method: "Perforate") -> None:
        super().__init__(site, kind, method)
        self._pairs: list[tuple[Tensor, Tensor]] | None = None
        """Of x and δ, while a phase lasts."""
        self._made_by: tuple[str, tuple[int, ...]] = site.map.name, site.map.numbers
        """The map of the pairs, which may depend on the call."""
        self._kept = 0
        self._began = 0

    def begin(self, attempt: int) -> None:
        """Keep pairs from here on."""
        self._pairs, self._kept, self._began = [], 0, self.steps

    def end(self) -> None:
        """Forget them."""
        self._pairs = None

    def observe(self, call: Call, delta: Delta) -> None:
        """In the phase: keep some examples of this call."""
        super().observe(call, delta)
        rows = self._method.fit_rows
        if self._pairs is None or self._kept >= rows or not call.delta.numel():
            return
        if not self._readable(call, f"the start of the dendrites of layer {self.name!r} is fitted to"):
            return
        x, found = self._some(call, min(rows // _CALLS + 1, rows - self._kept))
        if self._pairs and x.shape[1:] != self._pairs[0][0].shape[1:]:
            return  # images of another size: the first one decides
        self._made_by = call.map.name, call.map.numbers
        self._pairs.append((x, found))
        self._kept += found.numel() // self._outputs

    def _some(self, call: Call, rows: int) -> tuple[Tensor, Tensor]:
        """About so many rows of a call: rows of a linear layer, whole examples of a convolution."""
        x, delta = call.saved[0].detach(), call.delta.detach()
        if call.map.plain_rows:
            x, delta = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])
        else:
            rows = -(-rows * delta.shape[0] * self._outputs // delta.numel())
        chosen = spread(delta.shape[0], rows, delta.device)
        return x[chosen], delta[chosen]

    def ready(self) -> bool:
        """Whether there are pairs enough, on all ranks, or the phase has taken long."""
        enough = self._kept >= self._method.fit_rows or self.steps - self._began >= _PATIENCE
        here = torch.tensor(float(enough), device=self.growths[0].output.device)
        return float(ranks.mean(here)) == 1

    def _new_values(self, attempt: int) -> dict[str, Tensor]:
        pairs = self._pairs or []
        here = torch.tensor(float(bool(pairs)), device=self.growths[0].output.device)
        if float(ranks.mean(here)) < 1:
            warnings.warn(
                f"layer {self.name!r} saw no error in its dendrite phase, so its dendrites start as they are drawn. "
                "Train with the attached model, or leave the layer out (where=…).",
                RetrogradeWarning,
                stacklevel=2,
            )
            return super()._new_values(attempt)
        like = self.growths[0].weight
        x, delta = (wide(torch.cat([pair[i].to(like.device) for pair in pairs])) for i in (0, 1))
        square = float(ranks.mean(x.square().mean()))
        values = self._draw(self.state.growths, attempt, 0, square**-0.5 if square > 0 else 1.0)
        return self._fitted(values, x, delta)

    def _fitted(self, values: dict[str, Tensor], x: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """The parameters after Adam's steps, and the mean and variance of z."""
        sets = self.growths[self.state.growths]
        method, map = self._method, map_of(*self._made_by)
        earlier = [
            a.to(x)
            for a in dendrites.activations(
                self.layer,
                x.to(sets.weight.dtype),
                self.state.growths if method.cascade else 0,
                method.activation,
                map,
            )
        ]
        axis = map.axis(delta)
        earlier = [sets.repeated(a, axis) for a in earlier]
        target = rows_of(sets.repeated(delta, axis), axis)
        learnt = {
            part: values[part].to(x).clone() for part in ("weight", "bias", "cascade") if part in values
        }
        first = {part: torch.zeros_like(value) for part, value in learnt.items()}
        second = {part: torch.zeros_like(value) for part, value in learnt.items()}
        spread = {part: float(value.std()) if value.numel() > 1 else 1.0 for part, value in learnt.items()}

        def pre_activation() -> Tensor:
            z = map.forward(x, learnt["weight"], None if sets.norm is not None else learnt.get("bias"))
            return rows_of(cascaded(z, learnt.get("cascade", ()), earlier, axis), axis)

        def score() -> Tensor:
            z = pre_activation()
            if sets.norm is not None:
                z = (z - z.mean(0)) * (z.var(0, correction=0) + _EPSILON).rsqrt() + learnt["bias"]
            return correlations(activate(z, method.activation), target).abs()

        for step in range(1, method.fit_steps + 1):
            with torch.enable_grad():
                leaves = [value.requires_grad_() for value in learnt.values()]
                gradients = torch.autograd.grad(score().sum(), leaves)
            for (part, value), gradient in zip(learnt.items(), gradients, strict=True):
                value.requires_grad_(False)
                climb(value, ranks.mean(gradient), first[part], second[part], step, _RATE * spread[part])
        z = pre_activation()
        mean = ranks.mean(z.mean(0))
        variance = ranks.mean((z - mean).square().mean(0))
        self.score = float(ranks.mean(score().max()))
        return {**learnt, "mean": mean, "variance": variance}

    def state_dict(self) -> dict[str, Any]:
        """What every rule keeps, and the pairs of a phase."""
        pairs = None if self._pairs is None else [list(pair) for pair in self._pairs]
        counts = {"kept": self._kept, "began": self._began}
        return {**super().state_dict(), "pairs": pairs, "made_by": list(self._made_by), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        pairs = state["pairs"]
        self._pairs = None if pairs is None else [(x, delta) for x, delta in pairs]
        name, numbers = state["made_by"]
        self._made_by = str(name), tuple(map(int, numbers))
        self._kept, self._began = int(state["kept"]), int(state["began"])
