"""The nine slots, filled by small rules of a third party."""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from cases import assert_same, batch, gradients, program, seeded, train
from retrograde.engine.maps import base as maps
from retrograde.engine.maps.linear import LINEAR
from retrograde.kernels.work import linear_flops
from retrograde.maths.philox import key_of, mix_key


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


def rule_of(layer: nn.Module, kind: type[rg.Rule]) -> Any:
    (rule,) = (rule for rule in program(layer).rules if isinstance(rule, kind))
    return rule


# Rules that change the forward pass give the layer a class that computes the same.


class Shifted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class ShiftedConv1d(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class AddOne(rg.Rule):
    """z + 1."""

    def prepare(self, layer: nn.Module) -> None:
        layer.__class__ = Shifted if type(layer) is nn.Linear else ShiftedConv1d

    def release(self, layer: nn.Module) -> None:
        layer.__class__ = type(layer).__base__

    def output(self, x: Tensor, z: Tensor, map: rg.Map) -> Tensor:
        return z + 1

    def fold(self, layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.bias.add_(1)
        self.release(layer)
        return layer


class AddInput(rg.Rule):
    """z + 2 Σ x, and what it was called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen: list[tuple[torch.dtype, torch.dtype, rg.Map]] = []

    def output(self, x: Tensor, z: Tensor, map: rg.Map) -> Tensor:
        self.seen.append((x.dtype, z.dtype, map))
        return z + 2 * x.sum(-1, keepdim=True).to(z.dtype)


@cache
def _composed(base: type[nn.Module], shift: float, factor: float) -> type[nn.Module]:
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return factor * (base.forward(self, input) + shift)

    return type(f"Affine{base.__name__}", (base,), {"forward": forward, "below": base})


class Affine(rg.Rule):
    """factor · (z + shift): two of them do not commute, and each builds on the class that it finds."""

    shift, factor = 1.0, 1.0

    def prepare(self, layer: nn.Module) -> None:
        layer.__class__ = _composed(type(layer), self.shift, self.factor)

    def release(self, layer: nn.Module) -> None:
        assert type(layer) is _composed(type(layer).below, self.shift, self.factor)
        layer.__class__ = type(layer).below

    def output(self, x: Tensor, z: Tensor, map: rg.Map) -> Tensor:
        return self.factor * (z + self.shift)


class Shift(Affine):
    shift = 3.0


class Stretch(Affine):
    shift, factor = 0.0, 2.0


class Project(rg.Rule):
    """Keeps only x U of the input; dW = (δ̃ᵀ (x U)) Uᵀ."""

    basis = torch.linalg.qr(batch((6, 2), 7))[0]

    def save(self, x: Tensor, weight: Tensor, map: rg.Map) -> tuple[Tensor, ...]:
        assert weight.shape[1] == x.shape[-1]
        return (x @ self.basis,)

    def product(self, call: rg.Call, delta: rg.Delta) -> rg.Work:
        (kept,) = call.saved
        rows = delta.dense(kept.dtype).reshape(-1, delta.values.shape[-1])
        value = (rows.T @ kept.reshape(-1, 2)) @ self.basis.T
        return rg.Work(value, "mine", needed=11.0, executed=13.0, discounted=17.0)


class ProjectAny(rg.Rule):
    """The same at a layer of any kind, by its map; directions are those of the unit vectors."""

    def save(self, x: Tensor, weight: Tensor, map: rg.Map) -> tuple[Tensor, ...]:
        return (map.narrow(x, self.directions(weight, map), weight),)

    def product(self, call: rg.Call, delta: rg.Delta) -> rg.Work:
        (kept,) = call.saved
        basis = self.directions(call.weight, call.map)
        return call.map.narrow_weight_grad(call.products, kept, basis, call.weight)

    @staticmethod
    def directions(weight: Tensor, map: rg.Map) -> Tensor:
        groups, _, width = map.matrix(weight).shape
        return torch.eye(width, dtype=weight.dtype)[:, ::2].expand(groups, -1, -1)


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


class Clip(rg.Rule):
    """Takes what is above 0.2 away: does not commute with halving."""

    def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
        return rg.Delta(delta.values.clamp(max=0.2), delta.step)


class LateHalve(Halve):
    precedence = 1


class Watch(rg.Rule):
    """Notes what each call shows, and counts FLOPs of its own."""

    needs_input = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen: list[rg.Call] = []
        self.deltas: list[rg.Delta] = []

    def observe(self, call: rg.Call, delta: rg.Delta) -> None:
        assert not hasattr(call, "products")
        self.seen.append(call)
        self.deltas.append(delta)
        call.spend(7.0)


class ZeroGrad(rg.Rule):
    def grad(self, step: rg.Step) -> None:
        assert step.weight is not None
        step.weight.grad.zero_()


class CountSteps(rg.Rule):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen: list[tuple[int, float | None]] = []

    def local(self, step: rg.Step) -> None:
        self.seen.append((step.index, step.zeros))
        step.spend(5.0)

    def metrics(self) -> dict[str, float]:
        return {"steps": len(self.seen)}


def linear() -> nn.Module:
    return nn.Linear(6, 5)


def shifted() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = seeded(linear)
    return layer, lambda x: layer(x) + 1


# Forward.


def test_output(runner: Callable[[nn.Module], Any]) -> None:
    """Adds its term after the boundary, in training; evaluation and the folded copy compute the same."""
    model = seeded(linear)
    session = rg.attach(model, method(AddOne))
    reference, function = shifted()
    x = batch((7, 6))
    assert_same(gradients(model, x, runner(model)), gradients(reference, x, function), 1e-5)
    torch.testing.assert_close(model(x), function(x), rtol=0, atol=0)
    folded = session.fold()
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), function(x))
    assert torch.equal(model.eval()(x), function(x))
    with torch.no_grad():
        assert torch.equal(model.train()(x), function(x))


def test_output_sees_the_layers_own_input(runner: Callable[[nn.Module], Any]) -> None:
    """x as the layer was given it, z as autocast made it, and the map that multiplied."""
    model = seeded(linear)
    _session = rg.attach(model, method(AddInput))
    x = batch((7, 6))
    run = runner(model)
    expected = seeded(linear)(x) + 2 * x.sum(-1, keepdim=True)
    torch.testing.assert_close(run(x), expected)
    assert rule_of(model, AddInput).seen == [(torch.float32, torch.float32, LINEAR)]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x)
    assert rule_of(model, AddInput).seen[1:] == [(torch.float32, torch.bfloat16, LINEAR)]
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("rules", [[Shift, Stretch], [Stretch, Shift]], ids=["in_order", "reversed"])
def test_outputs_chain(rules: list[type[rg.Rule]], runner: Callable[[nn.Module], Any]) -> None:
    """By name, whatever the user's order."""
    model = seeded(linear)
    _session = rg.attach(model, [method(rule) for rule in rules])
    x = batch((7, 6))
    expected = 2 * (seeded(linear)(x) + 3)
    torch.testing.assert_close(runner(model)(x), expected)
    torch.testing.assert_close(model.eval()(x), expected)


def test_rules_are_released_in_reverse() -> None:
    """Of two rules that build on each other's class the last one to come is the first to go."""
    model = seeded(linear)
    session = rg.attach(model, [method(Shift), method(Stretch)])
    session.detach()
    assert type(model) is nn.Linear
    assert torch.equal(model(batch((7, 6))), seeded(linear)(batch((7, 6))))


def test_pause_keeps_the_function() -> None:
    """paused() makes the backward pass plain; it must not change what the model computes."""
    model = seeded(linear)
    session = rg.attach(model, [method(AddOne), method(Halve)])
    reference, function = shifted()
    x = batch((7, 6))
    with session.paused():
        torch.testing.assert_close(model(x), function(x))
        assert_same(gradients(model, x), gradients(reference, x, function), 1e-5)
    assert_same(
        {"input": gradients(model, x)["input"]},
        {"input": gradients(reference, x, function)["input"] / 2},
        1e-5,
    )


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_keep_the_function(how: str, tmp_path: Any) -> None:
    """A copy or a file of a model with changed forward passes computes the same, keys and all; it is not attached."""
    model = nn.Sequential(seeded(linear))
    _session = rg.attach(model, method(AddOne))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "m.pt")
        twin = torch.load(tmp_path / "m.pt", weights_only=False)
    assert type(twin[0]) is Shifted
    assert twin.state_dict().keys() == model.state_dict().keys()
    x = batch((3, 6))
    assert torch.equal(twin(x), model(x))
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_detach_releases() -> None:
    """`release` undoes `prepare`."""
    model = nn.Sequential(seeded(linear))
    session = rg.attach(model, method(AddOne))
    session.detach()
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(batch((3, 6))), seeded(linear)(batch((3, 6))))


