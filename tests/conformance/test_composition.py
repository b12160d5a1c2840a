"""Methods on one model together: every pair, and all five."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrograde as rg
from cases import batch, seeded

METHODS: dict[str, Callable[[], rg.Method]] = {
    "decorrelate": partial(rg.Decorrelate, rank=4, every=2),
    "deepfocus": partial(rg.DeepFocus, warmup=2),
    "dither": partial(rg.Dither, scale=1.0),
    "perforate": partial(rg.Perforate, max_dendrites=1, patience=1, limit=2),
    "spectral": partial(rg.Spectral, rank=4, warmup=1, full_every=3, every=2),
}
SETS = [*itertools.combinations(METHODS, 2), tuple(METHODS)]


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
