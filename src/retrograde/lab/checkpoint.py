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


_Passes = Annotated[dict[str, float], _of("forward", "backward", "saved_bytes", "samples")]
_Sums = Annotated[dict[str, float], _of("loss", "correct", "count")]
_Reading = Annotated[dict[str, float], _of("loss", "accuracy", empty=True)]


class State(BaseModel):
    """How far a run has come, and what it has measured; the trainer counts in it, and `Checkpoint` keeps it.

    Attributes:
        rng: torch's generators, from which dropout and the like draw, after the last step.
        step: steps done in the whole run.
        finished_epochs: their number.
        seconds: of training.
        backward_seconds: of backward passes.
        passes: ``forward`` and ``backward`` ones of a whole batch: peers may run one twice, or in part. ``samples`` of
            them were looked at for what forward passes keep for the backward pass, ``saved_bytes`` all together.
        epoch_sums: over the examples of the epoch so far.
        step_seconds: of the epoch's steps.
        clocked: layer → seconds of its backward passes and their number of steps, in the processes before this one.
        validation: the last reading.
        best: the best one, and its epoch.
        best_weights: the weights of that, where they are to be kept.
    """

    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)

    rng: list[Tensor]
    step: NonNegativeInt = 0
    finished_epochs: NonNegativeInt = 0
    seconds: float = 0.0
    backward_seconds: NonNegativeFloat = 0.0
    passes: _Passes = dict.fromkeys(("forward", "backward", "saved_bytes", "samples"), 0.0)
    epoch_sums: _Sums = dict.fromkeys(("loss", "correct", "count"), 0.0)
    step_seconds: list[float] = []
    clocked: dict[str, tuple[float, int]] = {}
    validation: _Reading = {}
    best: _Reading = {}
    best_weights: dict[str, Tensor] | None = None


class Checkpoint(State):
    """All that a run needs to go on; `Trainer.save` writes it."""

    format: Literal[3]
    recipe: dict[str, Any]
    model: _State
    optimizer: _State
    schedule: _State
    session: _State | None
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
    for name in Checkpoint.model_fields.keys() - content.keys():
        raise misfit(folder, name, "it is missing")
    path = folder / files.METRICS
    if not path.is_file() or path.stat().st_size < found.metrics_bytes:
        raise CheckpointError(
            f"{path} is missing or shorter than the {found.metrics_bytes} bytes that its checkpoint counts on, so the "
            "run cannot go on in it. Put the file back, or start the run anew in another folder."
        )
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
