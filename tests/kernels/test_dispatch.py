"""What a call is dithered to, whatever its size, and what its products are counted as."""

import math

import pytest
import torch
from torch import Tensor

from retrograde.kernels import dispatch, reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.work import DISCOUNTS, discount
from retrograde.maths.philox import mix_key

KEYS = (0, 2**63, mix_key(1, 2))
SIZES = [(1,), (3,), (7, 13), (4095,), (4096,), (4097,), (64, 65), (2, 3, 5, 7), (331, 307)]
PLAIN = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Dithering: small gradients in one call, without levels.


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_small_gradients_are_dithered_as_large_ones(shape: tuple[int, ...], bits: int, scale: float) -> None:
    """Step, noise, levels, zeros and largest level of both ways are the same, bit for bit."""
    delta = normal(shape).relu() * 1e-3 - 1e-5
    delta[..., 0] = 0.0
    for key in KEYS:
        of_small, of_large = Delta(delta), Delta(delta)
        small = dispatch.dithered(of_small, scale, bits, key, small=True)
        large = dispatch.dithered(of_large, scale, bits, key, small=False)
        assert small.step == pytest.approx(large.step, rel=1e-12)
        assert (small.largest, small.finite) == (large.largest, large.finite)
        if len(delta.flatten()) > 1:
            assert torch.equal(small.delta.dense(torch.float32), large.delta.dense(torch.float32))
            assert large.delta.step == large.step
        assert small.delta.step is None
        assert small.delta.quantised == large.delta.quantised == bool(large.step)
        assert small.delta.zeros == large.delta.zeros == int((large.delta.values == 0).sum())
        assert of_small.counted == of_large.counted == int((delta == 0).sum())


def test_small_gradients_in_any_layout() -> None:
    """Noise follows the entries' row-major numbers; the result lies in memory as the gradient does."""
    delta = normal((2, 3, 4, 5))
    expected = dispatch.dithered(Delta(delta), 1.0, 8, 7, small=True).delta.values
    last = delta.contiguous(memory_format=torch.channels_last)
    found = dispatch.dithered(Delta(last), 1.0, 8, 7, small=True).delta.values
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    turned = delta.transpose(1, 3)
    whole = dispatch.dithered(Delta(turned.contiguous()), 1.0, 8, 7, small=True).delta.values
    assert torch.equal(dispatch.dithered(Delta(turned), 1.0, 8, 7, small=True).delta.values, whole)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_cannot_be_dithered_is_passed_on(bad: float | None, small: bool) -> None:
    """A gradient that holds no finite numbers, or does not vary, comes back as the very object."""
    delta = Delta(torch.full((40, 30), 0.25))
    if bad is not None:
        delta.values[3, 4] = bad
    found = dispatch.dithered(delta, 1.0, 8, 1, small=small)
    assert found.delta is delta
    assert found.step == 0.0
    assert found.finite == (bad is None)


def test_unbounded_levels_and_other_dtypes_are_never_small() -> None:
    for values, bits in (
        (normal((8, 8)), None),
        (normal((8, 8)).double(), 8),
        (normal((8, 8)).bfloat16(), 8),
    ):
        found = dispatch.dithered(Delta(values), 1.0, bits, 3, small=True)
        assert found.delta.step == found.step
        levels = reference.nsd(values, found.step, 3, bits)
        assert torch.equal(found.delta.values, levels)


@pytest.mark.parametrize("factor", [1e-36, 1e-6, 1.0, 1e30])
def test_one_call_statistics(factor: float) -> None:
    """The step is s · std, widened to reach the peak, over fourteen orders of magnitude."""
    delta = normal((64, 130)) * factor
    std, peak = float(delta.double().std(correction=0)), float(delta.abs().max())
    found = dispatch.dithered(Delta(delta), 1.0, 8, 0, small=True)
    assert found.step == pytest.approx(std, rel=1e-6)
    widened = dispatch.dithered(Delta(delta), 1e-3, 8, 0, small=True)
    assert widened.step == pytest.approx(peak / 127, rel=1e-6)
    assert widened.largest == 127
    assert float((widened.delta.values - delta).abs().max()) <= widened.step * (1 + 1e-5)


# Zeros, counted and assumed.


def test_zeros_are_counted_once() -> None:
    """A count is kept: what is written into the tensor afterwards does not change it."""
    delta = Delta(torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert delta.count() == 2
    delta.values.zero_()
    assert delta.count() == delta.zeros == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [100, 1 << 15, (1 << 15) + 1])
def test_counts(dtype: torch.dtype, size: int) -> None:
    """Below and above the size from which a kernel counts."""
    values = (normal((size,)) * 3).relu().to(dtype)
    assert Delta(values).count() == int((values == 0).sum())


