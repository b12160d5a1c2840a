"""What a peer may change of plain training."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from retrograde.engine.slots import Method
from retrograde.extras import missing

Base = Callable[..., torch.optim.Optimizer]
"""Makes the recipe's optimizer from parameters or groups of them."""


class Selector(Protocol):
    """Chooses the examples of a batch that are trained on; it may keep a history."""

    def select(self, losses: Callable[[], Tensor], count: int) -> Tensor:
        """Indices (m ≤ count,) of the examples to train on.

        Args:
            losses: computes the loss of each example, (count,), without a graph: a forward pass more, which is part
                of what the peer costs.
            count: examples in the batch.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        ...


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer of `model` steps."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Peer:
    """A rival of the methods, as a frozen config. Every hook leaves training as it is unless a peer says otherwise.

    A subclass names its paper in the class docstring and its package, where it is an adapter, in `package`. The types
    of its options say which values they take, and pydantic checks them.
    """

    package: ClassVar[str | None] = None
    """The package that it adapts; None for those that are written here."""

    second_pass: ClassVar[bool] = False
    """The optimizer's step takes a closure that runs the batch forward and backward again (SAM)."""

    def method(self) -> Method | None:
        """A method for the engine's slots: what a peer does in the backward pass of a layer; itself where it is one."""
        return self if isinstance(self, Method) else None

    def prepare(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """The model as it is trained: called before the optimizer is made; may change `model` in place.

        Args:
            model: as it was built, or as the peer before this one left it.
            example: a batch of its input, for peers that trace it.
        """
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """An ordinary model that computes the same, after training."""
        return model

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base
    ) -> torch.optim.Optimizer | None:
        """The peer's optimizer; None where it trains with the recipe's.

        Args:
            model: after `prepare`.
            learning_rate: the recipe's; the schedule moves every parameter group's from what the peer makes it here.
            weight_decay: the recipe's.
            base: makes the recipe's optimizer, for peers that wrap one.
        """
        return None

    def selector(self, seed: int) -> Selector | None:
        """What chooses the examples of each batch; None trains on all."""
        return None

    def _load(self, module: str) -> Any:
        """The imported `module` of the peer's package, or of one that this needs.

        Raises:
            MissingPackageError: it is not installed.
        """
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            part = f"the peer {type(self).__name__}, which comes from the package {self.package},"
            raise missing(part, "peers", str(error.name)) from error
