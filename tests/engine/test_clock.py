"""The optimizer drives the methods: whatever the training loop looks like, a step is a step, once."""

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import retrograde as rg
from cases import batch, mlp, program, seeded, train
from retrograde.engine import clock
from retrograde.engine.maps import base
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


def test_sessions_of_models_that_are_gone_are_not_told_for_ever() -> None:
    """Every step of the process tells each listener, and Python's collector seldom runs over so few objects."""
    gc.disable()
    try:
        for _ in range(200):
            rg.attach(nn.Linear(4, 4), rg.Dither(), strict=False)
        assert len(clock._running) < 64
    finally:
        gc.enable()


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


class Gained(nn.Module):
    """A layer whose first parameter is not the one that it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.gain, self.weight, self.bias)


def test_a_layer_steps_with_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other parameters come first: rules treat the weight's gradient before the weight's optimizer uses it."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    rg.register_layer(Gained, lambda layer, x: rg.Operands(x * layer.gain, layer.weight, layer.bias))
    layer, rule = seeded(Gained), Note(factor=0.0)
    session = rg.attach(layer, noting(rule))
    matrices = torch.optim.SGD([layer.weight], lr=0.1)
    rest = torch.optim.SGD([layer.gain, layer.bias], lr=0.1)
    before = layer.weight.detach().clone()
    for step in range(3):
        layer.zero_grad()
        loss_of(layer, step).backward()
        matrices.step()
        rest.step()
    assert session.step == rule.grads == 3
    assert torch.equal(layer.weight, before)
    assert not torch.equal(layer.gain, torch.ones(8))


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


class Twice(torch.optim.SGD):
    """An optimizer that calls its base class's step: torch wraps both in its hooks, where both classes are in use."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("given", [False, True], ids=["listening", "given"])
def test_a_step_that_calls_the_base_class_is_one(given: bool) -> None:
    model = seeded(mlp)
    torch.optim.SGD(nn.Linear(1, 1).parameters())  # from now on SGD's own step tells the hooks
    rule = Note()
    optimizer = Twice(model.parameters(), lr=0.1)
    _session = rg.attach(model, noting(rule), optimizer=optimizer if given else None)
    train(model, optimizer, (6, 8), 3)
    assert steps(model) == [3, 3, 3]
    assert rule.grads == 3 * 3


