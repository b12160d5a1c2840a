"""Is an attached layer ever slower than the plain one, and does the forecast hold?

    python repro/never_slower.py [--rounds 15] [--out results/never-slower.json]

20 linear layers from 8×16×16 to 4096×2048×2048 and 6 convolutions, dithered so that 30, 60, 92 and 99 % of δ become
zeros; some of them once more with `Exact` and padding, half of the rows of δ zero. Each is attached with an example and
may be declined; then forward and backward pass run in turns with the plain layer. Whole models of several sizes follow,
with each method that is there to save time, at its defaults. A last table holds what a product took when its kernels
were tried against what it takes later. About 8 minutes on two cores.

Results: results/never-slower.json
"""

import copy
import math
import time
import unittest.mock
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn

from retrograde import DeepFocus, Dither, Exact, Method, attach, make_plan
from retrograde.errors import NoEffectError, RetrogradeWarning
from retrograde.kernels import choose, linear
from retrograde.kernels.dispatch import Products
from retrograde.kernels.kept import COMPACT
from retrograde.kernels.rehearse import rehearse
from retrograde.lab import contestants
from retrograde.lab.contestants import Convolution, Linear, Shape
from retrograde.lab.files import write_json
from retrograde.lab.models.convolutional import VGG
from retrograde.lab.timing import Times, interleave

SPARSITIES = (0.30, 0.60, 0.92, 0.99)
LINEAR = (
    *((8, 16, 16), (32, 64, 64), (64, 64, 256), (128, 128, 128), (64, 512, 512)),
    *((256, 256, 256), (128, 784, 500), (512, 256, 512), (64, 1024, 1024), (512, 512, 512)),
    *((2048, 256, 256), (256, 1024, 1024), (1024, 512, 1024), (512, 1024, 1024), (4096, 512, 512)),
    *((512, 2048, 1024), (2048, 1024, 1024), (512, 2048, 2048), (1024, 3072, 768), (4096, 2048, 2048)),
)
"""(rows, outputs, inputs)."""
CONVOLUTIONS = (
    Convolution(16, 3, 32, 32, 3),
    Convolution(32, 16, 16, 32, 3),
    Convolution(64, 128, 16, 128, 3),
    Convolution(64, 64, 32, 64, 3),
    Convolution(64, 64, 32, 128, 3, stride=2),
    Convolution(64, 256, 16, 128, 1),
)
PADDED = (*LINEAR[5::3], *CONVOLUTIONS[2:4])
"""With half of the rows, or of the images, zero."""
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 64-32-10, batch 32": (lambda: mlp(64, 32), (32, 64)),
    "MLP 64-256-256-10, batch 64": (lambda: mlp(64, 256, 256), (64, 64)),
    "MLP 784-1024-1024-10, batch 256": (lambda: mlp(784, 1024, 1024), (256, 784)),
    "VGG 16-32, batch 16": (lambda: VGG((3, 16, 16), 10, [[16], [32]]), (16, 3, 16, 16)),
    "VGG 64-128-256, batch 32": (lambda: VGG((3, 32, 32), 10, [[64], [128], [256]]), (32, 3, 32, 32)),
}
METHODS: tuple[Method, ...] = (Exact(), Dither(), DeepFocus())
"""Those that are there to save time."""
_OTHER = torch.zeros(1 << 22)
SHAPES: tuple[Shape, ...] = (*(Linear(*shape) for shape in LINEAR), *CONVOLUTIONS)


def main() -> None:
    parser = arguments(__doc__, "never-slower.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only so many, for a trial")
    options = parser.parse_args()
    report = head("attached layers against plain ones, and forecasts against what was measured")
    rehearse()
    rows: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    for shape in SHAPES[: options.shapes]:
        for sparsity in SPARSITIES:
            rows.append(layer_row(shape, sparsity, options.rounds))
            if isinstance(shape, Linear):
                products += product_rows(shape, sparsity)
            r = rows[-1]
            print(
                f"{r['op']} {r['shape']} at {sparsity:.0%}: {'declined' if r['declined'] else 'attached'}, "
                f"×{r['ratio_to_plain']:.3f} of plain, forecast {r['predicted_seconds'] * 1e3:.3f} ms, "
                f"measured {r['measured_seconds'] * 1e3:.3f} ms",
                flush=True,
            )
    for shape in PADDED[: options.shapes]:
        rows.append(padded_row(shape if isinstance(shape, Convolution) else Linear(*shape), options.rounds))
        print(
            f"{rows[-1]['op']} {rows[-1]['shape']} padded: ×{rows[-1]['ratio_to_plain']:.3f} of plain",
            flush=True,
        )
    models = [
        model_row(name, method, options.rounds)
        for name in list(MODELS)[: options.shapes]
        for method in METHODS
    ]
    for row in models:
        print(f"{row['model']} with {row['method']}: ×{row['ratio_to_plain']:.3f} of plain", flush=True)
    found = summary(rows, products, models)
    print(found)
    write_json(
        options.out,
        {
            **report,
            "rounds": options.rounds,
            "summary": found,
            "rows": rows,
            "models": models,
            "products": products,
        },
    )


def layer_row(shape: Shape, sparsity: float, rounds: int) -> dict[str, Any]:
    """Dithered so that a share of δ becomes zero."""
    layer, x, _ = contestants.operands(shape)
    delta = normal_delta(layer, x)
    method = Dither(scale=contestants.scale_for(delta, sparsity))
    return {"sparsity": sparsity, **attached_row(shape, layer, x, delta, method, rounds)}


