"""The base rule at one layer: slots 3, 6, 7 and 8, in the letters of the package's docstring."""

from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrograde.accounting.flops import DISCOUNTS, linear_flops
from retrograde.engine.slots import Call, Rule, Step
from retrograde.engine.statistics import StatisticsSpec
from retrograde.errors import AttachError
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Done
from retrograde.kernels.geometry import Geometry
from retrograde.maths import spectral
from retrograde.methods.spectral import projection
from retrograde.methods.spectral.diagnostics import Diagnostics
from retrograde.methods.spectral.subspace import Subspace

if TYPE_CHECKING:
    from retrograde.methods.spectral import Spectral

_MOMENTS = ("exp_avg", "momentum_buffer")


class SpectralRule(Rule):
    """The rule of one layer.

    Args:
        name: full name of the layer.
        method: the options.
        kernel: size of the convolution's kernel; empty for a linear layer.
        inputs: the subspace of the layer's input, U.
        outputs: the subspace of its output, V; None where neither ``side`` nor ``decay`` needs it.
    """

    def __init__(
        self,
        name: str,
        method: "Spectral",
        kernel: tuple[int, ...],
        inputs: Subspace,
        outputs: Subspace | None,
    ) -> None:
        super().__init__(name)
        self.needs_statistics = StatisticsSpec(method.rows, method.every)
        self.projecting = False
        """Whether this step projects: a plain flag, set between steps, so that compiled code knows two programs."""
        self._method = method
        self._kernel = kernel
        self._inputs, self._outputs = inputs, outputs
        self._narrows = method.side != "output" and method.basis != "bulk"
        self._geometry: Geometry | None = None
        self._seen = False
        self._refreshed_at = -1
        self._owed = 0.0
        self._diagnostics = Diagnostics()

    # Slots 3 to 6: every step.

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        """x̂ on full steps; else x̂U, and the U that it was made with."""
        basis = self._inputs.basis
        if not (self.projecting and self._narrows) or basis is None:
            return (x,)
        basis = basis.to(x)
        return projection.keep(x, basis, self._kernel, self._geometry), basis

    def observe(self, call: Call, delta: Delta) -> None:
        """Note how the layer lies, for the next forward pass, and settle what the last step's hook cost."""
        projected = len(call.saved) > 1 and call.geometry is not None and not call.geometry.transposed
        if projected and call.geometry != self._geometry:
            raise AttachError(
                f"layer {self.name!r} was given another stride, padding or dilation while it trained, and what was "
                "kept of its input belongs to the earlier ones. Detach, change the layer, and attach again."
            )
        self._geometry, self._seen = call.geometry, True
        call.counters.overhead += self._owed
        self._owed = 0.0

    def product(self, call: Call, delta: Delta) -> Tensor:
        """Equation (1); on full steps the layer's own product."""
        if len(call.saved) == 1:
            if call.geometry is None:
                x = call.saved[0] if call.int8_x is None else call.int8_x
                return call.products.linear_weight_grad(x)[0]
            return call.products.convolution_weight_grad(call.saved[0], call.weight, call.geometry)[0]
        kept, basis = call.saved
        found, done = projection.product(call.products, kept, basis, call.weight, call.geometry)
        if kept.numel():
            self._diagnostics.saved_fraction = kept.numel() / prod(call.input_shape)
            self._count(call, delta, kept, basis, done)
        return found

    def _count(self, call: Call, delta: Delta, kept: Tensor, basis: Tensor, done: Done) -> None:
        """Replace the dense product that was counted for this call by the projected one."""
        factor, rest = projection.flops(call.delta.shape, kept, basis, call.weight, call.geometry)
        groups, d, rank = basis.shape
        if call.geometry is not None and call.geometry.transposed:
            dense = linear_flops(kept.numel() // rank, d, prod(call.weight.shape[1:]))
        else:
            dense = linear_flops(kept.numel() // (groups * rank), call.weight.shape[0], d)
        used = 1 - delta.zeros / call.delta.numel()
        discount = DISCOUNTS[str(call.weight.dtype).removeprefix("torch.")]
        counters = call.counters
        counters.weight_grad_needed += rest + (factor - dense) * used
        executed = rest + (factor * used if done.skips_zeros else factor) - dense
        counters.weight_grad_executed += executed
        counters.weight_grad_discounted += executed * discount

    # Slot 7: between the backward pass and the optimizer.

    def grad(self, step: Step) -> None:
        """V(VᵀG) for the output side; the scaled residual, equation (6), on full steps."""
        weight = _weight(step.layer)
        if not self._seen or weight.grad is None or _group(step, weight) is None:
            return
        if self.projecting:
            if not self._narrows or self._method.side == "both":
                weight.grad.copy_(self._projected(weight.grad, narrow=self._narrows))
            return
        if any(subspace.basis is None for subspace in self._subspaces()):
            return
        projected = self._projected(weight.grad)
        self._diagnostics.measure(weight.grad, projected)
        if self._method.residual == "scaled" and self._past_warmup(step.index):
            scale = self._residual_scale()
            weight.grad.add_(weight.grad - projected, alpha=scale - 1)

    def _projected(self, gradient: Tensor, *, narrow: bool = False) -> Tensor:
        """What a projected step makes of `gradient`; with `narrow`, of one that slot 6 has projected already."""
        g = whole = projection.as_matrix(gradient, self._geometry)
        u, v = self._inputs.basis, self._output_basis()
        if self._method.side != "output" and not narrow and u is not None:
            g = spectral.project_rows(g, u.to(g))
            self._owed += 2 * linear_flops(g.shape[1], u.shape[-1], g.shape[0] * g.shape[2])
        if v is not None:
            g = spectral.project_columns(g, v.to(g))
            self._owed += 2 * linear_flops(g.shape[1], v.shape[-1], g.shape[0] * g.shape[2])
        if self._method.basis == "bulk":
            g = whole - g
        return projection.from_matrix(g, gradient, self._geometry)

    def _output_basis(self) -> Tensor | None:
        return self._outputs.basis if self._outputs is not None and self._method.side != "input" else None

    def _residual_scale(self) -> float:
        """Equation (6): s = min(m, λ₁/λ_k)."""
        subspace = self._outputs if self._method.side == "output" else self._inputs
        if subspace is None or subspace.eigenvalues is None:
            return 1.0
        values = subspace.eigenvalues
        ratio = (values[:, 0] / values[:, -1].clamp_min(torch.finfo(values.dtype).tiny)).min()
        return min(float(self._method.full_every), float(ratio))

    # Slot 8: after the optimizer.

    def local(self, step: Step) -> None:
        """Decay, refresh, and whether the next step projects."""
        weight = _weight(step.layer)
        group = _group(step, weight)
        if group is not None:
            self._decay(weight, float(group["lr"]))
        rows = self.statistics.rows
        late = self._refreshed_at < 0 or step.index - self._refreshed_at >= self._method.every
        if step.refreshed and late and rows is not None and self._seen:
            self._refreshed_at = step.index
            self._refresh(rows, weight, step if group is not None else None)
        following = step.index + 1
        ready = self._seen and all(subspace.basis is not None for subspace in self._subspaces())
        self.projecting = ready and self._past_warmup(following) and not self._is_full(following)
        if self.projecting:
            for subspace in self._subspaces():
                subspace.settle()

    def _past_warmup(self, index: int) -> bool:
        return index >= self._method.warmup

    def _is_full(self, index: int) -> bool:
        m = self._method.full_every
        return self._method.residual != "none" and (index - self._method.warmup) % m == m - 1

    def _subspaces(self) -> list[Subspace]:
        inputs = [] if self._method.side == "output" else [self._inputs]
        return inputs if self._outputs is None else [*inputs, self._outputs]

    @torch.no_grad()
    def _refresh(self, rows: Tensor, weight: Tensor, step: Step | None) -> None:
        old = self._inputs.basis, self._output_basis()
        if self._method.side != "output":
            self._owed += self._inputs.refresh(rows)
        if self._outputs is not None:
            w = projection.as_matrix(weight, self._geometry).to(rows)
            self._owed += linear_flops(rows.shape[0] * rows.shape[1], w.shape[1], w.shape[2])
            self._owed += self._outputs.refresh(rows @ w.mT)
        if step is not None and self._method.basis != "bulk":
            self._reexpress(step, weight, *old)

    def _reexpress(self, step: Step, weight: Tensor, u: Tensor | None, v: Tensor | None) -> None:
        state = step.optimizer.state.get(weight, {})
        for name in _MOMENTS:
            moment = state.get(name)
            if not isinstance(moment, Tensor) or moment.shape != weight.shape:
                continue
            m = projection.as_matrix(moment, self._geometry)
            if u is not None and self._inputs.basis is not None:
                m = spectral.reexpress(m, u.to(m), self._inputs.basis.to(m))
            new = self._output_basis()
            if v is not None and new is not None:
                m = spectral.reexpress(m.mT, v.to(m), new.to(m)).mT
            moment.copy_(projection.from_matrix(m, weight, self._geometry))

    @torch.no_grad()
    def _decay(self, weight: Tensor, lr: float) -> None:
        """Equation (4)."""
        first = self._outputs.first_eigenpair() if self._outputs is not None and self._method.decay else None
        if first is None:
            return
        w = projection.as_matrix(weight, self._geometry)
        value, direction = first[0].to(w), first[1].to(w)
        w = spectral.decayed(w, direction, lr * self._method.decay * value)
        weight.copy_(projection.from_matrix(w, weight, self._geometry))
        self._owed += 4 * weight.numel()

    def metrics(self) -> dict[str, float]:
        """See `Diagnostics.metrics`; nothing for a layer that is trained in full."""
        subspace = self._outputs if self._method.side == "output" else self._inputs
        return {} if subspace is None else self._diagnostics.metrics(subspace, self.projecting)

    def state_dict(self) -> dict[str, Any]:
        """Bases, cadence and figures."""
        return {
            "projecting": self.projecting,
            "geometry": None if self._geometry is None else asdict(self._geometry),
            "seen": self._seen,
            "refreshed_at": self._refreshed_at,
            "owed": self._owed,
            "inputs": self._inputs.state_dict(),
            "outputs": None if self._outputs is None else self._outputs.state_dict(),
            "diagnostics": self._diagnostics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.projecting, self._seen = bool(state["projecting"]), bool(state["seen"])
        self._geometry = None if state["geometry"] is None else Geometry(**state["geometry"])
        self._refreshed_at, self._owed = int(state["refreshed_at"]), float(state["owed"])
        self._inputs.load_state_dict(state["inputs"])
        if self._outputs is not None and state["outputs"] is not None:
            self._outputs.load_state_dict(state["outputs"])
        self._diagnostics = Diagnostics(**state["diagnostics"])


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight")


def _group(step: Step, weight: Tensor) -> dict[str, Any] | None:
    """The parameter group of this step's optimizer that owns `weight`."""
    for group in step.optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return group
    return None
