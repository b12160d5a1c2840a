"""Methods on one model together: every pair of settings, in both orders, and all five."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrograde as rg
from cases import batch, seeded
from retrograde.accounting.flops import Flops, Product
from retrograde.engine import program
from retrograde.errors import OptionError
from retrograde.kernels import choose, dispatch

SETTINGS: dict[str, dict[str, Callable[[], rg.Method]]] = {
    "decorrelate": {
        "lowrank": partial(rg.Decorrelate, rank=4, every=2),
        "full": partial(rg.Decorrelate, mode="full", every=2),
        "precondition": partial(rg.Decorrelate, mode="precondition", rank=4, every=2),
    },
    "deepfocus": {
        "int8": partial(rg.DeepFocus, warmup=1),
        "bfloat16": partial(rg.DeepFocus, warmup=1, low="bfloat16", unbiased=True),
        "all-low": partial(rg.DeepFocus, warmup=0, q_skip=0.0, q_full=0.0),
        "random": partial(rg.DeepFocus, warmup=1, controller="random", p_max=0.05),
    },
    "dither": {
        "fixed": partial(rg.Dither, scale=1.0),
        "target": partial(rg.Dither, scale=1.0, target_sparsity=0.8),
        "int8": partial(rg.Dither, scale=1.0, forward="int8"),
        "unbounded": partial(rg.Dither, scale=1.0, bits=None, products="float32"),
    },
    "perforate": {
        "gradient": partial(rg.Perforate, where="*", max_dendrites=2, patience=1, limit=2),
        "perforated": partial(
            rg.Perforate,
            rule="perforated",
            where="*",
            max_dendrites=1,
            patience=1,
            limit=1,
            candidate_limit=1,
        ),
    },
    "spectral": {
        "input": partial(rg.Spectral, rank=4, warmup=1, full_every=3, every=2),
        "output": partial(rg.Spectral, rank=4, warmup=1, full_every=3, every=2, side="output"),
        "both-lie": partial(rg.Spectral, rank=4, warmup=1, every=2, side="both", update="lie", decay=1e-3),
        "none": partial(rg.Spectral, rank=4, warmup=1, every=2, residual="none", random=1),
        "bulk": partial(rg.Spectral, rank=4, warmup=1, every=2, residual="full-step", basis="bulk"),
    },
}
METHODS = {name: next(iter(settings.values())) for name, settings in SETTINGS.items()}
SETS = [*itertools.combinations(METHODS, 2), tuple(METHODS)]
PAIRS = [
    ((first, one), (second, other))
    for first, second in itertools.combinations(SETTINGS, 2)
    for one in SETTINGS[first]
    for other in SETTINGS[second]
]
REFUSED = {frozenset({("perforate", "perforated"), ("spectral", name)}) for name in SETTINGS["spectral"]} | {
    frozenset({("dither", "int8"), ("spectral", name)}) for name in SETTINGS["spectral"]
}
"""Pairs that keep different things for the backward pass."""


def net() -> nn.Module:
    """A small residual network of convolutions and linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        rg.Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.ReLU(),
        rg.Residual(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))),
        nn.Linear(16, 4),
    )


def steps(
    model: nn.Module, session: rg.Session, optimizer: torch.optim.Optimizer, start: int, count: int
) -> float:
    """Train on one fixed batch, with a score after every third step; returns the last loss."""
    x, y = batch((32, 3, 6, 6)), torch.arange(32) % 4
    loss = math.nan
    for step in range(start, start + count):
        optimizer.zero_grad()
        result: Tensor = F.cross_entropy(model(x), y)
        result.backward()
        optimizer.step()
        loss = float(result.detach())
        if step % 3 == 2:
            session.report(val=-loss)
    return loss


class _Forced(choose.Chooser):
    """A chooser that takes the last of the kernels that are allowed: never the dense one where there is another."""

    def best(self, problem: Any, allowed: tuple[str, ...], compute: Any) -> str:
        return allowed[-1]


@pytest.fixture(params=["torch's kernels", "fast kernels"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products go to torch's kernels; or none is small, and zeros are skipped and operands rounded."""
    if request.param == "fast kernels":
        monkeypatch.setattr(dispatch, "SMALL", 0)
        monkeypatch.setattr(program, "SMALL", 0)
        monkeypatch.setattr(choose, "chooser", _Forced)


def consistent(flops: Flops, executed_calls: bool) -> None:
    """What must hold of any count, whatever ran."""
    products: list[Product] = [flops.forward, flops.input_grad, flops.weight_grad]
    for product in products:
        assert 0 <= product.needed <= product.dense * (1 + 1e-9)
        assert 0 <= product.discounted <= product.executed * (1 + 1e-9)
        assert product.executed <= product.dense * (1 + 1e-9)
    assert 0 <= flops.needed <= flops.dense + flops.overhead
    assert 0 <= flops.discounted <= flops.executed
    assert (flops.executed > 0) is executed_calls


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda pair: "+".join(f"{name}.{setting}" for name, setting in pair)
)
def test_order_means_nothing_and_counts_add_up(pair: tuple[tuple[str, str], tuple[str, str]]) -> None:
    """Both orders train to the same bits and count the same; what cannot work together is refused when attaching."""
    ends = []
    for order in (pair, pair[::-1]):
        model = seeded(net)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        methods = [SETTINGS[name][setting]() for name, setting in order]
        if frozenset(pair) in REFUSED:
            with pytest.raises(OptionError, match="`only` and `skip` choose layers"):
                rg.attach(model, methods, seed=1)
            after = model.state_dict()
            assert after.keys() == before.keys()
            continue
        session = rg.attach(model, methods, seed=1)
        steps(model, session, torch.optim.Adam(model.parameters(), lr=3e-3), 0, 5)
        consistent(session.flops(), executed_calls=True)
        ends.append((model.state_dict(), session.summary().to_dict(), session.state_dict()["layers"]))
    if ends:
        (one, counts, layers), (other, counts_too, layers_too) = ends
        assert counts == counts_too
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
        assert [s["kernels"] for s in layers.values()] == [s["kernels"] for s in layers_too.values()]


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_together_they_train_fold_and_resume(names: tuple[str, ...]) -> None:
    """The loss falls, the folded model computes the same, and a resumed run ends in the same bits."""

    def start() -> tuple[nn.Module, rg.Session, torch.optim.Optimizer]:
        model = seeded(net)
        session = rg.attach(model, [METHODS[name]() for name in names], seed=1)
        return model, session, torch.optim.Adam(model.parameters(), lr=3e-3)

    model, session, optimizer = start()
    acting = {name for row in session.plan.rows for name in row.methods}
    assert acting == set(names)
    first = steps(model, session, optimizer, 0, 1)
    last = steps(model, session, optimizer, 1, 17)
    assert last < 0.8 * first
    consistent(session.flops(), executed_calls=True)

    other, resumed, second = start()
    steps(other, resumed, second, 0, 7)
    states = [part.state_dict() for part in (other, second, resumed)]
    again, fresh, third = start()
    for part, state in zip((again, third, fresh), states, strict=True):
        part.load_state_dict(state)
    steps(again, fresh, third, 7, 11)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key

    model.eval()
    x = batch((5, 3, 6, 6))
    torch.testing.assert_close(session.fold().eval()(x), model(x), rtol=1e-4, atol=1e-5)
