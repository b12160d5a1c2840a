"""Running one cell of a published result again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from retrograde.errors import RunError
from retrograde.lab.claims.cells import train_together
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.grid import Grid, Places, run_of
from retrograde.lab.claims.result import Result

_ABSOLUTE = 0.005
_DEVIATIONS = 3.0
_COMPARED = ("accuracy", "best_validation", "zeros")


@dataclass(frozen=True)
class Verified:
    """A cell as published, and as it came out now.

    Attributes:
        contestant: of the cell.
        seed: of the cell.
        published: figures by metric.
        found: the same, now.
        identical: all figures are equal to the last bit.
        agrees: each is within three standard deviations over seeds, or half a point.
    """

    contestant: str
    seed: int
    published: dict[str, float]
    found: dict[str, float]
    identical: bool
    agrees: bool


def run_again(
    claim: Claim,
    result: Result,
    folder: Path,
    data_dir: Path | None,
    random: Random,
    *,
    tell: Callable[[float], None],
    stop: Callable[[], bool],
) -> Verified:
    """Run a random cell of a result in an empty folder and compare.

    Raises:
        RunError: the definition has changed since.
    """
    if claim.hash != result.hash:
        raise RunError(
            f"{claim.id}: the definition has changed since its result, so a cell of it cannot be run again. Run the "
            "claim."
        )
    published = random.choice(result.runs)
    entry = result.contestants[published.contestant]
    cell = Grid(claim, Places(folder)).cell(published.contestant, published.seed, entry.changes)
    train_together([cell], data_dir, tell, stop)
    metrics = run_of(cell).metrics
    pairs = {name: (published.metrics[name], metrics[name]) for name in _COMPARED}
    known = {name: (old, new) for name, (old, new) in pairs.items() if old is not None and new is not None}
    before, after = ({name: pair[i] for name, pair in known.items()} for i in (0, 1))

    def near(name: str) -> bool:
        spread = result.summaries[cell.name][name].deviation or 0.0
        return abs(after[name] - before[name]) <= max(_ABSOLUTE, _DEVIATIONS * spread)

    return Verified(cell.name, published.seed, before, after, before == after, all(map(near, known)))
