"""Two epochs of plain backpropagation and of every method on real data, through ``retrograde train``.

    RETROGRADE_DATA=… python repro/two_epochs.py [--data imdb] [--runs runs/two-epochs]

Does every method learn, with no divergence and within 3 points of plain backpropagation, on images by a convolutional
network with residual branches, on text by convolutions over words, and on small images by an MLP? Interrupted, it goes
on where it was; at the end it writes ``results/two-epochs.json`` and one report over all runs.

Results: results/two-epochs.json
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reports import RESULTS, arguments, head

from retrograde.lab import files
from retrograde.methods.registry import available
from retrograde.report import write

TASKS = {"fashion_mnist": "mlp", "cifar10": "resnet-small", "imdb": "text-cnn"}

# Scores come once an epoch, so dendrites must be allowed to grow after one of them, or this would be plain
# backpropagation under another name.
METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in available()},
    "dither": dict(available()["dither"].short_run),
    "perforate": {"patience": 1, "limit": 1, "max_dendrites": 1},
}

ALLOWED = 0.03
"""How far a method's accuracy may lie below plain backpropagation's."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/two-epochs"))
    given = parser.parse_args()
    rows = [
        _row(data, method, _train(given, data, method)) for data in given.data for method in ("", *METHODS)
    ]
    plain = {row["data"]: row["accuracy"] for row in rows if row["method"] == "plain"}
    for row in rows:
        row["against_plain"] = row["accuracy"] - plain[row["data"]]
        row["passed"] = row["against_plain"] >= -ALLOWED
        print(
            f"{row['data']:14} {row['method']:12} {row['accuracy']:.4f} {row['against_plain']:+.4f}",
            flush=True,
        )
    write([given.runs], given.runs / "report.html", "Two epochs of every method")
    if set(given.data) == set(TASKS):
        what = f"{given.epochs} epochs of every method through `retrograde train`, seed {given.seed}"
        files.write_json(RESULTS / "two-epochs.json", {**head(what), "rows": rows})


def _train(given: argparse.Namespace, data: str, method: str) -> Path:
    """Run ``retrograde train`` in a folder of its own, unless it has finished there."""
    folder: Path = given.runs / f"{data}-{method or 'plain'}-{given.seed}"
    if not (folder / files.RESULT).exists() or _read(folder / files.RESULT)["status"] != "finished":
        command = [
            *(sys.executable, "-m", "retrograde", "train", "--out", str(folder)),
            *("--data", data, "--model", TASKS[data]),
            *("--epochs", str(given.epochs), "--seed", str(given.seed)),
        ]
        if method:
            command += ["--no-decline", "--method", method]
            for name, value in METHODS[method].items():
                command += [f"--{method}.{name.replace('_', '-')}", str(value)]
        if (folder / files.CHECKPOINT).exists():
            command.append("--resume")
        subprocess.run(command, check=True)
    return folder


def _row(data: str, method: str, folder: Path) -> dict[str, Any]:
    result = _read(folder / files.RESULT)
    return {
        "data": data,
        "model": TASKS[data],
        "method": method or "plain",
        "settings": METHODS.get(method, {}),
        "accuracy": result["test"]["accuracy"],
        "zeros": result["zeros"],
        "needed": result["flops"]["needed"] / result["flops"]["dense"],
        "parameters": result["parameters"],
        "steps": result["steps"],
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
