import pytest
import torch

from retrograde.errors import OptionError
from retrograde.lab.corruptions import SEVERITIES, corrupt


@pytest.fixture
def images():
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")


@pytest.mark.parametrize("name", SEVERITIES)
def test_severities_grow_keep_the_range_and_repeat(images, name):
    distances = []
    for severity in range(1, 6):
        found = corrupt(images, name, severity, seed=3)
        assert found.shape == images.shape
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(found, corrupt(images, name, severity, seed=3))
        distances.append((found - images).square().mean().item())
    # Boxes that fit the pixels badly cost more than slightly larger ones that fit.
    assert name == "pixelate" or distances == sorted(distances)
    assert 0 < distances[0] < distances[-1]


def test_each_corruption_does_what_it_says(images):
    noisy = corrupt(torch.full((8, 3, 32, 32), 0.5), "noise", 5) - 0.5
    assert noisy.std().item() == pytest.approx(0.10, rel=0.05)
    assert not torch.equal(corrupt(images, "noise", 5, seed=0), corrupt(images, "noise", 5, seed=1))
    pale = corrupt(images, "contrast", 2)
    torch.testing.assert_close(pale.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(pale.std((2, 3)), 0.5 * images.std((2, 3)))
    dark = images * 0.5
    bright = corrupt(dark, "brightness", 3)
    torch.testing.assert_close(bright.amax(1), dark.amax(1) + 0.15)
    torch.testing.assert_close(bright / bright.sum(1, keepdim=True), dark / dark.sum(1, keepdim=True))
    torch.testing.assert_close(
        corrupt(torch.zeros(1, 3, 4, 4), "brightness", 1), torch.full((1, 3, 4, 4), 0.05)
    )
    point = torch.zeros(1, 3, 33, 33)
    point[..., 16, 16] = 1
    spread = corrupt(point, "blur", 5)[0, 0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    steps = torch.arange(33) - 16.0
    assert (spread.sum(0) * steps**2).sum().sqrt().item() == pytest.approx(1, rel=0.02)
    blocks = corrupt(torch.arange(32.0).expand(1, 3, 32, 32) / 32, "pixelate", 5)
    assert len(blocks[0, 0, 0].unique()) == 20


def test_refusals(images):
    with pytest.raises(OptionError, match="no corruption 'fog'"):
        corrupt(images, "fog", 1)
    with pytest.raises(OptionError, match="severity=6"):
        corrupt(images, "blur", 6)
