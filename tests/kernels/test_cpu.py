"""The numba kernels against plain torch: the same levels bit for bit, the same products but for rounding."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from retrograde.kernels import cpu, cpu_threads, linear, reference
from retrograde.kernels.delta import Delta
from retrograde.maths import dither
from retrograde.maths.philox import mix_key, uniform

KEY = mix_key(1, 2, 3)
SIZES = [(1,), (3,), (7, 13), (4096,), (4097,), (64, 65), (331, 307)]
SHAPES = [(1, 1, 1), (5, 3, 2), (8, 64, 128), (33, 65, 129), (31, 257, 300), (64, 8, 16)]


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(shape: tuple[int, ...], share: float, seed: int = 0) -> Tensor:
    """int8 levels with about `share` zeros."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-127, 128, shape, generator=generator)
    return (levels * (torch.rand(shape, generator=generator) >= share)).to(torch.int8)


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield None
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_levels_are_the_references(shape: tuple[int, ...], bits: int) -> None:
    delta = normal(shape)
    step = 0.7 * float(delta.abs().max()) / dither.largest_level(bits)
    found = cpu.nsd(delta, step, KEY, bits)
    expected = dither.levels(delta, step, uniform(KEY, delta.shape), bits)
    assert torch.equal(found.values, expected)
    assert found.zeros == int((expected == 0).sum())
    assert found.largest == int(expected.abs().max())


def test_levels_of_zeros_and_of_views() -> None:
    assert not cpu.nsd(torch.zeros(70, 70), 1.0, KEY, 8).values.any()
    turned = normal((65, 33)).T
    expected = dither.levels(turned, 0.5, uniform(KEY, turned.shape), 8)
    assert torch.equal(cpu.nsd(turned, 0.5, KEY, 8).values, expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 70, 8, 8), (5, 16, 1, 4), (2, 9, 7, 7)], ids=str)
def test_levels_of_channels_last(shape: tuple[int, ...]) -> None:
    """Every entry has the noise that it has channels first, and nothing is copied on the way where pixels allow it."""
    delta = normal(shape)
    found = cpu.nsd(delta.contiguous(memory_format=torch.channels_last), 0.5, KEY, 8)
    expected = cpu.nsd(delta, 0.5, KEY, 8)
    assert found.values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.values, expected.values)
    assert (found.zeros, found.largest) == (expected.zeros, expected.largest)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("factor", [1e-36, 1e-6, 1.0, 1e30])
def test_statistics(shape: tuple[int, ...], factor: float) -> None:
    delta = normal(shape).relu() * factor
    std = float(delta.double().std(correction=0))
    found = cpu.statistics(delta)
    assert found.std == pytest.approx(std, rel=1e-6, abs=0)
    assert found.peak == float(delta.max())
    assert cpu.count_zeros(delta) == int((delta == 0).sum())


def test_zeros_are_counted_in_any_layout() -> None:
    delta = normal((3, 5, 7, 9)).relu()
    last = delta.contiguous(memory_format=torch.channels_last)
    expected = int((delta == 0).sum())
    assert cpu.count_zeros(last) == cpu.count_zeros(delta.transpose(1, 3)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_zeros_of_every_dtype(dtype: torch.dtype) -> None:
    """Of either sign; what is smaller than any normal number, infinite or no number at all is none."""
    values = torch.arange(-5000, 5000).clamp(-100, 100).to(dtype)
    values[::3] = 0
    if dtype.is_floating_point:
        least = torch.finfo(dtype).smallest_normal / 4
        values[:7] = torch.tensor([-0.0, least, -least, math.inf, -math.inf, math.nan, 0.0], dtype=dtype)
    expected = sum(value == 0 for value in values.tolist())
    assert cpu.count_zeros(values) == expected
    assert Delta(values.repeat(10)).zeros == 10 * expected  # enough of them for the kernel


def test_deviation_of_a_gradient_far_from_zero() -> None:
    delta = normal((90, 97)) * 1e-3 + 10
    assert cpu.statistics(delta).std == pytest.approx(float(delta.double().std(correction=0)), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4500, -1])
def test_what_is_not_finite_shows(bad: float, place: int) -> None:
    delta = normal((9001,))
    delta[place] = bad
    found = cpu.statistics(delta)
    assert not math.isfinite(found.peak)


def check_lists(values: Tensor) -> None:
    """By rows and by columns, against torch."""
    by_rows = cpu.lists(values)
    for found, matrix in ((by_rows, values), (by_rows.transposed(), values.T), (by_rows, values)):
        rows, columns = matrix.nonzero(as_tuple=True)
        size = len(rows)
        ends = (matrix != 0).sum(1).cumsum(0).tolist()
        assert found.start.tolist() == [[0, *ends]]
        assert found.size == size
        assert found.columns == matrix.shape[1]
        assert found.index[:size].tolist() == columns.tolist()
        assert found.value[:size].tobytes() == matrix[rows, columns].float().numpy().tobytes()


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 5), (2, 64), (5, 63), (4, 65), (1, 1000), (300, 1), (0, 7), (7, 0), (150, 700)],
    ids=str,
)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.92, 1.0])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_lists(
    shape: tuple[int, int], share: float, dtype: torch.dtype, threads: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_threads, "_GRAIN", 0)
    values = sparse(shape, share).to(dtype)
    for count in (1, 2):
        torch.set_num_threads(count)
        check_lists(values)