class Inner(torch.optim.Optimizer):
    """Steps several optimizers over the same parameters within its own step, and goes on where one raises."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        super().__init__(inner[0].param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        for optimizer in self.inner:
            with contextlib.suppress(ArithmeticError):
                optimizer.step()


def test_nested_optimizers_count_once() -> None:
    """Two inside one, one inside another inside a third, and one that raises where it is: always one step."""
    model = mlp()
    _session = rg.attach(model, rg.Dither())

    def sgd() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    stages = [
        Inner(sgd(), sgd()),
        Inner(Inner(sgd())),
        Inner(Raising(model.parameters(), sgd())),
        Inner(Raising(model.parameters()), sgd()),
    ]
    for number, optimizer in enumerate(stages, start=1):
        train(model, optimizer, (6, 8), 2)
        assert steps(model) == [2 * number] * 3


def test_rules_are_told_of_steps_inside_a_step() -> None:
    """Those of the layers that the outer optimizer owns, before each inner one."""
    model, rule = mlp(), Note()
    _session = rg.attach(model, noting(rule), only=["0", "2"])
    inner = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    train(model, Inner(*inner), (6, 8), 3)
    assert rule.grads == rule.locals == 3 * 2
    assert rule.remembered == 3 * 2 * 2
    train(model, inner[0], (6, 8), 1)
    assert rule.remembered == 3 * 2 * 2


# Steps that raise.


class Raising(torch.optim.Optimizer):
    """Raises in the midst of its step, once."""

    def __init__(self, parameters: Any, inner: torch.optim.Optimizer | None = None) -> None:
        super().__init__(parameters, {})
        self.inner, self.left = inner, 1

    def step(self, closure: Any = None) -> None:
        if self.left:
            self.left -= 1
            raise ArithmeticError
        if self.inner is not None:
            self.inner.step()


@pytest.mark.parametrize("mine", [False, True], ids=["unrelated", "own"])
def test_a_step_that_raised_loses_no_later_one(mine: bool) -> None:
    """An optimizer that raised never tells the end of its step: others, and it itself, count on."""
    model = mlp()
    _session = rg.attach(model, rg.Dither())
    working = torch.optim.SGD(model.parameters(), lr=0.1)
    raising = Raising(model.parameters(), working) if mine else Raising(nn.Linear(2, 2).parameters())
    kept: list[BaseException] = []
    for _ in range(2):
        raising.left = 1
        model.zero_grad()
        loss_of(model).backward()
        try:
            raising.step()
        except ArithmeticError as error:
            # Its frames live on with it.
            kept.append(error)
        train(model, working, (6, 8), 2)
    assert len(kept) == 2
    assert steps(model) == [4, 4, 4]
    train(model, raising if mine else working, (6, 8), 1)
    assert steps(model) == [5, 5, 5]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration])
def test_an_interrupted_closure_loses_no_later_step(error: type[BaseException]) -> None:
    """The user stops a closure, catches that, and trains on: with the same optimizer, and with another."""
    model = mlp()
    _session = rg.attach(model, rg.Dither())
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    for number in range(1, 3):

        def interrupted() -> Tensor:
            loss_of(model).backward()
            raise error

        with pytest.raises(error):
            first.step(interrupted)
        for optimizer in (second, first)[:: 1 if number == 1 else -1]:
            train(model, optimizer, (6, 8), 1)
        assert steps(model) == [2 * number] * 3


def test_a_rule_treats_a_gradient_once_though_the_step_raised() -> None:
    """The step is tried again with the gradient that the rules have treated; a new gradient is treated again."""
    model, rule = mlp(), Note(factor=2.0)
    _session = rg.attach(model, noting(rule), only="0")
    optimizer = Raising(model.parameters())
    loss_of(model).backward()
    exact = model[0].weight.grad.clone()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.step()
    assert torch.equal(model[0].weight.grad, 2 * exact)
    model.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    assert torch.equal(model[0].weight.grad, 2 * exact)
    assert rule.grads == 2


# Closures.


class Note(rg.Rule):
    """Multiplies the gradient, and notes what it saw."""

    def __init__(self, factor: float = 1.0, replaces: bool = False) -> None:
        super().__init__("")
        self.factor, self.replaces = factor, replaces
        self.grads = self.locals = self.remembered = 0
        self.seen: list[Tensor | None] = []

    def grad(self, step: rg.Step) -> None:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        self.grads += 1
        gradient = None if step.weight is None else step.weight.grad
        self.seen.append(None if gradient is None else gradient.detach().clone())
        if gradient is None:
            return
        if self.replaces:
            step.weight.grad = gradient * self.factor
        else:
            gradient.mul_(self.factor)

    def remember(self, step: rg.Step) -> None:
        self.remembered += 1

    def local(self, step: rg.Step) -> None:
        assert not torch.is_autocast_enabled("cpu")
        self.locals += 1


def noting(rule: rg.Rule) -> rg.Method:
    """A method that gives every layer this very rule."""

    class Noting(rg.Method):
        name = "noting"

        def make_rule(self, site: rg.Site) -> rg.Rule:
            return rule

    return Noting()


@pytest.mark.parametrize("how", ["positional", "keyword", "none"])
def test_rules_see_the_gradient_that_a_closure_computes(how: str) -> None:
    """`grad` runs when the closure has run, and before the optimizer uses what it changes."""
    model, plain, rule = seeded(mlp), seeded(mlp), Note(factor=3.0)
    _session = rg.attach(model, noting(rule), only="0")
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    for number in range(3):

        def closure(m: nn.Module = model) -> Tensor:
            m.zero_grad()
            loss = loss_of(m)
            loss.backward()
            return loss

        if how == "none":
            closure()
            optimizer.step()
        else:
            loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
            torch.testing.assert_close(loss, loss_of(plain))
        closure(plain)
        torch.testing.assert_close(rule.seen[-1], plain[0].weight.grad)
        plain[0].weight.grad *= 3
        other.step()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
        assert rule.grads == rule.locals == number + 1


@pytest.mark.parametrize("given", [False, True], ids=["plain", "closure"])
def test_rules_work_in_their_own_precision(given: bool) -> None:
    """A user may step inside autocast: what rules compute around the step is not rounded by it."""
    model, rule = mlp(), Note()
    _session = rg.attach(model, noting(rule))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):

        def closure() -> Tensor:
            loss = loss_of(model)
            loss.backward()
            return loss

        if not given:
            closure()
        optimizer.step(closure if given else None)
        assert torch.is_autocast_enabled("cpu")
    assert rule.grads == rule.locals == 3


EVALUATIONS = 60
"""So many that new gradients surely come to lie where old ones lay."""


class Searching(torch.optim.Optimizer):
    """Evaluates its closure several times within one step, as a line search does, and takes the last gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.found: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        for _ in range(EVALUATIONS):
            with torch.enable_grad():
                closure()
            self.found.append(self.param_groups[0]["params"][0].grad.clone())


