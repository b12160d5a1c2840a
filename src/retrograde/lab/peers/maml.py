"""MAML, first-order MAML and ANIL: learning initial weights from which a few steps solve a new task.

Sources: Finn et al., https://arxiv.org/abs/1703.03400, 2017 (MAML and its first-order form); Raghu et al.,
https://arxiv.org/abs/1909.09157, 2020 (ANIL). The inner step (MAML's eq. 1) is θ' = θ − α ∇L_support(θ); the outer
loss (its eq. 2) is L_query(θ'), averaged over tasks. Cost: each inner step is a forward and a backward pass, and the
second-order outer gradient passes backward through both.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retrograde.errors import OptionError

Parameters = Mapping[str, Tensor]
"""Name → tensor, as of `named_parameters`."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target) → scalar."""


@dataclass(frozen=True)
class Task:
    """A task's examples to adapt on and to be judged by.

    Attributes:
        support: inputs (k, …) and targets (k, …).
        query: inputs (q, …) and targets (q, …).
    """

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


def inner_step(
    loss: Callable[[dict[str, Tensor]], Tensor],
    parameters: Parameters,
    rate: float,
    *,
    first_order: bool = False,
    only: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """θ' = θ − α ∇L(θ), with a graph back to θ.

    Args:
        loss: L, from all parameters by name.
        parameters: θ.
        rate: α.
        first_order: take ∇L(θ) for a constant, so that ∂θ'/∂θ is the identity (FOMAML).
        only: names of those that move; None moves all. With the head's names this is ANIL.

    Raises:
        OptionError: `only` names no parameter, or one that does not exist.
    """
    names = parameters if only is None else only
    missing = [name for name in names if name not in parameters]
    if missing or not names:
        raise OptionError(
            f"maml: `only` names {', '.join(map(repr, missing)) or 'nothing'} to adapt, and the parameters are "
            f"{', '.join(parameters)}. Name some of these."
        )
    moving = {name: parameters[name] for name in names}

    def partial_loss(part: dict[str, Tensor]) -> Tensor:
        return loss({**parameters, **part})

    gradients = torch.func.grad(partial_loss)(moving)
    if first_order:
        gradients = {name: gradient.detach() for name, gradient in gradients.items()}
    return {**parameters, **{name: p - rate * gradients[name] for name, p in moving.items()}}


def adapt(
    model: nn.Module,
    parameters: Parameters,
    support: tuple[Tensor, Tensor],
    loss: Loss,
    rate: float,
    steps: int,
    *,
    first_order: bool = False,
    only: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """`steps` inner steps on one task's support set; see `inner_step`."""
    x, y = support

    def support_loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, (x,)), y)

    adapted = dict(parameters)
    for _ in range(steps):
        adapted = inner_step(support_loss, adapted, rate, first_order=first_order, only=only)
    return adapted


def outer_loss(
    model: nn.Module,
    tasks: Sequence[Task],
    loss: Loss,
    rate: float,
    steps: int = 1,
    *,
    first_order: bool = False,
    only: Collection[str] | None = None,
) -> Tensor:
    """Mean query loss after adaptation, a scalar; its `backward` fills the gradients of `model`'s parameters.

    Buffers, such as running statistics, must not be written in the forward pass.
    """
    parameters = dict(model.named_parameters())
    losses: list[Tensor] = []
    for task in tasks:
        adapted = adapt(
            model, parameters, task.support, loss, rate, steps, first_order=first_order, only=only
        )
        x, y = task.query
        losses.append(loss(torch.func.functional_call(model, adapted, (x,)), y))
    return torch.stack(losses).mean()
