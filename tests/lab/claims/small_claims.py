"""A claim that runs in a second, and results that nobody ran."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from retrograde.lab import files
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.result import Entry, Reading, Result, Run

STEPS = 5
"""Of each run of `small`."""

RECIPE = {"limit": 160, "batch_size": 32, "epochs": 1, "optimizer": "sgd", "learning_rate": 0.05}
TUNING = {"trials": 2, "space": {"learning_rate": {"low": 1e-3, "high": 0.2}}}
CONTENT: dict[str, Any] = {
    "id": "toy/small",
    "title": "Small",
    "claim": "decay costs nothing",
    "source": "Somebody 2020, Table 1",
    "recipe": RECIPE,
    "seeds": 2,
    "contestants": {"plain": {}, "decayed": {"recipe": {"weight_decay": 0.3}, "source": {"accuracy": 0.9}}},
}
CHECK = {"says": "no less accurate", "of": "decayed", "metric": "accuracy", "minus": "plain", "at_least": -1}

_TIMED = (
    "backward_seconds",
    "seconds",
    "step_seconds",
    "late_step_seconds",
    "forward_seconds_128",
    "seconds_to_target",
    "peak_memory_bytes",
    "jobs",
    "threads",
)


def small(**change: Any) -> Claim:
    return Claim.model_validate({**CONTENT, **change})


def stop_after(steps: int) -> Callable[[], bool]:
    asked = itertools.count(1)
    return lambda: next(asked) >= steps


HOLD = "SMALL_CLAIMS_HOLD"
"""Names a file beside `runs`: while it is there, and another run has ended, `patient` waits in its 100th pass."""


class _Patient(nn.Sequential):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        hold = Path(os.environ[HOLD]) if HOLD in os.environ else None
        while (
            hold and self.passes > 100 and hold.exists() and any(hold.parent.glob(f"runs/*/{files.RESULT}"))
        ):
            time.sleep(0.01)
        return super().forward(x)


def patient() -> nn.Module:
    """A model for digits whose training can be held in its middle."""
    return _Patient(nn.Flatten(), nn.Linear(64, 10))


def untimed(content: Any) -> Any:
    """All of a result but what depends on the clock, and how many processes ran it."""
    if isinstance(content, Result):
        return untimed(content.model_dump(mode="json"))
    if isinstance(content, dict):
        return {key: untimed(value) for key, value in content.items() if key not in _TIMED}
    return [untimed(value) for value in content] if isinstance(content, list) else content


def made_up(
    figures: dict[str, dict[str, list[float | None]]],
    *,
    curves: dict[str, list[tuple[int, float, float]]] | None = None,
    target: str | list[str] | None = None,
) -> Result:
    """A result with these figures: contestant → metric → one for each seed; the same curve for every seed."""
    seeds = len(next(iter(next(iter(figures.values())).values())))
    return Result(
        claim="toy/made-up",
        hash="0",
        quick=False,
        title="Made up",
        sentence="",
        source="",
        note="",
        command="",
        machine={},
        jobs=1,
        threads=1,
        seeds=list(range(seeds)),
        equal="steps",
        target=target,
        table=["accuracy"],
        contestants={
            name: Entry(label=name, recipe={}, changes={}, trials=[], source={}) for name in figures
        },
        runs=[
            Run(
                contestant=name,
                seed=seed,
                commit=None,
                metrics={metric: values[seed] for metric, values in metrics.items()},
                flops={},
                peak_memory_bytes=None,
                curve=[
                    Reading(step=step, seconds=seconds, accuracy=accuracy)
                    for step, seconds, accuracy in (curves or {}).get(name, [])
                ],
            )
            for name, metrics in figures.items()
            for seed in range(seeds)
        ],
    )
