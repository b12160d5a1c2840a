import copy

import pytest
import torch
from torch import nn

from retrograde.errors import OptionError
from retrograde.lab.peers.renormalise import Renormalised


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 2, 6, 6))
    return model.eval()


def test_without_a_memory_it_is_training_mode_and_the_model_stays(model):
    x, before = torch.randn(8, 2, 6, 6) * 3 + 1, copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).train()(x)
    torch.testing.assert_close(Renormalised(model)(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_memory_starts_at_the_source_and_ends_at_the_stream(model):
    x = torch.randn(8, 2, 6, 6) * 3 + 1
    plain, shifted = model(x), copy.deepcopy(model).train()(x)
    torch.testing.assert_close(Renormalised(model, 1e9)(x), plain, rtol=1e-4, atol=1e-4)
    remembering = Renormalised(model, 8.0)
    for _ in range(20):
        last = remembering(x)
    torch.testing.assert_close(last, shifted.detach(), rtol=1e-4, atol=1e-4)


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(OptionError, match="no batch normalisation"):
        Renormalised(nn.Linear(2, 2))
