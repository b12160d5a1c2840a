"""Files of a run folder, written so that a kill at any moment leaves the old or the new content, never half of it."""

import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from retrograde.errors import CheckpointError, RunError
from retrograde.host import write_atomically

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
RESULT = "result.json"
RUN = "run.json"
CHECKPOINT_FORMAT = 2
# What torch.load raises on bytes that are no checkpoint, or half of one.
_UNREADABLE = (
    *(RuntimeError, OSError, EOFError, pickle.UnpicklingError),
    *(ValueError, LookupError, TypeError, AttributeError),
)


def to_json(content: dict[str, Any], indent: int | None = None) -> str:
    """JSON that every reader takes: a figure that is not finite (a diverged loss) becomes null."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, atomically."""
    text = to_json(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        RunError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}. Make it again, or remove it.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object. Make it again, or remove it.")
    return content


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write the run's checkpoint, atomically."""
    whole = {"format": CHECKPOINT_FORMAT, **content}
    write_atomically(folder / CHECKPOINT, lambda file: torch.save(whole, file))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the run's checkpoint; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: it is missing, cut off, or of another format.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}. Start the run without --resume.")
    try:
        with warnings.catch_warnings():
            # Bytes that are no checkpoint make torch muse about pickle protocols before it refuses them.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({_first_line(error)}): it is cut off or no checkpoint. Put a whole "
            "copy in its place, or remove it and start the run anew."
        ) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of format {CHECKPOINT_FORMAT}: another version wrote it, or another program. "
            "Start the run anew in an empty folder."
        )
    return content


def check_metrics(folder: Path, length: int) -> None:
    """The metrics file must hold all that was logged up to the checkpoint.

    Raises:
        CheckpointError: it is missing or shorter.
    """
    path = folder / METRICS
    if not path.is_file() or path.stat().st_size < length:
        raise CheckpointError(
            f"{path} is missing or shorter than the {length} bytes that its checkpoint counts on, so the run cannot go "
            "on in it. Put the file back, or start the run anew in another folder."
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics file, in order.

    Raises:
        RunError: it is missing or damaged.
    """
    path = folder / METRICS
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}. Start the run anew in another folder.") from error


def read_run(folder: Path) -> dict[str, Any]:
    """The description of the run in `folder`.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = folder / RUN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"there is no run in {folder}: {error}. Give the folder of a run (--out).") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Start the run anew in another folder.") from error
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise RunError(f"{path} is damaged: it describes no run. Start the run anew in another folder.")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
