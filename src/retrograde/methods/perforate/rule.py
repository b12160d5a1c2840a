"""What Perforate does at one layer, and growth when the conductor asks for it."""

import warnings
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.maps.base import LayerKind, Map
from retrograde.engine.slots import Call, Rule, Site, Step
from retrograde.errors import NoEffectError, RetrogradeWarning
from retrograde.kernels.delta import Delta
from retrograde.maths.perforate import normal
from retrograde.maths.philox import key_of, mix_key
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.dendrites import Dendritic
from retrograde.methods.perforate.stage import Stage

if TYPE_CHECKING:
    from retrograde.methods.perforate import Perforate

_INITIAL = 0.01
"""Standard deviation of a new dendrite's parameters."""


class DendriteRule(Rule):
    """The gradient rule: dendrites are part of the network, and train with it.

    Attributes:
        steps: optimizer steps seen.
        stage: shared with the model's other rules, given by the conductor.
    """

    detached = False
    stage: Stage

    def __init__(self, site: Site, kind: LayerKind, method: "Perforate") -> None:
        super().__init__(site.name)
        self._method = method
        self._kind = kind
        self._map = site.map
        self._outputs = 0 if site.weight is None else site.map.outputs(site.weight.shape)
        self._encoders = [m for m in site.fused_by if isinstance(m, nn.TransformerEncoder)]
        self._fused = bool(site.fused_by)
        self._layer: weakref.ref[nn.Module] | None = None
        self._checked = False
        self._key = 0
        self.steps = 0
        self.score: float | None = None

    @property
    def active(self) -> int:
        """Dendrite sets in use."""
        return self.state.count

    @property
    def state(self) -> dendrites.State:
        """The layer's dendrites."""
        return self.layer._dendrite_state  # pyright: ignore[reportPrivateUsage]

    @property
    def layer(self) -> Dendritic:
        """The attached layer."""
        layer = None if self._layer is None else self._layer()
        if layer is None:
            raise NoEffectError(f"layer {self.name!r} is gone: the attached model was deleted.")
        return cast(Dendritic, layer)

    def prepare(self, layer: nn.Module) -> None:
        """Capacity for all dendrite sets, so that optimizers, DDP, averages and checkpoints see them from the start."""
        self._layer = weakref.ref(layer)
        self._key = mix_key(self.seed, key_of(self.name))
        weight, bias = (layer._parameters.get(name) for name in self._kind.names(layer))  # pyright: ignore[reportPrivateUsage]
        assert weight is not None
        dendrites.allocate(layer, self._method.max_dendrites, weight, self._outputs, bias=bias is not None)
        for d in range(self._method.max_dendrites):
            for value in dendrites.parameters(layer, d).values():
                value.requires_grad_(value.is_floating_point())
        state = dendrites.State(0, self._method.max_dendrites, self._method.activation, self.detached)
        made = dendrites.adopt(layer, self._kind, state)
        if self._fused:
            # A layer with a hook is one that torch's fused transformer layers call.
            made._forward_hooks[_HOOK] = _ordinary_path  # pyright: ignore[reportPrivateUsage]
            self._encoders = [e for e in self._encoders if e.use_nested_tensor]
            for encoder in self._encoders:
                encoder.use_nested_tensor = False
                encoder.__dict__[dendrites.UNPACKED] = True

    def release(self, layer: nn.Module) -> None:
        """The layer as it was; dendrites in use are lost."""
        if hasattr(self, "stage"):
            self.stage.thaw()
        made = cast(Dendritic, layer)
        if count := made._dendrite_state.count:  # pyright: ignore[reportPrivateUsage]
            warnings.warn(
                f"detaching takes {count} dendrite set(s) from layer {self.name!r}, so the model's function "
                "changes. Call session.fold() first: it returns a plain model that keeps them.",
                RetrogradeWarning,
                stacklevel=2,
            )
        dendrites.strip(made, 0)
        dendrites.restore(made)
        layer._forward_hooks.pop(_HOOK, None)  # pyright: ignore[reportPrivateUsage]
        for encoder in self._encoders:
            encoder.use_nested_tensor = True
            encoder.__dict__.pop(dendrites.UNPACKED, None)

    def output(self, x: Tensor, z: Tensor, map: Map) -> Tensor:
        """``y = z + Σ_d w[d] ⊙ a_d``."""
        layer = self.layer
        if count := self.active:
            values = dendrites.activations(
                layer, x, count, self._method.activation, map, detached=self.detached
            )
            z = dendrites.add(layer, z, values, map)
        # DDP waits for every parameter that is registered: idle ones are tied to the output.
        return cast(Tensor, _Tie.apply(z, *self._idle(layer))) if ranks.grouped() else z

    def _idle(self, layer: nn.Module) -> list[nn.Parameter]:
        """Parameters that no gradient of the loss may reach: unused capacity, and what learnt in a dendrite phase."""
        idle: list[nn.Parameter] = []
        for d in range(self._method.max_dendrites):
            for part in dendrites.NAMES:
                value = getattr(layer, dendrites.name_of(part, d))
                if value is not None and (d >= self.active or (self.detached and part != "output")):
                    idle.append(value)
        return idle

    # Backward.

    def observe(self, call: Call, delta: Delta) -> None:
        """Count the dendrites' own products."""
        if active := self.active:
            call.spend((1 if self.detached else 3) * active * call.flops)

    # Around the step, and when folding.

    def grad(self, step: Step) -> None:
        """Dendrite phase: nothing moves but the candidates. Else: everything but unused and frozen dendrites."""
        for parameter in self._idle(self.layer):
            parameter.grad = None
        if not self._checked:
            self._check_owner(step)

    def _check_owner(self, step: Step) -> None:
        output = getattr(step.layer, dendrites.name_of("output", 0))
        if not any(p is output for group in step.optimizer.param_groups for p in group["params"]):
            raise NoEffectError(
                f"the optimizer that owns layer {self.name!r} lacks its dendrites, so they would never learn. Make the "
                "optimizer after attaching, from model.parameters()."
            )
        self._checked = True

    def local(self, step: Step) -> None:
        """Count steps, for a run that reports no scores."""
        self.steps = step.index + 1

    def fold(self, layer: nn.Module) -> nn.Module:
        """The plain layer, or one with dendrites when sets are in use."""
        folded = dendrites.fold(cast(Dendritic, layer))
        if not isinstance(folded, Dendritic):
            folded._forward_hooks.pop(_HOOK, None)  # pyright: ignore[reportPrivateUsage]
        return folded

    # Growth, asked for by the conductor.

    def begin(self, attempt: int) -> None:
        """Start a dendrite phase, if the rule has one."""

    def improved(self) -> bool:
        """Whether a candidate has grown better since last asked."""
        return False

    @torch.no_grad()
    def grow(self, attempt: int) -> None:
        """Put one more dendrite set into use: new parameters, and a row of w that is exactly zero."""
        parts = dendrites.parameters(self.layer, self.active)
        for part, value in self._new_values(attempt).items():
            ranks.write(parts[part], value)
        parts["output"].zero_()
        self.state.count += 1

    def _new_values(self, attempt: int) -> dict[str, Tensor]:
        return self._draw(self.active, attempt, 0)

    def _draw(self, index: int, attempt: int, candidate: int) -> dict[str, Tensor]:
        drawn: dict[str, Tensor] = {}
        for i, (part, value) in enumerate(dendrites.parameters(self.layer, index).items()):
            if part != "output":
                key = mix_key(self._key, attempt, index, candidate, i)
                drawn[part] = ranks.first((normal(key, value.shape, value.device) * _INITIAL).to(value.dtype))
        return drawn

    # Figures and state.

    def metrics(self) -> dict[str, float]:
        """Dendrites in use, and the best |r| of the candidates that learn or were last accepted."""
        found = {"dendrites": float(self.active)}
        return found if self.score is None else {**found, "correlation": self.score}

    def state_dict(self) -> dict[str, Any]:
        """Steps and the key of the parameters that are drawn."""
        return {"key": self._key, "steps": self.steps, "score": self.score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._key, self.steps = int(state["key"]), int(state["steps"])
        self.score = None if state["score"] is None else float(state["score"])


class _Tie(torch.autograd.Function):
    """z itself; the other tensors take part in the graph, and get gradients of zero.

    Zero, not none: with ``static_graph`` DDP reduces no others than those that had one in the first step.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, *idle: Tensor) -> Tensor:
        ctx.idle = idle
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], *map(torch.zeros_like, ctx.idle)


_HOOK = -1
"""Key of `_ordinary_path` among a layer's hooks: torch counts its own from 0."""


def _ordinary_path(layer: nn.Module, args: Any, output: Any) -> None:
    """Does nothing: a layer that has a hook is called, whatever fused kernel could take its place."""
