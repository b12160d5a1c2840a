"""Decorrelate at whole layers: an ordinary layer, which is trained as one that is held in other coordinates."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import retrograde as rg
from cases import (
    LAYERS,
    MODELS,
    Case,
    assert_bitwise,
    assert_same,
    batch,
    gradients,
    mlp,
    program,
    seeded,
)
from retrograde.methods.decorrelate import Decorrelate

Named = dict[str, Tensor]
Optimizers = Callable[[Named], Sequence[torch.optim.Optimizer]]


def restless(every: int = 1, **options: Any) -> Decorrelate:
    """A new R every so many steps, whether or not it is another one."""
    return Decorrelate(every=every, longest=every, **options)


MODES: dict[str, Callable[..., Decorrelate]] = {
    "lowrank": partial(restless, rank=3, rows=64, damping=0.01),
    "full": partial(Decorrelate, mode="full", every=1, rows=64),
}
ALL = {**MODES, "precondition": partial(restless, mode="precondition", rank=3, rows=64)}
modes = pytest.mark.parametrize("make", MODES.values(), ids=MODES)
all_modes = pytest.mark.parametrize("make", ALL.values(), ids=ALL)

ONE_UPDATE = {"until": 1}
"""R is learnt in the first step, and never again."""

_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def ill_conditioned(d: int, n: int, ratio: float = 1e6, seed: int = 0) -> Tensor:
    """Inputs far from zero whose covariance has a power-law spectrum, as natural inputs have, from 1 to 1/ratio."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=generator).double())
    spectrum = torch.arange(1, d + 1).double() ** -(math.log(ratio) / math.log(d))
    noise = torch.randn(n, d, generator=generator).double()
    return (noise * spectrum.sqrt() @ turn.T + 3 * torch.randn(d, generator=generator).double()).float()


def correlated(n: int, d: int, seed: int = 1) -> Tensor:
    """Inputs of a few strong directions, with a mean, in float64."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3, 0.3, d).double()
    return torch.randn(n, d, generator=generator).double() * scale + 1.5


def shifted(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs with a mean."""
    return batch(shape, seed, dtype) + 2.0


def loss_of(z: Tensor) -> Tensor:
    return torch.sin(z).square().sum()


def run(layer: nn.Module, x: Tensor, steps: int = 1, lr: float = 0.05, **call: Any) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(layer(x, **call)).backward()
        optimizer.step()


def rule_of(layer: nn.Module) -> Any:
    return program(layer).rules[0]


