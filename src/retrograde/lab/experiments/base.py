"""What every experiment is: settings with a seed, and a run that gives figures."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from retrograde import host


@dataclass(frozen=True)
class Context:
    """What a run is given beside its settings.

    Attributes:
        folder: of the run, for what it wants to keep; it exists.
        data_dir: where data sets lie.
        trial: of a search: only the validation split may be read, and ``accuracy`` is its figure.
        tell: to be told how much is done, 0 to 1.
        stop: to be asked now and then; true means that the run should raise KeyboardInterrupt.
    """

    folder: Path
    data_dir: Path | None = None
    trial: bool = False
    tell: Callable[[float], None] = lambda share: None
    stop: Callable[[], bool] = lambda: False

    def note(self, share: float) -> None:
        """So much is done; raises KeyboardInterrupt when it is time to stop."""
        self.tell(share)
        if self.stop():
            raise KeyboardInterrupt


class Experiment(BaseModel, ABC):
    """Settings of one cell of a claim: a variant with a seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0

    @abstractmethod
    def run(self, context: Context) -> dict[str, float]:
        """Run the cell. The same settings give the same figures, times aside.

        Returns:
            Figures by metric; ``accuracy`` is of the test split, or in a trial of the validation split.
        """


def train_once(context: Context, key: Sequence[Any], model: nn.Module, train: Callable[[], None]) -> None:
    """Give `model` what `train` made of it in whichever variant came first; others that want it wait.

    Args:
        context: of the run; networks are kept beside the runs of all variants.
        key: all that the trained network depends on.
        model: freshly made, the same in every variant.
        train: trains it in place.
    """
    # Definitions of claims know experiments, and not the other way round, but for this.
    from retrograde.lab.claims.definition import content_hash

    path = context.folder.parent / f"network-{content_hash([*key, torch.__version__])}.pt"
    with path.with_suffix(".lock").open("w") as lock:
        if sys.platform != "win32":  # there both would train the same network, and write the same file
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            train()
            host.write_atomically(path, lambda file: torch.save(model.state_dict(), file), shared=True)
    model.load_state_dict(torch.load(path, weights_only=True))