@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "to_zero"])
@pytest.mark.parametrize("replaces", [True, False], ids=["replaced", "in_place"])
def test_every_evaluation_of_a_closure_is_treated(replaces: bool, to_none: bool) -> None:
    """Whatever memory its gradient comes to lie in: an optimizer that evaluates often never sees a plain gradient."""
    layer, rule = seeded(lambda: nn.Linear(8, 4)), Note(factor=2.0, replaces=replaces)
    session = rg.attach(layer, noting(rule))
    optimizer = Searching(layer.parameters())
    plain = seeded(lambda: nn.Linear(8, 4))
    loss_of(plain).backward()

    def closure() -> None:
        optimizer.zero_grad(set_to_none=to_none)
        loss_of(layer).backward()

    for number in range(3):
        optimizer.step(closure)
        assert rule.grads == EVALUATIONS * (number + 1)
    for gradient in optimizer.found:
        torch.testing.assert_close(gradient, 2 * plain.weight.grad)
    assert session.step == 3


def test_an_unrelated_optimizer_around_the_training() -> None:
    """Hyperparameters' own optimizer may train the model within its closure: these steps are steps."""
    model = mlp()
    session = rg.attach(model, rg.Dither())
    rate = nn.Parameter(torch.tensor(0.1))
    outer = torch.optim.SGD([rate], lr=0.1)

    def closure() -> Tensor:
        train(model, torch.optim.SGD(model.parameters(), lr=float(rate)), (6, 8), 3)
        rate.grad = torch.ones(())
        return loss_of(model)

    for _ in range(2):
        outer.step(closure)
    assert session.step == 6


# Threads, and steps within the backward pass.


class Meeting(torch.optim.Optimizer):
    """Plain SGD that waits, in the midst of each step, for another thread to be in the midst of its own."""

    def __init__(self, parameters: Any, barrier: threading.Barrier) -> None:
        super().__init__(parameters, {})
        self.barrier = barrier

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.barrier.wait(timeout=60)
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.1 * parameter.grad)
        self.barrier.wait(timeout=60)


@pytest.mark.parametrize("shared", [False, True], ids=["two sessions", "one session"])
def test_two_threads_lose_no_steps(shared: bool) -> None:
    """Each thread trains layers of its own, of one model or of two; their steps overlap, and all count."""
    parts = [seeded(mlp), seeded(mlp)]
    whole = nn.ModuleList(parts)
    _sessions = [rg.attach(model, rg.Dither(scale=0)) for model in ([whole] if shared else parts)]
    barrier, failed = threading.Barrier(2), list[BaseException]()

    def work(model: nn.Module) -> None:
        try:
            train(model, Meeting(model.parameters(), barrier), (6, 8), 20)
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(model,)) for model in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failed
    plain = seeded(mlp)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), (6, 8), 20)
    for model in parts:
        assert steps(model) == [20, 20, 20]
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


