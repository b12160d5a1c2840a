"""A method and a layer kind of somebody else's, each one file, keep to what ours keep to: alone and with all five."""

import math
from functools import partial

import pytest
import torch
from a_layer import GroupedLinear
from a_method import Clip
from torch import Tensor, nn

import retrograde as rg
from retrograde.testing import CHECKS, LAYERS, METHODS, Layer, check_layer, check_method

EAGER = [name for name in CHECKS if name != "compiled"]
GROUPED = Layer("grouped linear", partial(GroupedLinear, 6, 4, 2), (7, 6))
make = partial(Clip, spread=1.0, ratio=0.02, momentum=0.5)


def test_the_method_on_every_layer_kind() -> None:
    """Every check, its own layer kind included; nothing is declined."""
    neutral = partial(Clip, spread=math.inf, ratio=math.inf)
    assert check_method(make, neutral=neutral, layers=[*LAYERS, GROUPED]) == {}


@pytest.mark.parametrize("name", METHODS)
def test_the_method_with_each_of_ours(name: str) -> None:
    kinds = [kind for kind in LAYERS if kind.name in ("linear", "conv2d-grouped", "transposed2d")]
    assert check_method(lambda: [make(), METHODS[name]()], layers=[*kinds, GROUPED], checks=EAGER) == {}


def test_the_method_clips() -> None:
    """What passes the checks also does something: an outlier of δ is cut to the running size."""
    layer, x = GROUPED.make(), torch.randn(7, 6)
    session = rg.attach(layer, make())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    found = []
    for size in (1.0, 100.0):
        optimizer.zero_grad()
        z = layer(x)
        z.backward(torch.full_like(z, size))
        found.append(float(layer.kernel.grad.norm()))
        optimizer.step()
    # In the second step δ came 100 times as large, and went on as large as in the first.
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert session.metrics()["layers"]["(root)"]["size"] > 1


@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 3, 6)], ids=str)
def test_the_layer_under_every_method(shape: tuple[int, ...]) -> None:
    """Forward pass, gradients, rows, subspaces, counts; then training by the five methods, alone and together."""
    checks = None if len(shape) == 2 else EAGER
    assert check_layer(GROUPED.make, shape, checks=checks) == {}


def test_the_layer_under_the_method() -> None:
    assert check_layer(GROUPED.make, (7, 6), methods={"clip": make}, checks=EAGER) == {}


class Dense(nn.Module):
    """Read by a function, which cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 5) / 3)
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.bias


rg.register_layer(Dense, lambda layer, x: rg.Operands(x, layer.kernel.T, layer.bias))


def test_a_layer_read_by_a_function_under_every_method() -> None:
    assert check_layer(Dense, (7, 6), checks=EAGER) == {}


def test_methods_see_the_layers_parameter() -> None:
    """The plan describes it, and the rules' weight is the parameter itself."""
    layer = GROUPED.make()
    session = rg.attach(layer, make())
    (row,) = session.plan.rows
    assert (row.type, row.shape, row.status) == ("GroupedLinear", "2×(3→2)", "attached")
