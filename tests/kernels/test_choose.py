"""The choice among kernels: measured, kept, and taken where it may be."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import retrograde as rg
from retrograde.errors import RetrogradeWarning, StateError
from retrograde.kernels import choose, linear, reference
from retrograde.kernels.choose import Chooser, Problem
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import SMALL, Products
from retrograde.kernels.geometry import Geometry

ROWS, OUT, IN = 256, 256, 256


class Favours:
    """A machine on which one kernel is the fastest wherever it is allowed."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel

    def best(self, problem: Problem, allowed: tuple[str, ...], compute: object = None) -> str:
        return self._kernel if self._kernel in allowed else "dense"


def favour(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that emulates no precision."""
    monkeypatch.setattr(choose, "chooser", lambda: Favours(kernel))
    monkeypatch.setattr(choose, "fast_precision", lambda name: True)


def levels() -> Delta:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-9, 10, (ROWS, OUT), generator=generator)
    return Delta((values * (torch.rand(ROWS, OUT, generator=generator) > 0.9)).to(torch.int8), 0.1)


@pytest.mark.parametrize("kernel", linear.KERNELS)
def test_every_kernel_stands_in_for_the_reference(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    favour(kernel, monkeypatch)
    delta, weight, x = levels(), torch.randn(OUT, IN), torch.randn(ROWS, IN)
    products = Products(delta, "int8")
    of_input, of_weight = products.linear_input_grad(weight, (ROWS, IN)), products.linear_weight_grad(x)
    rtol, atol = (1e-4, 1e-4) if kernel in ("dense", "skip") else (0.05, 0.15)
    expected = reference.linear_input_grad(delta, weight, (ROWS, IN))
    torch.testing.assert_close(of_input.value, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(of_weight.value, reference.linear_weight_grad(delta, x), rtol=rtol, atol=atol)
    dense = 2 * ROWS * OUT * IN
    discount = {None: 1.0, "bfloat16": 0.5, "int8": 0.25}[linear.PRECISION.get(kernel)]
    for work in (of_input, of_weight):
        assert work.kernel == (reference.NAME if kernel == "dense" else kernel)
        assert work.needed == pytest.approx(dense * (1 - delta.zeros / (ROWS * OUT)))
        assert work.executed == (work.needed if kernel.startswith("skip") else dense)
        assert work.discounted == discount * work.executed


@pytest.mark.parametrize("kernel", ["bfloat16", "skip-bfloat16", "int8"])
def test_nothing_is_rounded_that_may_not_be(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    favour(kernel, monkeypatch)
    weight = torch.randn(OUT, IN)
    exact = Delta(torch.randn(ROWS, OUT))
    for delta, precision in ((levels(), "float32"), (exact, "int8")):
        work = Products(delta, precision).linear_input_grad(weight, (ROWS, IN))
        assert work.kernel == reference.NAME
        assert work.discounted == work.executed
        assert torch.equal(work.value, reference.linear_input_grad(delta, weight, (ROWS, IN)))


@pytest.mark.parametrize("inner", ["skip", "bfloat16"])
@pytest.mark.parametrize("first", ["weight", "input"])
def test_convolutions_in_bfloat16(inner: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels are exact, the other operand is rounded; both products may come from one call, in any order."""

    class Picks:
        def best(self, problem: Problem, allowed: tuple[str, ...], compute: object) -> str:
            assert set(allowed) == {"dense", "skip", "bfloat16"}
            return inner if problem.product == "convolution/input" else "bfloat16"

    monkeypatch.setattr(choose, "chooser", Picks)
    monkeypatch.setattr(choose, "fast_precision", lambda name: True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, 16, 16, generator=generator)
    weight = torch.randn(32, 32, 3, 3, generator=generator)
    levels = torch.randint(-3, 4, (8, 32, 16, 16), generator=generator)
    levels *= torch.rand(levels.shape, generator=generator) > 0.6
    delta = Delta(levels.to(torch.int8), 0.25)
    geometry = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    products = Products(delta, "int8")
    found = {}
    for name in (first, "weight", "input"):
        if name == "input":
            found[name] = products.convolution_input_grad(weight, x.shape, geometry)
        else:
            found[name] = products.convolution_weight_grad(x, weight, geometry)
    assert (found["weight"].kernel, found["input"].kernel) == ("bfloat16", inner)
    dense = 2 * delta.values.numel() * 32 * 9
    assert found["weight"].executed == dense
    assert found["weight"].discounted == dense / 2
    assert found["input"].executed == (dense if inner == "bfloat16" else found["input"].needed)
    assert found["input"].discounted == found["input"].executed * (0.5 if inner == "bfloat16" else 1)
    for name, exact in (
        ("input", reference.convolution_input_grad(delta, weight, x.shape, geometry)),
        ("weight", reference.convolution_weight_grad(delta, x, weight, geometry)),
    ):
        assert found[name].value.dtype == torch.float32
        distance = float((found[name].value - exact).norm() / exact.norm())
        assert distance < (1e-5 if (name, inner) == ("input", "skip") else 0.01)
    with pytest.raises(AssertionError):
        Products(delta, "float32").convolution_input_grad(weight, x.shape, geometry)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    favour("skip", monkeypatch)
    work = Products(levels()).linear_input_grad(torch.randn(OUT, IN).to(dtype), (ROWS, IN))
    assert work.value.dtype == dtype
    assert work.kernel == reference.NAME
    assert work.discounted == work.executed * (1.0 if dtype == torch.float64 else 0.5)


def test_small_products_are_not_worth_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted() -> Chooser:
        raise AssertionError("tried for a product of a few microseconds")

    monkeypatch.setattr(choose, "chooser", unwanted)
    small = Delta(torch.ones(8, 8, dtype=torch.int8), 1.0)
    assert Products(small).linear_weight_grad(torch.randn(8, 8)).kernel == reference.NAME
    just_below = Delta(torch.ones(64, 8, dtype=torch.int8), 1.0)
    width = (SMALL - 1) // (64 * 8)
    assert Products(just_below).linear_weight_grad(torch.randn(64, width)).kernel == reference.NAME
    with pytest.raises(AssertionError, match="tried"):
        Products(just_below, "int8").linear_weight_grad(torch.randn(64, width + 1))


def test_executed_work_is_that_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    favour("skip", monkeypatch)
    layer = nn.Linear(IN, OUT)
    session = rg.attach(layer, rg.Dither(scale=4.0))
    layer(torch.randn(ROWS, IN)).square().sum().backward()
    flops = session.flops()
    assert flops.weight_grad.executed == flops.weight_grad.needed < flops.weight_grad.dense / 2
    (figures,) = session.metrics()["layers"].values()
    assert figures["kernel_skip"] == 1.0


class Machine:
    """One on which every kernel takes a known time, and nothing else takes any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.seconds = seconds
        self.runs: list[str] = []
        self._now = 0.0
        monkeypatch.setattr(choose, "time", SimpleNamespace(perf_counter=lambda: self._now))

    def __call__(self, kernel: str) -> None:
        self.runs.append(kernel)
        self._now += self.seconds[kernel]

    def met(self, chooser: Chooser, problem: Problem, *allowed: str) -> str:
        """The kernel for a product; `runs` holds those that were tried for it."""
        self.runs.clear()
        return chooser.best(problem, allowed, self)


def problem(nonzeros: float, kept: float = 1.0, size: int = 64) -> Problem:
    return Problem.of("linear/input", "float32 float32", (size, size), 64, nonzeros, kept)


def test_the_fastest_has_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, chooser = Machine(monkeypatch, dense=0.02, skip=0.015), Chooser()
    assert machine.met(chooser, problem(0.1), "dense", "skip") == "skip"
    assert machine.runs == ["dense", "skip"] * 4
    assert machine.met(chooser, problem(0.1), "dense", "skip") == "skip"
    assert not machine.runs
    assert machine.met(chooser, problem(0.1), "dense") == "dense"
    assert not machine.runs
    assert machine.met(chooser, problem(0.1, size=65), "dense", "skip") == "skip"
    assert machine.runs


def test_what_takes_long_is_tried_less(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, dense=0.1, skip=0.3)
    assert machine.met(Chooser(), problem(0.1), "dense", "skip") == "dense"
    assert machine.runs == ["dense", "skip", "dense", "skip", "dense"]


def test_what_is_known_of_other_zeros_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense products do not depend on them; more non-zeros take no less time, nor half of them less than half."""
    machine, chooser = Machine(monkeypatch, dense=0.02, skip=0.05), Chooser()
    assert machine.met(chooser, problem(1 / 4), "dense", "skip") == "dense"
    assert machine.met(chooser, problem(1 / 2), "dense", "skip") == "dense"
    assert not machine.runs
    machine.seconds["skip"] = 0.01
    assert machine.met(chooser, problem(1 / 5), "dense", "skip") == "dense"
    assert not machine.runs
    assert machine.met(chooser, problem(1 / 16), "dense", "skip") == "skip"
    assert machine.runs == ["skip"] * 4
    assert machine.met(chooser, problem(1 / 8), "dense", "skip") == "dense"
    assert not machine.runs
    assert chooser.seconds(problem(1 / 8), "skip") == pytest.approx(0.01 + 0.04 / 3)
    assert chooser.seconds(problem(1 / 8), "dense") == pytest.approx(0.02)
    assert math.isnan(chooser.seconds(problem(1 / 64), "skip"))
    machine.seconds["compact"] = 0.001
    assert machine.met(chooser, problem(1 / 16, 1 / 4), "dense", "skip", "compact") == "compact"
    assert machine.runs == ["compact"] * 4
    assert machine.met(chooser, problem(1 / 4, 1 / 4), "dense", "skip", "compact") == "compact"
    assert not machine.runs


def test_batches_of_every_size_are_few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are as long as they are; what was tried on fewer rows holds for a few more."""
    machine, chooser = Machine(monkeypatch, dense=0.02, skip=0.01), Chooser()
    trials = 0
    for rows in range(1000, 3000):
        one = Problem.of("linear/input", "float32 float32", (64, 64), rows, 0.1 + 1e-5 * rows)
        machine.met(chooser, one, "dense", "skip")
        trials += len(machine.runs) > 0
    assert trials <= 6
    assert len(chooser.answers) == len(chooser._taken) <= 16
    assert chooser.seconds(one, "skip") == pytest.approx(0.01, rel=0.25)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that has met no product."""
    monkeypatch.setenv("RETROGRADE_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "_choosers", {})
    return tmp_path / "kernels"


def test_answers_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that another process has found in the meantime stay."""
    machine, mine, other = Machine(monkeypatch, dense=2e-3, skip=1e-3), choose.chooser(), choose.chooser()
    monkeypatch.setattr(choose, "_choosers", {})
    other = choose.chooser()
    machine.met(mine, problem(0.1), "dense", "skip")
    machine.met(other, problem(0.1, size=32), "dense", "skip")
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {**mine.answers, **other.answers}
    monkeypatch.setattr(choose, "_choosers", {})
    again = choose.chooser()
    for size in (32, 64):
        assert machine.met(again, problem(0.1, size=size), "dense", "skip") == "skip"
        assert not machine.runs
    assert machine.met(again, problem(0.4, size=64), "dense", "skip") == "skip"
    assert machine.runs == ["skip"] * 4


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1, 2]", '{"dense": [1.0]}', "[" * 100_000),
        *('{"a 1 2: b c": {"kernel": "d", "seconds": {}}}', '{"a 1 2: b c": {"kernel": [], "seconds": {}}}'),
        '{"a 1 2: b c": {"kernel": "b", "seconds": {"c": NaN}}}',
    ],
    ids=["empty", "list", "other", "deep", "unknown kernel", "no kernel", "no number"],
)
def test_damaged_answers_are_found_again(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, dense=2e-3, skip=1e-3)
    machine.met(choose.chooser(), problem(0.1), "dense", "skip")
    (file,) = cache.iterdir()
    file.write_text(content)
    monkeypatch.setattr(choose, "_choosers", {})
    assert not choose.chooser().answers
    assert machine.met(choose.chooser(), problem(0.1), "dense", "skip") == "skip"
    assert json.loads(file.read_text()) == choose.chooser().answers


@pytest.mark.usefixtures("cache")
def test_a_run_goes_on_with_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, or the same one on another day, would choose kernels that round differently."""
    session = rg.attach(nn.Linear(4, 4), rg.Dither())
    assert session.state_dict()["calibration"] is None
    machine = Machine(monkeypatch, dense=2e-3, skip=1e-3)
    machine.met(choose.chooser(), problem(0.1), "dense", "skip")
    state = session.state_dict()
    machine.seconds["skip"] = 3e-3
    monkeypatch.setattr(choose, "_choosers", {choose._which(): Chooser()})
    session.load_state_dict(state)
    assert machine.met(choose.chooser(), problem(0.1), "dense", "skip") == "skip"
    session.load_state_dict(state)
    monkeypatch.setattr(choose, "_choosers", {choose._which(): Chooser()})
    assert machine.met(choose.chooser(), problem(0.1), "dense", "skip") == "dense"
    for other in (
        state["calibration"],
        {"for": [7], "answers": {}},
        {"for": [2], "weights": {"dense": [1.0]}},
    ):
        with pytest.warns(RetrogradeWarning, match="a calibration other than"):
            session.load_state_dict({**state, "calibration": other})
    assert machine.met(choose.chooser(), problem(0.1), "dense", "skip") == "dense"
    for damaged in ({}, {"for": [1], "answers": [1]}, {"for": [1], "answers": {"a": ["x"]}}):
        with pytest.raises(StateError, match="damaged"):
            session.load_state_dict({**state, "calibration": damaged})


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_long_trials_are_announced(
    patience: float, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "_PATIENCE", patience)
    choose._announce.cache_clear()
    for share in (0.1, 0.3):
        choose.chooser().best(problem(share), ("dense", "skip"), lambda kernel: time.sleep(0.02))
    said = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == (patience == 0), "once for all products"
    assert all(str(cache) in record.getMessage() for record in said)


def test_kept_answers_can_be_forgotten(cache: Path) -> None:
    asked: list[str] = []
    for _ in range(2):
        choose.chooser().best(problem(0.1), ("dense", "skip"), asked.append)
    before = len(asked)
    assert choose.forget() == 1
    assert not list(cache.rglob("*.json"))
    choose.chooser().best(problem(0.1), ("dense", "skip"), asked.append)
    assert len(asked) > before


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_few_zeros_are_not_skipped(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """To visit more than half of the entries one by one is never tried."""
    favour("skip", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    delta = Delta(torch.randn(ROWS, OUT) * (torch.rand(ROWS, OUT, generator=generator) < share))
    work = Products(delta).linear_input_grad(torch.randn(OUT, IN), (ROWS, IN))
    assert work.kernel == ("skip" if share < 0.5 else reference.NAME)


@pytest.mark.parametrize("order", ["contiguous", "turned"])
def test_convolutions_of_one_dimension_skip_zeros(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are convolutions over images of one row, whichever way they lie in memory."""
    favour("skip", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 40, 24, generator=generator)
    if order == "turned":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = torch.randn(48, 20, 5, generator=generator)
    geometry = Geometry((2,), (3,), (2,), False, (0,), 2)
    z = torch.nn.functional.conv1d(x, weight, None, 2, 3, 2, 2)
    delta = Delta(
        torch.randn(z.shape, generator=generator) * (torch.rand(z.shape, generator=generator) > 0.9)
    )
    monkeypatch.setattr("retrograde.kernels.dispatch.SMALL", 0)
    products = Products(delta)
    of_weight = products.convolution_weight_grad(x, weight, geometry)
    of_input = products.convolution_input_grad(weight, x.shape, geometry)
    for work, expected in (
        (of_weight, reference.convolution_weight_grad(delta, x, weight, geometry)),
        (of_input, reference.convolution_input_grad(delta, weight, x.shape, geometry)),
    ):
        assert work.kernel == "skip"
        torch.testing.assert_close(work.value, expected, rtol=1e-4, atol=1e-4)
