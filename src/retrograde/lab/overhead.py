"""What attaching costs a layer that is too small to save anything: one with a rule that does nothing, and dithered."""

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retrograde.engine.slots import Method, Rule, Site
from retrograde.errors import RetrogradeWarning
from retrograde.lab.timing import interleave
from retrograde.methods.dither import Dither
from retrograde.session import attach

LAYERS = ((8, 32), (128, 512))
"""Rows and width of the linear layers."""
_CALLS = {32: 200, 512: 10}
"""Passes in one reading: a millisecond or more."""


@dataclass(frozen=True)
class Overhead:
    """One run against the plain layer, which ran in the same rounds.

    Attributes:
        layer: the layer and its rows.
        threads: torch's.
        compiled: whether both were compiled with ``fullgraph=True``.
        run: ``"plain"``, ``"bare function"`` (a Python autograd function that computes the same), ``"no rule"`` or a
            method.
        microseconds: median of a forward and backward pass.
        ratio: to the plain layer, median over the rounds.
        spread: first and third quartile of the rounds' ratios.
        rounds: that were made.
    """

    layer: str
    threads: int
    compiled: bool
    run: str
    microseconds: float
    ratio: float
    spread: tuple[float, float]
    rounds: int


class _Nothing(Method):
    name: ClassVar[str] = "no rule"

    def make_rule(self, site: Site) -> Rule:
        return Rule(site.name)


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        (delta,) = grad_outputs
        return delta @ weight, delta.T @ x, delta.sum(0)


class _BareLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _Bare.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


def overhead(rounds: int, *, compiled: bool = False, seconds: float | None = None) -> list[Overhead]:
    """Every layer with one thread and with two, runs taking turns.

    Args:
        rounds: that count.
        compiled: with one thread under ``torch.compile`` too.
        seconds: for all of it; None: no limit.
    """
    found: list[Overhead] = []
    ways = [(1, False), (2, False), *([(1, True)] if compiled else [])]
    share = None if seconds is None else seconds / len(LAYERS) / len(ways)
    before = torch.get_num_threads()
    try:
        for (rows, width), (threads, compile_them) in itertools.product(LAYERS, ways):
            torch.set_num_threads(threads)
            found += _compare(rows, width, threads, rounds, compile_them, share)
    finally:
        torch.set_num_threads(before)
    return found


def _compare(
    rows: int, width: int, threads: int, rounds: int, compiled: bool, seconds: float | None
) -> list[Overhead]:
    calls = _CALLS[width]
    torch.manual_seed(0)
    layer, x = nn.Linear(width, width), torch.randn(rows, width, requires_grad=True)
    delta = torch.randn(rows, width)
    bare = _BareLinear(width, width)
    bare.load_state_dict(layer.state_dict())
    models: dict[str, nn.Module] = {"plain": nn.Sequential(layer), "bare function": nn.Sequential(bare)}
    for method in (_Nothing(), Dither()):
        models[method.name] = nn.Sequential(copy.deepcopy(layer))
        attach(models[method.name], method, seed=0)

    def run(model: nn.Module) -> Callable[[], None]:
        step: Any = torch.compile(model, fullgraph=True) if compiled else model
        parameters = list(model.parameters())

        def passes() -> None:
            for _ in range(calls):
                step(x).backward(delta)
                x.grad = None
                for parameter in parameters:
                    parameter.grad = None

        return passes

    with warnings.catch_warnings():
        # So many passes without a step are meant here.
        warnings.simplefilter("ignore", RetrogradeWarning)
        runs = {name: run(model) for name, model in models.items()}
        times = interleave(runs, rounds, warmups=3, seconds=seconds)
    where = f"Linear({width}, {width}), {rows} rows"
    found: list[Overhead] = []
    for name in models:
        speedup, microseconds = times.speedup("plain", name), times.median(name) / calls * 1e6
        figures = microseconds, speedup.ratio, speedup.quartiles, times.rounds
        found.append(Overhead(where, threads, compiled, name, *figures))
    return found
