"""Exact skipping: plain training's gradients, fewer of its products."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import retrograde as rg
from retrograde.errors import RetrogradeWarning


class Pooled(nn.Module):
    """A convolution, ReLU, pooling and a linear layer: large enough for a choice of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(x).relu(), 2)
        return self.head(self.second(x).relu().amax((2, 3)))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_those_of_plain_training(last: bool) -> None:
    torch.manual_seed(0)
    plain, x = Pooled(), torch.randn(16, 3, 32, 32)
    if last:
        plain, x = (t.to(memory_format=torch.channels_last) for t in (plain, x))
    model = copy.deepcopy(plain)
    session = rg.attach(model, rg.Exact())
    for found, expected in zip(gradients(model, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    flops = session.flops()
    assert flops.weight_grad.needed < 0.5 * flops.weight_grad.dense
    assert flops.discounted <= flops.executed


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_padding_leaves_the_products(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of δ that are zero throughout are not multiplied, under autocast either."""
    monkeypatch.setattr(
        "retrograde.kernels.choose.Chooser.best", lambda self, problem, allowed, compute: allowed[-1]
    )
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    model, x = copy.deepcopy(plain), torch.randn(8, 64, 256)
    real = (torch.arange(64) < torch.randint(8, 40, (8, 1)))[..., None]
    session = rg.attach(model, rg.Exact())
    found: list[list[Tensor]] = []
    for each in (model, plain):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = (each(x).float() * real).square().mean()
        loss.backward()
        found.append([p.grad for p in each.parameters() if p.grad is not None])
    tolerance = 1e-5 if dtype is None else 0.02
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    for layer in session.metrics()["layers"].values():
        assert layer["kernel_compact"] == 1
    flops = session.flops()
    assert flops.weight_grad.executed == pytest.approx(float(real.float().mean()) * flops.weight_grad.dense)


def test_beside_another_method_it_adds_nothing_and_that_is_said() -> None:
    with pytest.warns(RetrogradeWarning, match="exact adds nothing beside dither: zeros are skipped") as said:
        session = rg.attach(Pooled(), [rg.Exact(), rg.Dither()])
    assert said[0].filename == __file__
    assert {row.methods for row in session.plan.attached} == {("exact", "dither")}
    with pytest.warns(RetrogradeWarning, match="beside dither"):
        rg.make_plan(Pooled(), [rg.Exact(), rg.Dither()])
    rg.attach(Pooled(), {"first": rg.Exact(), "*": rg.Dither()})
    rg.attach(Pooled(), {"first": rg.Exact(), "*": [rg.Exact(), rg.Dither()]})
