"""Files of a run folder, written so that a kill at any moment leaves the old or the new content, never half of it."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from retrograde.errors import CheckpointError, RunError

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
RESULT = "result.json"
RUN = "run.json"
CHECKPOINT_FORMAT = 1


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and put it in place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


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
        content = torch.load(path, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
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


def read_run(folder: Path) -> dict[str, Any]:
    """The description of the run in `folder`.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = folder / RUN
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"there is no run in {folder}: {error}. Give the folder of a run (--out).") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Start the run anew in another folder.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
