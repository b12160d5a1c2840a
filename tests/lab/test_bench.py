"""Benchmarks: turns, ratios, budgets, and variants that compute what they claim. No time is asserted."""

import itertools

import pytest
import torch
from torch import nn

from retrograde.errors import OptionError
from retrograde.lab import bench, contestants, timing
from retrograde.lab.bench import Limits, Measured, Row
from retrograde.lab.contestants import AFTER_INT8, Contestant, Convolution, Linear, Shape, Workload
from retrograde.lab.precisions import Precision
from retrograde.lab.timing import Times
from retrograde.methods.dither import Dither

SHAPES: tuple[Shape, ...] = (
    Linear(48, 32, 24),
    Convolution(3, 8, 6, 4, 3),
    Convolution(2, 4, 8, 6, 3, stride=2),
    Convolution(2, 4, 6, 8, 1),
    Convolution(2, 8, 6, 4, 3, groups=2),
)
WORKLOADS = {
    "mlp": Workload(lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)), (8, 20), (8,), 5),
    "tokens": Workload(
        lambda: nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 7)), (4, 6), (4, 6), 7, tokens=7
    ),
}


# Variants.


@pytest.mark.parametrize("sparsity", [0.8, 0.92, 0.98])
@pytest.mark.parametrize("shape", [Linear(256, 128, 8), Convolution(8, 2, 16, 16, 3)], ids=lambda s: s.op)
def test_dithering_leaves_the_share_of_zeros_that_was_asked_for(shape: Shape, sparsity: float) -> None:
    _, _, delta = contestants.operands(shape)
    found = contestants.dithered(delta, contestants.scale_for(delta, sparsity))
    assert found.zeros / delta.numel() == pytest.approx(sparsity, abs=0.01)


