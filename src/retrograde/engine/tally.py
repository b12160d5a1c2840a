"""What the backward calls of one layer did, added up."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from retrograde.accounting.counters import Counters
from retrograde.kernels import reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.work import DTYPE_DISCOUNTS, Work

_FIRST, _EVERY = 8, 17
"""Zeros that no method and no kernel counts anyway are counted in the first calls of the first steps, and then in those
of one step of so many, a number that no method's own period divides."""


class Tally:
    """Sums over the calls of a layer since attaching.

    Attributes:
        kernels: products by the kernel that computed them.
    """

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self._total = Counters()
        self._noted: dict[tuple[bool, bool, torch.dtype], list[Any]] = {}
        """What `note` counted and the sums do not have yet: calls, FLOPs, those needed, entries, zeros of δ and δ̃."""
        self._share, self._own_share = 0.0, 0.0
        """Zeros in δ̃ and in δ when they were last counted."""
        self._unread: list[tuple[int, int | Tensor, int | Tensor]] = []
        """Counts that lie on a GPU: entries, zeros of δ, zeros of δ̃."""
        self._at_step = 0.0, 0.0
        self._steps = 0
        """With calls."""

    @property
    def total(self) -> Counters:
        """The sums; counts that lie on a GPU enter them when they are read."""
        if self._noted:
            self._settle()
        return self._total

    @property
    def own_share(self) -> float:
        """Zeros in δ when they were last counted."""
        return self._own_share

    def counting(self, step: int, call: int) -> bool:
        """Whether zeros that nothing else counts are counted in this call of this step."""
        return call < _FIRST and (self._steps < _FIRST or step % _EVERY == 0)

    def look(self, own: Delta, delta: Delta, *, counting: bool) -> None:
        """Count the zeros of δ and of δ̃, or say what to go by."""
        own.assumed = self._own_share
        delta.assumed = self._own_share if delta is own else self._share
        if counting:
            own.count()
            delta.count()

    def spend(self, flops: float) -> None:
        """Count FLOPs of a method's own."""
        self._total.overhead += flops

    def note(self, flops: float, own: Delta, delta: Delta, dtype: torch.dtype, needs: Sequence[bool]) -> bool:
        """Count a call whose products were torch's own; False where that is left to `add`.

        Small layers are called often: this is short.
        """
        entries = delta.values.numel()
        own_zeros, zeros = own.counted, delta.counted
        if not entries or isinstance(own_zeros, Tensor) or isinstance(zeros, Tensor):
            return False
        self._keep(own, delta, entries)
        if own_zeros is None:
            own_zeros = self._own_share * entries
        if zeros is None:
            zeros = own_zeros if delta is own else self._share * entries
        found = self._noted.get((needs[0], needs[1], dtype))
        if found is None:
            found = self._noted[needs[0], needs[1], dtype] = [0, 0.0, 0.0, 0, 0.0, 0.0]
        found[0] += 1
        found[1] += flops
        found[2] += flops * (1 - zeros / entries)
        found[3] += entries
        found[4] += own_zeros
        found[5] += zeros
        return True

    def _settle(self) -> None:
        noted, self._noted = self._noted, {}
        total = self._total
        for (input, weight, dtype), (calls, flops, needed, entries, own_zeros, zeros) in noted.items():
            discounted = flops * DTYPE_DISCOUNTS[dtype]
            total.calls += calls
            self._count(entries, own_zeros, zeros)
            total.add("forward", flops, flops, flops, discounted)
            if input:
                total.add("input_grad", flops, needed, flops, discounted)
            if weight:
                total.add("weight_grad", flops, needed, flops, discounted)
            self.kernels[reference.NAME] += calls * (input + weight)

    def _keep(self, own: Delta, delta: Delta, entries: int) -> None:
        """Go by what was counted, and by nothing else, until the next count."""
        if own.counted is not None:
            self._own_share = cast(int, own.counted) / entries
        if delta is not own and delta.counted is not None:
            self._share = cast(int, delta.counted) / entries

    def add(
        self,
        flops: float,
        discounts: tuple[float, float],
        needs: Sequence[bool],
        learns: bool,
        own: Delta,
        delta: Delta,
        dx: Work | None = None,
        dw: Work | None = None,
    ) -> None:
        """A call.

        Args:
            flops: of one dense product.
            discounts: of the forward product and of torch's own backward products.
            needs: gradients that autograd asked for, of input and weight.
            learns: whether dW was computed.
            own: δ.
            delta: δ̃.
            dx: the product, where it was not torch's own.
            dw: likewise.
        """
        total, entries = self.total, delta.values.numel()
        total.calls += 1
        total.skipped += needs[1] and not learns
        if not entries:
            return
        total.add("forward", flops, flops, flops, flops * discounts[0])
        for name, asked, done, work in (
            ("input_grad", needs[0], needs[0], dx),
            ("weight_grad", needs[1], learns, dw),
        ):
            if not asked:
                continue
            if not done:
                total.add(name, flops, 0.0, 0.0, 0.0)
            elif work is None:
                self.kernels[reference.NAME] += 1
                total.add(name, flops, flops * delta.nonzero_share, flops, flops * discounts[1])
            else:
                self.kernels[work.kernel] += 1
                total.add(name, flops, work.needed, work.executed, work.discounted)
        own_zeros = self._own_share * entries if own.counted is None else own.counted
        zeros = (delta.assumed or 0.0) * entries if delta.counted is None else delta.counted
        if isinstance(own_zeros, Tensor) or isinstance(zeros, Tensor):
            self._unread.append((entries, cast(Any, own_zeros), cast(Any, zeros)))
        else:
            self._count(entries, own_zeros, zeros)
            self._keep(own, delta, entries)

    def _count(self, entries: int, own_zeros: float, zeros: float) -> None:
        total = self._total
        total.entries += entries
        total.own_zeros += own_zeros
        total.zeros += zeros

    def read(self) -> None:
        """Fetch the counts that lie on a GPU: the one wait of a step."""
        unread, self._unread = self._unread, []
        flat = [value for _, *pair in unread for value in pair]
        waiting = [value for value in flat if isinstance(value, Tensor)]
        numbers = iter(torch.stack(waiting).tolist() if waiting else [])
        found = iter([next(numbers) if isinstance(value, Tensor) else value for value in flat])
        for entries, *_ in unread:
            own_zeros, zeros = next(found), next(found)
            self._count(entries, own_zeros, zeros)
            self._own_share, self._share = own_zeros / entries, zeros / entries

    def pass_by(self, dense: Counters, ratio: float) -> None:
        """Calls that a block pruned: their forward pass ran, their backward pass did not.

        Args:
            dense: what an executed call of the block counted at this layer.
            ratio: size of the pruned call relative to that one.
        """
        total = self.total
        total.calls += dense.calls
        total.skipped += dense.calls
        forward = (
            dense.forward_dense,
            dense.forward_needed,
            dense.forward_executed,
            dense.forward_discounted,
        )
        total.add("forward", *(value * ratio for value in forward))
        total.input_grad_dense += dense.input_grad_dense * ratio
        total.weight_grad_dense += dense.weight_grad_dense * ratio

    def zeros_of_step(self) -> float | None:
        """Share of zeros in δ̃ since the last step; None without a backward pass."""
        self.read()
        entries = self.total.entries - self._at_step[0]
        return (self._total.zeros - self._at_step[1]) / entries if entries else None

    def end_step(self) -> None:
        """The next step begins."""
        total = self.total
        self._steps += total.entries > self._at_step[0]
        self._at_step = total.entries, total.zeros

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        self.read()
        return {
            "total": self.total.to_dict(),
            "at_step": list(self._at_step),
            "counted_steps": self._steps,
            "shares": [self._share, self._own_share],
            "kernels": dict(self.kernels),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._total, self._noted, self._unread = Counters(**state["total"]), {}, []
        self.kernels = Counter(state["kernels"])
        self._at_step = (*map(float, state["at_step"]),)  # pyright: ignore[reportAttributeAccessIssue]
        self._steps = int(state["counted_steps"])
        self._share, self._own_share = map(float, state["shares"])