def test_share_of_nonzeros() -> None:
    """By the count where there is one, by what is assumed where there is none."""
    delta = Delta(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    delta.assumed = 0.5
    assert delta.nonzero_share == 0.5
    assert delta.counted is None
    delta.count()
    assert delta.nonzero_share == 0.25
    empty = Delta(torch.ones(0, 3))
    assert empty.count() == 0
    assert empty.nonzero_share == 0.0


# What products are counted as.


def test_discount_is_the_least() -> None:
    assert discount() == discount(None, None) == 1.0
    assert discount("bfloat16", None) == 0.5
    assert discount("bfloat16", "int8") == 0.25
    assert DISCOUNTS["float32"] == DISCOUNTS["float64"] == 1.0


@pytest.mark.parametrize(
    ("dtype", "rounded", "factor"),
    [
        (torch.float32, None, 1.0),
        (torch.float32, "bfloat16", 0.5),
        (torch.float32, "int8", 0.25),
        (torch.float64, "int8", 0.25),
        (torch.bfloat16, None, 0.5),
        (torch.bfloat16, "bfloat16", 0.5),
        (torch.bfloat16, "int8", 0.25),
        (torch.float16, None, 0.5),
    ],
)
def test_work_of_the_reference(dtype: torch.dtype, rounded: str | None, factor: float) -> None:
    """Half the entries of δ̃ are zero: half is needed, all is executed, at the least precision of the operands."""
    values = torch.ones(6, 4, dtype=torch.int8)
    values[:, ::2] = 0
    delta = Delta(values, 0.5)
    delta.count()
    products = Products(delta, rounded=rounded)
    weight, x = torch.ones(4, 3, dtype=dtype), torch.ones(6, 3, dtype=dtype)
    for work, flops in (
        (products.linear_input_grad(weight, (6, 3)), 2 * 6 * 4 * 3),
        (products.linear_weight_grad(x), 2 * 6 * 4 * 3),
    ):
        assert (work.kernel, work.needed, work.executed) == (reference.NAME, flops / 2, flops)
        assert work.discounted == factor * flops
    values = torch.ones(2, 4, 5, 5, dtype=torch.int8)
    values[:, :, :, 0] = 0
    delta = Delta(values, 0.5)
    delta.count()
    products = Products(delta, rounded=rounded)
    weight, x = torch.ones(4, 3, 3, 3, dtype=dtype), torch.ones(2, 3, 5, 5, dtype=dtype)
    flops = 2 * 2 * 4 * 25 * 27
    for work in (
        products.convolution_weight_grad(x, weight, PLAIN),
        products.convolution_input_grad(weight, x.shape, PLAIN),
    ):
        assert (work.kernel, work.executed) == (reference.NAME, flops)
        assert work.needed == pytest.approx(0.8 * flops)
        assert work.discounted == factor * flops


def test_work_of_8_bit_operands() -> None:
    """A quantised operand counts in the dtype that it stands for, unless it was said to be rounded."""
    delta = Delta(torch.ones(6, 4, dtype=torch.int8), 0.5)
    operand = Quantised(torch.ones(6, 3, dtype=torch.int8), torch.ones(3), torch.float32)
    exact, low = Products(delta), Products(delta, rounded="int8")
    assert exact.linear_weight_grad(operand).discounted == 2 * 6 * 4 * 3
    assert low.linear_weight_grad(operand).discounted == 2 * 6 * 4 * 3 / 4


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("joint", [True, False])
def test_something_narrower_is_multiplied_alone(joint: bool, wanted: int) -> None:
    """dx comes from the weight that it is asked with, whatever stood in its place for dW."""
    delta = Delta(torch.randint(-3, 4, (2, 4, 5, 5), dtype=torch.int8), 0.25)
    weight, x = normal((4, 3, 3, 3)), normal((2, 3, 5, 5), 1)
    expected_dw = reference.convolution_weight_grad(delta, x, weight, PLAIN)
    expected_dx = reference.convolution_input_grad(delta, weight, x.shape, PLAIN)
    products = Products(delta, wanted=wanted)
    if not joint:
        # A projected input of one channel: a weight of no meaning takes part.
        products.convolution_weight_grad(x[:, :1], torch.full((4, 1, 3, 3), math.nan), PLAIN, joint=False)
    else:
        found = products.convolution_weight_grad(x, weight, PLAIN)
        torch.testing.assert_close(found.value, expected_dw)
    torch.testing.assert_close(products.convolution_input_grad(weight, x.shape, PLAIN).value, expected_dx)


def test_small_gradients_whose_sign_is_still_to_be_turned() -> None:
    delta = normal((8, 5))
    turned = torch._neg_view(-delta)
    assert turned.is_neg()
    expected = dispatch.dithered(Delta(delta), 1.0, 8, 7, small=True).delta.values
    assert torch.equal(dispatch.dithered(Delta(turned), 1.0, 8, 7, small=True).delta.values, expected)
