"""What every experiment is: settings with a seed, and a run that gives figures."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict


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
