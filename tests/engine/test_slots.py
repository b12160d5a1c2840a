"""The nine slots, filled by small rules of a third party."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from cases import assert_same, batch, gradients, program, seeded, train


@pytest.fixture(params=["eager", "compiled"])
def runner(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], Any]]:
    torch._dynamo.reset()
    if request.param == "eager":
        yield lambda model: model
    else:
        yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def method(kind: type[rg.Rule], label: str | None = None) -> rg.Method:
    """A method that gives every layer a rule of this kind."""

    class Everywhere(rg.Method):
        name = label or kind.__name__

        def make_rule(self, site: rg.Site) -> rg.Rule:
            return kind(site.name)

    return Everywhere()


class ScaleInput(rg.Rule):
    """z = W (2x) + b, and a plain copy that computes the same."""

    def input(self, operands: rg.Operands) -> rg.Operands:
        return rg.Operands(2 * operands.x, operands.weight, operands.bias, operands.geometry)

    def fold(self, layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.weight.mul_(2)
        return layer


class ScaleWeight(rg.Rule):
    """The same map from the weight's side."""

    def input(self, operands: rg.Operands) -> rg.Operands:
        return rg.Operands(operands.x, 2 * operands.weight, operands.bias, operands.geometry)

    fold = ScaleInput.fold


class AddOne(rg.Rule):
    def output(self, x: Tensor, z: Tensor) -> Tensor:
        return z + 1

    def fold(self, layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.bias.add_(1)
        return layer


class AddInput(rg.Rule):
    """Slot 2 sees the transformed input x̂."""

    def output(self, x: Tensor, z: Tensor) -> Tensor:
        return z + x.sum(-1, keepdim=True)

    def fold(self, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(layer.weight + 1)
        return layer


class Unfoldable(rg.Rule):
    """Changes the forward pass and cannot be folded."""

    def output(self, x: Tensor, z: Tensor) -> Tensor:
        return z + 1


class Project(rg.Rule):
    """Keeps only x U of the input; dW = (δ̃ᵀ (x U)) Uᵀ."""

    basis = torch.linalg.qr(batch((6, 2), 7))[0]

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x @ self.basis,)

    def product(self, call: rg.Call, delta: rg.Delta) -> Tensor:
        (kept,) = call.saved
        rows = delta.dense(kept.dtype).reshape(-1, delta.values.shape[-1])
        return (rows.T @ kept.reshape(-1, 2)) @ self.basis.T


class Skip(rg.Rule):
    def gate(self, call: rg.Call) -> rg.Tier:
        return rg.Tier.SKIP


class Low(rg.Rule):
    def gate(self, call: rg.Call) -> rg.Tier:
        return rg.Tier.LOW


class HalveLow(rg.Rule):
    """Halves δ, on the LOW tier only."""

    def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
        return rg.Delta(delta.values * 0.5, delta.step) if call.tier is rg.Tier.LOW else delta


class Halve(rg.Rule):
    def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
        return rg.Delta(delta.values * 0.5, delta.step)


class ZeroGrad(rg.Rule):
    def grad(self, step: rg.Step) -> None:
        step.layer.weight.grad.zero_()


class CountSteps(rg.Rule):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen: list[tuple[int, int]] = []

    def local(self, step: rg.Step) -> None:
        self.seen.append((step.index, step.counters.calls))

    def metrics(self) -> dict[str, float]:
        return {"steps": len(self.seen)}


def linear() -> nn.Module:
    return nn.Linear(6, 5)


def plain(scale_x: float = 1.0, shift: float = 0.0) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = seeded(linear)
    return layer, lambda x: layer(scale_x * x) + shift


@pytest.mark.parametrize("rule", [ScaleInput, ScaleWeight])
def test_input(rule: type[rg.Rule], runner: Callable[[nn.Module], Any]) -> None:
    """Slot 1, both sides: the function changes, autograd goes through the change, eval agrees, the fold agrees."""
    model = seeded(linear)
    session = rg.attach(model, method(rule))
    reference, function = plain(2.0)
    x = batch((7, 6))
    run = runner(model)
    assert_same(gradients(model, x, run), gradients(reference, x, function), 1e-5)
    torch.testing.assert_close(run(x), function(x))
    folded = session.fold()
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), function(x))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), function(x))


