"""The base rule at one layer, in the letters of the package's docstring."""

import warnings
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.maps.base import Map, wide
from retrograde.engine.slots import Call, Rule, Step
from retrograde.engine.statistics import StatisticsSpec
from retrograde.errors import AttachError, RetrogradeWarning
from retrograde.kernels.delta import Delta
from retrograde.kernels.work import Work, linear_flops
from retrograde.maths import spectral
from retrograde.maths.philox import key_of, mix_key
from retrograde.methods.spectral.diagnostics import Diagnostics
from retrograde.methods.spectral.sketch import Sketch, widening
from retrograde.methods.spectral.subspace import Subspace

if TYPE_CHECKING:
    from retrograde.methods.spectral import Spectral

_MOMENTS = {"exp_avg", "momentum_buffer"}
_WARMUP = 200
"""Steps, where every later one is not unbiased."""
_PORTION = 1 / 64
"""Of a call's input, what is kept in rows for the next refresh where nothing else is kept whole."""


class SpectralRule(Rule):
    """The rule of one layer.

    Args:
        name: full name of the layer.
        method: the options.
        inputs: the subspace of the layer's input, U.
        outputs: the subspace of its output, V; None where neither ``side`` nor ``decay`` needs it.
        tied: whether others learn by the same weight, whose moments are then theirs too.
        sketch: the channels that are kept beside U, which is then of channels: equation (7).
    """

    def __init__(
        self,
        name: str,
        method: "Spectral",
        inputs: Subspace,
        outputs: Subspace | None,
        *,
        tied: bool = False,
        sketch: Sketch | None = None,
    ) -> None:
        super().__init__(name)
        self._sketch = sketch
        self._seen: Tensor | None = None
        """Vectors of the last refreshes, as many as `rows`: with a sketch few of them come in a step."""
        portion = 1.0 if sketch is None else _PORTION
        self.needs_statistics = StatisticsSpec(method.rows, method.every, portion=portion)
        self.projecting = False
        """Whether this step projects: a plain flag, set between steps, so that compiled code knows two programs."""
        self._method = method
        self._inputs, self._outputs = inputs, outputs
        self._tied = tied
        self._scale = 1.0
        """s of equation (6) in this step; 1 where nothing is scaled."""
        self.cycle = 1 if method.residual in ("none", "unbiased") else method.full_every
        self._warmup = method.warmup if method.warmup is not None else _WARMUP if sketch is None else 0
        self._warned = False
        self._narrows = method.side != "output" and method.basis != "bulk"
        self._map: Map | None = None
        self._refreshed_at = -1
        self._taken = 0
        """Steps so far in which the layer had a backward pass."""
        self._diagnostics = Diagnostics()

    def prepare(self, layer: nn.Module) -> None:
        """Without a warm-up the first step, too, keeps a sketch."""
        if self._sketch is not None and self._past_warmup(0):
            self._redraw(layer, 0)

    @property
    def sketches(self) -> bool:
        """Whether every step keeps a sketch: equation (7)."""
        return self._sketch is not None

    @property
    def tied(self) -> bool:
        """Whether others learn by the same weight."""
        return self._tied

    @property
    def map(self) -> Map | None:
        """How the layer multiplies; None before the first step."""
        return self._map

    @property
    def drawn(self) -> tuple[Tensor, Tensor] | None:
        """U and J of this step, in which it keeps a sketch; None where it is full."""
        if self._sketch is None or self._sketch.chosen is None or self._inputs.basis is None:
            return None
        return (self._inputs.basis, self._sketch.chosen) if self.projecting else None

    # In the passes.

    def save(self, x: Tensor, weight: Tensor, map: Map) -> tuple[Tensor, ...]:
        """The input on full steps; else xU, and the U that it was made with."""
        basis = self._inputs.basis
        if not (self.projecting and self._narrows) or basis is None:
            return (x,)
        basis = basis.to(x)
        if self._sketch is None or self._sketch.chosen is None or self._sketch.factors is None:
            return map.narrow(x, basis, weight), basis
        # A model may be moved between steps, and before the first one.
        chosen, factors = self._sketch.chosen.to(x.device), self._sketch.factors.to(x)
        return map.sketch(x, basis, chosen), basis, chosen, factors

    def product(self, call: Call, delta: Delta) -> Work:
        """Equation (1); on full steps the layer's own product, scaled as equation (6) says."""
        if len(call.saved) == 1:
            return self._treated(call, call.map.weight_grad(call.products, call.operand, call.weight))
        kept, basis, *drawn = call.saved
        # A sketch is of channels, whose places are of no account.
        if not drawn and self._map is not None and not call.map.has_rows_of(self._map):
            raise AttachError(
                f"layer {self.name!r} was given another stride, padding or dilation while it trained, and its basis "
                "belongs to the earlier ones. Detach, change the layer, and attach again."
            )
        if drawn:
            wider = widening(basis, *drawn)
            work = call.map.sketch_weight_grad(call.products, call.operand, wider, call.weight)
        else:
            work = call.map.narrow_weight_grad(call.products, call.operand, basis, call.weight)
        if kept.numel():
            _, d, rank = basis.shape
            self._diagnostics.saved_fraction = kept.numel() / prod(call.input_shape)
            # Narrowing x, and widening the product by Uᵀ.
            vectors = kept.numel() // (rank + (drawn[0].numel() if drawn else 0))
            call.spend(linear_flops(vectors, rank, d))
            call.spend(linear_flops(rank, call.weight.numel() // d, d))
        return self._treated(call, work)

    def _treated(self, call: Call, work: Work) -> Work:
        """What this step makes of the call's dW: here, and not of ``weight.grad``, to which others may add."""
        narrow = len(call.saved) > 1
        if self._sketch is not None:
            return work
        done = self.projecting and narrow and self._method.side != "both"
        if done or any(subspace.basis is None for subspace in self._subspaces()):
            return work
        whole = wide(call.map.matrix(work.value))
        found = self._projected(call, whole, narrow=narrow)
        if not self.projecting:
            self._diagnostics.measure(whole, found)
            if self._scale == 1:
                return work
            found = torch.lerp(found, whole, self._scale)
        value = call.map.from_matrix(found, work.value.shape).to(work.value.dtype)
        return replace(work, value=value)

    def _projected(self, call: Call, whole: Tensor, *, narrow: bool) -> Tensor:
        """What a projected step makes of dW as a matrix; with `narrow`, of one that is projected on U already."""
        g = whole
        u, v = self._inputs.basis, self._output_basis()
        if self._method.side != "output" and not narrow and u is not None:
            g = spectral.project_rows(g, u.to(g))
            call.spend(2 * linear_flops(g.shape[1], u.shape[-1], g.shape[0] * g.shape[2]))
        if v is not None and v.shape[-2] != g.shape[-2]:
            self._warn_of_parts()
            if self._method.side == "output":
                return whole
        elif v is not None:
            g = spectral.project_columns(g, v.to(g))
            call.spend(2 * linear_flops(g.shape[1], v.shape[-1], g.shape[0] * g.shape[2]))
        return whole - g if self._method.basis == "bulk" else g

    def _warn_of_parts(self) -> None:
        """Attention whose keys are not its queries multiplies by parts of its weight: V is of all its outputs."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"layer {self.name!r}: side={self._method.side!r} projects nothing on directions of its outputs where "
                "keys are not queries: attention's products have only a part of its outputs then. Use side='input'.",
                RetrogradeWarning,
                stacklevel=2,
            )

    def _output_basis(self) -> Tensor | None:
        return self._outputs.basis if self._outputs is not None and self._method.side != "input" else None

    def _residual_scale(self) -> float:
        """Equation (6): s = min(m, λ₁/λ_k)."""
        subspace = self._outputs if self._method.side == "output" else self._inputs
        if subspace is None or subspace.eigenvalues is None:
            return 1.0
        values = subspace.eigenvalues
        ratio = values[:, 0] / values[:, -1].clamp_min(torch.finfo(values.dtype).tiny)
        # A group whose input is zero has no gradient to scale, and bounds nothing.
        ratio = torch.where(values[:, 0] > 0, ratio, torch.inf).min()
        return max(1.0, min(float(self._method.full_every), float(ratio)))

    # After the optimizer.

    def local(self, step: Step) -> None:
        """Decay, refresh, and whether the next step projects."""
        self._diagnostics.read()
        # A weight that is computed has neither a group nor moments: the gradient of each call is all that is projected.
        weight, map = step.weight, step.map
        # Layers of several tasks, say, take turns: what counts are the steps that this one takes part in.
        if not step.program.calls:
            return
        self._taken += 1
        if map is not None:
            self._map = map
            group = None if weight is None else _group(step, weight)
            if weight is not None and group is not None:
                self._decay(step, weight, float(group["lr"]))
            rows = self.statistics.rows
            late = self._refreshed_at < 0 or step.index - self._refreshed_at >= self._method.every
            if step.refreshed and late and rows is not None:
                self._refreshed_at = step.index
                self._refresh(step, map, rows, weight, moments=group is not None)
        following = self._taken
        if self._sketch is not None:
            if self._past_warmup(following):
                self._redraw(step.layer, following)
            return
        ready = map is not None and all(subspace.basis is not None for subspace in self._subspaces())
        self.projecting = ready and self._past_warmup(following) and not self._is_full(following)
        if self.projecting:
            for subspace in self._subspaces():
                subspace.settle()
        scaled = self._method.residual == "scaled" and self._past_warmup(following) and not self.projecting
        self._scale = self._residual_scale() if scaled else 1.0

    def _redraw(self, layer: nn.Module, index: int) -> None:
        """The channels of the step that follows."""
        assert self._sketch is not None
        weight = next(layer.parameters())
        like = weight.new_empty(0, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
        if self._inputs.basis is None:
            self._inputs.begin(self._sketch.groups, self._sketch.channels, like)
        self._sketch.redraw(mix_key(self.seed, index, key_of(self.name)), like)
        self.projecting = True

    def _past_warmup(self, index: int) -> bool:
        return index >= self._warmup

    def _is_full(self, index: int) -> bool:
        m = self._method.full_every
        return self._method.residual != "none" and (index - self._warmup) % m == m - 1

    def _subspaces(self) -> list[Subspace]:
        inputs = [] if self._method.side == "output" else [self._inputs]
        return inputs if self._outputs is None else [*inputs, self._outputs]

    @torch.no_grad()
    def _refresh(self, step: Step, map: Map, rows: Tensor, weight: Tensor | None, *, moments: bool) -> None:
        old = self._inputs.basis, self._output_basis()
        if self._sketch is not None:
            vectors = map.by_channel(rows, self._sketch.channels)
            before = self._seen.to(vectors) if self._seen is not None else vectors[:, :0]
            self._seen = torch.cat((before, vectors), 1)[:, -self._method.rows :]
            step.spend(self._inputs.refresh(self._seen))
            assert self._inputs.basis is not None
            self._sketch.refresh(self._seen, self._inputs.basis)
        elif self._method.side != "output":
            step.spend(self._inputs.refresh(rows))
        if self._outputs is not None and weight is not None:
            w = map.matrix(ranks.whole(weight)).to(rows)
            step.spend(linear_flops(rows.shape[0] * rows.shape[1], w.shape[1], w.shape[2]))
            step.spend(self._outputs.refresh(rows @ w.mT))
        # Where every step is unbiased, moments lie in no subspace.
        known = any(basis is not None for basis in old) and self._sketch is None
        if weight is not None and moments and known and not self._tied and self._method.basis != "bulk":
            self._reexpress(step, map, weight, *old)

    def _reexpress(self, step: Step, map: Map, weight: Tensor, u: Tensor | None, v: Tensor | None) -> None:
        """Equation (5), where moments are all that the optimizer keeps of the weight's shape."""
        state = step.optimizer.state.get(weight, {})
        kept = {name: t for name, t in state.items() if isinstance(t, Tensor) and t.shape == weight.shape}
        if not kept.keys() <= _MOMENTS:
            return
        for moment in kept.values():
            m = map.matrix(ranks.whole(moment))
            if u is not None and self._inputs.basis is not None:
                m = spectral.reexpress(m, u.to(m), self._inputs.basis.to(m))
            new = self._output_basis()
            if v is not None and new is not None:
                m = spectral.reexpress(m.mT, v.to(m), new.to(m)).mT
            ranks.write(moment, map.from_matrix(m, weight.shape))

    @torch.no_grad()
    def _decay(self, step: Step, weight: Tensor, lr: float) -> None:
        """Equation (4)."""
        first = self._outputs.first_eigenpair() if self._outputs is not None and self._method.decay else None
        if first is None or step.map is None:
            return
        w = step.map.matrix(ranks.whole(weight))
        value, direction = first[0].to(w), first[1].to(w)
        w = spectral.decayed(w, direction, lr * self._method.decay * value)
        ranks.write(weight, step.map.from_matrix(w, weight.shape))
        step.spend(4 * weight.numel())

    def read(self) -> None:
        """The captured energy."""
        self._diagnostics.read()

    def metrics(self) -> dict[str, float]:
        """See `Diagnostics.metrics`; nothing for a layer that is trained in full."""
        subspace = self._outputs if self._method.side == "output" else self._inputs
        return {} if subspace is None else self._diagnostics.metrics(subspace, self.projecting)

    def state_dict(self) -> dict[str, Any]:
        """Bases, cadence and figures."""
        return {
            "projecting": self.projecting,
            "refreshed_at": self._refreshed_at,
            "taken": self._taken,
            "scale": self._scale,
            "inputs": self._inputs.state_dict(),
            "outputs": None if self._outputs is None else self._outputs.state_dict(),
            "diagnostics": self._diagnostics.state_dict(),
            "sketch": None if self._sketch is None else self._sketch.state_dict(),
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.projecting, self._refreshed_at = bool(state["projecting"]), int(state["refreshed_at"])
        self._scale, self._taken = float(state["scale"]), int(state["taken"])
        self._inputs.load_state_dict(state["inputs"])
        if self._outputs is not None and state["outputs"] is not None:
            self._outputs.load_state_dict(state["outputs"])
        self._diagnostics = Diagnostics(**state["diagnostics"])
        self._seen = state["seen"]
        if self._sketch is not None:
            self._sketch.load_state_dict(state["sketch"])


def _group(step: Step, weight: Tensor) -> dict[str, Any] | None:
    """The parameter group of this step's optimizer that owns `weight`."""
    for group in step.optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return group
    return None
