"""Candidate dendrites: gradient against finite differences, moments against the definitions."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from cases import batch
from retrograde.engine.maps.base import Map
from retrograde.engine.maps.convolution import ConvolutionMap, TransposedMap
from retrograde.engine.maps.linear import LinearMap
from retrograde.engine.program import LayerProgram
from retrograde.engine.slots import Call, Needs
from retrograde.kernels.geometry import Geometry
from retrograde.maths import perforate as maths
from retrograde.maths.perforate import ACTIVATIONS, Activation, Moments, Sums
from retrograde.methods.perforate.pool import Pool

GROUPED = Geometry((2,), (1,), (2,), False, (0,), 2)
SQUARE = Geometry((1, 2), (1, 0), (1, 1), False, (0, 0), 1)
TURNED = Geometry((2,), (1,), (1,), True, (1,), 2)
ALL = Needs(True, True, True)


@dataclass(frozen=True)
class Kind:
    """A map under test.

    Attributes:
        map: the map.
        weight: shape of its weight, for 4 outputs.
        x: shape of an input.
        product: torch's own.
        spread: (4,) laid along the weight's outputs.
    """

    map: Map
    weight: tuple[int, ...]
    x: tuple[int, ...]
    product: Callable[..., Tensor]
    spread: Callable[[Tensor], Tensor]


KINDS = {
    "linear": Kind(LinearMap(), (4, 5), (30, 5), F.linear, lambda c: c.view(4, 1)),
    "linear_turned": Kind(
        LinearMap(turned=True), (5, 4), (30, 5), lambda x, w, b: F.linear(x, w.T, b), lambda c: c.view(1, 4)
    ),
    "conv1d_grouped": Kind(
        ConvolutionMap(GROUPED),
        (4, 3, 3),
        (6, 6, 11),
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1, dilation=2, groups=2),
        lambda c: c.view(4, 1, 1),
    ),
    "conv2d": Kind(
        ConvolutionMap(SQUARE),
        (4, 3, 2, 3),
        (5, 3, 4, 7),
        lambda x, w, b: F.conv2d(x, w, b, stride=(1, 2), padding=(1, 0)),
        lambda c: c.view(4, 1, 1, 1),
    ),
    # Of the six inputs the first three make the first two outputs, the others the others.
    "transposed1d_grouped": Kind(
        TransposedMap(TURNED),
        (6, 2, 3),
        (6, 6, 5),
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, padding=1, output_padding=1, groups=2),
        lambda c: c.view(2, 2).repeat_interleave(3, 0).unsqueeze(-1),
    ),
}


def called(delta: Tensor, x: Tensor, weight: Tensor, map: Map) -> Call:
    """A call of a layer without rules."""
    flops = map.flops(x.shape, weight.shape, delta.shape)
    return Call(delta, (x,), weight, x.shape, map, ALL, flops, True, LayerProgram("layer", {}, 0), 0)


def correlation(a: Tensor, delta: Tensor) -> Tensor:
    """Equation (2), by its definition; channels along dimension 1 (or the last)."""
    dims = [d for d in range(a.dim()) if d != (1 if a.dim() > 2 else a.dim() - 1)]
    return ((a - a.mean(dims, keepdim=True)) * (delta - delta.mean(dims, keepdim=True))).mean(dims)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_finite_differences(kind: str, activation: Activation) -> None:
    """dS/dθ of weight, bias and cascade, with batch means in the place of running ones; two candidates at once."""
    found_kind = KINDS[kind]
    weight_shape, product = found_kind.weight, found_kind.product
    double = torch.float64
    x = batch(found_kind.x, 1, double)
    values = {
        "weight": 0.5 * batch((2, *weight_shape), 2, double),
        "bias": 0.5 * batch((2, 4), 3, double),
        "cascade": 0.5 * batch((2, 1, 4), 4, double),
    }
    spatial = len(weight_shape) - 2
    shape = product(x, values["weight"][0], None).shape
    accepted, delta = torch.tanh(batch(shape, 5, double)), batch(shape, 6, double)

    def activations(j: int) -> Tensor:
        z = product(x, values["weight"][j], values["bias"][j])
        return maths.activate(z + values["cascade"][j, 0].view(-1, *[1] * spatial) * accepted, activation)

    copies = {k: v.clone() for k, v in values.items()}
    pool = Pool(**copies, activation=activation, outputs=4, map=found_kind.map)
    call = called(delta, x, values["weight"][0], found_kind.map)
    pool.observe(call, x, [accepted])
    pool.learn(rate=0.0, momentum=1.0)  # the first batch brings the means and signs
    for j in range(2):
        torch.testing.assert_close(
            pool.moments.covariance[j], correlation(activations(j), delta), rtol=1e-10, atol=1e-13
        )
    pool.observe(call, x, [accepted])
    state = pool.state_dict()
    count = state["sums"][0]
    deviation = state["moments"]["variance_delta"].sqrt()
    scale = {
        "weight": found_kind.spread(deviation),
        "bias": deviation,
        "cascade": deviation,
    }
    for j in range(2):
        for name, value in values.items():
            found = state["gradient"][name][j] / count * scale[name]
            flat, expected = value[j].view(-1), []
            for i in range(flat.numel()):
                at = float(flat[i])
                sides: list[float] = []
                for step in (1e-6, -1e-6):
                    flat[i] = at + step
                    sides.append(float(correlation(activations(j), delta).abs().sum()))
                flat[i] = at
                expected.append((sides[0] - sides[1]) / 2e-6)
            expected = torch.tensor(expected, dtype=double).view_as(found)
            assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name


def test_moments_are_those_of_all_batches() -> None:
    """While batches weigh 1/n, running moments are the moments of everything seen; calls of a step add up."""
    double = torch.float64
    a, delta = batch((8, 5, 2, 3), 1, double) + 3, batch((8, 5, 3), 2, double) - 5
    moments = Moments.zeros(2, 3, a)
    for step in range(4):
        sums = Sums.zeros(2, 3, a)
        for call in (2 * step, 2 * step + 1):
            sums.add_delta(delta[call], moments)
            for j in range(2):
                sums.add_candidate(j, a[call, :, j], delta[call], moments)
        moments = moments.absorbed(sums, momentum=0.01)
    flat_a, flat_delta = a.flatten(0, 1), delta.flatten(0, 1)
    torch.testing.assert_close(moments.mean_a, flat_a.mean(0))
    torch.testing.assert_close(moments.variance_a, flat_a.var(0, correction=0))
    torch.testing.assert_close(moments.variance_delta, flat_delta.var(0, correction=0))
    for j in range(2):
        for c in range(3):
            r = stats.pearsonr(flat_a[:, j, c], flat_delta[:, c]).statistic
            assert float(moments.score()[j, c]) == pytest.approx(abs(r), rel=1e-9)
            assert float(moments.covariance[j, c]) * r > 0


def test_momentum_takes_over() -> None:
    """After 1/momentum batches a new one weighs the momentum: equation of an exponential mean."""
    moments, values = Moments.zeros(1, 1, torch.zeros(())), batch((20,), 1)
    expected = 0.0
    for n, value in enumerate(values.tolist(), start=1):
        sums = Sums.zeros(1, 1, torch.zeros(()))
        sums.add_delta(torch.tensor([[value]]), moments)
        moments = moments.absorbed(sums, momentum=0.25)
        expected += max(1 / n, 0.25) * (value - expected)
    assert float(moments.mean_delta) == pytest.approx(expected, rel=1e-5)


def test_constant_has_no_score() -> None:
    """A candidate, or a δ, that does not vary has score and direction 0, not NaN."""
    moments = Moments.zeros(1, 2, torch.zeros(()))
    sums = Sums.zeros(1, 2, torch.zeros(()))
    delta = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    sums.add_delta(delta, moments)
    sums.add_candidate(0, torch.tensor([[4.0, 1.0], [4.0, 2.0]]), delta, moments)
    moments = moments.absorbed(sums, 0.01)
    assert moments.score().tolist() == [[0.0, 0.0]]
    assert moments.direction()[0, 1] == 0


def test_best_of_each_neuron() -> None:
    score, index = maths.best_of(torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.5, 0.1]]))
    assert score.tolist() == pytest.approx([0.3, 0.9, 0.2])
    values = torch.arange(12.0).view(2, 3, 2)
    assert maths.choose(values, index).tolist() == [[6, 7], [2, 3], [4, 5]]


def test_climb_is_adam() -> None:
    """Ten steps uphill end where torch's Adam ends downhill on the negated gradient."""
    value, reference = batch((5,)), batch((5,)).requires_grad_()
    first, second = torch.zeros(5), torch.zeros(5)
    adam = torch.optim.Adam([reference], lr=0.1)
    for step in range(1, 11):
        gradient = batch((5,), seed=step)
        maths.climb(value, gradient, first, second, step, 0.1)
        reference.grad = -gradient
        adam.step()
    torch.testing.assert_close(value, reference.detach())


