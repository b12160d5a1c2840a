"""What Decorrelate adds to a whole training step: at its defaults, at `max_overhead=0.1`, and as a preconditioner.

    python repro/decorrelate_overhead.py [--rounds 10]

An MLP, a VGG-like network, a residual network with BatchNorm and a GPT, each trained by AdamW on generated inputs whose
neighbouring features move together, with labels that a fixed network gave. A reading is 32 steps, so that a refresh
falls into each of the first ones; ways take turns, reading by reading. `ratio` is that of the sums over all readings,
refreshes included; `settled` the median of the readings' ratios, which are mostly without one; `forecast` is what the
plan says beforehand of the forward and backward pass. About 10 minutes on two cores.

Results: results/decorrelate-overhead.json
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn

from retrograde import Decorrelate, attach, make_plan
from retrograde.errors import RetrogradeWarning
from retrograde.lab.files import write_json
from retrograde.lab.models.convolutional import VGG, ResNet
from retrograde.lab.models.mlp import MLP
from retrograde.lab.models.transformer import GPT
from retrograde.lab.timing import interleave

STEPS = 32
WAYS: dict[str, Decorrelate | None] = {
    "plain": None,
    "defaults": Decorrelate(),
    "max_overhead=0.1": Decorrelate(max_overhead=0.1),
    "precondition": Decorrelate(mode="precondition"),
}
IMAGES = (64, 3, 32, 32)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 3072-1024-1024-1024-10, batch 128": (
        lambda: MLP((3, 32, 32), 10, (1024, 1024, 1024)),
        (128, 3, 32, 32),
    ),
    "VGG 32-64-128, batch 64": (lambda: VGG((3, 32, 32), 10, [[32], [64], [128]]), IMAGES),
    "ResNet-14 with BatchNorm, batch 64": (lambda: ResNet((3, 32, 32), 10, blocks=2), IMAGES),
    "GPT 4×512, batch 4×128": (lambda: GPT(64, 128, layers=4, width=512, heads=8), (4, 128)),
}


def main() -> None:
    parser = arguments(__doc__, "decorrelate-overhead.json")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="by the start of their names")
    given = parser.parse_args()
    report = head("what Decorrelate adds to a training step")
    chosen = [name for name in MODELS if name.startswith(tuple(given.models))]
    rows = [row for name in chosen for row in measure(name, given.rounds)]
    write_json(given.out, {**report, "steps": STEPS, "rounds": given.rounds, "rows": rows})


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    batches = inputs(shape)
    runs = {way: steps(copy.deepcopy(model), batches, method) for way, method in WAYS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)
        times = interleave({way: run for way, (run, _) in runs.items()}, rounds)
    plain = sum(times.seconds["plain"])
    rows: list[dict[str, Any]] = []
    for way, (_, forecast) in runs.items():
        speedup = times.speedup("plain", way)
        rows.append(
            {
                "model": name,
                "way": way,
                "step_ms": sum(times.seconds[way]) / rounds / STEPS * 1e3,
                "ratio": sum(times.seconds[way]) / plain,
                "settled": speedup.ratio,
                "spread": speedup.quartiles,
                "forecast": forecast,
            }
        )
        print(
            f"{name}: {way}: ×{rows[-1]['ratio']:.3f}, settled ×{rows[-1]['settled']:.3f}, forecast {forecast}",
            flush=True,
        )
    return rows


def inputs(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Images whose pixels are random walks to the right and down, with their labels; or tokens and those after them."""
    if len(shape) == 2:
        tokens = torch.randint(0, 8, (4, shape[0], shape[1] + 1)).cumsum(-1) % 64
        return [(one[:, :-1], one[:, 1:].flatten()) for one in tokens]
    x = torch.randn(4, *shape).cumsum(-1).cumsum(-2)
    x = x / x.std()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(x[0, 0].numel(), 10))
    return [(one, teacher(one).argmax(1)) for one in x]


def steps(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], method: Decorrelate | None
) -> tuple[Callable[[], None], float | None]:
    """32 training steps to call, and the method's forecast of its share of the model's work."""
    forecast = None
    if method is not None:
        step = make_plan(copy.deepcopy(model), method, example=batches[0][0]).step
        forecast = None if step is None else step.ratio
        attach(model, method, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for number in range(STEPS):
            x, y = batches[number % len(batches)]
            nn.functional.cross_entropy(model(x).flatten(0, -2), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run, forecast


if __name__ == "__main__":
    main()