class AtOnce:
    """Steps an optimizer within the backward pass, as soon as all of its parameters have their gradients."""

    def __init__(self, parameters: list[nn.Parameter], factor: float) -> None:
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)
        self.parameters, self.factor = parameters, factor
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.ready)

    def ready(self, _: Tensor) -> None:
        if any(parameter.grad is None for parameter in self.parameters):
            return
        for parameter in self.parameters:
            if parameter.dim() == 2:
                parameter.grad *= self.factor
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("per", ["parameter", "layer"])
def test_steps_within_the_backward_pass(per: str) -> None:
    """One optimizer for each parameter, stepped when its gradient is there: each drives its layer, once a pass."""
    model, plain, rule = seeded(mlp), seeded(mlp), Note(factor=2.0)
    _session = rg.attach(model, noting(rule))
    for m, factor in ((model, 1.0), (plain, 2.0)):
        for layer in (m[0], m[2], m[4]):
            own = list(layer.parameters())
            for parameters in [[p] for p in own] if per == "parameter" else [own]:
                AtOnce(parameters, factor)
    for number in range(1, 6):
        for m in (model, plain):
            loss_of(m, number).backward()
        assert steps(model) == [number] * 3
        assert rule.grads == rule.locals == 3 * number
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


# Parameters that come and go.


def test_replaced_parameters_are_followed() -> None:
    """`load_state_dict(assign=True)` puts other parameters in place: the optimizer made over them drives the layers."""
    model, rule = seeded(mlp), Note()
    _session = rg.attach(model, noting(rule), only="0")
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, old, (6, 8), 2)
    before = model[0].weight
    model.load_state_dict(seeded(mlp, 1).state_dict(), assign=True)
    assert model[0].weight is not before
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, new, (6, 8), 3)
    assert steps(model) == [5]
    torch.testing.assert_close(rule.seen[-1], model[0].weight.grad)
    # What the old one owns is nobody's now.
    old.step()
    assert steps(model) == [5]


def test_parameters_that_an_optimizer_is_given_anew_are_followed() -> None:
    """As sharding does: the optimizer stays, its parameters and the model's are others."""
    model = seeded(mlp)
    _session = rg.attach(model, rg.Dither())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, (6, 8), 2)
    model.load_state_dict(seeded(mlp, 1).state_dict(), assign=True)
    optimizer.param_groups[0]["params"] = list(model[:1].parameters())
    train(model, optimizer, (6, 8), 1)
    assert steps(model) == [3, 2, 2]
    optimizer.param_groups[0]["params"] = list(model[2:].parameters())
    train(model, optimizer, (6, 8), 1)
    assert steps(model) == [3, 3, 3]
    model[2].requires_grad_(False)
    train(model, optimizer, (6, 8), 1)
    assert steps(model) == [3, 3, 4]


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


# Layers that no optimizer steps any more.


def _freeze(model: nn.Module) -> None:
    model[0].requires_grad_(False)


def _replace(model: nn.Module) -> None:
    state = {key: value.clone() for key, value in model[0].state_dict().items()}
    model[0].load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    ("change", "why"), [(_freeze, "frozen after attaching"), (_replace, "replaced after")]
)
def test_layers_that_steps_pass_by_are_named(change: Callable[[nn.Module], None], why: str) -> None:
    """Once, and the others step on."""
    model = mlp()
    session = rg.attach(model, rg.Dither())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    change(model)
    with pytest.warns(rg.errors.RetrogradeWarning, match=f"1 of 3 attached layers.*'0', .*{why}") as said:
        train(model, optimizer, (6, 8), 40)
    assert len(said) == 1
    assert session.step == 40


def test_other_trainings_are_not_this_models() -> None:
    """A model that rests is not passed by, nor is one that was attached with a frozen layer, or a slow generator."""
    rests, other = mlp(), mlp()
    rg.attach(rests, rg.Dither())
    loss_of(rests).backward()
    train(other, torch.optim.SGD(other.parameters(), lr=0.01), (6, 8), 40)
    frozen = mlp()
    frozen[0].requires_grad_(False)
    rg.attach(frozen, rg.Dither())
    train(frozen, torch.optim.SGD(frozen.parameters(), lr=0.01), (6, 8), 40)
