"""Does training in the leading subspace stall, and does the residual path mend it? Top, random, bulk and full.

    RETROGRADE_DATA=… python repro/spectral_ablation.py [--optimizer adamw] [--seeds 5] [--epochs 5]

The model trains with each choice of basis, with the residual path off and on, and with plain backpropagation. Ablations
run without warm-up and on all layers, head included, so that nothing but the subspace is at work; the row "default" is
`Spectral()` as it comes. ``results/spectral-ablation-<optimizer>.json`` gets the accuracy after each epoch for each row
and seed; a run that was interrupted goes on after the last finished row.

Results: results/spectral-ablation-adamw.json, results/spectral-ablation-sgd.json, results/spectral-ablation-slow.json
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from reports import RESULTS, arguments, head
from torch import nn
from torch.nn import functional as F

import retrograde as rg
from retrograde.lab import data, files, models
from retrograde.methods.spectral import Spectral


def arms(rank: int, full_every: int) -> dict[str, Spectral | None]:
    """The rows of the table: None is plain backpropagation."""
    found: dict[str, Spectral | None] = {"full": None, "default": Spectral()}
    for basis in ("top", "random", "bulk"):
        for residual in ("none", "full-step", "scaled") if basis == "top" else ("none", "full-step"):
            found[f"{basis}/{residual}"] = Spectral(
                rank, basis=basis, residual=residual, full_every=full_every, warmup=0, skip_head=False
            )
    found["unbiased"] = Spectral(rank, residual="unbiased", skip_head=False)
    found["top+random/none"] = Spectral(rank, random=rank // 2, residual="none", warmup=0, skip_head=False)
    return found


def accuracy(model: nn.Module, split: data.Split) -> float:
    """Share of right answers in eval mode."""
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.evaluation_batches(split, 1000))
    model.train()
    return hits / len(split)


def run(
    method: Spectral | None, options: argparse.Namespace, images: data.Data, seed: int
) -> dict[str, object]:
    """One training run: accuracies and losses by epoch, and what the layers report at the end."""
    model = models.build(options.model, images, seed=seed)
    session = rg.attach(model, method, seed=seed) if method else None
    if options.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    steps = options.epochs * (len(images.train) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    accuracies, losses, start = [], [], time.perf_counter()
    for epoch in range(options.epochs):
        total, count = 0.0, 0
        for x, y in data.batches(images.train, options.batch, seed=seed, epoch=epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            total, count = total + float(loss.detach()), count + 1
        losses.append(round(total / count, 5))
        accuracies.append(round(accuracy(model, getattr(images, options.split)), 4))
    layers = session.metrics()["layers"] if session else {}
    return {
        "seed": seed,
        "accuracy": accuracies,
        "loss": losses,
        "seconds": round(time.perf_counter() - start, 1),
        "layers": {
            name: {k: figures[k] for k in ("rank", "captured_energy") if k in figures}
            for name, figures in layers.items()
        },
    }


def main() -> None:
    """Run the table."""
    parser = arguments(__doc__)
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--model", default="mlp-small")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--lr", type=float, default=None, help="0.05 for sgd, 0.001 for adamw")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="validation for choosing"
    )
    parser.add_argument("--rank", type=int, default=10, help="directions in the ablations")
    parser.add_argument("--full-every", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="rows of each split")
    parser.add_argument("--arms", nargs="*", help="these rows alone")
    parser.add_argument("--out", type=Path, help="default: results/spectral-ablation-<optimizer>.json")
    options = parser.parse_args()
    options.lr = options.lr or {"sgd": 0.05, "adamw": 1e-3}[options.optimizer]
    out: Path = options.out or RESULTS / f"spectral-ablation-{options.optimizer}.json"
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "arms")}
    torch.set_num_threads(1)
    report = head(f"Spectral's subspaces, {options.data}, {options.model}, {options.optimizer}")
    images = data.load(options.data, limit=options.limit)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    table: dict[str, Any] = {}
    if out.exists() and (before := json.loads(out.read_text()))["options"] == asked:
        table = before["results"]
    for name, method in arms(options.rank, options.full_every).items():
        if name in table or (options.arms and name not in options.arms):
            continue
        runs: list[dict[str, Any]] = []
        for seed in seeds:
            runs.append(run(method, options, images, seed))
            print(name, seed, runs[-1]["accuracy"], file=sys.stderr, flush=True)
        last = [r["accuracy"][-1] for r in runs]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        table[name] = {"mean": round(statistics.mean(last), 4), "std": round(spread, 4), "runs": runs}
        files.write_json(out, {**report, "options": asked, "results": table})
    for name, row in table.items():
        print(f"{name:18} {row['mean']:.4f} ± {row['std']:.4f}")


if __name__ == "__main__":
    main()