def test_a_share_of_zeros_that_no_scale_gives_is_refused() -> None:
    """One huge entry widens the step for all."""
    delta = torch.ones(100)
    delta[0] = 1e6
    with pytest.raises(OptionError, match="no scale gives"):
        contestants.scale_for(delta, 0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_contestant_computes_both_products(shape: Shape) -> None:
    layer, x, delta = contestants.operands(shape)
    weight = layer.get_parameter("weight")
    runs = contestants.products(shape, weight.detach(), x, delta, contestants.scale_for(delta, 0.8))
    chosen = ["auto", AFTER_INT8] if isinstance(shape, Linear) else ["auto"]
    assert list(runs) == ["fp32", "bf16", *contestants.kernels_for(shape), *chosen]
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(delta)
    for wanted, found in zip((leaf.grad, weight.grad), runs["fp32"](), strict=True):
        torch.testing.assert_close(found, wanted)
    for wanted, found in zip((leaf.grad, weight.grad), runs["bf16"](), strict=True):
        assert found.dtype == torch.bfloat16
        assert _distance(found.float(), wanted) < 0.02
    exact = runs["dense"]()
    for name in (*contestants.kernels_for(shape), *chosen):
        found = runs[name]()
        pair = [work.value for work in found] if name in chosen else found
        for wanted, grad in zip(exact, pair, strict=True):
            assert grad.shape == wanted.shape
            assert _distance(grad, wanted) < 0.02, name


def _distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def test_layers_contend_from_the_same_weights_and_the_attached_one_is_dithered() -> None:
    runs, session = contestants.passes(SHAPES[0], Dither(scale=2.0))
    assert list(runs) == ["fp32", "bf16", "auto"]
    for run in runs.values():
        run()
        run()
    (layer,) = session.metrics()["layers"].values()
    assert layer["scale"] == 2.0
    assert layer["zeros"] > 0.5 > layer["own_zeros"]


def test_methods_contend_once_at_each_setting_and_warm_up_briefly() -> None:
    found = bench.settings(["dither", "spectral"], warmup=2)
    assert list(found) == [
        "dither(scale=2.0)",
        "dither(scale=4.0)",
        "dither(scale=2.0, forward=int8)",
        "dither",
        "dither(scale=4.0) under bfloat16",
        "spectral(warmup=2)",
    ]
    assert found["dither(scale=4.0)"] == Contestant(Dither(scale=4.0))
    assert found["dither(scale=4.0) under bfloat16"] == Contestant(Dither(scale=4.0), "bfloat16")
    assert found["dither"] == Contestant(Dither()), "the defaults, which are none of the others"


def test_a_step_trains_and_under_bfloat16_too() -> None:
    model: list[nn.Module] = []

    def build() -> nn.Module:
        model.append(nn.Sequential(nn.Linear(20, 5)))
        return model[0]

    methods = {"dither": Contestant(Dither())}
    runs, sessions = contestants.steps(Workload(build, (8, 20), (8,), 5), methods)
    assert list(runs) == ["fp32", "bf16", "dither"]
    for run in runs.values():
        run()
    assert sessions["dither"].step == 1
    before, after = model[0][0].weight, sessions["dither"].model[0].weight
    assert not torch.equal(before, after)


def test_the_workloads_take_their_batches() -> None:
    for workload in bench.workloads(part=16).values():
        x, y = workload.batch()
        with torch.no_grad():
            assert workload.build()(x).shape == (*y.shape, workload.classes)


@pytest.fixture(autouse=True)
def nothing_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine is good at; tests of dropping say who loses."""
    monkeypatch.setattr(timing, "DROPPED_AT", float("inf"))


# Rows.


def test_kernels_have_a_row_for_each_kernel_sparsity_and_shape() -> None:
    seen: list[tuple[float, float]] = []
    limits, note = Limits(2), lambda what, done, total: seen.append((done, total))
    rows = bench.kernels(SHAPES[:2], (0.8, 0.9), Measured(limits, note)).rows
    wanted = [
        (shape.op, str(shape), sparsity, kernel)
        for shape in SHAPES[:2]
        for sparsity in (0.8, 0.9)
        for kernel in (
            *contestants.kernels_for(shape),
            "auto",
            *([AFTER_INT8] if shape.op == "linear" else []),
        )
    ]
    assert [(row.op, row.shape, row.sparsity, row.kernel) for row in rows] == wanted
    # Too small for a choice to matter.
    names = {("auto", "reference"), (AFTER_INT8, "reference")}
    assert {(row.kernel, row.chosen) for row in rows if row.chosen} == names
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert (seen[-1], {total for _, total in seen}) == ((4, 4), {4})
    assert {row.rounds for row in rows} == {2}


def test_layers_have_a_row_for_each_shape() -> None:
    rows = bench.layers(SHAPES[:2], Measured(Limits(2))).rows
    assert [(row.op, row.shape, row.kernel) for row in rows] == [(s.op, str(s), "auto") for s in SHAPES[:2]]
    assert all(row.sparsity is not None and 0.5 < row.sparsity < 1 for row in rows)
    assert {(row.chosen, row.method) for row in rows} == {("reference", "dither(scale=2.0)")}


def test_steps_have_a_row_for_each_model_and_method() -> None:
    seen: list[tuple[str, float]] = []
    methods = ["dither", "deepfocus"]
    measured = Measured(Limits(2), lambda what, done, total: seen.append((what, done)))
    rows = bench.steps(WORKLOADS, methods, measured).rows
    labels = list(bench.settings(methods, 1))
    assert [(row.model, row.method) for row in rows] == list(itertools.product(WORKLOADS, labels))
    assert [row.shape for row in rows[:: len(labels)]] == ["8x20", "4x6"]
    assert list(dict.fromkeys(what for what, _ in seen)) == list(WORKLOADS)
    assert seen[-1] == ("tokens", 2)


def test_rows_follow_from_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [1.0, 4.0, 3.0]
    times = Times({"fp32": [2.0, 4.0, 12.0], "bf16": [1.0, 1.0, 3.0], "auto": mine, "dither": mine})
    monkeypatch.setattr(bench, "interleave", lambda runs, rounds, **more: times)
    monkeypatch.setattr(Dither, "benchmarks", {})
    (layer,) = bench.layers(SHAPES[:1], Measured(Limits(3))).rows
    # Ratios to fp32: 2, 1, 4; to bf16: 1, 0.25, 1.
    assert (layer.seconds, layer.seconds_fp32, layer.seconds_bf16) == (3.0, 4.0, 1.0)
    assert (layer.speedup_fp32, layer.spread_fp32) == (2.0, (1.5, 3.0))
    assert (layer.speedup_bf16, layer.spread_bf16) == (1.0, (0.625, 1.0))
    (step,) = bench.steps({"mlp": WORKLOADS["mlp"]}, ["dither"], Measured(Limits(3))).rows
    assert (step.speedup_fp32, step.spread_fp32) == (4 / 3, (1.5, 3.0)), "of a step: ratio of medians"


def test_rows_are_plain_values() -> None:
    (row,) = bench.layers(SHAPES[:1], Measured(Limits(1))).rows
    assert isinstance(row, Row)
    assert all(isinstance(v, str | float | int | tuple | None) for v in vars(row).values())


# What is dropped.


def _slow(op: str, name: str, times_as_long: float) -> Precision:
    return Precision(op, "256x512x512", name, 1.0, 1 / times_as_long)


def test_a_precision_that_loses_in_a_small_product_is_not_run() -> None:
    slow = [_slow("linear", "bfloat16", 40), _slow("linear", "int8", 30), _slow("conv", "bfloat16", 6)]
    found = bench.kernels(SHAPES[:2], (0.8,), Measured(Limits(1), slow=slow))
    assert {row.kernel for row in found.rows if row.op == "linear"} == {
        *("dense", "skip", "skip-bfloat16", "auto", AFTER_INT8)
    }
    assert {row.kernel for row in found.rows if row.op == "conv"} == {
        *contestants.kernels_for(SHAPES[1]),
        "auto",
    }
    assert all((row.speedup_bf16 is None) == (row.op == "linear") for row in found.rows)
    assert [(one.variant, one.ratio) for one in found.dropped] == [
        ("torch in bfloat16", 40),
        ("bfloat16", 40),
        ("int8", 30),
    ]
    assert {one.seen for one in found.dropped} == {"in a product of 256x512x512"}


def test_steps_in_a_precision_that_loses_are_not_run() -> None:
    slow = [_slow("linear", "bfloat16", 40), _slow("linear", "int8", 30)]
    found = bench.steps({"mlp": WORKLOADS["mlp"]}, ["dither"], Measured(Limits(1), slow=slow))
    assert [row.method for row in found.rows] == ["dither(scale=2.0)", "dither(scale=4.0)", "dither"]
    assert [one.variant for one in found.dropped] == [
        "torch in bfloat16",
        "dither(scale=2.0, forward=int8)",
        "dither(scale=4.0) under bfloat16",
    ]


def test_what_loses_in_the_first_round_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times({"fp32": [1.0, 1.0], "bf16": [20.0], "auto": [2.0, 2.0]}, {"bf16": 20.0})
    monkeypatch.setattr(bench, "interleave", lambda runs, rounds, **more: times)
    found = bench.layers(SHAPES[:1], Measured(Limits(2)))
    (row,) = found.rows
    assert (row.speedup_fp32, row.speedup_bf16, row.spread_bf16, row.seconds_bf16) == (0.5, None, None, None)
    assert row.rounds == 2
    (dropped,) = found.dropped
    assert (dropped.variant, dropped.ratio, dropped.seen) == ("torch in bfloat16", 20.0, "in the first round")


def test_cells_share_the_seconds_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, shares = 0.0, list[float]()

    def lasting(runs: object, rounds: int, *, seconds: float, **more: object) -> Times:
        nonlocal now
        now += 70.0
        shares.append(seconds)
        return Times({"fp32": [1.0], "bf16": [1.0], "auto": [1.0]})

    monkeypatch.setattr(bench, "interleave", lasting)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    bench.layers([SHAPES[0]] * 3, Measured(Limits(5, 120.0)))
    assert shares == [40.0, 25.0, 0.0], "a budget that is spent leaves one round"
