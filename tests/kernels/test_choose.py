"""The choice among kernels: fitted, kept, and taken where it may be."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import retrograde as rg
from retrograde.errors import RetrogradeWarning, StateError
from retrograde.kernels import calibrate, choose, linear, reference
from retrograde.kernels.choose import ConvolutionProblem, CostModel, Problem
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import SMALL, Products
from retrograde.kernels.geometry import Geometry

ROWS, OUT, IN = 256, 256, 256


class Favours(CostModel):
    """A machine on which one kernel takes no time."""

    def __init__(self, kernel: str) -> None:
        super().__init__({})
        self._kernel = kernel

    def seconds(self, kernel: str, problem: Problem | ConvolutionProblem) -> float:
        return float(kernel != self._kernel)


def favour(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Favours(kernel)
    monkeypatch.setattr(choose, "model", lambda: model)


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
        def best(self, problem: ConvolutionProblem, allowed: tuple[str, ...]) -> str:
            assert set(allowed) == {"dense", "skip", "bfloat16"}
            return inner if problem.product == "input" else "bfloat16"

    monkeypatch.setattr(choose, "model", Picks)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, 16, 16, generator=generator)
    weight = torch.randn(32, 32, 3, 3, generator=generator)
    delta = Delta(torch.randint(-3, 4, (8, 32, 16, 16), generator=generator).to(torch.int8), 0.25)
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
    def unwanted() -> CostModel:
        raise AssertionError("calibrated for a product of a few microseconds")

    monkeypatch.setattr(choose, "model", unwanted)
    small = Delta(torch.ones(8, 8, dtype=torch.int8), 1.0)
    assert Products(small).linear_weight_grad(torch.randn(8, 8)).kernel == reference.NAME
    just_below = Delta(torch.ones(64, 8, dtype=torch.int8), 1.0)
    width = (SMALL - 1) // (64 * 8)
    assert Products(just_below).linear_weight_grad(torch.randn(64, width)).kernel == reference.NAME
    with pytest.raises(AssertionError, match="calibrated"):
        Products(just_below).linear_weight_grad(torch.randn(64, width + 1))


def test_executed_work_is_that_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    favour("skip", monkeypatch)
    layer = nn.Linear(IN, OUT)
    session = rg.attach(layer, rg.Dither(scale=4.0))
    layer(torch.randn(ROWS, IN)).square().sum().backward()
    flops = session.flops()
    assert flops.weight_grad.executed == flops.weight_grad.needed < flops.weight_grad.dense / 2
    (figures,) = session.metrics()["layers"].values()
    assert figures["kernel_skip"] == 1.0


EXACT = Problem(256, 256, 1024, 2000, levels=False, transposed=False)
CONVOLUTION = ConvolutionProblem(
    "input", 1 << 16, 1 << 16, (64, 64, 3, 3), 1, 1 << 12, levels=True, channels_last=False
)


def all_fits() -> dict[str, int]:
    return {name: size for family in choose.FAMILIES for name, size in choose._fits(family).items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that knows no calibration yet."""
    monkeypatch.setenv("RETROGRADE_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "_models", {})
    return tmp_path / "kernels"


@pytest.mark.parametrize("family", choose.FAMILIES)
def test_the_fit_is_kept(family: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_SHAPES", ((8, 16, 32), (32, 64, 16)))
    monkeypatch.setattr(calibrate, "_CONVOLUTIONS", ((2, 4, 6, 4, 3, 1, 1), (2, 4, 6, 4, 1, 1, 2)))
    first = choose.model()
    first.complete(family)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == first.weights
    assert {name: len(row) for name, row in first.weights.items()} == choose._fits(family)
    assert all(weight >= 0 for row in first.weights.values() for weight in row)

    def unwanted(family: str) -> dict[str, list[float]]:
        raise AssertionError("calibrated twice")

    monkeypatch.setattr(calibrate, "calibrate", unwanted)
    monkeypatch.setattr(choose, "_models", {})
    again = choose.model()
    again.complete(family)
    assert again.weights == first.weights


def test_only_what_is_asked_for_is_calibrated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what another process has calibrated in the meantime stays."""
    made: list[str] = []

    def make(family: str) -> dict[str, list[float]]:
        made.append(family)
        return {name: [1.0] * size for name, size in choose._fits(family).items()}

    monkeypatch.setattr(calibrate, "calibrate", make)
    first, other = choose.model(), CostModel({}, choose._calibrated)
    first.best(CONVOLUTION, ("dense",))
    assert made == []
    for _ in range(2):
        first.best(CONVOLUTION, ("dense", "skip"))
    assert made == ["convolution"]
    other.best(EXACT, ("dense", "skip"))
    assert made == ["convolution", "linear/float32"]
    monkeypatch.setattr(choose, "_models", {})
    assert choose.model().weights.keys() == {*first.weights, *other.weights}


def test_a_hopeless_kernel_is_not_measured_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated precision; what skips zeros may win with more of them, and small products say nothing."""
    runs: list[str] = []
    monkeypatch.setattr(calibrate, "_time", lambda work, other: work())
    measured = calibrate._Measured()
    for dense in (1e-5, 0.005, 0.005):
        for kernel, seconds in (("dense", dense), ("skip", 0.1), ("bfloat16", 0.1)):

            def work(kernel: str = kernel, seconds: float = seconds) -> float:
                runs.append(kernel)
                return seconds

            measured.add(kernel, EXACT, work)
    assert runs == ["dense", "skip", "bfloat16"] * 2 + ["dense", "skip"]
    assert set(measured.fits()) == {EXACT.fit(kernel) for kernel in ("dense", "skip", "bfloat16")}


def test_a_damaged_fit_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(family: str) -> dict[str, list[float]]:
        made.append(family)
        return {name: [1.0] * size for name, size in choose._fits(family).items()}

    monkeypatch.setattr(calibrate, "calibrate", make)
    choose.model().complete("convolution")
    (file,) = cache.iterdir()
    contents = ("", "[1, 2]", '{"dense": [1.0]}', '{"dense": "x"}')
    for content in contents:
        file.write_text(content)
        monkeypatch.setattr(choose, "_models", {})
        choose.model().complete("convolution")
    assert len(made) == 1 + len(contents)


def test_a_run_goes_on_with_its_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's, or a new one on this machine, would choose kernels that round differently."""
    mine = CostModel({name: [1.0] * size for name, size in all_fits().items()})
    other = CostModel({name: [2.0] * size for name, size in all_fits().items()})
    layer = nn.Linear(4, 4)
    session = rg.attach(layer, rg.Dither())
    monkeypatch.setattr(choose, "_models", {})
    assert session.state_dict()["calibration"] is None
    choose._models[choose._which()] = mine
    state = session.state_dict()
    monkeypatch.setattr(choose, "_models", {})
    session.load_state_dict(state)
    assert choose.model().weights == mine.weights
    session.load_state_dict(state)
    monkeypatch.setattr(choose, "_models", {choose._which(): other})
    with pytest.warns(RetrogradeWarning, match="a calibration other than"):
        session.load_state_dict(state)
    assert choose.model() is other
    assert set(map(tuple, other.weights.values())) == {(2.0,) * size for size in all_fits().values()}
    monkeypatch.setattr(choose, "_models", {})
    state["calibration"]["weights"].popitem()
    with pytest.warns(RetrogradeWarning, match="a calibration other than"):
        session.load_state_dict(state)
    for damaged in ({}, {"for": [1], "weights": [1]}, {"for": [1], "weights": {"a": ["x"]}}):
        with pytest.raises(StateError, match="damaged"):
            session.load_state_dict({**state, "calibration": damaged})
    assert not choose._models


def test_a_run_brings_the_families_that_it_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those that the process that resumes it knows already."""
    convolutions, linear = (
        {name: [1.0] * size for name, size in choose._fits(family).items()}
        for family in ("convolution", "linear/float32")
    )
    monkeypatch.setattr(choose, "_models", {choose._which(): CostModel(dict(convolutions))})
    choose.load_state_dict({"for": list(choose._which()), "weights": linear})
    assert choose.model().weights == {**convolutions, **linear}


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_a_long_calibration_is_announced_once(
    patience: float, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "_PATIENCE", patience)

    def make(family: str) -> dict[str, list[float]]:
        time.sleep(0.2)
        return {name: [1.0] * size for name, size in choose._fits(family).items()}

    monkeypatch.setattr(calibrate, "calibrate", make)
    choose.model().complete("convolution")
    monkeypatch.setattr(choose, "_models", {})
    choose.model().complete("convolution")
    said = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == (patience == 0)
    assert all(str(cache) in record.getMessage() for record in said)
    assert all("convolution" in record.getMessage() for record in said)


def test_few_zeros_are_not_skipped_whatever_was_measured() -> None:
    """A calibration on a busy machine may say that visiting every entry by itself beats a dense product."""
    problem = choose.Problem(64, 32, 16, 2000, levels=False, transposed=False)
    dense, skip = (problem.fit(kernel) for kernel in ("dense", "skip"))
    model = choose.CostModel(
        {dense: [1.0] * len(problem.terms("dense")), skip: [0.0] * len(problem.terms("skip"))}
    )
    assert model.best(problem, ("dense", "skip")) == "dense"
    assert model.best(choose.Problem(64, 32, 16, 1000, False, False), ("dense", "skip")) == "skip"


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
