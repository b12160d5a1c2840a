"""Convolutional networks for images of 8×8 pixels and more."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from retrograde.engine.branches import Residual


class LeNet(nn.Sequential):
    """LeNet-5 with ReLU and max pooling: x (B, C, H, W) → logits (B, classes).

    The second convolution is padded where the image is too small for it otherwise.
    """

    def __init__(self, input_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        padding = 0 if min(height, width) >= 20 else 2
        sides = [(side // 2 - 4 + 2 * padding) // 2 for side in (height, width)]
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.body = nn.Sequential(
            nn.Linear(16 * math.prod(sides), 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
        )
        self.head = nn.Linear(84, classes)


class VGG(nn.Sequential):
    """The first three stages of VGG-11 (configuration A): x (B, C, H, W) → logits (B, classes).

    3×3 convolutions 64 · pool · 128 · pool · 256 · 256 · pool, then one linear layer. Pooling stops where less than 3
    pixels a side would be left, and the last one takes large images down to about 4. Images are first averaged over
    squares of ``average`` pixels a side. With ``channels_last`` the weights lie so in memory, and with them what the
    convolutions return.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        stages: Sequence[Sequence[int]] = ((64,), (128,), (256, 256)),
        *,
        batch_norm: bool = False,
        channels_last: bool = False,
        average: int = 1,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        if average > 1:
            layers.append(nn.AvgPool2d(average))
            height, width = height // average, width // average
        for stage, widths in enumerate(stages):
            for outputs in widths:
                layers += [*_convolution(channels, outputs, 3, batch_norm=batch_norm), nn.ReLU()]
                channels = outputs
            pool = 2 if min(height, width) >= 6 else 1
            if stage == len(stages) - 1:
                pool = max(pool, min(height, width) // 4)
            if pool > 1:
                layers.append(nn.MaxPool2d(pool))
                height, width = height // pool, width // pool
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * height * width, classes)
        _he(self.features)
        if channels_last:
            self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class ResNet(nn.Sequential):
    """ResNet of 6n + 2 layers for small images (He et al. 2016, §4.2): x (B, C, H, W) → logits (B, classes).

    Each block is ``relu(shortcut(x) + branch(x))``, the shortcut a 1×1 convolution where the shape changes.
    Without ``batch_norm`` the branches start as Fixup's do (Zhang et al. 2019): the first convolution scaled
    by 1/√blocks, the last one zero, so that the whole begins as its shortcuts and depth does no harm.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        *,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        channels = widths[0]
        self.stem = nn.Sequential(
            *_convolution(input_shape[0], channels, 3, batch_norm=batch_norm), nn.ReLU()
        )
        stages: list[nn.Module] = []
        branches: list[nn.Sequential] = []
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                branch = nn.Sequential(
                    *_convolution(channels, outputs, 3, stride, batch_norm=batch_norm),
                    nn.ReLU(),
                    *_convolution(outputs, outputs, 3, batch_norm=batch_norm),
                )
                shortcut = None
                if stride != 1 or channels != outputs:
                    shortcut = nn.Sequential(
                        *_convolution(channels, outputs, 1, stride, batch_norm=batch_norm)
                    )
                branches.append(branch)
                stages += [Residual(branch, shortcut), nn.ReLU()]
                channels = outputs
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)
        _he(self)
        with torch.no_grad():
            for branch in [] if batch_norm else branches:
                branch[0].get_parameter("weight").div_(math.sqrt(len(branches)))
                branch[-1].get_parameter("weight").zero_()


def _convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, *, batch_norm: bool
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=not batch_norm)
    return [convolution, nn.BatchNorm2d(outputs)] if batch_norm else [convolution]


def _he(module: nn.Module) -> None:
    """Initialise convolutions for ReLU (He et al. 2015), which keeps the variance without BatchNorm."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
