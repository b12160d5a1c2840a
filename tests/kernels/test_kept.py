"""Rows and columns of δ̃ that are zero throughout leave dense products, and nothing else changes."""

import pytest
import torch
from torch import Tensor

from retrograde.kernels import choose, cpu_kept, kept, reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.kept import COMPACT

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


class Compacts(choose.Chooser):
    """A machine on which it is the fastest wherever it is allowed."""

    def best(self, problem: choose.Problem, allowed: tuple[str, ...], compute: object) -> str:
        return allowed[-1]


@pytest.fixture(autouse=True)
def _compacts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "chooser", Compacts)
    monkeypatch.setattr(choose, "fast_precision", lambda name: False)
    monkeypatch.setattr("retrograde.kernels.dispatch.SMALL", 0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def holed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With zeros by themselves, and every third row and every fourth column without anything else."""
    values = random(*shape)
    values[random(*shape, seed=1) < -0.3] = 0
    values[::3] = -0.0
    values[:, 1::4] = 0
    return values.mul(9).round().to(dtype) if dtype == torch.int8 else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (300, 3), (64, 65), (7, 5, 4, 6), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_what_is_found(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    for given in (
        holed(*shape, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        torch.ones(shape, dtype=dtype),
    ):
        turned = last and given.dim() == 4
        values = given.contiguous(memory_format=torch.channels_last) if turned else given
        other = tuple(range(2, values.dim()))
        assert torch.equal(cpu_kept.rows(values), (values != 0).sum((1, *other)) > 0)
        assert torch.equal(cpu_kept.columns(values), (values != 0).sum((0, *other)) > 0)


def test_nothing_is_made_of_few() -> None:
    values = torch.ones(100, 100)
    values[:3] = 0
    values[:, :3] = 0
    assert kept.find(values, None) is None
    values[3] = 0
    found = kept.find(values, None)
    assert found is not None
    assert found.columns is None
    assert found.share == 0.96


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_linear_products(dtype: torch.dtype, turned: bool) -> None:
    step = 0.25 if dtype == torch.int8 else None
    own = torch.float32 if dtype == torch.int8 else dtype
    delta, weight, x = (
        Delta(holed(4, 12, 20, dtype=dtype), step),
        random(20, 64).to(own),
        random(4, 12, 64).to(own),
    )
    delta.values[:, ::2] = 0
    if turned:
        weight = weight.T.contiguous().T
    products = Products(delta, "int8")
    of_input, of_weight = products.linear_input_grad(weight, x.shape), products.linear_weight_grad(x)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(own, 1e-5)
    for work, expected in (
        (of_input, reference.linear_input_grad(delta, weight, x.shape)),
        (of_weight, reference.linear_weight_grad(delta, x)),
    ):
        assert work.kernel == COMPACT
        assert work.value.shape == expected.shape
        assert work.value.dtype == own
        torch.testing.assert_close(work.value, expected, rtol=tolerance, atol=tolerance)
        dense = 2 * delta.values.numel() * 64
        assert work.needed == pytest.approx(dense * delta.nonzero_share)
        assert work.needed <= work.executed < 0.6 * dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_convolutions(dtype: torch.dtype, last: bool, groups: int, dimensions: int) -> None:
    step = 0.25 if dtype == torch.int8 else None
    own = torch.float32 if dtype == torch.int8 else dtype
    sides = (9, 10)[:dimensions]
    x, weight = random(6, 4, *sides).to(own), random(8, 4 // groups, *(3,) * dimensions).to(own)
    geometry = Geometry(*((one,) * dimensions for one in (2, 1, 1)), False, (0,) * dimensions, groups)
    z = (torch.conv1d if dimensions == 1 else torch.conv2d)(x, weight, None, 2, 1, 1, groups)
    values = holed(*z.shape, dtype=dtype)
    if last and dimensions == 2:
        x, values = (t.contiguous(memory_format=torch.channels_last) for t in (x, values))
    delta = Delta(values, step)
    products = Products(delta)
    tolerance = 0.05 if own == torch.bfloat16 else 1e-4
    for work, expected in (
        (
            products.convolution_input_grad(weight, x.shape, geometry),
            reference.convolution_input_grad(delta, weight, x.shape, geometry),
        ),
        (
            products.convolution_weight_grad(x, weight, geometry),
            reference.convolution_weight_grad(delta, x, weight, geometry),
        ),
    ):
        assert work.kernel == COMPACT
        torch.testing.assert_close(work.value, expected, rtol=tolerance, atol=tolerance)
        assert work.needed <= work.executed


def test_a_gradient_without_anything() -> None:
    delta, weight, x = Delta(torch.zeros(6, 5)), random(5, 7), random(6, 7)
    products = Products(delta)
    assert torch.equal(products.linear_input_grad(weight, (6, 7)).value, torch.zeros(6, 7))
    assert torch.equal(products.linear_weight_grad(x).value, torch.zeros(5, 7))
    kernel, images = random(4, 3, 3, 3), random(2, 3, 5, 5)
    geometry = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    products = Products(Delta(torch.zeros(2, 4, 5, 5)))
    assert torch.equal(
        products.convolution_input_grad(kernel, images.shape, geometry).value, torch.zeros_like(images)
    )
    assert torch.equal(
        products.convolution_weight_grad(images, kernel, geometry).value, torch.zeros_like(kernel)
    )


def test_a_gradient_that_is_negated_lazily() -> None:
    values = torch._neg_view(holed(64, 65))
    assert values.is_neg()
    assert torch.equal(cpu_kept.rows(values), (values != 0).any(1))
    assert torch.equal(cpu_kept.columns(values), (values != 0).any(0))
    weight = random(65, 8)
    work = Products(Delta(values)).linear_input_grad(weight, (64, 8))
    torch.testing.assert_close(work.value, values @ weight)
