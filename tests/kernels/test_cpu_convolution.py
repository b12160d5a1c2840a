"""Zero-skipping convolution gradients equal the dense ones, in every geometry and layout, on any number of threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from retrograde.kernels import cpu_convolution, reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry

STEP = 0.1


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def geometry(
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Geometry:
    return Geometry(stride, padding, dilation, False, (0, 0), groups)


def problem(
    x_shape: tuple[int, int, int, int],
    outputs: int,
    kernel: tuple[int, int],
    g: Geometry,
    density: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, input and weight."""
    x, weight = torch.randn(x_shape), torch.randn(outputs, x_shape[1] // g.groups, *kernel)
    shape = torch.nn.functional.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups).shape
    levels = torch.randint(1, 128, shape) * (1 - 2 * torch.randint(0, 2, shape))
    return (levels * (torch.rand(shape) < density)).to(torch.int8), x, weight


def products(
    values: Tensor, step: float | None, x: Tensor, weight: Tensor, g: Geometry
) -> tuple[Tensor, Tensor]:
    assert cpu_convolution.supports(values, weight, tuple(x.shape), g)
    sparse = cpu_convolution.compact(values, step, g.groups)
    dx = cpu_convolution.convolution_input_grad(sparse, weight, tuple(x.shape), g)
    return dx, cpu_convolution.convolution_weight_grad(sparse, x, tuple(weight.shape), g)


def check(values: Tensor, step: float | None, x: Tensor, weight: Tensor, g: Geometry) -> None:
    dx, dw = products(values, step, x, weight, g)
    delta = Delta(values, step)
    expected_dx = reference.convolution_input_grad(delta, weight, x.shape, g)
    expected_dw = reference.convolution_weight_grad(delta, x, weight, g)
    for ours, expected in ((dx, expected_dx), (dw, expected_dw)):
        assert ours.dtype == torch.float32
        largest = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * largest, check_stride=False)


@pytest.mark.parametrize(
    ("x_shape", "outputs", "kernel", "g"),
    [
        pytest.param((2, 16, 8, 8), 32, (3, 3), geometry(padding=(1, 1)), id="3x3"),
        pytest.param((3, 130, 5, 5), 20, (1, 1), geometry(), id="1x1"),
        pytest.param((2, 40, 9, 9), 6, (1, 1), geometry(stride=(2, 2)), id="1x1 strided"),
        pytest.param((1, 3, 13, 7), 64, (5, 5), geometry((2, 2), (2, 2)), id="5x5 strided, batch 1"),
        pytest.param((2, 5, 11, 13), 7, (3, 2), geometry((2, 3), (1, 0)), id="3x2, all unequal"),
        pytest.param((2, 5, 11, 13), 7, (3, 2), geometry((2, 3), (1, 0), (1, 2)), id="dilated in width"),
        pytest.param((2, 17, 11, 13), 19, (3, 3), geometry((1, 1), (2, 1), (2, 1)), id="dilated in height"),
        pytest.param((3, 12, 9, 17), 8, (3, 3), geometry((1, 2), (2, 3), (2, 3), 4), id="groups, dilated"),
        pytest.param((2, 64, 7, 7), 32, (3, 3), geometry((1, 1), (1, 1), (1, 1), 2), id="groups"),
        pytest.param((2, 6, 8, 8), 6, (3, 3), geometry((1, 1), (1, 1), (1, 1), 6), id="depthwise"),
        pytest.param((1, 4, 5, 6), 3, (3, 3), geometry((1, 1), (4, 5)), id="more padding than kernel"),
        pytest.param((2, 4, 9, 9), 3, (2, 2), geometry((3, 3)), id="input left over"),
        pytest.param((9, 200, 4, 4), 24, (3, 3), geometry(padding=(1, 1)), id="tiles of inputs"),
        pytest.param((2, 8, 40, 40), 80, (3, 3), geometry(padding=(1, 1)), id="blocks of pixels"),
    ],
)
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("delta_last", [False, True])
@pytest.mark.parametrize("x_last", [False, True])
def test_geometries(
    x_shape: tuple[int, int, int, int],
    outputs: int,
    kernel: tuple[int, int],
    g: Geometry,
    floating: bool,
    delta_last: bool,
    x_last: bool,
) -> None:
    values, x, weight = problem(x_shape, outputs, kernel, g)
    if delta_last:
        values, weight = (t.to(memory_format=torch.channels_last) for t in (values, weight))
    if x_last:
        x = x.to(memory_format=torch.channels_last)
    check(values.float() * STEP if floating else values, None if floating else STEP, x, weight, g)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.1])
