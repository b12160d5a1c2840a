import pytest
import torch
from torch import nn

from retrograde.lab.experiments import transfer
from retrograde.lab.peers.transfer import batch_spectral_shrinkage, l2_sp


def test_l2_sp_pulls_to_where_it_began():
    torch.manual_seed(0)
    layer, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(layer.state_dict())
    before = layer.weight.detach().clone()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (layer, plain)]
    l2_sp(optimizers[0], layer.parameters(), 2.0)
    x = torch.randn(4, 3)
    for model, optimizer in zip((layer, plain), optimizers, strict=True):
        model(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, before + 0.8 * (plain.weight - before))


def test_l2_sp_never_overshoots():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    l2_sp(optimizer, layer.parameters(), 1e6)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before)


def test_shrinkage_is_of_the_smallest_singular_values():
    left = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    features = (left * torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)) @ right
    assert float(batch_spectral_shrinkage(features)) == pytest.approx(0.25)
    assert float(batch_spectral_shrinkage(features, 2)) == pytest.approx(4.25)


def test_convolutions_as_linear_layers_of_patches_compute_the_same():
    torch.manual_seed(0)
    features = transfer._network(4)["features"]
    x = torch.randn(2, 3, 32, 32)
    turned = transfer._as_linear(features)
    torch.testing.assert_close(turned(x), features(x), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, nn.Linear) for m in turned.modules()) == 6


def test_rows_of_each_class_are_the_first():
    split = transfer.Split(torch.arange(6.0)[:, None], torch.tensor([1, 0, 1, 1, 0, 0]))
    few = transfer._few(split, 2)
    assert few.targets.tolist() == [0, 0, 1, 1]
    assert few.inputs[:, 0].tolist() == [1, 4, 0, 2]