def transform_of(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """R (g, d, d) and μ (g, d) as they are now; None for I and for 0."""
    rule = rule_of(layer)
    if hasattr(rule, "_matrix"):
        return rule._matrix, rule._mean
    if rule._basis is None:
        return None, None
    eye = torch.eye(rule._basis.shape[1], dtype=rule._basis.dtype)
    return rule._scale * (eye + rule._basis * (rule._gain - 1).unsqueeze(-2) @ rule._basis.mT), rule._mean


def grouped(weight: Tensor, groups: int) -> Tensor:
    """A weight, (g, o, d) or, of a transposed convolution, (g, d, o)."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def times(layer: nn.Module, weight: Tensor, R: Tensor) -> Tensor:
    """``W R``, in the weight's own shape."""
    matrix = grouped(weight, len(R))
    return (R.mT @ matrix if isinstance(layer, _TRANSPOSED) else matrix @ R).reshape(weight.shape)


def constant(layer: nn.Module, weight: Tensor, mean: Tensor) -> Tensor:
    """``A μ``: what an input of nothing but μ adds to each output, of a transposed convolution on average."""
    matrix = grouped(weight, len(mean))
    if isinstance(layer, _TRANSPOSED):
        places = torch.einsum("gdo,gd->go", matrix, mean)
        return places.reshape(layer.out_channels, -1).sum(1) / math.prod(layer.stride)
    return torch.einsum("god,gd->go", matrix, mean).flatten()


class Coordinates:
    """A plain model in decorrelated coordinates, written out: what is trained are W and b' of equation (1).

    Args:
        model: the attached model, whose R and μ are taken over by `take`; nothing else is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._plain = copy.deepcopy(model)
        self._layers = {n: m for n, m in model.named_modules() if "_retrograde" in m.__dict__}
        self._now: dict[str, tuple[Tensor | None, Tensor | None]] = dict.fromkeys(self._layers, (None, None))
        self.parameters: Named = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()
        }

    def __call__(self, x: Tensor, **call: Any) -> Tensor:
        return functional_call(self._plain, self.effective(), (x,), call)

    def effective(self) -> Named:
        """``A = W R`` and ``b = b' − A μ``."""
        found = dict(self.parameters)
        for name, layer in self._layers.items():
            weight, bias = (f"{name}.{own}".lstrip(".") for own in program(layer).names)
            R, mean = self._now[name]
            if R is not None:
                found[weight] = times(layer, found[weight], R)
            if mean is not None:
                found[bias] = found[bias] - constant(layer, found[weight], mean)
        return found

    @torch.no_grad()
    def take(self) -> None:
        """The attached model's R and μ; the function stays, and what optimizers keep."""
        before = {name: p.clone() for name, p in self.effective().items()}
        for name, layer in self._layers.items():
            weight, bias = (f"{name}.{own}".lstrip(".") for own in program(layer).names)
            R, mean = self._now[name] = transform_of(layer)
            if R is not None:
                self.parameters[weight].copy_(times(layer, before[weight], torch.linalg.inv(R)))
            if mean is not None:
                self.parameters[bias].copy_(before[bias] + constant(layer, before[weight], mean))


class Written(Coordinates):
    """One layer, by the letter: ``z = R (x − μ)`` for each row or patch, ``y = W z + b'``."""

    def __call__(self, x: Tensor, **call: Any) -> Tensor:
        (layer,), ((R, mean),) = self._layers.values(), self._now.values()
        if R is None:
            return super().__call__(x, **call)
        if isinstance(layer, nn.Conv2d):
            assert layer.padding == (0, 0)
            patches = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
        else:
            patches = x.unsqueeze(-1)
        p = patches.unflatten(1, (len(R), -1))
        z = R @ (p if mean is None else p - mean.unsqueeze(-1))
        y = (grouped(self.parameters["weight"], len(R)) @ z).flatten(1, 2)
        if "bias" in self.parameters:
            y = y + self.parameters["bias"].unsqueeze(-1)
        return y.reshape(self._plain(x).shape)


def train_both(
    model: nn.Module,
    reference: Coordinates,
    optimizers: Optimizers,
    batches: Sequence[Tensor],
    **call: Any,
) -> None:
    """The attached model and its reference, a step for each batch; their effective weights agree to rounding."""
    pairs = [
        (model, optimizers(dict(model.named_parameters()))),
        (reference, optimizers(reference.parameters)),
    ]
    for x in batches:
        for forward, own in pairs:
            for optimizer in own:
                optimizer.zero_grad()
            loss_of(forward(x, **call)).backward()
            for optimizer in own:
                optimizer.step()
        reference.take()
    found = {name: p.detach() for name, p in model.named_parameters()}
    assert_same(found, {name: p.detach() for name, p in reference.effective().items()}, 1e-9)


def _weights_and_rest(named: Named) -> tuple[list[Tensor], list[Tensor]]:
    return [p for p in named.values() if p.dim() > 1], [p for p in named.values() if p.dim() == 1]


def momentum(named: Named) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(named.values(), lr=1e-3, momentum=0.9)]


def adam(named: Named) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(named.values(), lr=0.03)]


def adamw(named: Named) -> list[torch.optim.Optimizer]:
    """Decay of weights alone: that of W is that of A, and a decay of b' would be another one than of b."""
    weights, rest = _weights_and_rest(named)
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": weights}]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=0.03, weight_decay=2.0)]


