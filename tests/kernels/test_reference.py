"""Reference kernels: products of levels are products of the dense δ̃, in every dtype and geometry."""

import pytest
import torch
import torch.nn.functional as F

from retrograde.kernels import reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry


def quantised(shape: tuple[int, ...]) -> Delta:
    return Delta(torch.randint(-127, 128, shape, dtype=torch.int8), 0.03)


def test_delta() -> None:
    """Dense values and zeros of both kinds; making a dense tensor leaves the levels alone."""
    delta = Delta(torch.tensor([0, 2, -3], dtype=torch.int8), 0.5)
    assert delta.dense(torch.float32).tolist() == [0.0, 1.0, -1.5]
    assert delta.values.tolist() == [0, 2, -3]
    assert delta.zeros == 1
    floating = Delta(torch.tensor([0.0, 2.0]), 0.5)
    assert floating.dense(torch.float32).tolist() == [0.0, 1.0]
    assert floating.values.tolist() == [0.0, 2.0]
    assert Delta(torch.tensor([0.0, 2.0])).dense(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("lead", [(), (7,), (3, 4), (0,), (2, 0, 3)])
def test_linear(lead: tuple[int, ...]) -> None:
    """dx = δ̃ W and dW = δ̃ᵀ x for any leading dimensions."""
    delta, weight, x = quantised((*lead, 5)), torch.randn(5, 6), torch.randn(*lead, 6)
    dense = delta.dense(torch.float32)
    dx = reference.linear_input_grad(delta, weight, x.shape)
    torch.testing.assert_close(dx, dense @ weight, rtol=1e-5, atol=1e-5)
    assert dx.shape == x.shape
    dw = reference.linear_weight_grad(delta, x)
    torch.testing.assert_close(
        dw, torch.einsum("no,ni->oi", dense.reshape(-1, 5), x.reshape(-1, 6)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(transposed: bool, groups: int) -> None:
    """Both gradients equal autograd's of a convolution with the dense δ̃."""
    g = Geometry((2, 1), (1, 0), (1, 2), transposed, (1, 0) if transposed else (0, 0), groups)
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    shape = (4, 6 // groups, 3, 2) if transposed else (6, 4 // groups, 3, 2)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if transposed:
        z = F.conv_transpose2d(x, weight, None, g.stride, g.padding, g.output_padding, groups, g.dilation)
    else:
        z = F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, groups)
    delta = quantised(tuple(z.shape))
    expected = torch.autograd.grad(z, (x, weight), delta.dense(torch.float64))
    dx = reference.convolution_input_grad(delta, weight.detach(), x.shape, g)
    dw = reference.convolution_weight_grad(delta, x.detach(), weight.detach(), g)
    torch.testing.assert_close(dx, expected[0])
    torch.testing.assert_close(dw, expected[1])


def test_bfloat16_levels_are_exact() -> None:
    """Levels up to 127 survive bfloat16: only the products round."""
    delta = Delta(torch.arange(-127, 128, dtype=torch.int8).unsqueeze(1), 0.1)
    dw = reference.linear_weight_grad(delta, torch.eye(255, dtype=torch.bfloat16))
    assert torch.equal(dw.float(), (torch.arange(-127, 128).bfloat16() * 0.1).unsqueeze(0).float())


def test_float16_weight_gradient_does_not_overflow() -> None:
    """Many rows of small δ: the weight gradient fits into float16, so a product of whole levels must not overflow."""
    n = 200_000
    delta = Delta(torch.ones(n, 1, dtype=torch.int8), 1e-3)
    dw = reference.linear_weight_grad(delta, torch.ones(n, 1, dtype=torch.float16))
    assert float(dw) == pytest.approx(200.0, rel=1e-2)


@pytest.mark.parametrize("step", [1e-6, 1e-9])
def test_float16_levels_may_be_beyond_float16(step: float) -> None:
    """Unbounded levels of a small step: a level, or the step, does not fit into float16 where their product does."""
    delta = Delta(torch.tensor([[0.5 / step]]), step)
    assert float(delta.dense(torch.float16)) == pytest.approx(0.5, rel=1e-3)
    weight = torch.full((1, 1), 2.0, dtype=torch.float16)
    assert float(reference.linear_input_grad(delta, weight, (1, 1))) == pytest.approx(1.0, rel=1e-3)
    assert float(reference.linear_weight_grad(delta, weight)) == pytest.approx(1.0, rel=1e-3)


def test_float64_levels_stay_exact() -> None:
    delta = Delta(torch.tensor([3], dtype=torch.int8), 0.1)
    assert delta.dense(torch.float64).item() == 3 * 0.1


def test_nsd_takes_any_layout() -> None:
    """Noise follows the elements' row-major numbers, not their places in memory."""
    delta = torch.randn(6, 8)
    assert torch.equal(reference.nsd(delta, 0.7, 3), reference.nsd(delta.T.contiguous().T, 0.7, 3))
    image = torch.randn(2, 3, 4, 5)
    assert torch.equal(
        reference.nsd(image, 0.7, 3), reference.nsd(image.to(memory_format=torch.channels_last), 0.7, 3)
    )
