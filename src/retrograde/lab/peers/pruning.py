"""Structured magnitude pruning to a share of a model's multiply-adds, by the package `torch-pruning`.

Channels are ranked by the L2 norm of their group, all parameters that must go with them, and taken away step by
step until the multiply-adds are within the budget, as the package's own benchmarks do (``progressive_pruning``).

Reference: Fang, Ma, Song, Mi, Wang, *DepGraph: towards any structural pruning*, CVPR 2023.
"""

import copy
import importlib
import warnings
from typing import Any

from torch import Tensor, nn

from retrograde.extras import missing
from retrograde.lab.measure import macs_of

_STEPS = 400


def load(part: str) -> Any:
    """The package.

    Args:
        part: what needs it, as the beginning of a sentence.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise missing(part, "peers", "torch-pruning") from error


def prune(model: nn.Module, x: Tensor, share: float, *, all_layers: bool = True) -> nn.Module:
    """A pruned copy of a classifier; its last linear layer keeps its outputs.

    Args:
        model: any model that the package can trace.
        x: an input.
        share: of the multiply-adds that may stay.
        all_layers: rank the channels of all layers together; else each layer loses the same share.

    Raises:
        MissingPackageError: `torch-pruning` is not installed.
    """
    package = load("the peer for pruning")
    training = model.training
    small = copy.deepcopy(model).eval()
    last = [layer for layer in small.modules() if isinstance(layer, nn.Linear)][-1]
    budget = share * macs_of(small, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package, about parameters that it does not prune
        pruner = package.pruner.MagnitudePruner(
            small,
            x,
            importance=package.importance.GroupMagnitudeImportance(p=2),
            global_pruning=all_layers,
            iterative_steps=_STEPS,
            pruning_ratio=1.0,
            ignored_layers=[last],
        )
        for _ in range(_STEPS):
            pruner.step()
            if macs_of(small, x) <= budget:
                break
    return small.train(training)
