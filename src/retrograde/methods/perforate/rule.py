"""What Perforate does at one layer, and growth when the conductor asks for it."""

import warnings
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.maps.base import LayerKind, Map
from retrograde.engine.slots import Call, Rule, Site, Step
from retrograde.engine.statistics import StatisticsSpec
from retrograde.errors import NoEffectError, OptionError, RetrogradeWarning
from retrograde.kernels.delta import Delta
from retrograde.maths.perforate import normal, output_scale
from retrograde.maths.philox import key_of, mix_key
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.dendrites import Dendritic
from retrograde.methods.perforate.sets import Dendrites, DendriteSets, fan_in
from retrograde.methods.perforate.stage import Stage

if TYPE_CHECKING:
    from retrograde.methods.perforate import Perforate

_SMALL = 0.01
"""Standard deviation of a new dendrite's parameters where they start small."""
_SAMPLE = StatisticsSpec(rows=256, every=50)
"""Rows of the layer's input from which a start is scaled and a norm is primed, and how old they may be, in steps."""


class DendriteRule(Rule):
    """The gradient rule: dendrites are part of the network, and train with it.

    Attributes:
        steps: optimizer steps seen.
        stage: shared with the model's other rules, given by the conductor.
        cost: parameters of all dendrites.
    """

    detached = False
    stage: Stage
    cost: int = 0

    def __init__(self, site: Site, kind: LayerKind, method: "Perforate") -> None:
        super().__init__(site.name)
        self._method = method
        self._kind = kind
        self._map = site.map
        self._outputs = 0 if site.weight is None else site.map.outputs(site.weight.shape)
        self._inputs = 1.0 if site.weight is None else fan_in(site.map, site.weight.shape)
        self._encoders = [m for m in site.fused_by if isinstance(m, nn.TransformerEncoder)]
        self._fused = bool(site.fused_by)
        self._layer: weakref.ref[nn.Module] | None = None
        self._met = False
        self._key = 0
        self.steps = 0
        self.score: float | None = None
        if method.samples:
            until = method.first_growth
            self.needs_statistics = StatisticsSpec(
                _SAMPLE.rows, _SAMPLE.every, 0, None if until is None else max(until, 1)
            )

    @property
    def active(self) -> int:
        """Dendrite sets in use."""
        return sum(sets.sets for sets in self.used)

    @property
    def state(self) -> dendrites.State:
        """The layer's dendrites."""
        return self.layer._dendrite_state  # pyright: ignore[reportPrivateUsage]

    @property
    def growths(self) -> list[DendriteSets]:
        """The sets of every growth, those that are not in use as well."""
        return [dendrites.growth(self.layer, index) for index in range(dendrites.capacity(self.layer))]

    @property
    def used(self) -> list[DendriteSets]:
        """The sets of the growths so far."""
        return self.growths[: self.state.growths]

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
        method = self._method
        weight, bias = (layer._parameters.get(name) for name in self._kind.names(layer))  # pyright: ignore[reportPrivateUsage]
        assert weight is not None
        made, earlier = Dendrites(), 0
        for sets in method.growths:
            made.append(
                DendriteSets(
                    weight,
                    self._map,
                    sets,
                    earlier if method.cascade else 0,
                    bias=bias is not None,
                    norm=method.normalises,
                    scale=output_scale(True, method.output_scale),
                )
            )
            earlier += sets
        adopted = dendrites.adopt(
            layer, self._kind, made, dendrites.State(0, method.activation, self.detached)
        )
        if self._fused:
            # A layer with a hook is one that torch's fused transformer layers call.
            adopted._forward_hooks[_HOOK] = _ordinary_path  # pyright: ignore[reportPrivateUsage]
            self._encoders = [e for e in self._encoders if e.use_nested_tensor]
            for encoder in self._encoders:
                encoder.use_nested_tensor = False
                encoder.__dict__[dendrites.UNPACKED] = True

    def release(self, layer: nn.Module) -> None:
        """The layer as it was; dendrites in use are lost."""
        if hasattr(self, "stage"):
            self.stage.thaw()
        made = cast(Dendritic, layer)
        if count := sum(dendrites.growth(layer, i).sets for i in range(made._dendrite_state.growths)):  # pyright: ignore[reportPrivateUsage]
            warnings.warn(
                f"detaching takes {count} dendrite set(s) from layer {self.name!r}, so the model's function "
                "changes. Call session.fold() first: it returns a plain model that keeps them.",
                RetrogradeWarning,
                stacklevel=2,
            )
        dendrites.restore(made)
        layer._forward_hooks.pop(_HOOK, None)  # pyright: ignore[reportPrivateUsage]
        for encoder in self._encoders:
            encoder.use_nested_tensor = True
            encoder.__dict__.pop(dendrites.UNPACKED, None)

    def output(self, x: Tensor, z: Tensor, map: Map) -> Tensor:
        """``y = z + Σ_s s·w[s] ⊙ a_s``."""
        layer, count = self.layer, self.state.growths
        if count:
            z = dendrites.add(
                layer, x, z, count, self._method.activation, map, detached=self.detached, aside=True
            )
        # DDP waits for every parameter that is registered: idle ones are tied to the output.
        return cast(Tensor, _Tie.apply(z, *self._idle())) if ranks.grouped() else z

    def _idle(self) -> list[nn.Parameter]:
        """Parameters that no gradient of the loss may reach: unused capacity, and what learnt in a dendrite phase."""
        count = self.state.growths
        idle = [p for sets in self.growths[count:] for p in sets.parameters()]
        if self.detached:
            idle += [p for sets in self.used for p in sets.parameters() if p is not sets.output]
        return idle

    # Backward.

    def observe(self, call: Call, delta: Delta) -> None:
        """Count the dendrites' own products."""
        if active := self.active:
            call.spend((1 if self.detached else 3) * active * call.flops)

    def _readable(self, call: Call, need: str) -> bool:
        """Whether a dendrite phase can learn from the input and the error of a call; errors must be finite.

        Args:
            call: in the backward pass.
            need: what wants the layer's input, for the message.

        Raises:
            OptionError: the input was not kept.
        """
        if not call.saved:
            raise OptionError(
                f"{need} the layer's input in the backward pass, and it was not kept: its weight was frozen after "
                "attaching. Leave the layer out with Perforate(where=…), or use rule='gradient'."
            )
        if bool(torch.isfinite(call.delta).all()):
            return True
        call.counters.fallbacks += 1
        return False

    # Around the step, and when folding.

    def grad(self, step: Step) -> None:
        """Dendrite phase: nothing moves but the candidates. Else: everything but unused and frozen dendrites."""
        for parameter in self._idle():
            parameter.grad = None
        if not self._met:
            self._meet(step)

    def _meet(self, step: Step) -> None:
        """The first step: does the optimizer own the dendrites, and how do its steps depend on the gradient?"""
        output = self.growths[0].output
        if not any(p is output for group in step.optimizer.param_groups for p in group["params"]):
            raise NoEffectError(
                f"the optimizer that owns layer {self.name!r} lacks its dendrites, so they would never learn. Make the "
                "optimizer after attaching, from model.parameters()."
            )
        self._met = True
        scale = output_scale(_adapts(step.optimizer), self._method.output_scale)
        for index, sets in enumerate(self.growths):
            # Where w has learnt, another scale would change the function.
            known = sets.scale
            if known is None or (index < self.state.growths and bool(ranks.whole(sets.output).any())):
                continue
            if sets.output.grad is not None:
                sets.output.grad.mul_(scale / known)
            known.fill_(scale)

    def local(self, step: Step) -> None:
        """Count steps, and let norms take in what they have seen."""
        self.steps = step.index + 1
        for sets in self.used:
            if sets.norm is not None:
                sets.norm.settle()

    def fold(self, layer: nn.Module) -> nn.Module:
        """The plain layer, or one with dendrites when sets are in use."""
        folded = dendrites.fold(cast(Dendritic, layer))
        if not isinstance(folded, Dendritic):
            folded._forward_hooks.pop(_HOOK, None)  # pyright: ignore[reportPrivateUsage]
        return folded

    # Growth, asked for by the conductor.

    def begin(self, attempt: int) -> None:
        """Start a dendrite phase, if the rule has one."""

    def end(self) -> None:
        """End it: what it was for has grown."""

    def improved(self) -> bool:
        """Whether a candidate has grown better since last asked."""
        return False

    @property
    def full(self) -> bool:
        """Whether all capacity is in use."""
        return self.state.growths == dendrites.capacity(self.layer)

    def ready(self) -> bool:
        """Whether a dendrite phase that ends by itself is over."""
        return False

    @torch.no_grad()
    def grow(self, attempt: int) -> None:
        """Put the sets of one more growth into use: new parameters, and rows of w that are exactly zero."""
        sets = self.growths[self.state.growths]
        values = self._new_values(attempt)
        for name in ("weight", "bias", "cascade"):
            parameter = getattr(sets, name)
            if parameter is not None:
                ranks.write(parameter, values[name].to(parameter.dtype))
        if sets.norm is not None:
            sets.norm.prime(values["mean"], values["variance"], values["bias"].to(sets.norm.bias.dtype))
        sets.output.zero_()
        self.state.growths += 1

    def _new_values(self, attempt: int) -> dict[str, Tensor]:
        """A start: M, its bias or β, V, and the mean and variance of z."""
        deviation, rows = 1.0, self._rows()
        if rows is not None:
            square = float(ranks.mean(rows.square().mean()))
            deviation = square**-0.5 if square > 0 else 1.0
        values = self._draw(self.state.growths, attempt, 0, deviation)
        # A single row has no variance; z was drawn to have about one.
        if rows is None or rows.shape[1] < 2:
            return values
        return {**values, **self._moments(rows, values["weight"])}

    def _rows(self) -> Tensor | None:
        """Rows of the layer's input of the last steps, (g, n, d)."""
        return None if self.needs_statistics is None else self.statistics.rows

    def _moments(self, rows: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Mean and variance of ``M x`` over rows and ranks."""
        z = rows @ self._map.matrix(weight).to(rows).mT
        mean = ranks.mean(z.mean(1))
        variance = ranks.mean((z - mean.unsqueeze(1)).square().mean(1))
        # Entries of a row that meet in one output are taken for independent.
        return {
            "mean": self._map.per_output(mean, weight.shape),
            "variance": self._map.per_output(variance, weight.shape),
        }

    def _draw(self, index: int, attempt: int, candidate: int, deviation: float = 1.0) -> dict[str, Tensor]:
        """Parameters of a growth that nothing is known of.

        Args:
            index: of the growth.
            attempt: how often was grown.
            candidate: which of several.
            deviation: 1 over the root of the input's mean square.
        """
        sets = self.growths[index]
        scaled = self._method.scales_start
        channels = sets.output.shape
        spreads = {
            "weight": (sets.weight.shape, deviation * self._inputs**-0.5 if scaled else _SMALL),
            "bias": (channels, 1.0 if scaled or sets.norm is not None else _SMALL),
            "cascade": (None if sets.cascade is None else sets.cascade.shape, _SMALL),
        }
        drawn: dict[str, Tensor] = {}
        for i, (part, (shape, spread)) in enumerate(spreads.items()):
            if shape is None or (part == "bias" and sets.bias is None and sets.norm is None):
                continue
            key = mix_key(self._key, attempt, index, candidate, i)
            value = normal(key, shape, sets.output.device) * spread
            drawn[part] = ranks.first(value.to(sets.output.dtype))
        zeros = torch.zeros(channels, device=sets.output.device)
        return {**drawn, "mean": zeros, "variance": torch.ones_like(zeros)}

    def new_parameters(self) -> list[nn.Parameter]:
        """Of the sets in use."""
        return [parameter for sets in self.used for parameter in sets.parameters()]

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


def _adapts(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its steps do not grow with the gradient: of all but those that descend by it as it is."""
    inner = getattr(optimizer, "base_optimizer", None) or getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return _adapts(inner)
    return not any("SGD" in cls.__name__ for cls in type(optimizer).__mro__)


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
