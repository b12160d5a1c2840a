"""The optimizer and the schedule that a recipe asks for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from retrograde.lab.peers import Peer
from retrograde.lab.recipe import Recipe


def make_optimizer(recipe: Recipe, model: nn.Module, peers: Sequence[Peer]) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's trainable parameters, or that of the first peer which brings one."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    settings: dict[str, Any] = {"lr": rate, "weight_decay": decay, "fused": True}
    base: Callable[..., torch.optim.Optimizer]
    if recipe.optimizer == "sgd":
        base = partial(torch.optim.SGD, momentum=0.9, nesterov=True, **settings)
    else:
        base = partial(torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam, **settings)
    made = (peer.make_optimizer(model, rate, decay, base) for peer in peers)
    found = next((optimizer for optimizer in made if optimizer is not None), None)
    return found or base([p for p in model.parameters() if p.requires_grad])


def make_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule of the learning rate over `steps` steps."""
    schedulers = torch.optim.lr_scheduler
    if recipe.schedule == "one-cycle":
        # A peer may give some parameters a learning rate of their own, as the other schedules take for granted.
        peaks = [group["lr"] for group in optimizer.param_groups]
        # The loop steps the schedule after every step, the last one included.
        return schedulers.OneCycleLR(optimizer, peaks, total_steps=steps + 1, cycle_momentum=False)
    if recipe.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps)
    return schedulers.ConstantLR(optimizer, factor=1.0)
