"""What Perforate does at one layer: slots 2, 7, 8 and 9, and growth when the conductor asks for it."""

import hashlib
import warnings
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from retrograde.accounting.flops import convolution_flops, linear_flops
from retrograde.engine.boundary import multiply
from retrograde.engine.slots import Call, Operands, Rule, Step
from retrograde.errors import NoEffectError, RetrogradeWarning
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry
from retrograde.maths.perforate import normal
from retrograde.maths.philox import mix_key
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.stage import Stage

if TYPE_CHECKING:
    from retrograde.methods.perforate import Perforate

_INITIAL = 0.01
"""Standard deviation of a new dendrite's parameters."""


class DendriteRule(Rule):
    """The gradient rule: dendrites are part of the network, and train with it.

    Attributes:
        active: dendrites in use: a plain number for the forward pass, which the layer's buffer keeps in
            ``model.state_dict()``.
        steps: optimizer steps seen.
        stage: shared with the model's other rules, given by the conductor.
    """

    detached = False
    stage: Stage

    def __init__(self, name: str, method: "Perforate") -> None:
        super().__init__(name)
        self._method = method
        self._layer: weakref.ref[nn.Module] | None = None
        self._checked = False
        self._tied = False
        self._key = 0
        self.active = 0
        self.steps = 0
        self.score: float | None = None

    @property
    def layer(self) -> nn.Module:
        """The attached layer."""
        layer = None if self._layer is None else self._layer()
        if layer is None:
            raise NoEffectError(f"layer {self.name!r} is gone: the attached model was deleted.")
        return layer

    def prepare(self, layer: nn.Module) -> None:
        """Capacity for all dendrite sets, so that optimizers, DDP, averages and checkpoints see them from the start."""
        self._layer = weakref.ref(layer)
        # DDP waits for every parameter that is registered: idle ones are tied to the output, without a gradient.
        self._tied = torch.distributed.is_available() and torch.distributed.is_initialized()
        name = int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest())
        self._key = mix_key(self.seed, name)
        dendrites.allocate(layer, self._method.max_dendrites)
        layer.register_load_state_dict_post_hook(_after_load)
        for d in range(self._method.max_dendrites):
            for value in dendrites.parameters(layer, d).values():
                value.requires_grad_(value.is_floating_point())

    def release(self, layer: nn.Module) -> None:
        """The layer as it was; dendrites in use are lost."""
        if hasattr(self, "stage"):
            self.stage.thaw()
        if self.active:
            warnings.warn(
                f"detaching takes {self.active} dendrite set(s) from layer {self.name!r}, so the model's function "
                "changes. Call session.fold() first: it returns a plain model that keeps them.",
                RetrogradeWarning,
                stacklevel=2,
            )
        dendrites.remove(layer, 0, self._method.max_dendrites)
        _remove_hook(layer)

    # Slot 2.

    def output(self, x: Tensor, z: Tensor) -> Tensor:
        """``y = z + Σ_d w[d] ⊙ a_d``."""
        layer = self.layer
        if self.active:
            values = dendrites.activations(
                layer, x, self.active, self._method.activation, self._product, detached=self.detached
            )
            z = dendrites.add(layer, z, values)
        return cast(Tensor, _Tie.apply(z, *self._idle(layer))) if self._tied else z

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(Operands(x, weight, bias, _geometry(self.layer)))

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
        products = 1 if self.detached else 3
        call.counters.overhead += products * self.active * product_flops(call)

    # Slots 7, 8 and 9.

    def grad(self, step: Step) -> None:
        """Dendrite phase: nothing moves but the candidates. Else: everything but unused and frozen dendrites."""
        for parameter in self._idle(step.layer):
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
        """The plain layer, or a `DendriticLinear` or `DendriticConv` when dendrites are in use."""
        _remove_hook(layer)
        method = self._method
        return dendrites.fold(layer, method.max_dendrites, method.activation, self.detached)

    # Growth, asked for by the conductor.

    def begin(self, attempt: int) -> None:
        """Start a dendrite phase, if the rule has one."""

    def improved(self) -> bool:
        """Whether a candidate has grown better since last asked."""
        return False

    @torch.no_grad()
    def grow(self, attempt: int) -> None:
        """Put one more dendrite set into use: new parameters, and a row of w that is exactly zero."""
        layer, parts = self.layer, dendrites.parameters(self.layer, self.active)
        for part, value in self._new_values(attempt).items():
            parts[part].copy_(value)
        parts["output"].zero_()
        getattr(layer, dendrites.COUNT).fill_(self.active + 1)
        self.sync()

    def _new_values(self, attempt: int) -> dict[str, Tensor]:
        return self._draw(self.active, attempt, 0)

    def _draw(self, index: int, attempt: int, candidate: int) -> dict[str, Tensor]:
        drawn: dict[str, Tensor] = {}
        for i, (part, value) in enumerate(dendrites.parameters(self.layer, index).items()):
            if part != "output":
                key = mix_key(self._key, attempt, index, candidate, i)
                drawn[part] = _from_rank_zero((normal(key, value.shape, value.device) * _INITIAL).to(value))
        return drawn

    def sync(self) -> None:
        """Read the number of dendrites in use from the layer's buffer."""
        self.active = int(getattr(self.layer, dendrites.COUNT))

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
        self.sync()


class _Tie(torch.autograd.Function):
    """z itself; the other tensors take part in the graph, and get no gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *idle: Tensor) -> Tensor:
        ctx.count = len(idle)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], *[None] * ctx.count


def _geometry(layer: nn.Module) -> Geometry | None:
    """Of the convolution that slot 2 sees: other padding than equal zeros on both sides is in x̂ already.

    Read anew in every forward pass: a model may change dilation and padding after it was built.
    """
    if isinstance(layer, nn.Linear):
        return None
    conv = cast(nn.Conv2d, layer)
    spatial = conv.weight.dim() - 2

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * spatial if isinstance(value, int) else tuple(value)

    stride, dilation, none = each(conv.stride), each(conv.dilation), (0,) * spatial
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        padding = none
    elif conv.padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, conv.weight.shape[2:], strict=True))
    else:
        padding = each(conv.padding)
    return Geometry(stride, padding, dilation, False, none, conv.groups)


def product_flops(call: Call) -> int:
    """FLOPs of one product of the layer with the call's input."""
    if call.geometry is None:
        return linear_flops(call.delta.numel() // call.weight.shape[0], *call.weight.shape)
    return convolution_flops(call.input_shape, call.weight.shape, call.delta.shape, call.geometry)


def _from_rank_zero(value: Tensor) -> Tensor:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast(value, 0)
    return value


def _after_load(layer: nn.Module, keys: Any) -> None:
    for rule in layer.__dict__["_retrograde"].rules:
        if isinstance(rule, DendriteRule):
            rule.sync()


def _remove_hook(layer: nn.Module) -> None:
    # By identity: a copied layer has the hook, but not the handle that would remove it.
    hooks = layer._load_state_dict_post_hooks  # pyright: ignore[reportPrivateUsage]
    for key in [key for key, hook in hooks.items() if hook is _after_load]:
        del hooks[key]
