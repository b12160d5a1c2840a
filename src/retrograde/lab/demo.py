"""The demonstration: plain backpropagation and every method on the bundled digits, side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from retrograde.lab import data as lab_data
from retrograde.lab.recipe import Recipe
from retrograde.lab.trainer import Progress, Trainer
from retrograde.methods.registry import available

SETTINGS: dict[str, dict[str, Any]] = {"dither": {"scale": 1.0}}
"""Options in the demonstration; a method that is not named here runs at its defaults."""

MODELS = ("mlp", "vgg-small-bn")


@dataclass(frozen=True)
class DemoRow:
    """One contestant on one model, over all seeds. Shares are of the dense-equivalent FLOPs.

    `seconds_ratio` is the mean over seeds of the ratio to plain backpropagation with the same seed: the runs take
    turns epoch by epoch, so both saw the same machine.
    """

    model: str
    label: str
    accuracy: float
    accuracy_deviation: float
    zeros: float | None
    own_zeros: float | None
    needed: float
    executed: float
    parameters: int
    saved_bytes: int
    seconds: float
    seconds_ratio: float


def run_demo(
    folder: Path,
    *,
    seeds: int,
    epochs: int,
    progress: Callable[[str, int, int], None],
) -> list[DemoRow]:
    """Train every contestant on every model with every seed; run folders go into `folder`.

    Args:
        folder: parent of the run folders.
        seeds: paired seeds.
        epochs: of each run.
        progress: called with (what, steps done, steps in all).
    """
    contestants: list[dict[str, dict[str, Any]]] = [
        {},
        *({name: SETTINGS.get(name, {})} for name in available()),
    ]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    done, total = 0, 0
    for model in MODELS:
        for seed in range(seeds):
            data = lab_data.load("digits", seed=seed)
            group = f"digits · {model}"

            def count(state: Progress) -> None:
                nonlocal done
                done += 1
                progress(group, done, total)  # noqa: B023  the bar shows where the loop is now

            trainers: list[Trainer] = []
            for methods in contestants:
                recipe = Recipe(
                    data="digits", model=model, methods=methods, epochs=epochs, batch_size=64, seed=seed
                )
                name = f"{model}-{'+'.join(methods) or 'plain'}-{seed}"
                label = f"{recipe.label}, seed {seed}"
                trainers.append(
                    Trainer(recipe, folder / name, data, progress=count, group=group, label=label)
                )
            total = total or sum(trainer.steps for trainer in trainers) * seeds * len(MODELS)
            # Turn by turn: whatever the machine does meanwhile, it does to all of them.
            for _ in zip(*(trainer.epochs() for trainer in trainers), strict=True):
                pass
            for trainer in trainers:
                results.setdefault((model, trainer.recipe.label), []).append(trainer.finish())
    return [_row(model, label, found, results[model, "plain"]) for (model, label), found in results.items()]


def _row(model: str, label: str, found: list[dict[str, Any]], plain: list[dict[str, Any]]) -> DemoRow:
    accuracies = [r["test"]["accuracy"] for r in found]
    zeros = [r["zeros"] for r in found if r["zeros"] is not None]
    own = [r["own_zeros"] for r in found if r["own_zeros"] is not None]
    return DemoRow(
        model=model,
        label=label,
        accuracy=mean(accuracies),
        accuracy_deviation=stdev(accuracies) if len(accuracies) > 1 else 0.0,
        zeros=mean(zeros) if zeros else None,
        own_zeros=mean(own) if own else None,
        needed=mean(r["flops"]["needed"] / r["flops"]["dense"] for r in found),
        executed=mean(r["flops"]["executed"] / r["flops"]["dense"] for r in found),
        parameters=found[0]["parameters"],
        saved_bytes=found[0]["saved_activation_bytes"],
        seconds=mean(r["seconds"] for r in found),
        seconds_ratio=mean(r["seconds"] / p["seconds"] for r, p in zip(found, plain, strict=True)),
    )