def bias_elsewhere(named: Named) -> list[torch.optim.Optimizer]:
    weights, rest = _weights_and_rest(named)
    return [torch.optim.SGD(weights, lr=1e-3, momentum=0.9), torch.optim.Adam(rest, lr=0.02)]


def bias_elsewhere_first(named: Named) -> list[torch.optim.Optimizer]:
    return bias_elsewhere(named)[::-1]


def muon(named: Named) -> list[torch.optim.Optimizer]:
    weights, rest = _weights_and_rest(named)
    return [torch.optim.Muon(weights, lr=0.03, weight_decay=2.0), torch.optim.SGD(rest, lr=1e-3)]


def frozen_bias() -> nn.Module:
    layer = nn.Linear(8, 5)
    layer.bias.requires_grad_(False)
    return layer


WRITTEN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (partial(nn.Linear, 8, 5), lambda seed: correlated(32, 8, seed)),
    "linear_no_bias": (partial(nn.Linear, 8, 5, bias=False), lambda seed: correlated(32, 8, seed)),
    "linear_frozen_bias": (frozen_bias, lambda seed: correlated(32, 8, seed)),
    "conv2d": (
        partial(nn.Conv2d, 2, 4, 3),
        lambda seed: correlated(12, 128, seed).reshape(12, 2, 8, 8),
    ),
    "conv2d_no_bias": (
        partial(nn.Conv2d, 2, 4, 3, bias=False),
        lambda seed: correlated(12, 128, seed).reshape(12, 2, 8, 8),
    ),
    "conv2d_groups_stride": (
        partial(nn.Conv2d, 4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2),
        lambda seed: correlated(12, 224, seed).reshape(12, 4, 7, 8),
    ),
}


# The training of the transformed layer.


@modes
@pytest.mark.parametrize("optimizers", [momentum, adam, adamw], ids=lambda o: o.__name__)
@pytest.mark.parametrize("name", WRITTEN)
def test_trains_as_the_transformed_layer(
    name: str, optimizers: Optimizers, make: Callable[..., Decorrelate]
) -> None:
    """Equation (1) by the letter, with the R of the first step for good: its weights, and not plain training's."""
    build, inputs = WRITTEN[name]
    layer, plain = seeded(build).double(), seeded(build).double()
    _session = rg.attach(layer, make(**ONE_UPDATE))
    batches = [inputs(step) for step in range(6)]
    train_both(layer, Written(layer), optimizers, batches)
    R, mean = transform_of(layer)
    assert R is not None
    assert (mean is None) is name.endswith("_bias")
    (optimizer,) = optimizers(dict(plain.named_parameters()))
    for x in batches:
        optimizer.zero_grad()
        loss_of(plain(x)).backward()
        optimizer.step()
    assert float((layer.weight - plain.weight).abs().max()) > 1e-3


@modes
@pytest.mark.parametrize("optimizers", [momentum, adam, adamw], ids=lambda o: o.__name__)
def test_moments_are_left_when_coordinates_change(
    optimizers: Optimizers, make: Callable[..., Decorrelate]
) -> None:
    """A new R and μ in every second step: what the optimizer keeps goes on as it is."""
    layer = seeded(partial(nn.Linear, 8, 5)).double()
    _session = rg.attach(layer, make(every=2))
    found = []

    class Watched(Written):
        def take(self) -> None:
            super().take()
            found.append(self._now[""][0])

    train_both(layer, Watched(layer), optimizers, [correlated(32, 8, 10 * step) for step in range(6)])
    assert [torch.equal(a, b) for a, b in itertools.pairwise(found)] == [step % 2 == 0 for step in range(5)]


@pytest.mark.parametrize("optimizers", [bias_elsewhere, bias_elsewhere_first, muon], ids=lambda o: o.__name__)
def test_bias_of_another_optimizer(optimizers: Optimizers) -> None:
    """Weights and biases in two optimizers, in either order, and Muon with its decoupled decay."""
    layer = seeded(partial(nn.Linear, 8, 5)).double()
    _session = rg.attach(layer, MODES["lowrank"]())
    train_both(layer, Written(layer), optimizers, [correlated(32, 8, step) for step in range(6)])


