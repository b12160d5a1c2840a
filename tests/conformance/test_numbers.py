"""Every method where numbers and shapes are unusual: as plain training, never NaN where plain training has none."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from retrograde.engine.slots import Method

METHODS: dict[str, Method] = {
    "dither": rg.Dither(),
    "dither-int8": rg.Dither(forward="int8", target_sparsity=0.8),
    "deepfocus": rg.DeepFocus(warmup=1),
    "deepfocus-bfloat16": rg.DeepFocus(warmup=1, low="bfloat16", unbiased=True),
    "decorrelate": rg.Decorrelate(rank=3, every=2),
    "decorrelate-full": rg.Decorrelate(mode="full", every=1),
    "decorrelate-precondition": rg.Decorrelate(mode="precondition", rank=3, every=2),
    "perforate": rg.Perforate(where="*", period=2),
    "perforated": rg.Perforate(rule="perforated", where="*", period=2, candidates=2),
    "spectral": rg.Spectral(3, warmup=2, every=2, skip_head=False),
    "spectral-both": rg.Spectral(
        3, side="both", update="lie", warmup=2, every=2, skip_head=False, decay=1e-3
    ),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(12, 16, 1), nn.Tanh(), nn.Conv2d(16, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 9, 3)
    )


def run(
    make: Callable[[], nn.Module],
    method: Method | None,
    batch: Callable[[int], Tensor],
    rate: float = 0.05,
    at: Callable[[nn.Module, int], Any] = lambda model, step: None,
    steps: int = 10,
) -> tuple[nn.Module, Any]:
    """Train on ``batch(step)``; `at` may change the model before a step."""
    torch.manual_seed(0)
    model = make()
    session = None if method is None else rg.attach(model, method, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.errors.RetrogradeWarning)
        for step in range(steps):
            at(model, step)
            torch.manual_seed(step)
            model(
                batch(step).to(next(model.parameters()).dtype)
            ).float().square().mean().nan_to_num().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, session


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("name", METHODS)
def test_cast_after_attaching(name: str, make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """What a method has learnt follows the model's precision, there and back."""
    shape = (8, 12) if make is mlp else (8, 12, 3, 3)

    def cast(model: nn.Module, step: int) -> None:
        if step in (3, 7):
            model.to(dtype if step == 3 else torch.float32)
            for p in model.parameters():
                p.grad = None

    plain, _ = run(make, None, lambda step: torch.randn(shape), at=cast)
    model, session = run(make, METHODS[name], lambda step: torch.randn(shape), at=cast)
    assert finite(plain)
    assert finite(model)
    session.load_state_dict(session.state_dict())
    session.metrics()


@pytest.mark.parametrize("size", [1e-20, 1e12, 1e18])
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("name", METHODS)
def test_inputs_of_any_size(name: str, make: Callable[[], nn.Module], size: float) -> None:
    """Timestamps in nanoseconds are inputs, too."""
    shape = (8, 12) if make is mlp else (8, 12, 3, 3)
    rate = 1e-3 / max(size, 1.0)
    assert finite(run(make, None, lambda step: torch.randn(shape) * size, rate)[0])
    model, session = run(make, METHODS[name], lambda step: torch.randn(shape) * size, rate)
    assert finite(model)
    session.metrics()


@pytest.mark.parametrize("sizes", [(0,), (8, 0, 8), (1,)], ids=str)
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("name", METHODS)
def test_batches_of_any_size(name: str, make: Callable[[], nn.Module], sizes: tuple[int, ...]) -> None:
    """Empty ones, which a mask may leave, and single examples."""

    def batch(step: int) -> Tensor:
        size = sizes[step % len(sizes)]
        return torch.randn((size, 12) if make is mlp else (size, 12, 3, 3))

    model, session = run(make, METHODS[name], batch, at=lambda model, step: None)
    assert finite(model)
    session.metrics()
    str(session.summary())


@pytest.mark.parametrize("name", METHODS)
def test_channels_last(name: str) -> None:
    """Where a kernel of 1×1 lies both ways, the layout of memory changes nothing but rounding."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, _ = run(
            lambda layout=layout: cnn().to(memory_format=layout),
            METHODS[name],
            lambda step, layout=layout: torch.randn(8, 12, 3, 3).to(memory_format=layout),
            steps=4,
        )
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", METHODS)
def test_layers_without_features(name: str) -> None:
    """They are left plain, by name; a model of nothing else has nothing to attach."""
    for shape in ((0, 5), (5, 0)):
        with pytest.raises(rg.errors.NoEffectError, match="weight without entries"):
            rg.attach(nn.Linear(*shape), METHODS[name])

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 4))

    model, session = run(make, METHODS[name], lambda step: torch.randn(8, 12))
    assert finite(model)
    assert [row.status for row in session.plan.rows] == ["attached", "left", "left", "attached"]
    str(session.summary())
