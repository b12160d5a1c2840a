"""Which precision torch itself multiplies fastest in on this machine: some processors only emulate the lower ones."""

from dataclasses import dataclass
from typing import Any

import torch

from retrograde.kernels.int8 import int_product
from retrograde.lab import contestants
from retrograde.lab.contestants import Convolution, Linear, Shape, Work
from retrograde.lab.timing import interleave

SHAPES: tuple[Shape, ...] = (Linear(256, 512, 512), Convolution(8, 64, 16, 64, 3))
"""Large enough for a fast unit to show, and small enough for emulation to end within a second."""
_ROUNDS = 5
_SECONDS = 3.0
"""For each shape."""

_CLEARLY = 1.2
"""Ratio below which two precisions are as fast as each other: without a unit for it the flag changes nothing."""

BASE = "float32"
FLAG = 'float32 with fp32_precision="bf16"'


@dataclass(frozen=True)
class Precision:
    """What both backward products of a layer take in one precision.

    Attributes:
        op: `"linear"` or `"conv"`.
        shape: of the product.
        name: `"float32"`, that with torch's flag, `"bfloat16"` or `"int8"`.
        seconds: median over the rounds.
        ratio: of float32's seconds to these: above 1 is faster than float32.
    """

    op: str
    shape: str
    name: str
    seconds: float
    ratio: float


def measure() -> list[Precision]:
    """Every precision that torch has for a linear layer and for a convolution; seconds."""
    measured: list[Precision] = []
    for shape in SHAPES:
        runs = _runs(shape)
        # What loses by far is run once.
        times = interleave(runs, _ROUNDS, against=BASE, seconds=_SECONDS)
        for name in runs:
            ratio = times.speedup(name, BASE).ratio
            measured.append(Precision(shape.op, str(shape), name, times.median(name), ratio))
    return measured


def fastest(measured: list[Precision], op: str) -> Precision:
    """The one with the least seconds for a kind of layer; float32 unless another clearly beats it."""
    rows = [one for one in measured if one.op == op]
    best = max(rows, key=lambda one: one.ratio)
    return best if best.ratio > _CLEARLY else next(one for one in rows if one.name == BASE)


def _runs(shape: Shape) -> dict[str, Work]:
    layer, x, delta = contestants.operands(shape)
    weight = layer.get_parameter("weight").detach()
    half = delta.bfloat16(), x.bfloat16(), weight.bfloat16()

    mkldnn: Any = torch.backends.mkldnn  # torch's stubs leave it out

    def flagged() -> object:
        # torch's products of float32 may round their operands to bfloat16 inside.
        before, mkldnn.fp32_precision = mkldnn.fp32_precision, "bf16"
        try:
            return shape.plain(delta, x, weight)
        finally:
            mkldnn.fp32_precision = before

    runs: dict[str, Work] = {
        BASE: lambda: shape.plain(delta, x, weight),
        FLAG: flagged,
        "bfloat16": lambda: shape.plain(*half),
    }
    if isinstance(shape, Linear):
        # Convolutions of integers have no kernel in torch.
        levels, rows, columns = (
            (100 * part / part.abs().max()).to(torch.int8) for part in (delta, x, weight)
        )
        across = levels.T.contiguous()
        runs["int8"] = lambda: (int_product(levels, columns), int_product(across, rows))
    return runs
