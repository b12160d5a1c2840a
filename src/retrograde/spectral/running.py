"""A model run on data to look at it, and left as it was."""

import contextlib
from collections.abc import Generator

import torch
from torch import nn

from retrograde.forecast import untouched


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
