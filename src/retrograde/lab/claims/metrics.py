"""The figures of one run, by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrograde.lab.claims.result import Reading, Run
from retrograde.lab.record import Outcome, RunRecord, number


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
"""Known once all variants of a seed have run; None where the target was not reached."""

TRAINING = {
    "accuracy": Metric("test accuracy", "%"),
    "best_validation": Metric("best validation accuracy", "%"),
    "zeros": Metric("zeros in δ", "%"),
    "own_zeros": Metric("zeros before the method", "%"),
    "needed": Metric("non-zero FLOPs", "%", 1),
    "executed": Metric("executed FLOPs", "%", 1),
    "discounted": Metric("FLOPs, discounted by precision", "%", 1),
    "discounted_backward": Metric("backward FLOPs, discounted by precision", "%", 1),
    "parameters": Metric("parameters"),
    "saved_bytes": Metric("saved activations at most", "MiB"),
    "mean_saved_bytes": Metric("saved activations on average", "MiB"),
    "seconds": Metric("training time", "s"),
    "step_seconds": Metric("time of a step", "s"),
    "late_step_seconds": Metric("time of a step, last epoch", "s"),
    "backward_seconds": Metric("backward pass of a step", "s"),
    "steps": Metric("steps"),
    "sharpness": Metric("λ_max of the Hessian"),
    "auc": Metric("area under the ROC curve", "%"),
    "step_peak_bytes": Metric("most memory of a step", "MiB"),
    "macs": Metric("multiply-adds of a row"),
    "forward_seconds_128": Metric("forward pass, batch of 128", "s"),
    **TO_TARGET,
}
"""Shares of FLOPs are of the dense-equivalent whole training step; ``discounted_backward`` of the backward pass."""

EXPERIMENTS = {
    "accuracy_untuned": Metric("test accuracy before fine-tuning", "%"),
    "macs_share": Metric("multiply-adds of the original's", "%", 1),
    "model_bytes": Metric("size of the file", "MiB"),
    "forward_seconds_1": Metric("forward pass, batch of 1", "s"),
    "forward_speedup_1": Metric("speed-up of it, batch of 1"),
    "forward_speedup_128": Metric("speed-up of it, batch of 128"),
    "source_accuracy": Metric("source accuracy, old head", "%"),
    "trainable": Metric("trained parameters"),
    "task_interval": Metric("half of the 95 % interval over tasks", "%"),
    "clean_accuracy": Metric("clean accuracy", "%"),
    "clean_drift": Metric("drift on clean images", "%"),
    "corrupted_drift": Metric("drift on corrupted images", "%"),
    "image_seconds": Metric("time per image", "s"),
    "captured": Metric("subspace captured", "%"),
    "tracking_error_still": Metric("tracking error, still", "%"),
    "tracking_error_slow": Metric("tracking error, slow", "%"),
    "tracking_error_middle": Metric("tracking error, middle", "%"),
    "tracking_error_fast": Metric("tracking error, fast", "%"),
    "orthonormality": Metric("max |QᵀQ − I|", "10⁻⁶"),
    "update_flops": Metric("FLOPs of an update"),
    "update_seconds": Metric("time of an update", "s"),
}
"""Of claims that do not train by a recipe, beside those above."""

ALL = TRAINING | EXPERIMENTS


def of_run(outcome: Outcome) -> dict[str, float | None]:
    """What a run tells: all but the time to a target. None where it has no figure, or one that is not finite."""
    flops = outcome.flops
    found: dict[str, Any] = {
        **dict(outcome),
        "accuracy": outcome.score("test"),
        "best_validation": outcome.score("best_validation"),
        **{name: flops.of_dense(name) for name in ("needed", "executed", "discounted")},
        "discounted_backward": flops.discounted_backward,
        "saved_bytes": outcome.saved_activation_bytes,
        "mean_saved_bytes": outcome.mean_saved_activation_bytes,
        **outcome.measures,
    }
    return {name: number(found[name]) for name in ALL if name in found}


def summary(record: RunRecord, variant: str) -> Run:
    """A run of `variant`, as results hold it."""
    outcome = record.outcome
    counts = {name: number(value) for name, value in outcome.flops.to_dict().items()}
    return Run(
        contestant=variant,
        seed=record.seed,
        commit=record.description.commit,
        folder=record.folder.name,
        # Most steps that compile or try kernels are over by then.
        metrics={**of_run(outcome), "late_step_seconds": number(record.epochs[-1].step_seconds)},
        flops={name: value for name, value in counts.items() if value is not None},
        peak_memory_bytes=outcome.peak_memory_bytes,
        curve=[
            Reading(step=reading.step, seconds=reading.seconds, accuracy=accuracy)
            for reading in record.readings
            if (accuracy := number(reading.validation.get("accuracy"))) is not None
        ],
    )


def to_target(curve: Sequence[Reading], target: float) -> tuple[float, int] | None:
    """Seconds and steps at the first reading with `target` validation accuracy or more."""
    reached = next((reading for reading in curve if reading.accuracy >= target), None)
    return None if reached is None else (reached.seconds, reached.step)
