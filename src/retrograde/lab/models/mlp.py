"""Networks of dense layers, for images (flattened) and tables."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from retrograde.engine.branches import Residual


class MLP(nn.Sequential):
    r"""Linear layers with ReLU between, behind BatchNorm on demand: x (B, \*input_shape) → logits (B, classes)."""

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int] = (512, 512, 512),
        *,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise((math.prod(input_shape), *widths)):
            norm = [nn.BatchNorm1d(outputs)] if batch_norm else []
            layers += [nn.Linear(inputs, outputs, bias=not batch_norm), *norm, nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)


class ResMLP(nn.Sequential):
    r"""Residual branches Linear-ReLU-Linear on one width: x (B, \*input_shape) → logits (B, classes).

    The last layer of each branch starts small, by 1/√depth, so that depth does not blow up the activations
    without normalisation.
    """

    def __init__(self, input_shape: Sequence[int], classes: int, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), width))
        branches = [
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*(Residual(branch) for branch in branches))
        self.head = nn.Linear(width, classes)
        with torch.no_grad():
            for branch in branches:
                branch[-1].get_parameter("weight").div_(math.sqrt(depth))
