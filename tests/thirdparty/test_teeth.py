"""The checks find faults: methods and maps with one fault each, and what is said of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from a_layer import GroupedKind, GroupedLinear, GroupedMap
from torch import Tensor, nn

import retrograde as rg
from retrograde.testing import LAYERS, METHODS, check_layer, check_method

LINEAR = [LAYERS[0]]


class Sound(rg.Rule):
    """Fills nothing: what the faulty ones differ from."""

    count = 0


class Louder(Sound):
    def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
        return rg.Delta(delta.values * 1.001)


class Steeper(Sound):
    def grad(self, step: rg.Step) -> None:
        step.weight.grad.mul_(1.001)


class OtherOutput(Sound):
    def output(self, x: Tensor, z: Tensor, map: rg.Map) -> Tensor:
        return z * 1.001


class OnceOnly(Sound):
    """Half of what the second backward pass of a step brings is lost."""

    def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
        return rg.Delta(delta.values * (0.5 if call.number else 1.0))


class Forgets(Sound):
    """Its state is not in state_dict."""

    def grad(self, step: rg.Step) -> None:
        self.count += 1
        step.weight.grad.mul_(1 / self.count)


class Divides(Sound):
    def grad(self, step: rg.Step) -> None:
        step.weight.grad.div_(0)


class CountsForward(Sound):
    """State that changes in the forward pass."""

    def output(self, x: Tensor, z: Tensor, map: rg.Map) -> Tensor:
        self.count += 1
        return z + self.count


class Adds(Sound):
    """Leaves a parameter behind."""

    def prepare(self, layer: nn.Module) -> None:
        layer.extra = nn.Parameter(torch.zeros(2))


class Misfolds(Sound):
    def fold(self, layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.weight.mul_(2)
        return layer


class Overcounts(Sound):
    def save(self, x: Tensor, weight: Tensor, map: rg.Map) -> tuple[Tensor, ...]:
        return (x,)

    def product(self, call: rg.Call, delta: rg.Delta) -> rg.Work:
        work = call.map.weight_grad(call.products, call.operand, call.weight)
        work.needed *= 3
        return work


class Discounts(Overcounts):
    def product(self, call: rg.Call, delta: rg.Delta) -> rg.Work:
        work = call.map.weight_grad(call.products, call.operand, call.weight)
        work.discounted = 2 * work.executed
        return work


class Figures(Sound):
    def metrics(self) -> dict[str, Any]:
        return {"figure": torch.zeros(2)}


class Unsavable(Sound):
    def state_dict(self) -> dict[str, Any]:
        return {"function": torch.relu}


class Breaks(Sound):
    """Asks a tensor's value in the forward pass, which compilers cannot follow."""

    def output(self, x: Tensor, z: Tensor, map: rg.Map) -> Tensor:
        return z if float(z.detach().sum()) > 0 else z * 1


@dataclass(frozen=True)
class Faulty(rg.Method):
    rule: Any = Sound
    name = "faulty"

    def make_rule(self, site: rg.Site) -> rg.Rule | str:
        return self.rule(site.name) if isinstance(self.rule, type) else self.rule


def test_a_sound_rule_passes() -> None:
    assert check_method(Faulty, neutral=Faulty, layers=LINEAR) == {}


@pytest.mark.parametrize(
    ("rule", "check", "words"),
    [
        ("", "declining", "without a reason"),
        (Louder, "neutral", "not plain autograd's"),
        (Steeper, "neutral", "slot `grad`"),
        (OtherOutput, "neutral", "another output"),
        (OnceOnly, "accumulation", "do not add up"),
        (Forgets, "resume", "state that its state_dict"),
        (Unsavable, "resume", "weights_only|UnpicklingError"),
        (Divides, "training", "not finite"),
        (Overcounts, "training", "weight_grad: needed"),
        (Discounts, "training", "weight_grad: discounted"),
        (Figures, "training", "JSON"),
        (CountsForward, "checkpointing", "change no state in it"),
        (Adds, "detach", "parameters are others"),
        (Misfolds, "fold", "something else"),
        (Breaks, "compiled", "UserError|Unsupported"),
    ],
)
def test_a_fault_of_a_method_is_found(rule: Any, check: str, words: str) -> None:
    """By its check, in words that name the method and the layer kind."""
    checks = [check] if check != "declining" else []
    with pytest.raises(AssertionError, match=rf"^faulty on linear, {check}: (.|\n)*{words}"):
        check_method(partial(Faulty, rule), neutral=partial(Faulty, rule), layers=LINEAR, checks=checks)


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(
        rg.errors.OptionError, match=r"no checks \['resuming'\]. The checks: neutral, training"
    ):
        check_method(Faulty, checks=["resuming"])


