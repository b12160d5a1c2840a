"""Measurements outside the timed loop: right, and without a trace."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from retrograde import Dither, attach
from retrograde.lab import measure
from retrograde.lab.data import Split

CPU = torch.device("cpu")


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 9, 5)),
    )


X, Y = torch.linspace(-1, 1, 6 * 3 * 64).reshape(6, 3, 8, 8), torch.arange(6) % 5


def test_step_flops_by_hand() -> None:
    """Linear 4→3, 3→2 on 5 rows: forward, weight gradient, and input gradient of the second alone."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    found = measure.step_flops(model, torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    assert found == measure.StepFlops(2 * 5 * (4 * 3 + 3 * 2), 2 * 5 * (4 * 3 + 3 * 2 * 2))


def test_step_flops_are_torchs() -> None:
    model = convolutions()
    with FlopCounterMode(display=False) as counter:
        measure.loss_of(copy.deepcopy(model)(X), Y).backward()
    assert measure.step_flops(model, X, Y).whole == counter.get_total_flops()


def test_step_flops_count_attention() -> None:
    """Its two products forward and four backward (five where one is computed again), on whatever device."""
    batch, heads, length, width = 3, 2, 5, 4

    class Attention(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = super().forward(x).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model = Attention(8, 3 * heads * width)
    x, y = torch.randn(batch, length, 8), torch.zeros(batch, length, dtype=torch.long)
    linear = 2 * 2 * batch * length * 8 * 3 * heads * width
    product = 2 * batch * heads * length * length * width
    found = measure.step_flops(model, x, y)
    assert found.forward == linear / 2 + 2 * product
    assert found.whole in (linear + 6 * product, linear + 7 * product)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("measurement", [measure.step_flops, measure.saved_activation_bytes])
def test_measuring_leaves_no_trace(measurement: object, attached: bool) -> None:
    model = convolutions()
    session = attach(model, Dither(), seed=0) if attached else None
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    if not (attached and measurement is measure.step_flops):
        measurement(model, X, Y)  # type: ignore[operator]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    if session is not None:
        assert session.step == 0
        assert session.flops().dense == 0
        assert session.summary().zeros is None


def test_evaluate_by_hand() -> None:
    """Row by row over several batches, the last one smaller; the mode comes back."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9))
    rows = 2 * 512 + 7
    split = Split(torch.randn(rows, 2), torch.randint(3, (rows,)))
    for training in (True, False):
        model.train(training)
        found = measure.evaluate(model, split, CPU, "float32")
        assert model.training is training
        logits = nn.functional.linear(split.inputs, model[0].weight, model[0].bias)
        assert found["accuracy"] == float((logits.argmax(1) == split.targets).double().mean())
        expected = float(nn.functional.cross_entropy(logits, split.targets))
        assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_auc_by_hand() -> None:
    """The share of pairs of a positive and a negative that are in the right order; a tie is half of one."""
    margins = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4])
    labels = torch.tensor([0, 0, 1, 1, 1])
    logits = torch.stack([torch.zeros(5), margins], 1)
    assert measure.auc_of(logits, labels) == pytest.approx(4.5 / 6)


def test_auc_of_more_classes_is_the_mean_of_each_against_the_rest() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(40) % 3
    shares = logits.softmax(1)
    each = []
    for one in range(3):
        hits, rest = shares[labels == one, one], shares[labels != one, one]
        each.append(float((hits[:, None] > rest).double().mean()))
    assert measure.auc_of(logits, labels) == pytest.approx(sum(each) / 3)
    passed = measure.auc(nn.Identity(), Split(logits, labels), CPU, "float32")
    assert passed == pytest.approx(measure.auc_of(logits, labels), abs=1e-6)


def test_evaluate_counts_every_token() -> None:
    model = nn.Embedding(4, 4)
    nn.init.eye_(model.weight)
    tokens = torch.tensor([[0, 1, 2], [3, 3, 3]])
    targets = torch.tensor([[0, 1, 0], [3, 0, 0]])
    assert measure.evaluate(model, Split(tokens, targets), CPU, "float32")["accuracy"] == 3 / 6


def test_loss_of_tokens_is_the_mean_over_all() -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(measure.loss_of(logits, targets), expected)


def test_autocast_follows_the_precision() -> None:
    a = torch.randn(2, 2)
    with measure.autocast(CPU, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with measure.autocast(CPU, "float32"):
        assert (a @ a).dtype == torch.float32


PLAIN = measure.StepFlops(2.5, 3.5)


def each(value: float) -> dict[str, float]:
    return dict.fromkeys(("dense", "needed", "executed", "discounted"), value)


def test_whole_flops_of_a_plain_model_are_the_dense_ones() -> None:
    assert measure.whole_flops(None, PLAIN, 5) == {**each(30.0), "overhead": 0.0, "forward": each(12.5)}


def test_whole_flops_of_bfloat16_are_discounted() -> None:
    found = measure.whole_flops(None, PLAIN, 5, precision="bfloat16")
    assert found["executed"] == 30.0
    assert found["discounted"] == 15.0
    assert found["forward"]["discounted"] == 6.25


def test_whole_flops_of_passes_again_and_in_part() -> None:
    """Two forward passes a step, and half a backward one, against the plain step's one of each."""
    found = measure.whole_flops(None, PLAIN, 5, passes=(10.0, 2.5))
    assert found["dense"] == 30.0
    assert found["needed"] == found["executed"] == found["discounted"] == 2.5 * 10.0 + 3.5 * 2.5
    assert found["forward"] == {**each(25.0), "dense": 12.5}


def test_whole_flops_add_what_is_not_attached() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    session = attach(model, Dither(scale=0.0), only="2", seed=0)
    x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    measure.loss_of(model(x), y).backward()
    products = 4 * 3 + 3 * 2
    step = measure.StepFlops(2 * 5 * products, 2 * 5 * (products + 3 * 2))
    whole = measure.whole_flops(session, step, 1)
    assert whole["not_attached"] == 2 * 5 * 4 * 3 * 2
    assert whole["dense"] == 2 * 5 * (4 * 3 * 2 + 3 * 2 * 3)
    assert whole["forward"]["dense"] == step.forward


def test_peak_memory_of_the_process_is_in_bytes() -> None:
    peak = measure.peak_memory(CPU)
    assert peak is None or 2**26 < peak < 2**40
