"""TensorBoard logs, when TensorBoard is installed."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from retrograde.errors import RetrogradeWarning
from retrograde.extras import is_installed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def is_available() -> bool:
    """Whether TensorBoard is installed."""
    return is_installed("tensorboard")


def open_writer(folder: Path, purge_step: int | None) -> "SummaryWriter | None":
    """A writer into `folder`; without TensorBoard, or where it cannot write there, None.

    Args:
        folder: where the event files go.
        purge_step: on resuming, hide what was logged from this step on; None keeps everything.
    """
    if not is_available():
        return None
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
        return None
