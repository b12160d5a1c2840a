"""What the demonstration compares: a small model for each method, plain training beside it, and one figure.

Sizes are chosen so that three seeds of everything take about a minute on two cores, and kernels of convolutions alone
are compiled: no product of a linear layer is large enough for others than torch's own.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from retrograde.lab.claims.definition import Claim

BASELINE = "plain"


@dataclass(frozen=True)
class Scenario:
    """One comparison.

    Attributes:
        claim: title, recipe, baseline (first) and methods.
        metric: the figure that decides: a key of `retrograde.lab.claims.metrics.ALL`.
        unit: what the figure is of, for the verdict: ``"a step"``.
        time: the figure that says how long training takes with the method, where time is what it is for.
        least_epochs: fewer show nothing.
        without: the same network without the method, where the baseline is another one.
    """

    claim: Claim
    metric: str
    unit: str
    time: Literal["step_seconds", "late_step_seconds", "seconds_to_target"] | None = None
    least_epochs: int = 1
    without: str | None = None

    @property
    def name(self) -> str:
        """The last part of the claim's id."""
        return self.claim.id.rpartition("/")[2]

    def shortened(self, share: float, seeds: int) -> "Scenario":
        """With so much of its epochs, and so many seeds."""
        epochs = self.claim.recipe["epochs"]
        fewer = min(epochs, max(self.least_epochs, round(epochs * share)))
        recipe = {**self.claim.recipe, "epochs": fewer}
        claim = self.claim.model_copy(update={"recipe": recipe, "seeds": seeds})
        return dataclasses.replace(self, claim=claim)


def scenarios() -> tuple[Scenario, ...]:
    """All of them, in the order in which they are shown."""
    return tuple(map(_read, ("dither", "decorrelate", "deepfocus", "perforate", "spectral")))


def _read(name: str) -> Scenario:
    """From its file in this folder: a claim's definition, and beside it what is shown of the claim."""
    text = resources.files("retrograde.lab.demo").joinpath(f"{name}.toml").read_text("utf-8")
    content = tomllib.loads(text)
    shown = content.pop("shown")
    return Scenario(Claim.model_validate({"id": f"demo/{name}", "source": "", **content}), **shown)
