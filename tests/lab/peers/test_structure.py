"""Other shapes of a network: narrower, deeper, normalised."""

import copy
import math

import pytest
import torch
from torch import nn

from retrograde.errors import OptionError
from retrograde.lab import peers
from retrograde.lab.models.convolutional import ResNet
from retrograde.lab.peers.structure import Shape, deepened, narrowed, normalised

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def dense(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 3),
    )


def convolutional(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(16)] if norm else []
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), *norms, nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)),
    )


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_hidden_channels_go_and_inputs_and_outputs_stay() -> None:
    model = dense()
    before = copy.deepcopy(model)
    small = narrowed(model, X, 0.25)
    shapes = [tuple(layer.weight.shape) for layer in small if isinstance(layer, nn.Linear)]
    assert shapes == [(16, 64), (16, 16), (3, 16)]
    assert same(model, before), "the model itself is left alone"
    assert same(small, narrowed(model, X, 0.25)), "the same channels every time"
    assert small(X).shape == (4, 3)
    assert small.training == model.training


def test_initial_weights_are_those_of_the_narrower_networks_own_initialisation() -> None:
    """He's has deviation sqrt(2/fan-in): what stays of the wide one's is too small by the root of the width."""
    model = dense(512)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    small = narrowed(model, X, 0.25)
    for layer in (small[1], small[3]):
        expected = math.sqrt(2 / layer.weight.shape[1])
        assert float(layer.weight.std()) == pytest.approx(expected, rel=0.05)


def test_shortcuts_keep_their_channels_together() -> None:
    torch.manual_seed(0)
    model = ResNet((1, 8, 8), 3, widths=(8, 16), blocks=1)
    small = narrowed(model, X, 0.5)
    assert count(small) == pytest.approx(0.26 * count(model), rel=0.1)
    small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_network_that_cannot_be_narrower_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x.flatten(1)).view(-1, 3, 4).flatten(1))

    with pytest.raises(OptionError, match="cannot be made narrower"):
        narrowed(Fixed(), X, 0.5)
    with pytest.raises(OptionError, match="takes nothing away"):
        narrowed(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), X, 0.5)


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (dense(), [nn.BatchNorm1d] * 2),
        (convolutional(), [nn.BatchNorm2d] * 2),
        (convolutional(norm=True), [nn.BatchNorm2d] * 2),
    ],
    ids=["linear", "convolutions", "one has a norm"],
)
def test_every_hidden_layer_gets_a_norm_that_has_none(model: nn.Module, kinds: list[type]) -> None:
    made = normalised(copy.deepcopy(model), X)
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [type(norm) for norm in norms] == kinds
    with pytest.raises(OptionError, match="no hidden layer without a norm"):
        normalised(made, X)
    # The statistics of a fresh norm are 0 and 1.
    torch.testing.assert_close(made.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model", [dense(), convolutional(), convolutional(norm=True)], ids=["linear", "convolutions", "norm"]
)
def test_layers_are_added_behind_the_last_hidden_one(model: nn.Module) -> None:
    made = deepened(copy.deepcopy(model), X, 2)

    def layers(one: nn.Module) -> int:
        return sum(isinstance(module, nn.Linear | nn.Conv2d) for module in one.modules())

    assert layers(made) == layers(model) + 2
    assert made(X).shape == (4, 3)
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) in (0, 3)
    assert len({id(norm) for norm in norms}) == len(norms)


def test_an_activation_that_is_called_twice_is_not_made_deeper() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.act(self.b(self.act(self.a(x.flatten(1))))))

    with pytest.raises(OptionError, match="cannot be made deeper"):
        deepened(Shared(), X)


def test_the_peer_does_all_of_it() -> None:
    peer = peers.make("shape", {"width": 0.5, "deeper": 1, "normalise": True})
    assert isinstance(peer, Shape)
    made = peer.prepare(dense(), X)
    assert [tuple(m.weight.shape) for m in made.modules() if isinstance(m, nn.Linear)] == [
        (32, 64),
        (32, 32),
        (32, 32),
        (3, 32),
    ]
    assert sum(isinstance(module, nn.BatchNorm1d) for module in made.modules()) == 3


@pytest.mark.parametrize("options", [{"width": 0.0}, {"width": 1.5}, {"deeper": -1}])
def test_values_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        peers.make("shape", options)
