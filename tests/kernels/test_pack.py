"""Activations in a few bits: unbiased, the same by every kernel, in any layout; and signs in a bit each."""

import pytest
import torch
from torch import Tensor

from retrograde.kernels import cpu_pack, pack

KEY = 12345678901234567890


def packed(x: Tensor, bits: int, key: int = 7) -> Tensor:
    return pack.unpack(*pack.pack(x, torch.tensor([key]), bits), x.shape, x.dtype)


@pytest.mark.parametrize("bits", pack.BITS)
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 5000, 100_000])
def test_kernel_and_reference_agree(size: int, bits: int) -> None:
    """Levels bit for bit, and values to rounding; b bits and a quarter for each entry of whole groups."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    fast = cpu_pack.pack(x, KEY, bits)
    plain = pack._pack_in_torch(x, KEY, bits)
    assert torch.equal(fast[0], plain[0])
    torch.testing.assert_close(fast[1], plain[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        cpu_pack.unpack(*fast, size), pack._unpack_in_torch(*plain)[:size], rtol=1e-5, atol=1e-6
    )
    groups = -(-size // pack.GROUP)
    assert sum(t.nbytes for t in fast) == groups * (pack.GROUP * bits // 8 + 8)


@pytest.mark.parametrize("bits", pack.BITS)
def test_unbiased(bits: int) -> None:
    """The mean over 2,000 draws is x within 5 σ everywhere, and no error is larger than a step."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)) + 3
    draws = torch.stack([packed(x, bits, key) for key in range(2000)])
    sigma = draws.std(0) / 2000**0.5
    assert float(sigma.max()) > 0
    assert bool(((draws.mean(0) - x).abs() <= 5 * sigma + 1e-5).all())
    assert float((draws - x).abs().max()) <= float(x.max() - x.min()) / (2**bits - 1) * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (4, 5, 6), (2, 8, 3, 5)])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = packed(x, 8)
    assert found.shape == x.shape
    assert found.dtype == dtype
    spread = float(x.max() - x.min())
    assert float((found - x).double().abs().max()) <= spread / 255 + 0.02 * float(x.abs().max())


def test_calls_of_one_step_draw_apart() -> None:
    """By what they are given: the same again is the same, which checkpointing needs."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    noise = [packed(x + shift, 8) - (x + shift) for shift in (0.0, 0.0, 1.0)]
    assert torch.equal(noise[0], noise[1])
    assert abs(float(torch.corrcoef(torch.stack((noise[0], noise[2])))[0, 1])) < 0.1


def test_channels_last_stays_so() -> None:
    """Packed in its own order, and given back in it."""
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1))
    last = x.contiguous(memory_format=torch.channels_last)
    found = packed(last, 8)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, packed(last.movedim(1, -1).contiguous(), 8).movedim(-1, 1))
    strided = x[:, ::2]
    torch.testing.assert_close(packed(strided, 8), strided, rtol=0, atol=0.05)


@pytest.mark.parametrize("bits", pack.BITS)
def test_a_group_that_does_not_vary_is_exact(bits: int) -> None:
    x = torch.cat((torch.full((256,), 3.25), torch.zeros(256), torch.full((10,), -1e-30)))
    assert torch.equal(packed(x, bits), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 100, 511])
def test_what_is_not_finite_is_seen(value: float, at: int) -> None:
    """By a GradScaler, say; other groups are as they were."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(2))
    x[at] = value
    for found in (
        packed(x, 4),
        pack._unpack_in_torch(*pack._pack_in_torch(x, 7, 4)),
    ):
        group = at // pack.GROUP
        assert not bool(found[group * 256 : (group + 1) * 256].isfinite().any())
        assert bool(found[(1 - group) * 256 : (2 - group) * 256].isfinite().all())
        assert bool(found[512:].isfinite().all())


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 256, 4097])
def test_signs(size: int) -> None:
    """Eight to a byte; zeros of both signs are not positive, and NaN passes, as it does torch's."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(3))
    x[::5] = 0.0
    x[1::5] = -0.0
    x[2::11] = float("nan")
    delta = torch.randn(size, generator=torch.Generator().manual_seed(4))
    bits = pack.signs(x)
    assert bits.numel() == -(-size // 256) * 32
    assert torch.equal(pack.where_positive(delta, bits, False), torch.where(x <= 0, 0, delta))


def test_signs_of_images() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    last = x.contiguous(memory_format=torch.channels_last)
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    for d in (delta, delta.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(pack.where_positive(d, pack.signs(last), True), torch.where(x > 0, d, 0))
        assert torch.equal(pack.where_positive(d, pack.signs(x), False), torch.where(x > 0, d, 0))
    half = x.bfloat16()
    assert torch.equal(
        pack.where_positive(delta.bfloat16(), pack.signs(half), False),
        torch.where(half > 0, delta.bfloat16(), 0),
    )


@pytest.mark.parametrize("bits", pack.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (-1.0, 1e-3), (0.9, 1.0)])
def test_ranges_up_to_the_largest_number(ends: tuple[float, float], dtype: torch.dtype, bits: int) -> None:
    """The range, or its last level, may be beyond float32: entries come back within a step, and unbiased."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    x = (torch.linspace(*ends, 600, dtype=torch.float64) * largest).to(dtype)
    x[[0, 255, 256, 599]] = torch.tensor([*ends, *ends], dtype=torch.float64).mul(largest).to(dtype)
    for found in (
        packed(x, bits),
        pack._unpack_in_torch(*pack._pack_in_torch(x.float(), 7, bits))[:600].to(dtype),
    ):
        assert bool(found.isfinite().all())
        error = (found.double() - x.double()) / largest
        width = (ends[1] - ends[0]) / (2**bits - 1)
        assert float(error.abs().max()) <= width + torch.finfo(dtype).eps
        assert abs(float(error.mean())) < width / 5
    fast, plain = cpu_pack.pack(x.float(), KEY, bits), pack._pack_in_torch(x.float(), KEY, bits)
    assert torch.equal(fast[0], plain[0])
