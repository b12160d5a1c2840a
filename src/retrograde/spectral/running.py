"""A model run on data to look at it, and left as it was."""

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree  # pyright: ignore[reportPrivateUsage]

from retrograde.errors import OptionError, RetrogradeError
from retrograde.forecast import untouched

BATCH = "a tensor, a tuple or list that begins with the model's input, or a mapping of its keyword arguments"
"""What a batch must be."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """In evaluation mode and without gradients; modes, buffers and torch's random state come back as they were."""
    training = [module for module in model.modules() if module.training]
    with untouched(model), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


class Runner:
    """Runs a model on batches of data, on the device of its parameters.

    Args:
        what: whose data they are, for messages.
        call: runs a model on one batch, where the user says how.
        option: by which the user can say it; empty where there is none.
    """

    def __init__(
        self, what: str, call: Callable[[nn.Module, Any], object] | None = None, option: str = ""
    ) -> None:
        self._what, self._call, self._option = what, call, option

    def __call__(self, model: nn.Module, batch: Any, through: nn.Module | None = None) -> object:
        """``model(x)``, or ``model(**batch)`` with what its forward takes: labels beside the inputs are for a loss.

        Args:
            model: whose arguments the batch brings.
            batch: `BATCH`.
            through: what is called in place of the model, if anything.

        Raises:
            OptionError: it is no batch, or the model fails on it.
        """
        if self._call is not None:
            return self._call(model, batch)
        args, kwargs = self._arguments(model, batch)
        try:
            return (model if through is None else through)(*args, **kwargs)
        except (RetrogradeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            given = ", ".join([*map(_said, args), *(f"{name}: {_said(x)}" for name, x in kwargs.items())])
            raise OptionError(
                f"{self._what}: {type(model).__name__} fails on a batch, of which it was given {given}: "
                f"{type(error).__name__}: {error}. {self._advice()}"
            ) from error

    def _arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not any(isinstance(leaf, Tensor) for leaf in tree.tree_leaves(x)):
            raise OptionError(
                f"{self._what}: a {_said(x)} is not a batch{'' if x is batch else f' ({_said(batch)})'}. "
                f"{self._advice()}"
            )
        device = next((p.device for p in model.parameters()), None)
        x = tree.tree_map_only(Tensor, lambda tensor: tensor.to(device), x)
        if not isinstance(x, Mapping):
            return (x,), {}
        named = {str(key): value for key, value in cast("Mapping[Any, Any]", x).items()}
        takes = inspect.signature(model.forward).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()):
            return (), named
        kwargs = {key: value for key, value in named.items() if key in takes}
        lacking = [
            key
            for key, p in takes.items()
            if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and key not in kwargs
        ]
        if lacking:
            raise OptionError(
                f"{self._what}: a batch brings {', '.join(map(repr, named))}, and {type(model).__name__}.forward takes "
                f"{', '.join(map(repr, takes))}: {', '.join(map(repr, lacking))} is missing. {self._advice()}"
            )
        return (), kwargs

    def _advice(self) -> str:
        return f"A batch must be {BATCH}{self._option and f'; for any other give `{self._option}`'}."


def _said(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
    return type(x).__name__
