"""Files of a run folder, written so that a kill at any moment leaves the old or the new content, never half of it."""

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from retrograde.errors import CheckpointError, RunError, WriteError
from retrograde.host import write_atomically

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
RESULT = "result.json"
RUN = "run.json"
CHECKPOINT_FORMAT = 3


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Inside, or until the process ends, no other process trains in a folder.

    Args:
        folder: of a run; nothing is written into it.

    Raises:
        RunError: another run has it.
    """
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another run is training in {folder} at this moment, and two would overwrite each other's files. Wait "
                "for its end, or choose another folder (--out)."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(opened)


@contextlib.contextmanager
def writing(path: Path, *others: type[Exception]) -> Generator[None]:
    """What cannot be written inside is a `WriteError`.

    Args:
        path: what is written, for the message.
        others: exceptions that mean it too, besides OSError.
    """
    try:
        yield
    except (OSError, *others) as error:
        # torch's writer buries what the file said under an error of its own.
        causes = [cause for cause in (error, error.__context__) if isinstance(cause, OSError)]
        why = (causes[-1].strerror if causes else None) or _first_line(error)
        raise WriteError(
            f"{path} cannot be written: {why}. What was written before is whole. Make room, or choose another folder; "
            "then give the command again (for `train` with --resume, where a checkpoint was written)."
        ) from error


def to_json(content: dict[str, Any], indent: int | None = None) -> str:
    """JSON that every reader takes: a figure that is not finite (a diverged loss) becomes null."""
    text = json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    # Names of files that are not UTF-8 have surrogates, which only JSON's own escapes can carry.
    return text.encode("utf-8", "backslashreplace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, atomically."""
    text = to_json(content, indent=2) + "\n"
    with writing(path):
        write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        RunError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read: {error}. It is damaged: copy or make it again, or leave it out."
        ) from error


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write the run's checkpoint, atomically."""
    whole = {"format": CHECKPOINT_FORMAT, **content}
    path = folder / CHECKPOINT
    with writing(path, RuntimeError):
        write_atomically(path, lambda file: torch.save(whole, file))


def save_model(folder: Path, model: nn.Module) -> None:
    """Write the weights of the run's model, atomically; one copy of tied ones."""
    from safetensors.torch import save_model as save

    path = folder / MODEL
    with writing(path, SafetensorError):
        write_atomically(path, lambda file: save(model, file.name))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the run's checkpoint; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: it is missing, cut off, damaged, or of another format.
    """
    path = folder / CHECKPOINT
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no checkpoint at {path}. Start the run without --resume.")
    try:
        # torch does not check the sums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is not as it was written")
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # bytes that are no checkpoint, or half of one, raise whatever they lead to
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({_first_line(error)}): it is cut off, damaged, or no checkpoint. "
            "Put a whole copy in its place, or remove it and start the run anew."
        ) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of format {CHECKPOINT_FORMAT}: another version wrote it, or another program. "
            "Start the run anew in an empty folder."
        )
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
