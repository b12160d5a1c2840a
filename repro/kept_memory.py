"""What a training step keeps for its backward pass, and the peak of the whole process, with inputs kept in few bits.

    python repro/kept_memory.py [--steps 12]

An MLP of width 4096, a VGG-like network and a transformer's encoder, each in a process of its own for every way: plain,
`Dither(keep=4)`, `Dither(keep=2)` and `Spectral(residual="unbiased")`, none of which changes δ. A model's size is
weights, gradients and Adam's moments, which no way changes. Linear-like layers' share is what attached layers keep for
themselves beside what they kept before. Steps of different processes are not timed in turns: their seconds say whether
something is wrong, not which way is the fastest. About 5 minutes on two cores.

Results: results/kept-memory.json
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn

import retrograde as rg
from retrograde.accounting.memory import saved_bytes
from retrograde.lab.files import write_json
from retrograde.lab.models.convolutional import VGG

WAYS: dict[str, rg.Method | None] = {
    "plain": None,
    "4 bits": rg.Dither(scale=0.0, keep=4),
    "2 bits": rg.Dither(scale=0.0, keep=2),
    "sketch": rg.Spectral(residual="unbiased", skip_head=False),
}


class Encoder(nn.Module):
    """(B, L, 512) → (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 4096, batch 4096": (mlp, (4096, 784)),
    "VGG 64-128-256, batch 256": (
        lambda: VGG((3, 32, 32), 10, [[64, 64], [128, 128], [256, 256]]),
        (256, 3, 32, 32),
    ),
    "encoder 6×512, 32×256 tokens": (Encoder, (32, 256, 512)),
}


def main() -> None:
    parser = arguments(__doc__, "kept-memory.json")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help="a single way, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one, options.steps)))
        return
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for way in WAYS:
            command = [sys.executable, __file__, "--steps", str(options.steps), "--one", model, way]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"model": model, "way": way, **json.loads(found.stdout.splitlines()[-1])})
            row, plain = rows[-1], next(r for r in rows if r["model"] == model)
            print(
                f"{model}, {way}: keeps {row['saved_bytes'] / 2**20:.0f} MiB "
                f"(×{row['saved_bytes'] / plain['saved_bytes']:.3f}), process at most "
                f"{row['peak_bytes'] / 2**20:.0f} MiB (×{row['peak_bytes'] / plain['peak_bytes']:.2f}), "
                f"step {row['step_seconds']:.2f} s",
                flush=True,
            )
    write_json(
        options.out,
        {**head("what a step keeps, and the peak of its process"), "steps": options.steps, "rows": rows},
    )


def measured(name: str, way: str, steps: int) -> dict[str, Any]:
    """In this process."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    model = make()
    method = WAYS[way]
    session = None if method is None else rg.attach(model, method, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    seconds: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = saved_bytes(model, loss)
    parameters = sum(p.nbytes for p in model.parameters())
    return {
        "saved_bytes": kept,
        "peak_bytes": peak,
        "state_bytes": 4 * parameters,
        "step_seconds": median(seconds[steps // 2 :]),
        "attached": 0 if session is None else len(session.plan.attached),
    }


if __name__ == "__main__":
    main()