def test_a_method_that_declines_everything_is_of_no_use() -> None:
    with pytest.raises(AssertionError, match=r"declines every layer kind: .*not today"):
        check_method(partial(Faulty, "not today"), layers=LINEAR)


# Maps.


def turned(map: GroupedMap, **methods: Any) -> rg.Map:
    """`map`, with some of its methods replaced."""
    return type(f"Faulty{type(map).__name__}", (type(map),), {"name": f"faulty {id(methods)}", **methods})(
        map.groups
    )


def double(name: str) -> Callable[..., Any]:
    """What the sound method returns, twice as large."""

    def run(self: Any, *args: Any) -> Any:
        found = getattr(GroupedMap, name)(self, *args)
        if isinstance(found, rg.Work):
            found.value = found.value * 2
            return found
        return tuple(2 * f for f in found if f is not None) if isinstance(found, tuple) else found * 2

    return run


@pytest.mark.parametrize(
    ("method", "fault", "words"),
    [
        ("forward", double("forward"), "LayerKind.forward differs"),
        ("input_grad", double("input_grad"), "Map.input_grad is not autograd's"),
        ("weight_grad", double("weight_grad"), "Map.weight_grad is not autograd's"),
        ("bias_grad", double("bias_grad"), "Map.bias_grad is not autograd's"),
        ("gradients", double("gradients"), "Map.gradients is not autograd's"),
        ("from_matrix", double("from_matrix"), "Map.from_matrix does not undo"),
        ("matrix", lambda self, w: w[..., :1].mT, "Map.matrix: .* is not"),
        ("flops", double("flops"), "Map.flops: .* where rows and matrix make"),
        ("outputs", double("outputs"), "Map.axis"),
        ("axis", lambda self, d: 0, "Map.axis"),
        ("per_row", double("per_row"), "Map.per_row is not the transpose"),
        ("rows", double("rows"), "Map.rows times Map.matrix is not z"),
        ("rows", lambda self, x, w, budget: GroupedMap.rows(self, x, w, 1 << 30), "rows, 3 are the budget"),
        ("narrow", lambda self, x, u, w: x, "Map.narrow"),
        ("narrow_weight_grad", double("narrow_weight_grad"), "is not dW U Uᵀ"),
        ("of", classmethod(lambda cls, numbers: cls(1)), "compiled code would take that"),
    ],
)
def test_a_fault_of_a_map_is_found(method: str, fault: Any, words: str) -> None:
    """In words that name the method of the map."""
    layer = partial(type("Faulty", (GroupedLinear,), {"forward": GroupedLinear.forward}), 6, 4, 2)
    found = rg.register_map(turned(GroupedMap(2), **{method: fault}).__class__)
    kind = type("Kind", (GroupedKind,), {"map": lambda self, layer: found(layer.groups)})()
    with pytest.raises(AssertionError, match=rf"^Faulty: (.|\n)*{words}"):
        check_layer(layer, (7, 6), kind=kind, methods={"dither": METHODS["dither"]}, checks=[])


def test_faults_of_a_kind_are_found() -> None:
    class Renamed(GroupedKind):
        weight = "weight"

    class PastProduct(GroupedKind):
        def forward(self, layer: Any, product: Any, x: Tensor) -> Tensor:
            return GroupedLinear.forward(layer, x)

    for kind, words in ((Renamed(), "LayerKind.names"), (PastProduct(), "multiplies without product")):
        layer = partial(type("Other", (GroupedLinear,), {"forward": GroupedLinear.forward}), 6, 4, 2)
        with pytest.raises(AssertionError, match=f"^Other: .*{words}"):
            check_layer(layer, (7, 6), kind=kind, checks=[])
    with pytest.raises(AssertionError, match=r"^Tanh: the type is not registered"):
        check_layer(nn.Tanh, (7, 6))


def test_a_layer_kind_that_no_method_takes_is_reported() -> None:
    """With the reason, and without training."""
    reason = check_layer(LAYERS[0].make, (8, 6), methods={"faulty": partial(Faulty, "not today")})
    assert reason == {"faulty": "faulty: not today"}