def test_output(runner: Callable[[nn.Module], Any]) -> None:
    """Slot 2 adds its term after the boundary."""
    model = seeded(linear)
    session = rg.attach(model, method(AddOne))
    reference, function = plain(1.0, 1.0)
    x = batch((7, 6))
    assert_same(gradients(model, x, runner(model)), gradients(reference, x, function), 1e-5)
    torch.testing.assert_close(session.fold()(x), function(x))
    torch.testing.assert_close(model.eval()(x), function(x))


def test_output_sees_the_layers_own_input() -> None:
    """What slot 1 makes of it may be on the side of the weight: slot 2 must not depend on that."""
    model = seeded(linear)
    _session = rg.attach(model, [method(AddInput), method(ScaleInput)])
    x = batch((7, 6))
    torch.testing.assert_close(model(x), seeded(linear)(2 * x) + x.sum(-1, keepdim=True))


def test_save_and_product(runner: Callable[[nn.Module], Any]) -> None:
    """Slots 3 and 6: less is kept, and dW is the exact gradient projected onto what was kept."""
    model = seeded(linear)
    _session = rg.attach(model, method(Project))
    x = batch((7, 6))
    expected = gradients(seeded(linear), x)
    U = Project.basis
    expected["weight"] = expected["weight"] @ U @ U.T
    assert_same(gradients(model, x, runner(model)), expected, 1e-5)
    z = model(x.requires_grad_())
    assert sorted(t.numel() for t in z.grad_fn.saved_tensors if t is not None) == [7 * 2, 5 * 6]


def test_gate_skip(runner: Callable[[nn.Module], Any]) -> None:
    """Slot 4: SKIP drops dW, keeps dx and db, and counts."""
    model = seeded(linear)
    session = rg.attach(model, method(Skip))
    x = batch((7, 6))
    expected = gradients(seeded(linear), x)
    expected["weight"] = torch.zeros(5, 6)
    assert_same(gradients(model, x, runner(model)), expected, 1e-5)
    assert program(model).total.skipped == 1
    f = session.flops()
    assert f.weight_grad.executed == f.weight_grad.needed == 0
    assert f.weight_grad.dense == f.input_grad.executed == 2 * 7 * 6 * 5


def test_gates_take_the_lowest_tier(runner: Callable[[nn.Module], Any]) -> None:
    """Later slots see the tier; of several gates the lowest counts, in any order."""
    x = batch((7, 6))
    full = gradients(seeded(linear), x)
    for rules, factor in (([HalveLow], 1.0), ([Low, HalveLow], 0.5), ([HalveLow, Low], 0.5)):
        model = seeded(linear)
        _session = rg.attach(model, [method(rule) for rule in rules])
        torch.testing.assert_close(gradients(model, x, runner(model))["weight"], factor * full["weight"])
    for rules in ([Low, Skip], [Skip, Low]):
        model = seeded(linear)
        _session = rg.attach(model, [method(rule) for rule in rules])
        assert not gradients(model, x)["weight"].any()


def test_delta(runner: Callable[[nn.Module], Any]) -> None:
    """Slot 5 acts on both products, not on the bias gradient; two rules chain; Dither quantises behind them."""
    x = batch((7, 6))
    full = gradients(seeded(linear), x)
    for rules in (
        [method(Halve)],
        [method(Halve), rg.Dither(scale=0)],
        [method(Halve), rg.Dither(1e-7, bits=None)],
    ):
        model = seeded(linear)
        _session = rg.attach(model, rules)
        expected = {"weight": full["weight"] / 2, "input": full["input"] / 2, "bias": full["bias"]}
        assert_same(gradients(model, x, runner(model)), expected, 1e-5)
    model = seeded(linear)
    _session = rg.attach(model, [method(Halve, "a"), method(Halve, "b")])
    torch.testing.assert_close(gradients(model, x, runner(model))["input"], full["input"] / 4)


def test_delta_does_not_change_what_others_see() -> None:
    """A float level tensor that a rule turns dense keeps its values for the products."""

    class Peek(rg.Rule):
        def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
            delta.dense(delta.values.dtype)
            return delta

    x, found = batch((7, 6)), []
    for rules in ([rg.Dither(1.0, bits=None)], [rg.Dither(1.0, bits=None), method(Peek)]):
        model = seeded(linear)
        _session = rg.attach(model, rules, seed=1)
        found.append(gradients(model, x))
    assert_same(found[1], found[0], 0.0)


