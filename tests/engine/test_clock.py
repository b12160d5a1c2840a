"""The optimizer drives the methods: whatever the training loop looks like, a step is a step, once."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import retrograde as rg
from cases import batch, mlp, program, seeded, train
from retrograde.errors import NoEffectError, RetrogradeWarning

pytestmark = pytest.mark.filterwarnings("error::retrograde.errors.RetrogradeWarning")


def steps(model: nn.Module) -> list[int]:
    return [program(m).step for m in model.modules() if "_retrograde" in m.__dict__]


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return torch.sin(model(batch((6, 8), seed))).square().mean()


def test_one_optimizer() -> None:
    model = mlp()
    session = rg.attach(model, rg.Dither())
    train(model, torch.optim.AdamW(model.parameters()), (6, 8), 3)
    assert steps(model) == [3, 3, 3]
    assert session.step == 3


def test_session_not_kept() -> None:
    """`rg.attach(model, …)` alone, as one line: the clock lives as long as the model."""
    model = mlp()
    rg.attach(model, rg.Dither())
    gc.collect()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (6, 8), 3)
    assert steps(model) == [3, 3, 3]


@pytest.mark.parametrize("name", ["sgd", "lbfgs"])
def test_closure(name: str) -> None:
    """An optimizer whose step runs the backward pass itself (closures, LBFGS) is not called idle."""
    model = seeded(mlp)
    # A line search along noisy gradients may end anywhere: hardly any noise.
    session = rg.attach(model, rg.Dither(scale=0.01, bits=None))
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD if name == "sgd" else torch.optim.LBFGS
    optimizer = make(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(4):
        optimizer.step(closure)
    assert session.step == 4
    assert float(closure().detach()) < first


def test_two_optimizers_over_disjoint_layers() -> None:
    """Each layer counts the steps of its own optimizer."""
    model = mlp()
    _session = rg.attach(model, rg.Dither())
    one = torch.optim.SGD(model[0].parameters(), lr=0.1)
    other = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    for step in range(4):
        loss_of(model, step).backward()
        one.step()
        if step % 2:
            other.step()
    assert steps(model) == [4, 2, 2]


def test_weights_and_biases_in_two_optimizers() -> None:
    """Muon for matrices and AdamW for the rest: a layer makes one step for each iteration, without false alarms."""
    model = mlp()
    _session = rg.attach(model, rg.Dither())
    matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.1)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2])
    for step in range(4):
        loss_of(model, step).backward()
        matrices.step()
        rest.step()
    assert steps(model) == [4, 4, 4]


class Wrapper(torch.optim.Optimizer):
    """An optimizer that holds another one over the same parameters (lookahead, SAM, ZeRO)."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_wrapped_optimizer() -> None:
    """A step within a step is one step: slots 7 and 8 must not run twice."""
    model = mlp()
    _session = rg.attach(model, rg.Dither())
    train(model, Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)), (6, 8), 3)
    assert steps(model) == [3, 3, 3]


def test_parameter_group_added_later() -> None:
    model = mlp()
    _session = rg.attach(model, rg.Dither())
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    train(model, optimizer, (6, 8), 2)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, (6, 8), 2)
    assert steps(model) == [2, 0, 4]


def test_parametrised_layer_without_bias() -> None:
    """The originals of a parametrised weight lie in a submodule, and still make the layer step."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 4, bias=False)))
    session = rg.attach(model, rg.Dither())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (6, 8), 2)
    assert session.step == 2


def test_frozen_layer_raises_no_false_alarm() -> None:
    """A frozen layer that only passes gradients on has no optimizer; a thousand calls of it are no reason to warn."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    _session = rg.attach(model, rg.Dither())
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    for _ in range(1001):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_layer_called_often_within_a_step() -> None:
    """A cell unrolled over a long sequence is called a thousand times in one backward pass: no false alarm."""
    cell = nn.Linear(2, 2)
    _session = rg.attach(cell, rg.Dither(scale=0))
    optimizer = torch.optim.SGD(cell.parameters(), lr=1e-3)
    h = torch.ones(1, 2)
    for _ in range(1000):
        h = torch.tanh(cell(h))
    h.sum().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore::retrograde.errors.RetrogradeWarning")
