"""Synthetic run folders of the shape that training writes."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS = {"1": ("64→512", 33280, 0.62), "3": ("512→512", 262656, 0.55), "5": ("512→10", 5130, 0.02)}
MACHINE = {
    "cpu": "Example CPU",
    "cores": 2,
    "memory_gib": 23.4,
    "os": "Linux",
    "torch": "2.13.0",
    "python": "3.11.7",
    "retrograde": "0.1.0",
    "device": "cpu",
}


def flops(dense: float, zeros: float, overhead: float, discount: float = 1.0) -> dict[str, Any]:
    third = dense / 3
    backward = third * (1 - zeros)
    return {
        "dense": dense,
        "needed": third + 2 * backward,
        "executed": dense + overhead,
        "discounted": (dense + overhead) * discount,
        "overhead": overhead,
        "forward": {"dense": third, "executed": third, "needed": third, "discounted": third * discount},
        "input_grad": {"dense": third, "executed": third, "needed": backward, "discounted": third * discount},
        "weight_grad": {
            "dense": third,
            "executed": third,
            "needed": backward,
            "discounted": third * discount,
        },
    }


def of_layer(at: int, progress: float) -> dict[str, Any]:
    """What Decorrelate, Perforate and Spectral leave in a layer; ``progress`` goes from 0 to 1."""
    return {
        "correlation": 0.2 * math.exp(-3 * progress) / (at + 1),
        "correlation_input": 0.3 / (at + 1),
        "captured_energy": 1 - 0.4 * math.exp(-2 * progress) / (at + 1),
        "effective_rank": 20 + 30 * progress / (at + 1),
        "drift": 2 * math.exp(-4 * progress) + 0.05 * at,
        "dendrites": int(3 * progress) if at else 0,
    }


def of_model(epoch: int, epochs: int, per_epoch: int) -> dict[str, Any]:
    """What DeepFocus and Perforate leave in an epoch."""
    blocks: dict[str, Any] = {}
    for block in range(4):
        skip = 0.8 * (epoch / epochs) ** (1 + block / 2)
        blocks[f"stages.{block}.branch"] = {
            "skip": skip,
            "low": (1 - skip) * 0.6,
            "full": (1 - skip) * 0.4,
            "alpha": 0.5,
            "beta": 1.2,
            "error": 0.01,
            "kind": "chain" if block == 3 else "branch",
        }
    changes = [(epochs // 4, "dendrite", 0), (epochs // 2, "neuron", 2), (3 * epochs // 4, "done", 4)]
    marks = [
        {"step": at * per_epoch, "epoch": at, "phase": phase, "dendrites": dendrites}
        for at, phase, dendrites in changes
        if at <= epoch
    ]
    return {
        "blocks": blocks,
        "perforate": {"phase": "neuron", "dendrites": 2, "marks": marks, "unknown": [1]},
        "unknown": {"a": [1, {}]},
    }


def write_run(
    root: Path,
    name: str = "dither-0",
    label: str | None = None,
    *,
    scale: float = 2.0,
    group: str = "digits · mlp",
    epochs: int = 8,
    finished: bool = True,
    kernel: str = "reference",
    seed: int = 0,
    methods: bool = False,
    **fields: Any,
) -> Path:
    """Write a run folder; ``scale`` 0 is plain backpropagation and makes it the baseline.

    ``methods`` adds what each of the other methods leaves behind.
    """
    draw = random.Random(name + str(scale) + str(seed))
    folder = root / name
    folder.mkdir(parents=True)
    baseline = scale == 0
    method = [] if baseline else ["dither"]

    def zeros(own: float) -> float:
        return own + (1 - own) * (1 - math.exp(-scale / 1.6))

    mean_own = sum(own for _, _, own in LAYERS.values()) / len(LAYERS)
    run = {
        "schema": 1,
        "name": name,
        "label": label if label is not None else ("Backprop" if baseline else f"Dither(scale={scale:g})"),
        "baseline": baseline,
        "group": group,
        "recipe": {
            "task": "digits",
            "model": {"name": "mlp", "width": 512, "depth": 2},
            "optimizer": {"name": "adam", "learning_rate": 0.001},
            "epochs": epochs,
            "batch": 64,
            "seed": seed,
            "methods": [{"name": "dither", "scale": scale}] if method else [],
        },
        "machine": MACHINE,
        "metric": "accuracy",
        "started": "2026-01-01T00:00:00Z",
        "plan": {
            "layers": [
                {
                    "name": layer,
                    "type": "Linear",
                    "shape": shape,
                    "parameters": parameters,
                    "methods": method,
                    "kernel": kernel if method else None,
                    "status": "attached" if method else "plain",
                    "why": "Linear layer with a gradient" if method else None,
                }
                for layer, (shape, parameters, _) in LAYERS.items()
            ]
        },
    }
    (folder / "run.json").write_text(json.dumps(run | fields))
    per_epoch, step_seconds = (
        23,
        (1 + 0.05 * math.sin(seed)) * 0.021 + (0 if baseline else 0.004) + 0.0003 * scale,
    )
    dense = 6.0 * 301066 * 64 * per_epoch
    final = 0.972 - 0.0008 * scale**2 + 0.004 * math.sin(7 * seed)
    lines: list[dict[str, Any]] = []
    accuracy = loss = 0.0
    for epoch in range(1, epochs + 1):
        for step in range((epoch - 1) * per_epoch + 1, epoch * per_epoch + 1, 4):
            loss = 2.2 * math.exp(-step / 55) + 0.08 + 0.01 * scale + draw.gauss(0, 0.03)
            seconds = step * step_seconds
            lines.append(
                {
                    "event": "step",
                    "step": step,
                    "epoch": epoch,
                    "loss": loss,
                    "learning_rate": 0.001,
                    "seconds": seconds,
                }
            )
        accuracy = final - 0.5 * math.exp(-epoch / 1.4) + draw.gauss(0, 0.002)
        layers = {
            layer: {
                "zeros": zeros(own * (0.8 + 0.2 * epoch / epochs)),
                "own_zeros": own * (0.8 + 0.2 * epoch / epochs),
                "largest_level": None if baseline else 31,
                "bits": None if baseline else 6,
                "fallbacks": 0,
                "step": None if baseline else 0.0012,
                "unknown": 17,
            }
            for layer, (_, _, own) in LAYERS.items()
        }
        if methods:
            for at, numbers in enumerate(layers.values()):
                numbers.update(of_layer(at, epoch / epochs))
        own = mean_own * (0.8 + 0.2 * epoch / epochs)
        lines.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "step": epoch * per_epoch,
                "train": {"loss": loss, "accuracy": accuracy + 0.01},
                "validation": {"loss": loss + 0.05 + 0.01 * epoch / epochs, "accuracy": accuracy},
                "seconds": epoch * per_epoch * step_seconds,
                "step_seconds": step_seconds,
                "zeros": zeros(own),
                "own_zeros": own,
                "flops": flops(dense, zeros(own), 0 if baseline else 0.01 * dense),
                "layers": layers,
            }
            | (of_model(epoch, epochs, per_epoch) if methods else {})
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {
            "schema": 1,
            "status": "finished",
            "epochs": epochs,
            "steps": epochs * per_epoch,
            "seconds": epochs * per_epoch * step_seconds,
            "step_seconds": step_seconds,
            "parameters": 301066,
            "best_validation": {"epoch": epochs, "accuracy": accuracy},
            "test": {"loss": 0.11, "accuracy": final},
            "zeros": zeros(mean_own),
            "own_zeros": mean_own,
            "flops": flops(dense * epochs, zeros(mean_own), 0 if baseline else 0.01 * dense * epochs),
            "peak_memory_bytes": 412_000_000,
            "saved_activation_bytes": 3_400_000,
            "model_file": "model.safetensors",
        }
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder under ``tmp_path / "runs"``."""

    def make(*args: Any, **kwargs: Any) -> Path:
        return write_run(tmp_path / "runs", *args, **kwargs)

    return make


@pytest.fixture
def runs(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with two dithered runs and a baseline, and a second group with a run that never ended."""
    make_run("backprop-0", scale=0)
    make_run("dither-1", scale=1)
    make_run("dither-2", scale=2)
    make_run("images-backprop-0", scale=0, group="images · convolutions", epochs=30)
    make_run("images-dither-2", scale=2, group="images · convolutions", epochs=17, finished=False)
    return tmp_path / "runs"


@pytest.fixture
def seeded(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with three seeds of the baseline, of one dither, and of one run with everything all methods leave."""
    for seed in range(3):
        make_run(f"backprop-{seed}", scale=0, seed=seed)
        make_run(f"dither-{seed}", scale=1, seed=seed)
        make_run(f"all-{seed}", "Everything", scale=2, seed=seed, methods=True)
    return tmp_path / "runs"
