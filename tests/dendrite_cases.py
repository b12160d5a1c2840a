"""Layers with dendrites: what their test files share."""

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import retrograde as rg
from cases import Case, Turned, batch, conv, program, transposed
from retrograde.errors import RetrogradeWarning
from retrograde.methods.perforate import Perforate
from retrograde.methods.perforate.conductor import PerforateConductor
from retrograde.methods.perforate.rule import DendriteRule


def first_edition(**options: Any) -> Perforate:
    """One set after the other at plateaus, without a norm, in a cascade: what the papers' forward pass is."""
    settings: dict[str, Any] = {
        "where": "*",
        "norm": None,
        "activation": "tanh",
        "initial": "small",
        "scale": 1.0,
        "at_once": 1,
        "cascade": True,
        "grow_after": None,
    }
    return Perforate(**{**settings, **options})


class Told(Turned):
    """The same, made known by a function that returns its operands."""


def operands(layer: Told, x: Tensor) -> rg.Operands:
    return rg.Operands(x, layer.weight.T, layer.bias)


rg.register_layer(Told, operands)

KINDS = [
    Case("linear", lambda: nn.Linear(6, 5), (7, 6)),
    Case("linear_no_bias", lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    Case("conv1d_groups", conv(1, 4, 6, 3, groups=2, padding=1), (3, 4, 9)),
    Case("conv2d_stride", conv(2, 4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 7, 8)),
    Case("conv2d_same_even", conv(2, 4, 6, 4, padding="same"), (3, 4, 7, 8)),
    Case("conv2d_reflect", conv(2, 4, 6, 3, padding=1, padding_mode="reflect", dilation=2), (3, 4, 9, 8)),
    Case("conv2d_depthwise", conv(2, 4, 4, 3, groups=4, padding=1), (3, 4, 7, 8)),
    Case("conv2d_unbatched", conv(2, 4, 6, 3, padding=1), (4, 7, 8)),
    Case("conv3d", conv(3, 4, 6, 3, padding=1), (2, 4, 5, 6, 5)),
    Case("transposed1d", transposed(1, 4, 6, 3, stride=2), (3, 4, 9)),
    Case("transposed2d_groups", transposed(2, 4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 5, 6)),
    Case(
        "transposed2d_output_size",
        transposed(2, 4, 6, 3, stride=2, padding=1),
        (3, 4, 5, 6),
        {"output_size": [10, 12]},
    ),
    Case("transposed2d_unbatched", transposed(2, 4, 6, 3, dilation=2, bias=False), (4, 5, 6)),
    Case("transposed3d", transposed(3, 4, 6, 3, stride=2, output_padding=1), (2, 4, 3, 4, 3)),
    Case("turned", partial(Turned, 6, 5), (7, 6)),
    Case("told", partial(Told, 6, 5), (3, 4, 6)),
]


def conductor(session: rg.Session) -> PerforateConductor:
    return session._conductors["perforate"]  # type: ignore[return-value]


def rule(layer: nn.Module) -> DendriteRule:
    return next(r for r in program(layer).rules if isinstance(r, DendriteRule))


def grow(session: rg.Session, sets: int = 1, spread: float = 0.3) -> None:
    """`sets` more in use with parameters and w of size `spread`; 0 leaves them as growth makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)  # candidates that saw nothing: meant here
        for _ in range(sets):
            for r in conductor(session)._rules.values():
                r.grow(1)
    if spread:
        active = conductor(session).dendrites
        for i, (name, p) in enumerate(session.model.named_parameters()):
            # Unused capacity stays zero.
            if "dendrite" in name and int(name.split("dendrites.")[1][0]) < active:
                p.data.copy_(spread * batch(p.shape, 50 + i, p.dtype))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, shape: Any) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        torch.sin(model(batch(shape, seed=100 + step).requires_grad_())).square().mean().backward()
        optimizer.step()


def stopped(
    made: Callable[[], Any], train: Callable[..., set[str]], stop: int, total: int
) -> tuple[Any, Any, set[str]]:
    """A whole run, one that was stopped and taken up by new objects from saved states, and the phases of the whole.

    Args:
        made: what a run is made of: model, optimizer, session and more, all with a state.
        train: given these, the first step and the one after the last; returns the phases that it saw.
        stop: the step at which the second run stops.
        total: steps of a run.
    """
    whole, first = made(), made()
    phases = train(*whole, 0, total)
    train(*first, 0, stop)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in first], saved)
    saved.seek(0)
    torch.manual_seed(99)  # a new process has another random state
    second = made()
    for part, state in zip(second, torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, stop, total)
    return whole, second, phases
