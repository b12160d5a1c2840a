"""What is checked on: small models of every layer kind, their batches, and the five methods as they act at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.engine.maps.base import register_layer
from retrograde.engine.maps.linear import LinearKind
from retrograde.engine.slots import Method, Rule, Site
from retrograde.methods.decorrelate import Decorrelate
from retrograde.methods.deepfocus import DeepFocus
from retrograde.methods.dither import Dither
from retrograde.methods.perforate import Perforate
from retrograde.methods.spectral import Spectral
from retrograde.planning import make_plan
from retrograde.session import Session, attach

Make = Callable[[], Method | Sequence[Method]]
"""Makes a method, or several to be attached together."""

SEED = 3
"""Of the sessions."""


@dataclass(frozen=True)
class Layer:
    """A layer kind to check on.

    Attributes:
        name: for messages and tables.
        make: makes the layer, or a module of one input around it.
        input_shape: of that input.
    """

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


class Turned(nn.Module):
    """A linear layer whose weight lies as (i, o)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        plain = nn.Linear(inputs, outputs)
        self.weight = nn.Parameter(plain.weight.detach().T.contiguous())
        self.bias = nn.Parameter(plain.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(…, o)."""
        return nn.functional.linear(x, self.weight.T, self.bias)


register_layer(Turned, LinearKind(turned=True))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of one input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """As shaped as x."""
        return self.attention(x, x, x, need_weights=False)[0]


LAYERS = (
    Layer("linear", partial(nn.Linear, 6, 6), (8, 6)),
    Layer("linear-1d", partial(nn.Linear, 6, 5), (6,)),
    Layer("linear-3d", partial(nn.Linear, 6, 8, bias=False), (3, 4, 6)),
    Layer("linear-turned", partial(Turned, 6, 6), (8, 6)),
    Layer("conv1d-strided", partial(nn.Conv1d, 4, 4, 3, stride=2, padding=1), (4, 4, 9)),
    Layer("conv2d", partial(nn.Conv2d, 4, 4, 3, padding="same"), (4, 4, 6, 6)),
    Layer("conv2d-grouped", partial(nn.Conv2d, 4, 4, 3, padding=1, groups=2), (4, 4, 6, 6)),
    Layer("conv3d", partial(nn.Conv3d, 2, 2, 3, padding=1), (2, 2, 4, 4, 4)),
    Layer("transposed2d", partial(nn.ConvTranspose2d, 4, 4, 3, padding=1), (4, 4, 6, 6)),
    Layer("attention", partial(SelfAttention, 6, 2), (3, 5, 6)),
)
"""The layer kinds that every method is checked on."""

METHODS: Mapping[str, Callable[[], Method]] = {
    "decorrelate": partial(Decorrelate, rank=2, every=2),
    "deepfocus": partial(DeepFocus, warmup=1),
    "dither": Dither,
    "perforate": partial(Perforate, where="*", max_dendrites=2, patience=1, limit=2),
    "spectral": partial(Spectral, rank=2, warmup=1, full_every=3, every=2, skip_head=False),
}
"""The five methods, set to act within a few steps and able to work together."""


class Network(nn.Module):
    """Two layers of one kind in a row, whatever their shapes."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        """Of the second layer; its input is what the first one returned, repeated or cut to the shape of `x`."""
        z = torch.tanh(self.first(x))
        if z.shape != x.shape:
            z = z.flatten().repeat(-(-x.numel() // z.numel()))[: x.numel()].view(x.shape)
        return self.second(z)


class Bystander(Method):
    """A method that does nothing, anywhere."""

    name = "bystander"

    def make_rule(self, site: Site) -> Rule:
        """One without slots."""
        return Rule(site.name)


@dataclass(frozen=True)
class Case:
    """Methods on a model of one layer kind.

    Attributes:
        make: the methods, set to act within `STEPS` steps.
        layer: the layer kind.
        neutral: the methods set to change nothing; None where they cannot be.
        tolerance: of a neutral gradient, in its largest magnitude.
    """

    make: Make
    layer: Layer
    neutral: Make | None = None
    tolerance: float = 1e-5

    def plain(self) -> nn.Module:
        """The model, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Network(self.layer.make)

    def attached(
        self, make: Make | None = None, seed: int = SEED, model: nn.Module | None = None
    ) -> tuple[nn.Module, Session]:
        """The model, or one that is given, with those of the methods that act on it."""
        model = self.plain() if model is None else model
        methods = several(self.make if make is None else make)
        plan = make_plan(model, watched(methods), strict=False)
        acting = {name for row in plan.rows for name in row.methods}
        return model, attach(model, [method for method in methods if method.name in acting], seed=seed)

    def batch(self, seed: int = 1) -> Tensor:
        """Inputs that depend on `seed` alone."""
        return torch.randn(self.layer.input_shape, generator=torch.Generator().manual_seed(seed))


def watched(methods: list[Method]) -> list[Method]:
    """With one that acts on every layer, so that a plan is made where the others act on none."""
    known = any(isinstance(method, Bystander) for method in methods)
    return methods if known else [*methods, Bystander()]


def several(make: Make) -> list[Method]:
    """What `make` makes, as a list."""
    made = make()
    return [made] if isinstance(made, Method) else list(made)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One with state, so that resuming has something to lose."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(
    case: Case,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    session: Session | None = None,
    first: int = 0,
    run: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Plain training on batches that depend on the step alone; a score is reported after each.

    Args:
        case: gives the batches.
        model: what is trained.
        optimizer: over its parameters.
        steps: how many.
        session: is told the scores.
        first: number of the first step.
        run: the forward pass; None for the model's own.
    """
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of((model if run is None else run)(case.batch(100 + step)))
        loss.backward()
        optimizer.step()
        score = -float(loss.detach())
        if session is not None and math.isfinite(score):
            session.validated(score)


def loss_of(z: Tensor) -> Tensor:
    """A loss with a gradient everywhere, and another one for each output."""
    ramp = torch.linspace(-1.0, 1.0, z.numel(), dtype=z.dtype).view(z.shape)
    return F.mse_loss(torch.sin(z), ramp)


def gradients(
    model: nn.Module, batches: Sequence[Tensor], run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradients of the parameters, summed over backward passes of `batches`, and of the first one's input."""
    model.zero_grad(set_to_none=True)
    leaves = [x.clone().requires_grad_() for x in batches]
    for x in leaves:
        loss_of((model if run is None else run)(x)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found if leaves[0].grad is None else {**found, "input": leaves[0].grad}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def require_same(found: Mapping[str, Any], expected: Mapping[str, Any], relative: float, why: str) -> None:
    """Tensors by name are equal, to `relative` of each expected one's largest magnitude.

    What vanishes by symmetry is held to a thousandth of the largest tensor's magnitude.

    Raises:
        AssertionError: keys, shapes, dtypes or values differ; the message ends with `why`.
    """
    if found.keys() != expected.keys():
        raise AssertionError(f"{sorted(found.keys() ^ expected.keys())} are on one side only. {why}")
    largest = max((float(v.abs().max()) for v in expected.values() if v.numel()), default=0.0)
    for name, value in expected.items():
        other = found[name]
        if other.shape != value.shape or other.dtype != value.dtype:
            raise AssertionError(
                f"{name} is {tuple(other.shape)} of {other.dtype}, not {tuple(value.shape)} of {value.dtype}. {why}"
            )
        if not value.numel():
            continue
        worst = float((other - value).abs().max())
        scale = max(float(value.abs().max()), 1e-3 * largest)
        if not worst <= relative * scale:
            raise AssertionError(
                f"{name} is off by {worst:.3g}, where {relative * scale:.3g} is the most (of {scale:.3g}). {why}"
            )
