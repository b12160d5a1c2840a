"""TensorBoard logs, when TensorBoard is installed."""

import os
import warnings
from pathlib import Path
from typing import Protocol

from retrograde.errors import RetrogradeWarning


class Writer(Protocol):
    """The two calls that a run makes."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Log one number."""

    def close(self) -> None:
        """Write what is left."""


class _NoWriter:
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        pass

    def close(self) -> None:
        pass


def is_available() -> bool:
    """Whether TensorBoard is installed."""
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None


def open_writer(folder: Path, purge_step: int | None) -> Writer:
    """A writer into `folder`; without TensorBoard one that drops everything (`is_available` tells beforehand).

    Args:
        folder: where the event files go.
        purge_step: on resuming, hide what was logged from this step on; None keeps everything.
    """
    if not is_available():
        return _NoWriter()
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder), purge_step=purge_step)
    except UnicodeEncodeError:
        warnings.warn(
            f"TensorBoard's logs are left out: it cannot write into {os.fsencode(folder)!r}, whose name is not UTF-8. "
            "Choose another folder to have them.",
            RetrogradeWarning,
            stacklevel=2,
        )
        return _NoWriter()