def test_densities(density: float) -> None:
    """No non-zeros, hardly any, and no zeros."""
    g = geometry(padding=(1, 1))
    check(*_with_step(problem((3, 33, 9, 10), 18, (3, 3), g, density)), g)


def _with_step(operands: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float, Tensor, Tensor]:
    values, x, weight = operands
    return values, STEP, x, weight


def test_any_stride() -> None:
    """Operands that are slices of others."""
    g = geometry(padding=(1, 1))
    values, x, weight = problem((2, 8, 9, 9), 6, (3, 3), g)
    values, x, weight = (torch.stack([t, t], -1)[..., 0] for t in (values, x, weight))
    check(values, STEP, x, weight, g)


def test_order_of_memory() -> None:
    """dx is laid out as δ̃ is."""
    g = geometry(padding=(1, 1))
    values, x, weight = problem((2, 8, 9, 9), 6, (3, 3), g)
    assert products(values, STEP, x, weight, g)[0].is_contiguous()
    dx, _ = products(values.to(memory_format=torch.channels_last), STEP, x, weight, g)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [1, 2])
def test_same_bits_on_any_number_of_threads(threads: None, groups: int) -> None:
    g = geometry(padding=(1, 1), groups=groups)
    values, x, weight = problem((5, 48, 12, 12), 40, (3, 3), g)
    results: list[tuple[Tensor, Tensor]] = []
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        results.append(products(values, STEP, x, weight, g))
    for dx, dw in results[1:]:
        assert torch.equal(dx, results[0][0])
        assert torch.equal(dw, results[0][1])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_numbers_propagate(broken: float) -> None:
    """From δ, to all it meets; from the weight and the input, to the non-zeros they meet."""
    g = geometry(padding=(1, 1))
    levels, x, weight = problem((2, 18, 6, 6), 5, (3, 3), g)
    delta = levels.float()
    delta[1, 2, 3, 3] = broken
    dx, dw = products(delta, None, x, weight, g)
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[1, :, 2:5, 2:5] = True
    assert torch.equal(~dx.isfinite(), touched)
    assert torch.equal(~dw.isfinite().all(dim=3).all(dim=2).all(dim=1), torch.arange(5) == 2)

    delta = torch.zeros_like(delta)
    delta[0, 1, 2, 2] = 1.0
    weight[1, 4, 1, 1] = broken
    weight[2] = broken
    x[0, 3, 2, 2] = broken
    x[1] = broken
    dx, dw = products(delta, None, x, weight, g)
    assert (~dx.isfinite()).nonzero().tolist() == [[0, 4, 2, 2]]
    assert (~dw.isfinite()).nonzero().tolist() == [[1, 3, 1, 1]]


def test_supports() -> None:
    values, weight = torch.zeros(2, 4, 5, 5, dtype=torch.int8), torch.zeros(4, 3, 3, 3)
    shape = (2, 3, 5, 5)
    g = geometry(padding=(1, 1))
    supports = cpu_convolution.supports
    assert supports(values, weight, shape, g)
    assert supports(values.float(), weight, shape, g)
    assert not supports(values.double(), weight, shape, g)
    assert not supports(values, weight.bfloat16(), shape, g)
    assert not supports(values[:0], weight, (0, 3, 5, 5), g)
    assert not supports(values, weight, shape, Geometry((1, 1), (1, 1), (1, 1), True, (0, 0), 1))
    line = Geometry((1,), (1,), (1,), False, (0,), 1)
    assert not supports(values[..., 0], weight[..., 0], (2, 3, 5), line)