def test_learning_raises_the_correlation() -> None:
    """Candidates find a direction of x that explains δ, from a start that explains almost nothing."""
    x = batch((256, 6))
    delta = torch.tanh(3 * x[:, :2]) + 0.1 * batch((256, 2), 2)
    pool = Pool(
        0.01 * batch((3, 2, 6), 3),
        torch.zeros(3, 2),
        torch.zeros(3, 0, 2),
        "tanh",
        outputs=2,
        map=LinearMap(),
    )
    call = called(delta, x, torch.zeros(2, 6), LinearMap())
    start = None
    for _ in range(150):
        pool.observe(call, x, [])
        pool.learn(rate=0.03, momentum=0.1)
        start = pool.best()[0] if start is None else start
    score, chosen = pool.best()
    assert float(start.max()) < 0.9
    assert float(score.min()) > 0.97
    assert chosen["weight"].shape == (2, 6)
    assert chosen["bias"].shape == (2,)
    assert chosen["cascade"].shape == (0, 2)
    assert chosen["weight"].abs().argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_best_weights_of_each_neuron(kind: str) -> None:
    """A neuron's share of the weight is that of its best candidate, wherever it lies in the weight."""
    found_kind = KINDS[kind]
    weight = torch.stack([batch(found_kind.weight, seed) for seed in (1, 2, 3)])
    pool = Pool(weight, batch((3, 4), 4), batch((3, 1, 4), 5), "tanh", outputs=4, map=found_kind.map)
    best = torch.tensor([2, 0, 1, 0])
    pool.moments.covariance[best, torch.arange(4)] = 1.0
    pool.moments.variance_a.fill_(1.0)
    pool.moments.variance_delta.fill_(1.0)
    score, chosen = pool.best()
    assert score.tolist() == [1.0] * 4
    which = found_kind.spread(best).expand(found_kind.weight)
    assert torch.equal(chosen["weight"], weight.gather(0, which.unsqueeze(0))[0])
    assert torch.equal(chosen["bias"], batch((3, 4), 4)[best, torch.arange(4)])
    assert torch.equal(chosen["cascade"], batch((3, 1, 4), 5)[best, :, torch.arange(4)].T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope(activation: Activation) -> None:
    z = batch((50,), dtype=torch.float64).requires_grad_()
    a = maths.activate(z, activation)
    a.sum().backward()
    torch.testing.assert_close(maths.slope(a.detach(), activation), z.grad)


def test_normal() -> None:
    """Standard normal, and a function of the key."""
    drawn = maths.normal(7, (100, 100)).flatten()
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert torch.equal(drawn, maths.normal(7, (100, 100)).flatten())
    assert not torch.equal(drawn, maths.normal(8, (100, 100)).flatten())