def test_lists_keep_what_is_not_finite_and_no_zero_of_either_sign() -> None:
    values = torch.tensor([[0.0, -0.0, math.nan, 1e-45], [-math.inf, 0.0, -1.0, -0.0]])
    check_lists(values)
    assert cpu.lists(values).size == 4


def test_lists_of_slices() -> None:
    values = sparse((90, 260), 0.8)
    check_lists(values[1::2, 3:-4])
    check_lists(values.T)


def test_lists_where_the_processor_has_none_of_our_instructions() -> None:
    """Other tests of this file, in a process that compiles for the least processor of its kind."""
    tests = "test_lists_of_slices or test_lists_keep_what"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", tests]
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("shape", [(1, 1), (256, 127), (30, 128), (9, 300)], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_dense_operands_of_8_bits(shape: tuple[int, int], half: bool) -> None:
    """Packed as their values, exactly; scales of columns are for the result."""
    m, i = shape
    dense = ((torch.arange(m)[:, None] + torch.arange(i)) % 256 - 128).to(torch.int8)
    picks = cpu.lists(torch.eye(m).to(torch.int8))
    assert torch.equal(cpu.product(picks, cpu.pack(dense, half=half), i, 1.0), dense.float())
    levels = sparse((17, m), 0.8)
    # Sums of whole numbers below 2²⁴ are exact.
    scale, step = normal((i,)).abs(), 0.25
    found = cpu.product(cpu.lists(levels), cpu.pack(dense, half=half), i, step) * scale
    assert torch.equal(found, (levels.float() @ dense.float()) * step * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", linear.KERNELS)
def test_products(shape: tuple[int, int, int], share: float, transposed: bool, kernel: str) -> None:
    a, m, i = shape
    values = sparse((m, a) if transposed else (a, m), share)
    dense = normal((m, i), 1)
    found = linear.run(kernel, values, 0.01, dense, transposed=transposed)
    factor = (values.T if transposed else values).double() * 0.01
    expected = factor @ dense.double()
    # Of what is rounded in each term: twice 2⁻⁹ of a bfloat16 and some in sums, 1/254 of a column's peak in 8 bits.
    terms = factor.abs() @ dense.double().abs()
    peaks = factor.abs().sum(1, keepdim=True) * dense.double().abs().amax(0)
    allowed = {None: 1e-5 * terms, "bfloat16": 2**-7 * terms, "int8": peaks / 250}[
        linear.PRECISION.get(kernel)
    ]
    assert found.shape == (a, i)
    assert found.dtype == torch.float32
    assert bool(((found.double() - expected).abs() <= allowed + 1e-12).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_a_gradient_that_is_no_levels(shape: tuple[int, int, int]) -> None:
    a, m, i = shape
    values = normal((a, m)).relu()
    dense = normal((m, i), 1)
    torch.testing.assert_close(linear.run("skip", values, None, dense), values @ dense)
    other = normal((a, i), 2)
    torch.testing.assert_close(linear.run("skip", values, None, other, transposed=True), values.T @ other)


def test_operands_are_rounded_as_torch_rounds() -> None:
    """A gradient of one level in each row picks rows of the operand, exactly as they were stored."""
    dense = torch.cat([normal((40, 130)), normal((2, 130)) * 1e-40, torch.full((1, 130), math.inf)])
    dense[3, 5] = math.nan
    dense[4, 6] = 1 + 2**-8  # a tie
    picks = torch.eye(len(dense)).to(torch.int8)
    found = linear.run("skip-bfloat16", picks, 1.0, dense)
    torch.testing.assert_close(found, dense.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(linear.run("skip", picks, 1.0, dense), dense, rtol=0, atol=0, equal_nan=True)


def test_torch_keeps_its_threads() -> None:
    """In a process of its own, where numba has not started its threads yet."""
    code = (
        "import torch; torch.set_num_threads(1); from retrograde.kernels import cpu; "
        "cpu.statistics(torch.randn(300, 300)); assert torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_change_nothing(threads: object) -> None:
    delta, dense = normal((300, 400)), normal((400, 500), 1)
    found: list[tuple[Tensor, ...]] = []
    for count in (1, 2):
        torch.set_num_threads(count)
        levels = cpu.nsd(delta, 1.5, KEY, 8)
        lists = cpu.lists(levels.values)
        statistics = torch.tensor([cpu.statistics(delta).std], dtype=torch.float64)
        both = [
            linear.run("skip", levels.values, 1.5, dense, lists=lists),
            linear.run("skip", levels.values, 1.5, normal((300, 77), 2), transposed=True, lists=lists),
        ]
        found.append((levels.values, statistics, *both))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_levels_beyond_32_bits_keep_their_sign() -> None:
    delta = torch.tensor([1e12, -1e12, 3.0])
    assert torch.equal(cpu.nsd(delta, 0.1, 1, 8).values, reference.nsd(delta, 0.1, 1, 8))