class Attention(nn.Module):
    """Attention to itself or, turned, of an input to its reverse: one product of the packed weight, or two."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.crossed = crossed

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(1) * 0.5 if self.crossed else x
        return self.attention(x, y, y, need_weights=False)[0]


WHOLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **MODELS,
    "attention": (partial(Attention, False), (4, 5, 8)),
    "attention_crossed": (partial(Attention, True), (4, 5, 8)),
}


@modes
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name: str, make: Callable[..., Decorrelate]) -> None:
    """Every layer of a model at once, R new in every step; the packed projections of attention are one layer."""
    build, shape = WHOLE[name]
    model = seeded(build).double()
    keys = list(model.state_dict())
    _session = rg.attach(model, make())
    batches = [shifted(shape, step, torch.float64) for step in range(4)]
    train_both(model, Coordinates(model), momentum, batches)
    attached = [m for m in model.modules() if "_retrograde" in m.__dict__]
    assert len(attached) == (2 if "attention" in name else 3)
    assert all(transform_of(layer)[0] is not None for layer in attached)
    assert list(model.state_dict()) == keys


@modes
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_every_layer_kind(case: Case, make: Callable[..., Decorrelate]) -> None:
    """The training of the transformed layer, padded borders included; and an ordinary layer for everyone else."""
    layer = seeded(case.make).double()
    session = rg.attach(layer, make())
    batches = [shifted(case.shape, step, torch.float64) for step in range(3)]
    reference = Coordinates(layer)
    train_both(layer, reference, momentum, batches, **case.call)
    assert (transform_of(layer)[0] is None) is (0 in case.shape)
    plain = case.make()
    state = layer.state_dict()
    assert list(state) == list(plain.state_dict())
    x = batches[0]
    z = layer(x, **case.call)
    for copied in (session.fold(), copy.deepcopy(layer), session.detach()):
        assert type(copied) is type(plain)
        assert_bitwise(dict(copied.state_dict()), dict(state))
        assert torch.equal(copied(x, **case.call), z)


@modes
@pytest.mark.parametrize("name", ["linear", "linear_no_bias", "conv2d_groups_stride"])
def test_gradient_is_that_of_the_transformed_weight(name: str, make: Callable[..., Decorrelate]) -> None:
    """Equation (6): what the optimizer is given is autograd's gradient of W; the bias keeps its own."""
    build, inputs = WRITTEN[name]
    layer = seeded(build).double()
    _session = rg.attach(layer, make())
    run(layer, inputs(0), 2, lr=0.01)
    reference = Written(layer)
    reference.take()
    x = inputs(5)
    loss_of(reference(x)).backward()
    run(layer, x, lr=0.0)
    assert_same(
        {name: p.grad for name, p in layer.named_parameters()},  # type: ignore[misc]
        {name: p.grad for name, p in reference.parameters.items()},  # type: ignore[misc]
        1e-10,
    )


@modes
def test_step_with_decay_in_the_gradient(make: Callable[..., Decorrelate]) -> None:
    """Equations (7) and (8) with SGD's weight decay, which is one of A and is multiplied by R like the rest."""
    layer = seeded(partial(nn.Linear, 8, 5)).double()
    _session = rg.attach(layer, make(**ONE_UPDATE))
    run(layer, correlated(32, 8))
    R, mean = transform_of(layer)
    assert R is not None
    assert mean is not None
    plain = copy.deepcopy(layer)
    A, b = plain.weight.detach(), plain.bias.detach()
    x = correlated(32, 8, 2)
    loss_of(plain(x)).backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, weight_decay=0.3)
    optimizer.zero_grad()
    loss_of(layer(x)).backward()
    optimizer.step()
    dA, db = plain.weight.grad, plain.bias.grad
    s = -0.01 * ((dA - db.outer(mean[0])) @ R[0].T + 0.3 * A)
    expected = {"weight": A + s @ R[0], "bias": b - 0.01 * (db + 0.3 * b) - s @ R[0] @ mean[0]}
    assert_same({name: p.detach() for name, p in layer.named_parameters()}, expected, 1e-11)


