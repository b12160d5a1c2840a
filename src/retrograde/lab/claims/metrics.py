"""The figures of one run, by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrograde.lab.claims.result import Reading


@dataclass(frozen=True)
class Metric:
    """How a figure is written.

    Attributes:
        label: in tables.
        unit: ``%`` for shares, ``s``, ``MiB``, or empty.
        digits: of shares, behind the point.
    """

    label: str
    unit: str = ""
    digits: int = 2


TO_TARGET = {
    "seconds_to_target": Metric("time to target", "s"),
    "steps_to_target": Metric("steps to target"),
}
"""Known once all contestants of a seed have run; None where the target was not reached."""

ALL = {
    "accuracy": Metric("test accuracy", "%"),
    "best_validation": Metric("best validation accuracy", "%"),
    "zeros": Metric("zeros in δ", "%"),
    "own_zeros": Metric("zeros of its own", "%"),
    "needed": Metric("FLOPs needed", "%", 1),
    "executed": Metric("FLOPs executed", "%", 1),
    "discounted": Metric("FLOPs, precision discounted", "%", 1),
    "discounted_backward": Metric("backward FLOPs, precision discounted", "%", 1),
    "parameters": Metric("parameters"),
    "saved_bytes": Metric("saved activations at most", "MiB"),
    "mean_saved_bytes": Metric("saved activations on average", "MiB"),
    "seconds": Metric("training time", "s"),
    "step_seconds": Metric("time of a step", "s"),
    "backward_seconds": Metric("backward pass of a step", "s"),
    "steps": Metric("steps"),
    "sharpness": Metric("λ_max of the Hessian"),
    **TO_TARGET,
}
"""Shares of FLOPs are of the dense-equivalent whole training step; ``discounted_backward`` of the backward pass."""


def of_run(result: dict[str, Any]) -> dict[str, float | None]:
    """What a run's ``result.json`` tells: all but the time to a target, and what is measured afterwards."""
    flops = result["flops"]
    dense = flops["dense"] or 1.0
    backward = {name: flops[name] - flops["forward"][name] for name in ("dense", "discounted")}
    return {
        "accuracy": result["test"]["accuracy"],
        "best_validation": result["best_validation"]["accuracy"],
        "zeros": result["zeros"],
        "own_zeros": result["own_zeros"],
        **{name: flops[name] / dense for name in ("needed", "executed", "discounted")},
        "discounted_backward": backward["discounted"] / (backward["dense"] or 1.0),
        "parameters": result["parameters"],
        "saved_bytes": result["saved_activation_bytes"],
        "mean_saved_bytes": result["mean_saved_activation_bytes"],
        "seconds": result["seconds"],
        "step_seconds": result["step_seconds"],
        "backward_seconds": result["backward_seconds"],
        "steps": result["steps"],
        **result["measures"],
    }


def to_target(curve: Sequence[Reading], target: float) -> tuple[float, int] | None:
    """Seconds and steps at the first reading with `target` validation accuracy or more."""
    reached = next((reading for reading in curve if reading.accuracy >= target), None)
    return None if reached is None else (reached.seconds, reached.step)