def test_grad_and_local() -> None:
    """Slots 7 and 8: before and after the optimizer, once a step, with what the step's calls counted."""
    model = seeded(linear)
    _session = rg.attach(model, [method(ZeroGrad), method(CountSteps)])
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, (7, 6), 2)
    gradients(model, batch((7, 6)))
    train(model, optimizer, (7, 6), 1)
    assert torch.equal(model.weight, weight)
    assert not torch.equal(model.bias, bias)
    rule = next(r for r in program(model).rules if isinstance(r, CountSteps))
    assert rule.seen == [(0, 1), (1, 1), (2, 2)]
    assert _session.metrics()["layers"]["(root)"]["steps"] == 3


def test_two_save_rules_are_refused() -> None:
    """Two rules that keep something, or one that cannot say what dW is, are named; the model stays plain."""

    class Half(rg.Rule):
        def save(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x,)

    class Other(Project):
        pass

    for rules, names in (([Project, Other], "Other, Project"), ([Half], "Half")):
        model = nn.Sequential(nn.Linear(6, 5))
        with pytest.raises(rg.errors.OptionError, match=rf"layer '0' are filled by {names}"):
            rg.attach(model, [method(rule) for rule in rules])
        assert type(model[0]) is nn.Linear


def test_all_slots_compose(runner: Callable[[nn.Module], Any]) -> None:
    """All at once, in either order: the function and the gradients that the mathematics says."""
    x = batch((7, 6))
    reference, function = plain(2.0, 1.0)
    exact = gradients(reference, x, function)
    U = Project.basis
    rules = [ScaleInput, AddOne, Project, Low, HalveLow, CountSteps]
    for order in (rules, rules[::-1]):
        model = seeded(linear)
        session = rg.attach(model, [method(rule) for rule in order])
        found = gradients(model, x, runner(model))
        torch.testing.assert_close(found["weight"], exact["weight"] @ U @ U.T / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["input"], exact["input"] / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["bias"], exact["bias"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(session.fold()(x), function(x))


def test_pause_keeps_the_function() -> None:
    """paused() makes the backward pass plain; it must not change what the model computes."""
    model = seeded(linear)
    session = rg.attach(model, [method(ScaleInput), method(Halve)])
    reference, function = plain(2.0)
    x = batch((7, 6))
    with session.paused():
        torch.testing.assert_close(model(x), function(x))
        assert_same(gradients(model, x), gradients(reference, x, function), 1e-5)


def test_fold_without_slot_nine_is_refused() -> None:
    """A rule that changes the function and cannot fold it would leave copies that silently compute another one."""
    model = seeded(linear)
    with pytest.raises(rg.errors.OptionError, match=r"does not fill `fold`"):
        rg.attach(model, method(Unfoldable))
    assert type(model) is nn.Linear


def test_pickle_folds(tmp_path: Any) -> None:
    """A saved model with changed forward is the folded one."""
    model = nn.Sequential(seeded(linear))
    _session = rg.attach(model, method(ScaleInput))
    torch.save(model, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    assert type(loaded[0]) is nn.Linear
    torch.testing.assert_close(loaded(batch((3, 6))), model(batch((3, 6))))


def test_convolution_slots(runner: Callable[[nn.Module], Any]) -> None:
    """The same slots at a convolution, unbatched input included."""
    for shape in ((2, 3, 9), (3, 9)):
        model, reference = (seeded(lambda: nn.Conv1d(3, 4, 3, padding=1)) for _ in range(2))
        _session = rg.attach(model, [method(ScaleWeight), method(AddOne)])

        def function(x: Tensor, layer: nn.Module = reference) -> Tensor:
            return layer(2 * x) + 1

        x = batch(shape)
        assert_same(gradients(model, x, runner(model)), gradients(reference, x, function), 1e-5)


def test_unknown_answer_is_a_reason() -> None:
    """A method that leaves a layer alone says why, and the plan repeats it."""

    class Picky(rg.Method):
        name = "picky"

        def make_rule(self, site: rg.Site) -> rg.Rule | str:
            return Halve(site.name) if site.name == "0" else "not the first"

    plan = rg.make_plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [Picky()])
    assert [row.status for row in plan.rows] == ["attached", "left"]
    assert plan.rows[1].why == "picky: not the first"
