"""A few products of common shapes and the passes around a step, computed once.

The kernels are compiled then, and no training run has to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from retrograde.kernels import reference
from retrograde.kernels.coordinates import Coordinates
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry

_SHARES = (0.5, 0.9, 0.98)
_SIZE = 512
_IMAGES = (16, 64, 32, 32)
_SAME = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


@dataclass(frozen=True)
class Rehearsed:
    """What took dx of a layer.

    Attributes:
        layer: the layer and its sizes.
        zeros: share of zeros in δ̃.
        kernel: the fastest where δ̃ is levels.
    """

    layer: str
    zeros: float
    kernel: str


def rehearse(tell: Callable[[str], object] = lambda what: None) -> list[Rehearsed]:
    """Compute both products of a linear layer and of a convolution, exact and from levels, with few and many zeros.

    Args:
        tell: told what is computed.
    """
    found: list[Rehearsed] = []
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SIZE, _SIZE, generator=generator)
    images, kernel = torch.randn(_IMAGES, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    basis, turned = torch.linalg.qr(weight[:, :4])[0].unsqueeze(0), weight.clone().unsqueeze(0)
    coordinates = Coordinates.of(basis, torch.full((1, 4), 0.5), 1.0, weight[:1])
    coordinates.turn(turned, weight[:1])
    coordinates.advance(turned, turned.clone(), 1.0, True)
    linear = f"linear layer, {_SIZE} rows, {_SIZE}→{_SIZE}"
    convolution = f"3×3 convolution, 64→64 channels, {_IMAGES[0]} images of 32×32"
    for layer, shape, orders in (
        (linear, tuple(weight.shape), (torch.contiguous_format,)),
        (convolution, _IMAGES, (torch.contiguous_format, torch.channels_last)),
    ):
        tell(layer)
        for zeros in _SHARES:
            levels = torch.randint(1, 20, shape, generator=generator).to(torch.int8)
            levels *= torch.rand(shape, generator=generator) >= zeros
            kernels = ""
            for order in orders:
                values = levels.contiguous(memory_format=order)
                x = images.contiguous(memory_format=order)
                for delta in (Delta(values.float()), Delta(values, 0.5)):
                    products = Products(delta, "int8")
                    if layer == linear:
                        products.linear_weight_grad(weight)
                        taken = products.linear_input_grad(weight, shape).kernel
                    else:
                        products.convolution_weight_grad(x, kernel, _SAME)
                        taken = products.convolution_input_grad(kernel, _IMAGES, _SAME).kernel
                    kernels = "torch's own" if taken == reference.NAME else taken
            found.append(Rehearsed(layer, zeros, kernels))
    return found
