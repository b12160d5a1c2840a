"""The fields of a run's checkpoint: what is read back is checked here, before anything acts on it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    InstanceOf,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationError,
)
from torch import Tensor

from retrograde.errors import CheckpointError
from retrograde.lab import files

_State = InstanceOf[dict[str, Any]]
"""Left as it is: the part of the run that it belongs to checks what is inside."""


def _of(*names: str, empty: bool = False) -> AfterValidator:
    """Figures by these names, or where `empty` allows it none at all."""

    def check(found: dict[str, float]) -> dict[str, float]:
        missing = set(names) - found.keys()
        if missing and (found or not empty):
            raise ValueError(f"{', '.join(sorted(missing))} not in it")
        return found

    return AfterValidator(check)


_Reading = Annotated[dict[str, float], _of("loss", "accuracy", empty=True)]


class Checkpoint(BaseModel):
    """All that a run needs to go on; `Trainer.save` writes it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", arbitrary_types_allowed=True)

    format: Literal[3]
    recipe: dict[str, Any]
    step: NonNegativeInt
    finished_epochs: NonNegativeInt
    seconds: float
    backward_seconds: NonNegativeFloat
    passes: Annotated[dict[str, float], _of("forward", "backward")]
    model: _State
    optimizer: _State
    schedule: _State
    session: _State | None
    rng: list[Tensor]
    epoch_sums: Annotated[dict[str, float], _of("loss", "correct", "count")]
    step_seconds: list[float]
    clocked: dict[str, tuple[float, int]]
    validation: _Reading
    best: _Reading
    best_weights: dict[str, Tensor] | None
    selector: _State | None
    metrics_bytes: NonNegativeInt


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of the run in `folder`, with the metrics that it counts on in place.

    Raises:
        CheckpointError: it is missing, damaged, or incomplete, or the metrics are.
    """
    content = files.load_checkpoint(folder)
    try:
        found = Checkpoint.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise misfit(folder, str(first["loc"][0]), first["msg"]) from error
    files.check_metrics(folder, found.metrics_bytes)
    return found


def restore(folder: Path, name: str, part: Any, state: Any) -> None:
    """Let a part of the run take its field `name` of the checkpoint in `folder`.

    Raises:
        CheckpointError: the field is of another part.
    """
    try:
        part.load_state_dict(state)
        if isinstance(part, torch.optim.Optimizer) and type(part).__module__.startswith("torch."):
            _check_shapes(part)
    except Exception as error:  # each part has its own for a state that is not its own
        raise misfit(folder, name, f"{type(error).__name__}: {error}") from error


def misfit(folder: Path, name: str, why: str) -> CheckpointError:
    """An error about the field `name` of the checkpoint in `folder`."""
    return CheckpointError(
        f"the checkpoint {folder / files.CHECKPOINT} does not fit this run: its field {name!r} is refused "
        f"({why.rstrip('.')}). It is of another run or version, or was changed. Put the run's own back, or start anew "
        "in another folder."
    )


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    # torch's optimizers take any shape, and fail in their step.
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"{key} of shape {tuple(value.shape)} for a parameter {tuple(parameter.shape)}"
                )