def test_no_optimizer_at_all() -> None:
    """Training by hand is told, once, that nothing steps."""
    layer = nn.Linear(2, 2)
    rg.attach(layer, rg.Dither(scale=0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(1010):
            layer(torch.ones(1, 2)).sum().backward()
    assert len([w for w in seen if "without a step" in str(w.message)]) == 1


def test_given_optimizer_alone() -> None:
    """With `optimizer=`, other optimizers' steps do not count."""
    model = mlp()
    mine, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    session = rg.attach(model, rg.Dither(), optimizer=mine)
    train(model, other, (6, 8), 3)
    assert session.step == 0
    train(model, mine, (6, 8), 2)
    assert session.step == 2


def test_detached_clock_is_silent() -> None:
    model = mlp()
    for given in (False, True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = rg.attach(model, rg.Dither(), optimizer=optimizer if given else None)
        train(model, optimizer, (6, 8), 1)
        session.detach()
        train(model, optimizer, (6, 8), 5)
        assert session.step == 1


# Idleness.


@pytest.mark.parametrize("strict", [True, False])
def test_eval_mode_training(strict: bool) -> None:
    """Warned at the first idle step, refused at the third; strict=False only warns."""
    model = mlp().eval()
    _session = rg.attach(model, rg.Dither(), strict=strict)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(RetrogradeWarning, match=r"1 optimizer step.*model.train\(\)"):
        train(model, optimizer, (6, 8), 1)
    train(model, optimizer, (6, 8), 1)
    if strict:
        with pytest.raises(NoEffectError, match=r"3 optimizer step.*'0' is the first.*strict=False"):
            train(model, optimizer, (6, 8), 1)
    else:
        train(model, optimizer, (6, 8), 5)
    model.train()
    if not strict:
        train(model, optimizer, (6, 8), 1)


def test_idle_steps_must_be_in_a_row() -> None:
    """A working step in between starts the count anew."""
    model = mlp()
    _session = rg.attach(model, rg.Dither())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)
        for _ in range(3):
            train(model.eval(), optimizer, (6, 8), 2)
            train(model.train(), optimizer, (6, 8), 1)


def test_a_copy_is_trained() -> None:
    """Training a copy of the attached model is plain training; the attached one's optimizer does not complain."""
    model = mlp()
    session = rg.attach(model, rg.Dither())
    twin = session.fold()
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), (6, 8), 4)
    assert session.step == 0


def test_paused_steps_are_excused() -> None:
    """Any number of steps inside paused() is no idleness; the first one after it counts again."""
    model = mlp()
    session = rg.attach(model, rg.Dither())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with session.paused():
        train(model, optimizer, (6, 8), 5)
    with session.paused(), session.paused():
        train(model, optimizer, (6, 8), 1)
    assert session.summary().zeros is None
    train(model, optimizer, (6, 8), 1)
    assert session.summary().zeros is not None
    with pytest.raises(ZeroDivisionError), session.paused():
        _ = 1 / 0
    train(model, optimizer, (6, 8), 1)
    assert program(model[0]).total.calls == 2


# Accumulation and scaling.


def test_accumulation_draws_anew() -> None:
    """Two micro-batches of one step draw different noise; their sum is exact in the neutral setting."""
    layer = seeded(lambda: nn.Linear(8, 5))
    session = rg.attach(layer, rg.Dither(scale=2), seed=0)
    x = batch((16, 8))
    parts = []
    for _ in range(2):
        layer.zero_grad()
        torch.sin(layer(x)).sum().backward()
        parts.append(layer.weight.grad.clone())
    assert not torch.equal(*parts)
    assert session.step == 0
    session.detach()
    rg.attach(layer, rg.Dither(scale=0))
    layer.zero_grad()
    torch.sin(layer(x[:8])).sum().backward()
    torch.sin(layer(x[8:])).sum().backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    torch.sin(layer(x)).sum().backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-5, atol=1e-6)


def test_grad_scaler() -> None:
    """An Inf gradient passes through exactly: the scaler skips the step, the clock stands, one warning, counted."""
    model = seeded(mlp)
    session = rg.attach(model, rg.Dither())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RetrogradeWarning)
        for attempt in range(2):
            optimizer.zero_grad()
            (scaler.scale(loss_of(model)) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            assert session.step == 0, attempt
    assert scaler.get_scale() == 256.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    last = session.metrics()["layers"]["4"]
    assert last["fallbacks"] == 2
    assert len([w for w in seen if "'4'" in str(w.message)]) == 1
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert session.step == 1
    assert not torch.equal(before[0], model[0].weight)
    assert session.metrics()["layers"]["4"]["fallbacks"] == 2
