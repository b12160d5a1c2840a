"""Corrupted images: noise, blur, contrast, brightness and pixelate at five severities each.

In the spirit of Hendrycks, Dietterich, *Benchmarking neural network robustness to common corruptions and
perturbations*, ICLR 2019, with the constants of their CIFAR-10-C (of a gaussian blur, for "blur"). Unlike there, the
images are not rounded to bytes and compressed again, and pixelate averages boxes.

Images are (n, C, H, W), 0 to 1, and come back so; the same seed corrupts them in the same way.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograde.errors import OptionError
from retrograde.lab.options import require_known

SEVERITIES = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # deviation
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # deviation of the kernel, pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # share that is left
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value (of hue, saturation, value)
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # pixels a side that are left
}
"""Corruption → what grows or shrinks, from severity 1 to 5."""


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupt `images`.

    Args:
        images: (n, C, H, W), 0 to 1.
        name: one of `SEVERITIES`.
        severity: 1 to 5.
        seed: of the noise.

    Returns:
        Images of the same shape, 0 to 1.

    Raises:
        OptionError: an unknown corruption or severity.
    """
    require_known("there is no corruption", [name], SEVERITIES)
    if severity not in range(1, 6):
        raise OptionError(f"corrupt: severity={severity} must be 1 to 5.")
    amount = SEVERITIES[name][severity - 1]
    if name == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        corrupted = images + amount * noise.to(images)
    elif name == "blur":
        corrupted = _blurred(images, amount)
    elif name == "contrast":
        mean = images.mean((2, 3), keepdim=True)
        corrupted = mean + amount * (images - mean)
    elif name == "brightness":
        value = images.amax(1, keepdim=True)
        # At a fixed hue and saturation all channels are multiples of the value.
        corrupted = torch.where(value > 0, images * ((value + amount) / value.clamp_min(1e-6)), amount)
        corrupted = corrupted / corrupted.amax(1, keepdim=True).clamp_min(1)
    else:
        height, width = images.shape[2:]
        small = F.interpolate(images, (int(height * amount), int(width * amount)), mode="area")
        corrupted = F.interpolate(small, (height, width), mode="nearest")
    return corrupted.clamp(0, 1)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    radius = max(1, round(4 * deviation))
    steps = torch.arange(-radius, radius + 1).to(images)
    kernel = torch.exp(-(steps**2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.mT, groups=images.shape[1])