def test_save_and_product(runner: Callable[[nn.Module], Any]) -> None:
    """Less is kept, dW is the exact gradient projected onto what was kept, and its work is counted as it says."""
    model = seeded(linear)
    session = rg.attach(model, method(Project))
    x = batch((7, 6))
    expected = gradients(seeded(linear), x)
    U = Project.basis
    expected["weight"] = expected["weight"] @ U @ U.T
    assert_same(gradients(model, x, runner(model)), expected, 1e-5)
    product = session.flops().weight_grad
    assert (product.needed, product.executed, product.discounted) == (11.0, 13.0, 17.0)
    assert product.dense == linear_flops(7, 5, 6)
    assert session.metrics()["layers"]["(root)"]["kernel_mine"] == 0.5
    z = model(x.requires_grad_())
    assert sorted(t.numel() for t in z.grad_fn.saved_tensors if t is not None) == [7 * 2, 5 * 6]


class TurnedLinear(nn.Module):
    """A linear layer whose weight lies as (i, o)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture
def _turned_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_KINDS", dict(maps._KINDS))
    rg.register_layer(TurnedLinear, rg.LinearKind(turned=True))


MAPPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (7, 6)),
    "turned": (TurnedLinear, (7, 6)),
    "conv": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1, groups=2), (3, 6, 9)),
    "transposed": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), (3, 6, 5)),
}


@pytest.mark.usefixtures("_turned_is_known")
@pytest.mark.parametrize("kind", MAPPED)
def test_save_by_the_map(kind: str, runner: Callable[[nn.Module], Any]) -> None:
    """Of every kind of layer: dW has the exact gradient's entries in the directions kept, and zeros elsewhere."""
    make, shape = MAPPED[kind]
    model = seeded(make)
    _session = rg.attach(model, method(ProjectAny))
    x = batch(shape)
    expected = gradients(seeded(make), x)
    map = maps.kind_of(make().__class__).map(make())
    matrix = map.matrix(expected["weight"]).clone()
    matrix[:, :, 1::2] = 0
    assert matrix.any()
    expected["weight"] = map.from_matrix(matrix, model.weight.shape)
    assert_same(gradients(model, x, runner(model)), expected, 1e-5)


