"""Bytes kept for the backward pass, against examples computed by hand. Floats have 4 bytes."""

import gc
import weakref

import torch
from torch import Tensor, nn

from retrograde import Dither, attach
from retrograde.accounting.memory import peak_bytes, saved_bytes


def test_a_linear_layer_keeps_its_input() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    assert saved_bytes(model, lambda: model(x)) == 2 * 4 * 4


def test_a_frozen_linear_layer_keeps_nothing_but_its_weight() -> None:
    model, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4, requires_grad=True)
    assert saved_bytes(model, lambda: model(x)) == 0


def test_an_output_that_is_the_next_input_counts_once() -> None:
    """ReLU keeps its output, the second layer its input: they are the same tensor."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)
    assert saved_bytes(model, lambda: model(x)) == 2 * 4 * 4 + 2 * 3 * 4


def test_the_loss_counts_too() -> None:
    """Cross-entropy keeps the log-probabilities, the labels (8 bytes each) and the scalar total weight."""
    model, x, y = nn.Linear(4, 3), torch.randn(2, 4), torch.tensor([0, 1])
    found = saved_bytes(model, lambda: nn.functional.cross_entropy(model(x), y))
    assert found == 2 * 4 * 4 + 2 * 3 * 4 + 2 * 8 + 4


def test_views_of_one_storage_count_once_and_whole() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda: (x[:2] * x[2:4]).sum() + x.t().exp().sum()) == 400 + 400


def test_no_grad_keeps_nothing() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    assert saved_bytes(model, forward) == 0


def test_views_of_parameters_do_not_count() -> None:
    model, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4, requires_grad=True)
    assert saved_bytes(model, lambda: x @ model.weight.t()) == 2 * 4 * 4


def test_checkpointing_keeps_only_the_inputs_of_its_stretch() -> None:
    model, x = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 4)), torch.randn(2, 4)
    plain = saved_bytes(model, lambda: model(x))
    less = saved_bytes(model, lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))
    assert plain == 2 * 4 * 4 + 2 * 30 * 4
    assert less < 2 * 30 * 4


def test_dither_keeps_what_plain_training_keeps() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)
    attach(model, Dither(), seed=0)
    assert saved_bytes(model, lambda: model(x)) == 2 * 4 * 4 + 2 * 3 * 4


def test_dither_keeps_what_plain_training_keeps_of_convolutions() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))

    x = torch.randn(2, 3, 8, 8)
    plain, attached = net(), net()
    attach(attached, Dither(), seed=0)
    expected = 4 * (2 * 3 * 64 + 2 * 4 * 64)
    assert saved_bytes(plain, lambda: plain(x)) == expected
    assert saved_bytes(attached, lambda: attached(x)) == expected


def test_nothing_is_left_of_it() -> None:
    """ReLU and softmax keep their own outputs: were these kept as they are, the graph would keep itself alive."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LogSoftmax(1))
    outputs: list[weakref.ref[Tensor]] = []

    def forward() -> Tensor:
        z = model(torch.randn(3, 4))
        outputs.append(weakref.ref(z))
        return z

    assert saved_bytes(model, forward) > 0
    gc.collect()
    assert outputs[0]() is None


def test_gradients_flow_after_counting() -> None:
    """The hooks are gone, and counting has used nothing up."""
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    saved_bytes(model, lambda: model(x))
    model(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, x.sum(0).expand(3, 4))


def test_peak_bytes_counts_what_lives_at_once_and_only_what_is_new():
    x = torch.zeros(1000)

    def run():
        view = x.view(10, 100)
        first = view + 1
        second = first * 2
        del first, second
        return view * 3

    assert peak_bytes(run) == 2 * 4000
    assert peak_bytes(lambda: x.view(-1).add_(1)) == 0
    assert peak_bytes(lambda: [torch.zeros(256) for _ in range(3)]) == 3 * 1024


def test_peak_bytes_sees_through_transforms():
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(5, 4, 8)

    def loss(w, x):
        return (x @ w).square().sum()

    def step():
        torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x).sum().backward()

    # Five gradients of the size of the weight, at the least.
    assert peak_bytes(step) >= 5 * 8 * 8 * 4
