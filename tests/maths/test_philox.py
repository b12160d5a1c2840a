"""Philox4x32-7: known answers, uniformity, independence, and no dependence on size or shape."""

import numpy as np
import pytest
import torch
from scipy import stats

from retrograde.maths.philox import mix_key, numbers, philox, uniform


def reference(key: int, counter: int) -> tuple[int, ...]:
    """Philox4x32-7 in unbounded Python integers, after the paper."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def words(key: int, counter: int) -> tuple[int, ...]:
    signed = counter - (1 << 64) if counter >= 1 << 63 else counter
    return tuple(int(w) for w in philox(key, torch.tensor(signed)))


def test_known_answer() -> None:
    """The all-zero vector of Random123's kat_vectors (philox4x32 7)."""
    assert words(0, 0) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert reference(0, 0) == words(0, 0)


def test_against_numpy() -> None:
    """NumPy's Philox is the 64-bit variant, so the check is against integers of unbounded width, at hard values."""
    for key in (1, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0xA4093822299F31D0, 1 << 63):
        for counter in (0, 1, 0xFFFFFFFF, 1 << 32, (1 << 63) + 5, (1 << 64) - 1):
            assert words(key, counter) == reference(key, counter)


@pytest.mark.parametrize("key", [0, 7, mix_key(1, 2, 3), (1 << 64) - 1])
def test_uniform(key: int) -> None:
    """On [0, 1), uniform by Kolmogorov and Smirnov and by 256 cells, with 24 bits that are all used."""
    u = uniform(key, (200_000,))
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert stats.kstest(u.double().numpy(), "uniform").pvalue > 1e-4
    counts = torch.histc(u, 256, 0, 1).numpy()
    assert stats.chisquare(counts).pvalue > 1e-4
    integers = (u.double() * 2**24).long()
    assert torch.equal(integers.double() / 2**24, u.double())
    for bit in range(24):
        share = float(((integers >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / 200_000**0.5, bit


def test_independent_keys() -> None:
    """Streams of neighbouring keys, and neighbouring elements of one stream, do not correlate."""
    n = 100_000
    streams = [uniform(key, (n,)).double().numpy() for key in (0, 1, 1 << 32, mix_key(0), mix_key(1))]
    for i, a in enumerate(streams):
        for b in streams[i + 1 :]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5
        for lag in (1, 2, 3, 4, 8):
            assert abs(np.corrcoef(a[:-lag], a[lag:])[0, 1]) < 5 / n**0.5


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 4095, 4097])
def test_prefix(size: int) -> None:
    """Element i is the same whatever the tensor's size and shape."""
    whole = uniform(42, (5000,))
    assert torch.equal(uniform(42, (size,)), whole[:size])


def test_shape_and_blocks() -> None:
    """Row-major numbering; the inner blocks (65,536 counters each) leave no seam."""
    n = 4 * ((1 << 16) + 3) + 1
    flat = uniform(9, (n,))
    assert torch.equal(uniform(9, (n, 1, 1)).view(-1), flat)
    assert torch.equal(uniform(9, (3, 5, 7)), flat[:105].view(3, 5, 7))
    assert uniform(9, ()).shape == ()
    for i in (0, 5, (1 << 18) - 1, 1 << 18, (1 << 18) + 7, n - 1):
        assert float(flat[i]) == (reference(9, i // 4)[i % 4] >> 8) / 2**24


@pytest.mark.parametrize("count", [0, 1, 2, 4, 9])
def test_a_few_numbers(count: int) -> None:
    key = mix_key(3, count)
    assert numbers(key, count) == uniform(key, (count,)).tolist()


def test_threads() -> None:
    """The number of threads changes nothing."""
    threads = torch.get_num_threads()
    assert threads == 1
    expected = uniform(3, (300_001,))
    try:
        torch.set_num_threads(2)
        assert torch.equal(uniform(3, (300_001,)), expected)
    finally:
        torch.set_num_threads(threads)


def test_mix_key() -> None:
    """64-bit, order matters, zeros count, no collision among 10,000 neighbours, one bit flips about half of them."""
    keys = {mix_key(seed, step) for seed in range(100) for step in range(100)}
    assert len(keys) == 10_000
    assert all(0 <= key < 1 << 64 for key in keys)
    assert mix_key(1, 2) != mix_key(2, 1)
    assert len({mix_key(), mix_key(0), mix_key(0, 0)}) == 3
    assert mix_key(-1) == mix_key((1 << 64) - 1)
    flips = [(mix_key(5, n) ^ mix_key(5, n ^ (1 << b))).bit_count() for n in range(50) for b in (0, 31, 63)]
    assert 30 < sum(flips) / len(flips) < 34