# Backward.


def test_gate_skip(runner: Callable[[nn.Module], Any]) -> None:
    """SKIP drops dW, keeps dx and db, and counts."""
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
    for rules in ([method(Low, "a"), method(Skip, "b")], [method(Skip, "a"), method(Low, "b")]):
        model = seeded(linear)
        _session = rg.attach(model, rules)
        assert not gradients(model, x)["weight"].any()


def test_delta(runner: Callable[[nn.Module], Any]) -> None:
    """Acts on both products, not on the bias gradient; two rules chain; Dither quantises behind them."""
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


@pytest.mark.parametrize("backwards", [False, True])
def test_rules_run_by_precedence_then_by_name(backwards: bool) -> None:
    """The user's order means nothing."""
    x = batch((7, 6)).requires_grad_()
    delta = batch((7, 5), 3)
    for rules, expected in (
        ([method(Halve, "a"), method(Clip, "b")], (delta / 2).clamp(max=0.2)),
        ([method(Halve, "c"), method(Clip, "b")], delta.clamp(max=0.2) / 2),
        ([method(LateHalve, "a"), method(Clip, "b")], delta.clamp(max=0.2) / 2),
    ):
        model = seeded(linear)
        _session = rg.attach(model, rules[::-1] if backwards else rules)
        (dx,) = torch.autograd.grad(model(x), x, delta)
        torch.testing.assert_close(dx, expected @ model.weight)


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