def padded_row(shape: Shape, rounds: int) -> dict[str, Any]:
    """Every other row of δ zero, nothing approximated."""
    layer, x, _ = contestants.operands(shape)
    delta = normal_delta(layer, x)
    delta[::2] = 0
    return {"sparsity": 0.5, "padded": True, **attached_row(shape, layer, x, delta, Exact(), rounds)}


def attached_row(
    shape: Shape, layer: nn.Module, x: Tensor, delta: Tensor, method: Method, rounds: int
) -> dict[str, Any]:
    x.requires_grad_()
    plain = nn.Sequential(layer)

    def loss() -> Tensor:
        return (plain(x) * delta).sum()

    (row,) = make_plan(plain, [method], example=loss, decline=False).rows
    forecast = row.forecast
    assert forecast is not None
    attached = copy.deepcopy(plain)
    session = None if forecast.loses else attach(attached, method, seed=0)
    # Short passes are timed more often: half a second or so for each shape.
    rounds = max(rounds, min(200, int(0.25 / forecast.plain)))
    times = interleave(
        {"plain": run(plain, x, delta), "attached": run(attached, x, delta)}, rounds, warmups=3
    )
    return {
        "op": shape.op,
        "shape": str(shape),
        "zeros": session.metrics()["zeros"] if session else None,
        "declined": forecast.loses,
        "forecast_ratio": forecast.attached / forecast.plain,
        **to_plain(times),
        "predicted_seconds": forecast.plain if forecast.loses else forecast.attached,
        "measured_seconds": times.median("attached"),
        "plain_seconds": times.median("plain"),
        "kernels": forecast.kernels,
    }


def model_row(name: str, method: Method, rounds: int) -> dict[str, Any]:
    """A whole training step of a model, its layers attached or declined as the example shows."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    plain = make()
    attached = copy.deepcopy(plain)

    def step(model: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)

        def one() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return one

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)  # that nothing is attached, where nothing gains
        try:
            session = attach(
                attached,
                method,
                seed=0,
                strict=False,
                example=lambda: nn.functional.cross_entropy(attached(x), y),
            )
            layers = len(session.plan.attached)
        except NoEffectError:  # no residual branch
            layers = 0
    times = interleave({"plain": step(plain), "attached": step(attached)}, max(rounds, 40), warmups=10)
    return {"model": name, "method": method.name, "attached": layers, **to_plain(times)}


def to_plain(times: Times) -> dict[str, Any]:
    found = times.speedup("plain", "attached")
    return {"ratio_to_plain": found.ratio, "ratio_quartiles": found.quartiles}


def mlp(*widths: int) -> nn.Module:
    layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def normal_delta(layer: nn.Module, x: Tensor) -> Tensor:
    """Normal entries: heavier tails cannot have as few zeros as 30 % with levels of 8 bits."""
    with torch.no_grad():
        shape = layer(x).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul_(1e-3)


def run(model: nn.Module, x: Tensor, delta: Tensor) -> Callable[[], object]:
    wanted = [*model.parameters(), x]
    return lambda: torch.autograd.grad(model(x), wanted, delta)


def product_rows(shape: Linear, sparsity: float) -> list[dict[str, Any]]:
    """dx = δ̃ W by every kernel whose time is known from when it was tried, and again now."""
    layer, x, _ = contestants.operands(shape)
    delta = normal_delta(layer, x)
    quantised = contestants.dithered(delta, contestants.scale_for(delta, sparsity))
    weight = layer.get_parameter("weight").detach()
    tried: dict[str, float] = {}
    chooser = choose.chooser()
    best = chooser.best

    def noted(problem: choose.Problem, allowed: tuple[str, ...], compute: Callable[[str], object]) -> str:
        kernel = best(problem, allowed, compute)
        if not problem.product.startswith("precision"):
            tried.update((name, chooser.seconds(problem, name)) for name in allowed)
        return kernel

    with unittest.mock.patch.object(chooser, "best", noted):
        Products(quantised, "int8").linear_input_grad(weight, x.shape)
    found: list[dict[str, Any]] = []
    for kernel, seconds in tried.items():
        if kernel == COMPACT or math.isnan(
            seconds
        ):  # not this function's, or not tried since it could not be best
            continue
        times: list[float] = []
        for _ in range(7):
            _OTHER.add_(1.0)  # as in training, and when it was tried: operands are in no cache
            start = time.perf_counter()
            linear.run(kernel, quantised.values, quantised.step, weight)
            times.append(time.perf_counter() - start)
        found.append(
            {
                "shape": str(shape),
                "sparsity": sparsity,
                "kernel": kernel,
                "predicted_seconds": seconds,
                "measured_seconds": median(times[1:]),
            }
        )
    return found


def summary(
    rows: list[dict[str, Any]], products: list[dict[str, Any]], models: list[dict[str, Any]]
) -> dict[str, float]:
    def within(found: list[dict[str, Any]], error: float) -> float:
        near = [abs(r["predicted_seconds"] / r["measured_seconds"] - 1) <= error for r in found]
        return sum(near) / len(near)

    return {
        "layers": len(rows),
        "declined": sum(row["declined"] for row in rows),
        "slower_than_3_percent": sum(row["ratio_to_plain"] > 1.03 for row in rows),
        "models": len(models),
        "models_slower_than_3_percent": sum(row["ratio_to_plain"] > 1.03 for row in models),
        "largest_ratio_of_models": max(row["ratio_to_plain"] for row in models),
        "largest_ratio": max(row["ratio_to_plain"] for row in rows),
        "least_ratio": min(row["ratio_to_plain"] for row in rows),
        "forecasts_within_25_percent": within(rows, 0.25),
        "products_within_25_percent": within(products, 0.25),
    }


if __name__ == "__main__":
    main()
