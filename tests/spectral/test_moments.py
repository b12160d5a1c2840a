"""Moments of rows that come in batches."""

import pytest
import torch

from retrograde.spectral.moments import Moments

ROWS = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def of(*parts: torch.Tensor) -> Moments:
    moments = Moments()
    for part in parts:
        moments.add(part)
    return moments


@pytest.mark.parametrize("split", [False, True])
def test_a_mean_that_dwarfs_the_deviations(split: bool) -> None:
    """In float32, by batches; and of two halves that were summed up around means of their own."""
    x = ROWS + 1e4
    parts = x.float().split(900)
    moments = of(*parts[::2]).plus(of(*parts[1::2])) if split else of(*parts)
    assert (moments.count, moments.width, moments.like.dtype) == (5000, 6, torch.float32)
    mean, second = moments.finish()
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(second, torch.cov(x.mT, correction=0), rtol=1e-3, atol=1e-3)


def test_halves_of_other_means_add_up() -> None:
    """To rounding; a half without rows adds nothing, and nothing at all has no moments."""
    x = torch.cat((ROWS[:2000], 3 * ROWS[2000:] + 5))
    found = of(x[:2000]).plus(of(x[2000:])).finish()
    torch.testing.assert_close(found, (x.mean(0), torch.cov(x.mT, correction=0)))
    for both in (of(x).plus(of()), of().plus(of(x))):
        torch.testing.assert_close(both.finish(), of(x).finish())
    with pytest.raises(ValueError, match="no rows"):
        of(x[:0]).finish()
