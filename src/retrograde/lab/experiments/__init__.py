"""Experiments that claims run where training by a recipe is not what is claimed."""

from importlib import import_module

from retrograde.lab.experiments.base import Experiment
from retrograde.lab.options import require_known

NAMES = {
    "adaptation": "Adaptation",
    "factorisation": "Factorisation",
    "few_shot": "FewShot",
    "orthogonal": "OrthogonalWeights",
    "tracking": "Tracking",
    "transfer": "Transfer",
}
"""Modules of this package, and the class of each."""


def experiment(name: str) -> type[Experiment]:
    """The settings of an experiment by its name.

    Raises:
        OptionError: there is none.
    """
    require_known("there is no experiment", [name], list(NAMES))
    found: type[Experiment] = getattr(import_module(f"retrograde.lab.experiments.{name}"), NAMES[name])
    return found