def test_observe(runner: Callable[[nn.Module], Any]) -> None:
    """Sees δ, δ̃ and x of each call, changes nothing, and what it spends is counted."""
    model = seeded(linear)
    session = rg.attach(model, [method(Watch), method(Halve)], seed=11)
    x = batch((7, 6))
    run = runner(model)
    plain = gradients(seeded(linear), x)
    for _ in range(2):
        found = gradients(model, x, run)
        assert_same(found, plain | {n: plain[n] / 2 for n in ("weight", "input")}, 1e-5)
    rule = rule_of(model, Watch)
    for number, (call, delta) in enumerate(zip(rule.seen, rule.deltas, strict=True)):
        torch.testing.assert_close(call.delta.sum(0), plain["bias"])
        torch.testing.assert_close(delta.values, call.delta / 2)
        assert torch.equal(call.saved[0], x)
        assert torch.equal(call.weight, model.weight)
        assert tuple(call.input_shape) == (7, 6)
        assert (call.map, call.needs, call.tier) == (LINEAR, rg.Needs(True, True, True), rg.Tier.FULL)
        assert (call.flops, call.number) == (linear_flops(7, 5, 6), number)
        assert call.key == mix_key(11, 0, key_of("(root)"), 0, number)
    assert session.flops().overhead == 14.0


def test_observe_is_told_what_autograd_asked_for() -> None:
    model = seeded(linear)
    _session = rg.attach(model, method(Watch))
    model(batch((7, 6))).sum().backward()
    model.bias.requires_grad_(False)
    model(batch((7, 6)).requires_grad_()).sum().backward()
    needs = [call.needs for call in rule_of(model, Watch).seen]
    assert needs == [rg.Needs(False, True, True), rg.Needs(True, True, False)]


# Around the step.


def test_grad_and_local() -> None:
    """Before and after the optimizer, once a step, with the share of zeros that the step's calls counted."""
    model = seeded(linear)
    session = rg.attach(model, [method(ZeroGrad), method(CountSteps)])
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(*columns: int) -> None:
        """A backward pass for each number: of the five outputs so many are used."""
        optimizer.zero_grad()
        for used in columns:
            model(batch((7, 6)))[:, :used].sum().backward()
        optimizer.step()

    run(5)
    run(2)
    run(1, 4)
    with session.paused():
        run(5)
    assert torch.equal(model.weight, weight)
    assert not torch.equal(model.bias, bias)
    seen = rule_of(model, CountSteps).seen
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert [zeros for _, zeros in seen] == [0.0, pytest.approx(0.6), pytest.approx(0.5), None]
    assert session.metrics()["layers"]["(root)"]["steps"] == 4
    assert session.flops().overhead == 4 * 5.0


@pytest.mark.usefixtures("_turned_is_known")
def test_step_shows_the_layer() -> None:
    """Its parameters by their roles, and how it multiplied last."""
    found: list[rg.Step] = []

    class Look(rg.Rule):
        def grad(self, step: rg.Step) -> None:
            found.append(step)

    for layer, weight, bias in (
        (nn.Linear(6, 4, bias=False), "weight", None),
        (TurnedLinear(), "weight", "bias"),
        (nn.MultiheadAttention(6, 2, batch_first=True), "in_proj_weight", "in_proj_bias"),
    ):
        model = nn.ModuleList([layer])
        _session = rg.attach(model, method(Look), only="0")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = batch((2, 3, 6))
        z = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
        z.sum().backward()
        optimizer.step()
        step = found.pop()
        assert not found
        assert step.layer is layer
        assert step.optimizer is optimizer
        assert step.weight is getattr(layer, weight)
        assert step.bias is (None if bias is None else getattr(layer, bias))
        assert step.map == rg.LinearMap(turned=isinstance(layer, TurnedLinear))


def test_step_of_a_computed_weight() -> None:
    """A weight that is no parameter is nobody's to change: the step shows None."""
    found: list[Any] = []

    class Look(rg.Rule):
        def local(self, step: rg.Step) -> None:
            found.append((step.weight, step.bias is step.layer.bias))

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    _session = rg.attach(model, method(Look))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (4, 6), 1)
    assert found == [(None, True)]


# All together, and what is refused.


