"""Mean and covariance of rows that come in batches, one pass over all of them.

For rows x (n, d), shifted by the mean s of the first batch,

    t = Σ (x − s),   P = Σ (x − s)(x − s)ᵀ,   m = s + t/n,   C = P/n − (t/n)(t/n)ᵀ                    (1)

Products are in float32 (float64 where the rows are), at most 8,192 rows at a time, and each is added to a float64 sum:
without the shift a mean that is large against the deviations would take their digits.

Cost: n·d² multiply-adds and 8·d² bytes.
"""

from typing import Any

import torch
from torch import Tensor

from retrograde.engine import ranks

_CHUNK = 8192


class Moments:
    """Sums over rows (n, d), as they come."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        """s (d,) in the precision of the products, t (d,) and P (d, d) in float64."""

    @property
    def width(self) -> int:
        """d; 0 before the first rows."""
        return 0 if self._sums is None else self._sums[0].numel()

    @property
    def like(self) -> Tensor:
        """A tensor on the rows' device, in the precision of the products.

        Raises:
            ValueError: no rows were added.
        """
        return self._known()[0]

    def add(self, rows: Tensor) -> None:
        """Take rows (n, d) in."""
        if not len(rows):
            return
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
            for chunk in rows.detach().split(_CHUNK):
                part = chunk.to(wide)
                if self._sums is None:
                    shift = part.mean(0)
                    total = torch.zeros_like(shift, dtype=torch.float64)
                    self._sums = shift, total, total.new_zeros(part.shape[1], part.shape[1])
                shift, total, products = self._sums
                part = part - shift
                total += part.sum(0, dtype=torch.float64)
                products += part.mT @ part
                self.count += len(chunk)

    def state_dict(self) -> dict[str, Any]:
        """n, and copies of s, t and P of equation (1): none before the first rows."""
        return {"count": self.count, "sums": [part.clone() for part in self._sums or ()]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: which is copied.
            device: of the rows to come.
        """
        self.count = state["count"]
        shift, total, products = [part.to(device, copy=True) for part in state["sums"]] or (None, None, None)
        self._sums = None if shift is None or total is None or products is None else (shift, total, products)

    def plus(self, other: "Moments") -> "Moments":
        """Of the rows of both."""
        both = Moments()
        both.count = self.count + other.count
        both._sums = self._sums or other._sums
        if self._sums is not None and other._sums is not None:
            (shift, total, products), (elsewhere, more, others) = self._sums, other._sums
            away = elsewhere.double() - shift
            cross = torch.outer(away, more)
            others = others + cross + cross.mT + other.count * torch.outer(away, away)
            both._sums = shift, total + more + other.count * away, products + others
        return both

    def finish(self, *, everywhere: bool = True) -> tuple[Tensor, Tensor]:
        """m (d,) and C (d, d), float64.

        Args:
            everywhere: over the rows of all ranks, each of which must then call it.

        Raises:
            ValueError: no rows were added.
        """
        shift, total, products = self._known()
        delta = total / self.count
        mean, second = shift.double() + delta, products / self.count - torch.outer(delta, delta)
        if everywhere and ranks.count() > 1:
            count = torch.tensor(float(self.count), dtype=torch.float64, device=mean.device)
            total, around = mean * count, (second + torch.outer(mean, mean)) * count
            ranks.add([count, total, around])
            mean = total / count
            second = around / count - torch.outer(mean, mean)
        return mean, second

    def _known(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is None:
            raise ValueError("no rows were added")
        return self._sums
