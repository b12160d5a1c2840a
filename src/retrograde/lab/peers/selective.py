r"""Selective-Backprop: examples with a high loss are trained on more often.

    P(example) = CDF_H(loss)^β                  (1)   CDF_H: the share of the last H losses that are no larger

A forward pass over the whole batch gives the losses; what is drawn by (1) is trained on, unweighted, so that gradients
are biased towards hard examples. In the long run 1/(β + 1) of the examples is chosen.

Deviations from the paper: it gathers chosen examples until they fill a batch, while here each batch shrinks to what was
chosen of it, so that all variants make the same number of steps; where nothing is chosen, the example with the
highest loss is. Losses that are not finite are chosen, so that they are seen, and stay out of the history.

Cost: a forward pass over every batch; sorting the history and one search in it for each example.

Reference:
    Jiang et al. *Accelerating deep learning by focusing on the biggest losers.* 2019, arXiv 1910.00762.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from retrograde.lab.peers.base import Peer, Selector


@dataclass(frozen=True)
class SelectiveBackprop(Peer):
    """Selective-Backprop (module docstring: equation, deviations, source).

    Args:
        beta: β, selectivity: 0 trains on all, 1 on half of the examples, 2 on a third.
        history: H, losses that a loss is compared with.
    """

    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    history: PositiveInt = 1024

    def selector(self, seed: int) -> Selector:
        """What draws by equation (1), with random numbers from `seed`."""
        return _ByLoss(self.beta, self.history, seed)


class _ByLoss:
    def __init__(self, beta: float, history: int, seed: int) -> None:
        self._beta, self._size = beta, history
        self._history = torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def select(self, losses: Callable[[], Tensor], count: int) -> Tensor:
        """Equation (1); the batch's own losses are part of the history. Indices ascend, on the losses' device."""
        found = losses().detach()
        loss = found.float().cpu()
        known = torch.cat([self._history, loss[torch.isfinite(loss)]])
        self._history = known[-self._size :].clone()
        below = torch.searchsorted(self._history.sort().values, loss, right=True)
        share = torch.where(torch.isfinite(loss), below / max(len(self._history), 1), 1.0)
        drawn = torch.rand(count, generator=self._generator) < share**self._beta
        if count and not bool(drawn.any()):
            drawn[loss.argmax()] = True
        return drawn.nonzero().flatten().to(found.device)

    def state_dict(self) -> dict[str, Any]:
        """The history, oldest first, and the state of the random numbers."""
        return {"history": self._history.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self._history = state["history"].clone()
        self._generator.set_state(state["generator"])