def test_two_save_rules_are_refused() -> None:
    """Two rules that keep something, or one that cannot say what dW is, are named; the model stays plain."""

    class Half(rg.Rule):
        def save(self, x: Tensor, weight: Tensor, map: rg.Map) -> tuple[Tensor, ...]:
            return (x,)

    class Other(Project):
        pass

    for rules, names in (([Project, Other], "Other, Project"), ([Half], "Half")):
        model = nn.Sequential(nn.Linear(6, 5))
        with pytest.raises(rg.errors.OptionError, match=rf"layer '0' are filled by {names}"):
            rg.attach(model, [method(rule) for rule in rules])
        assert type(model[0]) is nn.Linear


def test_whoever_reads_the_input_needs_it_kept() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(
        rg.errors.OptionError, match=r"layer '0': Watch reads the layer's input.*Project keeps"
    ):
        rg.attach(model, [method(Watch), method(Project)])
    assert type(model[0]) is nn.Linear


def test_all_slots_compose(runner: Callable[[nn.Module], Any]) -> None:
    """All at once, in either order: the function and the gradients that the mathematics says."""
    x = batch((7, 6))
    reference, function = shifted()
    exact = gradients(reference, x, function)
    U = Project.basis
    rules = [AddOne, Project, Low, HalveLow, CountSteps]
    for order in (rules, rules[::-1]):
        model = seeded(linear)
        session = rg.attach(model, [method(rule) for rule in order])
        found = gradients(model, x, runner(model))
        torch.testing.assert_close(found["weight"], exact["weight"] @ U @ U.T / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["input"], exact["input"] / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["bias"], exact["bias"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(session.fold()(x), function(x))


def test_convolution_slots(runner: Callable[[nn.Module], Any]) -> None:
    """The same slots at a convolution, unbatched input included."""
    for shape in ((2, 3, 9), (3, 9)):
        model, reference = (seeded(lambda: nn.Conv1d(3, 4, 3, padding=1)) for _ in range(2))
        _session = rg.attach(model, [method(AddOne), method(Halve)])

        def function(x: Tensor, layer: nn.Module = reference) -> Tensor:
            return layer(x) + 1

        x = batch(shape)
        plain = gradients(reference, x, function)
        expected = plain | {name: plain[name] / 2 for name in ("weight", "input")}
        assert_same(gradients(model, x, runner(model)), expected, 1e-5)
        assert torch.equal(model.eval()(x), function(x))


class Replace(rg.Rule):
    """Folds into another module."""

    def fold(self, layer: nn.Module) -> nn.Module:
        made = nn.Linear(6, 6)
        made.load_state_dict(layer.state_dict())
        return nn.Sequential(made)


def test_fold_into_another_module() -> None:
    """It takes the layer's place in the copy, at any depth, and is the copy where the layer is the model."""
    model = seeded(lambda: nn.ModuleDict({"deep": nn.Sequential(nn.Tanh(), nn.Linear(6, 6))}))
    session = rg.attach(model, method(Replace))
    folded = session.fold()
    assert type(folded["deep"][1]) is nn.Sequential
    assert type(model["deep"][1]).__name__ == "RetrogradeLinear"
    x = batch((5, 6))
    assert torch.equal(folded["deep"](x), model["deep"](x))
    root = seeded(lambda: nn.Linear(6, 6))
    folded = rg.attach(root, method(Replace)).fold()
    assert type(folded) is nn.Sequential
    assert torch.equal(folded(x), root(x))


def test_fold_of_a_shared_layer() -> None:
    """A layer that is folded into another module is that module under all its names."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.inner = nn.ModuleList([nn.Tanh(), self.first])

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[1](torch.tanh(self.first(x)))

    model = seeded(Shared)
    session = rg.attach(model, method(Replace))
    folded = session.fold()
    assert type(folded.first) is nn.Sequential
    assert folded.inner[1] is folded.first
    assert torch.equal(folded(batch((5, 6))), model(batch((5, 6))))


def test_unknown_answer_is_a_reason() -> None:
    """A method that leaves a layer alone says why, and the plan repeats it."""

    class Picky(rg.Method):
        name = "picky"

        def make_rule(self, site: rg.Site) -> rg.Rule | str:
            return Halve(site.name) if site.name == "0" else "not the first"

    plan = rg.make_plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [Picky()])
    assert [row.status for row in plan.rows] == ["attached", "left"]
    assert plan.rows[1].why == "picky: not the first"
