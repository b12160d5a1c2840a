"""Counter-based random numbers: Philox4x32-7.

Noise is a function of (key, element index) alone, so it does not depend on the order of execution, the number of
threads, eager or compiled execution, or recomputation, and a resumed run draws what the uninterrupted one would have.

Seven rounds are the fewest that pass all of TestU01's BigCrush; libraries take ten for a margin that ciphers want.

Reference: Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011, table 2.
"""

from hashlib import blake2b

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_BLOCK = 1 << 16


def mix_key(*parts: int, start: int = 0) -> int:
    """Fold integers, in order, into one 64-bit key (the splitmix64 finaliser over a chain).

    Args:
        parts: any integers, for example (seed, step, layer, rank, call).
        start: the key of parts that come before these.

    Returns:
        An integer in [0, 2⁶⁴). Different tuples give unrelated keys.
    """
    key = start
    for part in parts:
        key = (key + 0x9E3779B97F4A7C15 + (part & _MASK64)) & _MASK64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK64
        key ^= key >> 31
    return key


def philox(key: int, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter.

    Args:
        key: 64-bit key.
        counters: int64, any shape, values in [0, 2⁶⁴) as bit patterns: the low two words of the 128-bit counter.

    Returns:
        Four int64 tensors of the same shape with values in [0, 2³²).
    """
    c0, c1 = counters & _MASK32, (counters >> 32) & _MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & _MASK32, key >> 32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2⁶⁴, so the bit pattern is that of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(_MASK32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(_MASK32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(_MASK32), product0.bitwise_and_(_MASK32)
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def numbers(key: int, count: int) -> list[float]:
    """The first `count` numbers of `uniform`, as Python's: for a few, forty tensor operations are slow."""
    found: list[float] = []
    for counter in range((count + 3) // 4):
        c0, c1, c2, c3 = counter & _MASK32, counter >> 32, 0, 0
        k0, k1 = key & _MASK32, key >> 32
        for _ in range(_ROUNDS):
            product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c2 = product1 >> 32 ^ c1 ^ k0, product0 >> 32 ^ c3 ^ k1
            c1, c3 = product1 & _MASK32, product0 & _MASK32
            k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
        found += [(word >> 8) * 2.0**-24 for word in (c0, c1, c2, c3)]
    return found[:count]


def uniform(key: int, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers on [0, 1), float32 with 24 random bits; element i is word i mod 4 of counter i // 4.

    Args:
        key: 64-bit key, see `mix_key`.
        shape: shape of the result; elements are numbered in row-major order.
        device: where to compute.
    """
    size = torch.Size(shape).numel()
    result = torch.empty((size + 3) // 4, 4, device=device)
    # A block at a time: the rounds then work in cache, which is several times faster than over whole tensors.
    for start in range(0, result.shape[0], _BLOCK):
        block = result[start : start + _BLOCK]
        counters = torch.arange(start, start + block.shape[0], device=device)
        for lane, word in enumerate(philox(key, counters)):
            block[:, lane] = word >> 8
    return result.mul_(2.0**-24).view(-1)[:size].view(shape)


def key_of(name: str) -> int:
    """A 64-bit key that depends on `name` alone, the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