DECAYING: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adafactor": torch.optim.Adafactor,
    "adamw": torch.optim.AdamW,
    "adamw_fused": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, decoupled_weight_decay=True),
    "nadam": partial(torch.optim.NAdam, decoupled_weight_decay=True),
    "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
}


@modes
@pytest.mark.parametrize("name", DECAYING)
def test_decoupled_decay_alone(name: str, make: Callable[..., Decorrelate]) -> None:
    """Where gradients are zero, decoupled decay is that of A and b, whatever R is: W decays, and b' but for A μ."""
    layer = seeded(partial(nn.Linear, 8, 5)).double()
    _session = rg.attach(layer, make(**ONE_UPDATE))
    run(layer, correlated(32, 8))
    A, b, mean = layer.weight.detach().clone(), layer.bias.detach().clone(), rule_of(layer)._mean[0]
    optimizer = DECAYING[name](layer.parameters(), lr=0.1, weight_decay=0.5)
    optimizer.zero_grad()
    (0 * layer(correlated(32, 8))).sum().backward()
    optimizer.step()
    expected = {"weight": 0.95 * A, "bias": 0.95 * b + 0.05 * A @ mean}
    assert_same({name: p.detach() for name, p in layer.named_parameters()}, expected, 1e-12)


# What changes no weight.


@modes
@pytest.mark.parametrize("name", MODELS)
def test_update_changes_no_weight(name: str, make: Callable[..., Decorrelate]) -> None:
    """Two runs of which one learns a new R in the third step: the same outputs, bit for bit, until the step after."""
    build, shape = MODELS[name]
    models = [seeded(build) for _ in range(2)]
    _sessions = [rg.attach(m, make(every=every)) for m, every in zip(models, (2, 50), strict=True)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in models]
    x = shifted(shape, 99)
    equal, same_basis = [], []
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(shifted(shape, step))).backward()
            optimizer.step()
        equal.append(torch.equal(models[0](x), models[1](x)))
        R = [transform_of(model[0])[0] for model in models]  # type: ignore[index]
        same_basis.append(torch.equal(R[0], R[1]))
        if equal[-1]:
            assert_bitwise(dict(models[0].state_dict()), dict(models[1].state_dict()))
    assert same_basis == [True, True, False, False]
    assert equal == [True, True, True, False]


@all_modes
@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda o: o.__name__
)
@pytest.mark.parametrize("name", MODELS)
def test_no_step_changes_nothing(
    name: str, optimizer: type[torch.optim.Optimizer], make: Callable[..., Decorrelate]
) -> None:
    """A learning rate of 0, with a new R in every step: every parameter keeps its bits."""
    build, shape = MODELS[name]
    model = seeded(build)
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
    _session = rg.attach(model, make())
    stepping = optimizer(model.parameters(), lr=0.0)
    for step in range(4):
        stepping.zero_grad()
        loss_of(model(shifted(shape, step))).backward()
        stepping.step()
    assert_bitwise({n: p.detach() for n, p in model.named_parameters()}, before)


@pytest.mark.parametrize("mode", ["lowrank", "full"])
def test_no_step_changes_nothing_wide(mode: str) -> None:
    """The same with so many inputs that their products are summed up in parts."""
    x = ill_conditioned(1024, 1200)
    layer = nn.Linear(1024, 64)
    before = copy.deepcopy({n: p.detach() for n, p in layer.named_parameters()})
    _session = rg.attach(layer, Decorrelate(mode=mode, every=1, rows=512))  # type: ignore[arg-type]
    run(layer, x, 2, lr=0.0)
    assert_bitwise({n: p.detach() for n, p in layer.named_parameters()}, before)


