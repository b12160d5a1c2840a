import math

import pytest
import torch
from torch import nn

from retrograde.errors import OptionError
from retrograde.lab.peers import tent


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
        nn.BatchNorm1d(4),
    )
    return model.eval()


def mean_entropy(model, x):
    with tent.batch_statistics(model), torch.no_grad():
        return tent.entropy(model(x)).mean().item()


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -200.0, -200.0]])
    two = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(tent.entropy(logits), torch.tensor([math.log(4), 0.0, two]))


def test_entropy_falls_and_only_scale_and_shift_move(model):
    x = torch.randn(32, 1, 8, 8) * 3 + 1
    before, entropy = {k: v.clone() for k, v in model.state_dict().items()}, mean_entropy(model, x)
    online = tent.Tent(model, lr=3e-2)
    for _ in range(30):
        online(x)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"1.weight", "1.bias", "5.weight", "5.bias"}
    assert mean_entropy(model, x) < 0.8 * entropy
    assert not model.training
    assert not model[1].training
    assert model[1].track_running_stats
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_first_step_is_adams_on_the_entropy_of_batch_statistics(model):
    x = torch.randn(16, 1, 8, 8) * 2
    normalised = nn.functional.batch_norm(
        model[0](x), None, None, model[1].weight, model[1].bias, training=True
    )
    hidden = model[4](normalised.relu().flatten(1))
    logits = nn.functional.batch_norm(hidden, None, None, model[5].weight, model[5].bias, training=True)
    (gradient,) = torch.autograd.grad(tent.entropy(logits).mean(), [model[1].weight])
    old = model[1].weight.detach().clone()
    returned = tent.Tent(model, lr=1e-3)(x)
    torch.testing.assert_close(returned, logits.detach())
    torch.testing.assert_close(
        old - model[1].weight, 1e-3 * gradient / (gradient.abs() + 1e-8), rtol=1e-3, atol=1e-6
    )


def test_gradients_that_were_there_stay(model):
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    tent.Tent(model)(torch.randn(4, 1, 8, 8))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(OptionError, match="no batch normalisation"):
        tent.Tent(nn.Linear(2, 2))
