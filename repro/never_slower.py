"""Is an attached layer ever slower than the plain one, and does the forecast hold?

    python repro/never_slower.py [--rounds 15] [--out results/never-slower.json]

20 linear layers from 8×16×16 to 4096×2048×2048 and 6 convolutions, dithered so that 30, 60, 92 and 99 % of δ become
zeros. Each is attached with an example and may be declined; then forward and backward pass run in turns with the plain
layer. A second table holds what the cost model predicts for each kernel's product against what it takes.
About 6 minutes on two cores.

Results: results/never-slower.json
"""

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn

from retrograde import attach, make_plan
from retrograde.kernels import choose, linear
from retrograde.kernels.dispatch import Products
from retrograde.kernels.rehearse import rehearse
from retrograde.lab import contestants
from retrograde.lab.contestants import Convolution, Linear, Shape
from retrograde.lab.files import write_json
from retrograde.lab.timing import interleave
from retrograde.methods.dither import Dither

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
    found = summary(rows, products)
    print(found)
    write_json(
        options.out,
        {**report, "rounds": options.rounds, "summary": found, "rows": rows, "products": products},
    )


def layer_row(shape: Shape, sparsity: float, rounds: int) -> dict[str, Any]:
    layer, x, _ = contestants.operands(shape)
    x.requires_grad_()
    delta = normal_delta(layer, x)
    method = Dither(scale=contestants.scale_for(delta, sparsity))
    plain = nn.Sequential(layer)

    def loss() -> Tensor:
        return (plain(x) * delta).sum()

    (row,) = make_plan(plain, [method], example=loss, decline=False).rows
    forecast = row.forecast
    assert forecast is not None
    attached = copy.deepcopy(plain)
    if not forecast.loses:
        session = attach(attached, method, seed=0)
    # Short passes are timed more often: half a second or so for each shape.
    rounds = max(rounds, min(200, int(0.25 / forecast.plain)))
    times = interleave(
        {"plain": run(plain, x, delta), "attached": run(attached, x, delta)}, rounds, warmups=3
    )
    ratios = [a / p for p, a in zip(times.seconds["plain"], times.seconds["attached"], strict=True)]
    zeros = None if forecast.loses else session.metrics()["zeros"]
    return {
        "op": shape.op,
        "shape": str(shape),
        "sparsity": sparsity,
        "zeros": zeros,
        "declined": forecast.loses,
        "forecast_ratio": forecast.attached / forecast.plain,
        "ratio_to_plain": median(ratios),
        "ratio_quartiles": sorted(ratios)[len(ratios) // 4 :: len(ratios) // 2][:2],
        "predicted_seconds": forecast.plain if forecast.loses else forecast.attached,
        "measured_seconds": times.median("attached"),
        "plain_seconds": times.median("plain"),
        "kernels": forecast.kernels,
    }


def normal_delta(layer: nn.Module, x: Tensor) -> Tensor:
    """Normal entries: heavier tails cannot have as few zeros as 30 % with levels of 8 bits."""
    with torch.no_grad():
        shape = layer(x).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul_(1e-3)


def run(model: nn.Module, x: Tensor, delta: Tensor) -> Callable[[], object]:
    wanted = [*model.parameters(), x]
    return lambda: torch.autograd.grad(model(x), wanted, delta)


def product_rows(shape: Linear, sparsity: float) -> list[dict[str, Any]]:
    """dx = δ̃ W by every kernel that was tried when it was first met, and again now."""
    layer, x, _ = contestants.operands(shape)
    delta = normal_delta(layer, x)
    quantised = contestants.dithered(delta, contestants.scale_for(delta, sparsity))
    weight = layer.get_parameter("weight").detach()
    before = set(choose.chooser().answers)
    Products(quantised, "int8").linear_input_grad(weight, x.shape)
    tried: dict[str, float] = {}
    for key, answer in choose.chooser().answers.items():
        if key not in before and not key.startswith("precision"):
            tried |= answer["seconds"]
    found: list[dict[str, Any]] = []
    for kernel, seconds in tried.items():
        times: list[float] = []
        for _ in range(7):
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


def summary(rows: list[dict[str, Any]], products: list[dict[str, Any]]) -> dict[str, float]:
    def within(found: list[dict[str, Any]], error: float) -> float:
        near = [abs(r["predicted_seconds"] / r["measured_seconds"] - 1) <= error for r in found]
        return sum(near) / len(near)

    return {
        "layers": len(rows),
        "declined": sum(row["declined"] for row in rows),
        "slower_than_3_percent": sum(row["ratio_to_plain"] > 1.03 for row in rows),
        "largest_ratio": max(row["ratio_to_plain"] for row in rows),
        "least_ratio": min(row["ratio_to_plain"] for row in rows),
        "forecasts_within_25_percent": within(rows, 0.25),
        "products_within_25_percent": within(products, 0.25),
    }


if __name__ == "__main__":
    main()