@all_modes
@pytest.mark.parametrize("name", MODELS)
def test_passes_are_plain(name: str, make: Callable[..., Decorrelate]) -> None:
    """Forward and backward pass are those of the plain model, before the first update and after some."""
    build, shape = MODELS[name]
    model = seeded(build)
    session = rg.attach(model, make())
    for step in range(3):
        plain = copy.deepcopy(model)
        x = batch(shape, step)
        assert torch.equal(model(x), plain(x))
        assert_same(gradients(model, x), gradients(plain, x))
        with session.paused():
            assert_same(gradients(model, x), gradients(plain, x), 0.0)
        run(model, shifted(shape, step), lr=1e-3)


# Less correlation.


@pytest.mark.parametrize(("mode", "steps"), [("lowrank", 10), ("full", 2000)])
def test_correlation_falls(mode: str, steps: int) -> None:
    """λ_max/λ_min = 1e6 and far from zero, at rank 32: tenfold less correlation on fresh rows, no divergence.

    Rank 32 is adequate for 256 features of this spectrum: what is outside the 32 is below the damping.
    """
    d = 256 if mode == "lowrank" else 64
    x, fresh = ill_conditioned(d, 6000).split(3000)
    layer = nn.Linear(d, 4)
    rank = {"rank": 32} if mode == "lowrank" else {}
    session = rg.attach(layer, Decorrelate(mode=mode, **rank))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    target = torch.randn(3000, 4)
    losses = []
    for step in range(steps):
        index = (torch.arange(256) + 256 * step) % 3000
        loss = (layer(x[index]) - target[index]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 2 * losses[0] + 2
    figures = next(iter(session.metrics()["layers"].values()))
    assert figures["correlation"] < figures["correlation_input"] / 10
    R, _ = transform_of(layer)
    assert R is not None
    before, after = (_mean_square_correlation(rows) for rows in (fresh, fresh @ R[0].T))
    assert after < before / 10


def _mean_square_correlation(x: Tensor) -> float:
    r = torch.corrcoef(x.T.double())
    d = len(r)
    return float((r.square().sum() - d) / (d * (d - 1)))


def test_normalized_variant_moves() -> None:
    """The other variant goes the same way and stays stable with κ = 1, where its variances weigh double."""
    x = ill_conditioned(16, 500, ratio=100)
    for kappa in (0.5, 1.0):
        layer = nn.Linear(16, 4)
        session = rg.attach(layer, Decorrelate(mode="full", variant="normalized", kappa=kappa, every=1))
        run(layer, x, 300, lr=0.0)
        z = (x - x.mean(0)) @ rule_of(layer)._matrix[0].T
        torch.testing.assert_close(z.square().mean(0), torch.ones(16), rtol=0, atol=0.1)
        figures = next(iter(session.metrics()["layers"].values()))
        if kappa == 0.5:
            assert figures["correlation"] < 0.7 * figures["correlation_input"]


def test_silent_feature_stays_bounded() -> None:
    """A feature that is always zero: its row of R does not grow for ever."""
    x = batch((64, 8))
    x[:, 3] = 0
    layer = nn.Linear(8, 4)
    _session = rg.attach(layer, Decorrelate(mode="full", every=1))
    run(layer, x, 300, lr=0.0)
    found = rule_of(layer)._matrix[0][3].norm()
    run(layer, x, 100, lr=0.0)
    assert float(rule_of(layer)._matrix[0][3].norm()) < 1.01 * float(found) < 100


def test_groups_have_their_own() -> None:
    """Two groups fed by inputs of different directions learn different transforms."""
    layer = nn.Conv1d(4, 4, 1, groups=2)
    _session = rg.attach(layer, Decorrelate(rank=1, every=1))
    a, b = batch((2, 64, 1, 9), 5)
    x = torch.cat([a, a + 0.1 * b, b, -b + 0.1 * a], 1)
    run(layer, x)
    first, second = rule_of(layer)._basis[..., 0]
    assert float(first.prod()) > 0.4
    assert float(second.prod()) < -0.4


# Centring.


@modes
@pytest.mark.parametrize(
    "build",
    [
        partial(nn.Linear, 3, 4),
        partial(nn.Conv2d, 2, 3, 3),
        partial(nn.ConvTranspose2d, 2, 3, 3),
        partial(nn.ConvTranspose2d, 2, 3, 4, stride=2),
        partial(nn.ConvTranspose2d, 4, 2, 3, stride=3, groups=2),
    ],
    ids=["linear", "plain", "transposed", "stride", "groups"],
)
def test_weights_learn_about_the_mean(
    build: Callable[[], nn.Module], make: Callable[..., Decorrelate]
) -> None:
    """A step of the weights alone leaves the answer to the mean input alone, away from borders and over all strides."""
    layer = seeded(build).double()
    _session = rg.attach(layer, make(**ONE_UPDATE))
    if isinstance(layer, nn.Linear):
        x = correlated(64, 3)
    else:
        channels = layer.in_channels
        x = batch((32, channels, 8, 8), dtype=torch.float64)
        x = x + 5 * torch.arange(1, channels + 1).view(-1, 1, 1)
    run(layer, x, lr=0.0)
    mean = rule_of(layer)._mean
    if isinstance(layer, nn.Linear):
        at_mean = mean
    elif isinstance(layer, nn.Conv2d):
        at_mean = mean.reshape(1, channels, 3, 3)
    else:
        at_mean = mean.reshape(1, channels, 1, 1).expand(1, channels, 16, 16)

    @torch.no_grad()
    def answer(x: Tensor) -> Tensor:
        z = layer(x)
        # A window of whole strides.
        return z[..., 6:12, 6:12].mean((2, 3)) if z.dim() == 4 and z.shape[-1] > 6 else z.flatten(1)

    before, other = answer(at_mean), answer(torch.zeros_like(at_mean))
    weight = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(
        [{"params": [layer.weight], "lr": 1e-3}, {"params": [layer.bias], "lr": 0.0}], lr=0.0
    )
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(layer(x)).backward()
        optimizer.step()
    assert float((layer.weight - weight).abs().max()) > 1e-3
    torch.testing.assert_close(answer(at_mean), before, rtol=1e-10, atol=1e-10)
    assert float((answer(torch.zeros_like(at_mean)) - other).abs().max()) > 1e-3


@modes
def test_without_bias(make: Callable[..., Decorrelate]) -> None:
    """No bias, and so no mean: the mean's direction is one that R brings down."""
    layer = nn.Linear(8, 4, bias=False)
    _session = rg.attach(layer, make())
    run(layer, batch((256, 8)) + 10, 20, lr=0.0)
    R, mean = transform_of(layer)
    assert mean is None
    assert R is not None
    direction = torch.full((8,), 8**-0.5)
    assert float((R[0] @ direction).norm()) < 0.5
    if hasattr(rule_of(layer), "_basis"):
        assert abs(float(rule_of(layer)._basis[0, :, 0] @ direction)) == pytest.approx(1, rel=1e-2)


@modes
def test_one_stride_for_all(make: Callable[..., Decorrelate]) -> None:
    """A stride set as one number after building, as segmentation models do, is that of each dimension."""
    layers = [seeded(partial(nn.ConvTranspose2d, 2, 3, 3, stride=2)) for _ in range(2)]
    layers[0].stride = 2  # type: ignore[assignment]
    _sessions = [rg.attach(layer, make()) for layer in layers]
    for layer in layers:
        run(layer, shifted((4, 2, 5, 5)), 3, lr=1e-3)
    assert transform_of(layers[0])[0] is not None
    assert_bitwise(dict(layers[0].state_dict()), dict(layers[1].state_dict()))


@modes
def test_frozen_bias_is_left(make: Callable[..., Decorrelate]) -> None:
    """A bias that is not trained, from the start or from some step on, cannot take up the mean: it stays as it is."""
    for when in (0, 3):
        layer = nn.Linear(8, 4)
        _session = rg.attach(layer, make())
        for step in range(5):
            if step == when:
                layer.bias.requires_grad_(False)
                layer.bias.grad = None
                bias, weight = layer.bias.clone(), layer.weight.detach().clone()
            run(layer, shifted((64, 8)))
        assert torch.equal(layer.bias, bias)
        assert not torch.equal(layer.weight, weight)
        assert rule_of(layer)._mean is None


def test_endless_damping_is_plain_training() -> None:
    """R stays I, and layers without bias have no mean: plain training, bit for bit, though there are directions."""
    model, plain = (seeded(partial(mlp, bias=False)) for _ in range(2))
    _session = rg.attach(model, Decorrelate(rank=32, damping=1e30, every=1))
    for net in (model, plain):
        run(net, shifted((16, 8)), 5, lr=0.01)
    assert float(rule_of(model[0])._basis.abs().sum()) > 0  # type: ignore[index]
    assert_bitwise(dict(model.state_dict()), dict(plain.state_dict()))


# Preconditioning.


def test_precondition_is_the_reparameterised_step() -> None:
    """Plain SGD, p = 1, no bias: A moves as in low-rank mode; p = 0.5 is another step."""
    x = batch((64, 8)) @ torch.diag(torch.tensor([5.0, 3, 2, 1, 1, 1, 1, 1])) + 1
    found = []
    for options in ({}, {"mode": "precondition"}, {"mode": "precondition", "power": 0.5}):
        layer = seeded(partial(nn.Linear, 8, 4, bias=False))
        _session = rg.attach(layer, Decorrelate(rank=3, every=100, **options))  # type: ignore[arg-type]
        run(layer, x, 1, lr=0.0)
        run(layer, x, 3, lr=1e-3)
        found.append(layer.weight.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert float((found[2] - found[0]).abs().max()) > 1e-3


def test_decorrelated_inputs_keep_their_energy() -> None:
    """E‖z‖² = E‖x − μ‖², so a step of the same size changes what the layer returns as much as before."""
    # A leading direction with half of the variance, which R brings down to the others'.
    x = correlated(4000, 12) * torch.cat([torch.tensor([2.5]), torch.ones(11)]).double()
    layer = nn.Linear(12, 4).double()
    _session = rg.attach(layer, restless(rank=2, rows=4000))
    run(layer, x, lr=0.0)
    R, mean = transform_of(layer)
    assert R is not None
    assert mean is not None
    assert rule_of(layer)._scale > 1.2
    z = (x - mean[0]) @ R[0].T
    assert float(z.square().sum()) == pytest.approx(float((x - mean[0]).square().sum()), rel=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_precondition_inverts_the_second_moment(power: float) -> None:
    """With all directions and little damping: dW E[xxᵀ]^(−p), in the scale of the least direction times γ^(2p)."""
    x = ill_conditioned(6, 400, ratio=30)
    layer, plain = (seeded(partial(nn.Linear, 6, 4)) for _ in range(2))
    _session = rg.attach(layer, Decorrelate(mode="precondition", rank=6, damping=1e-6, power=power, every=1))
    run(layer, x, lr=0.0)
    for net in (layer, plain):
        net.zero_grad()
        loss_of(net(x)).backward()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    values, vectors = torch.linalg.eigh(x.T.double() @ x.double() / len(x))
    scale = min(9.0, float(values.sum() / (6 * values[0]))) ** power
    expected = scale * plain.weight.grad.double() @ vectors * (values[0] / values) ** power @ vectors.T
    assert_same({"w": layer.weight.grad.double()}, {"w": expected}, 1e-2)
    assert torch.equal(layer.bias.grad, plain.bias.grad)
