"""Candidate dendrites of one layer: they watch x and δ in the backward pass and learn in the step hook."""

from typing import Any

import torch
from torch import Tensor

from retrograde.engine import ranks
from retrograde.engine.maps.base import Map
from retrograde.engine.slots import Call
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.maths import perforate as maths
from retrograde.maths.perforate import Activation, Moments, Sums
from retrograde.methods.perforate.sets import cascaded, rows_of

_IMPROVEMENT = 1.1
_NOISE_FLOOR = 0.01
"""|r| below which an improvement is taken for noise."""


class Pool:
    """`m` candidates for every neuron of a layer.

    Args:
        weight: (m, …), the candidates' copies of the layer's weight.
        bias: (m, C); None for a layer without bias.
        cascade: (m, d, C), V of d accepted dendrites.
        activation: f.
        outputs: C.
        map: how the layer multiplies.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        cascade: Tensor,
        activation: Activation,
        outputs: int,
        map: Map,
    ) -> None:
        self.values: dict[str, Tensor] = {"weight": weight, "cascade": cascade}
        if bias is not None:
            self.values["bias"] = bias
        self._activation: Activation = activation
        self._outputs = outputs
        self._map = map
        self._first = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self._second = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.moments = Moments.zeros(weight.shape[0], outputs, weight)
        self._reference = weight.new_zeros(outputs)
        self._updates = 0
        self._begin()

    def _begin(self) -> None:
        weight = self.values["weight"]
        self._gradient = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self._sums = Sums.zeros(weight.shape[0], self._outputs, weight)

    @torch.no_grad()
    def observe(self, call: Call, x: Tensor, accepted: list[Tensor]) -> None:
        """Take in one backward call: sums for the moments, and equation (3) for the candidates' parameters.

        Args:
            call: δ and the geometry.
            x: the layer's input in the candidates' dtype.
            accepted: a_e of the dendrites that the layer has.
        """
        weight, map = self.values["weight"], call.map
        delta = call.delta.to(weight.dtype)
        axis = map.axis(delta)
        rows = rows_of(delta, axis)
        self._sums.add_delta(rows, self.moments)
        direction = self.moments.direction()
        bias = self.values.get("bias")
        for j in range(weight.shape[0]):
            cascade = self.values["cascade"][j]
            z = cascaded(
                map.forward(x, weight[j], None if bias is None else bias[j]), cascade, accepted, axis
            )
            a = rows_of(maths.activate(z, self._activation), axis)
            self._sums.add_candidate(j, a, rows, self.moments)
            if not self.moments.steps:
                continue  # no sign is known yet: the first batch only primes the means
            g = maths.ascent(a, rows, self.moments.mean_delta, direction[j], self._activation)
            if bias is not None:
                self._gradient["bias"][j] += g.sum(0)
            for e, a_e in enumerate(accepted):
                self._gradient["cascade"][j, e] += (g * rows_of(a_e, axis)).sum(0)
            at_z = Delta(g.view(z.movedim(axis, -1).shape).movedim(-1, axis))
            self._gradient["weight"][j] += map.weight_grad(Products(at_z, wanted=1), x, weight[j]).value

    @torch.no_grad()
    def learn(self, rate: float, momentum: float) -> None:
        """One step uphill from what the calls since the last step brought; the same on every rank."""
        ranks.add([*self._sums.tensors(), *self._gradient.values()])
        count = self._sums.count
        if not float(count):
            return
        if self.moments.steps:
            self._updates += 1
            for name, value in self.values.items():
                gradient = self._gradient[name] / count
                maths.climb(value, gradient, self._first[name], self._second[name], self._updates, rate)
        self.moments = self.moments.absorbed(self._sums, momentum)
        self._begin()

    def improved(self) -> bool:
        """Whether any neuron's best |r| has grown by a tenth since it last did."""
        score, _ = maths.best_of(self.moments.score())
        better = score > _IMPROVEMENT * self._reference.clamp_min(_NOISE_FLOOR)
        self._reference = torch.where(better, score, self._reference)
        return bool(better.any())

    def best(self) -> tuple[Tensor, dict[str, Tensor]]:
        """|r| (C,) and parameters of the best candidate of each neuron: weight, cascade (d, C), bias (C,)."""
        score, index = maths.best_of(self.moments.score())
        chosen = {"weight": self._choose_weight(index)}
        if "bias" in self.values:
            chosen["bias"] = maths.choose(self.values["bias"], index)
        chosen["cascade"] = maths.choose(self.values["cascade"].transpose(1, 2), index).T
        return score, chosen

    def _choose_weight(self, index: Tensor) -> Tensor:
        weight = self.values["weight"]
        matrices = torch.stack([self._map.matrix(w) for w in weight])
        rows = matrices.flatten(1, 2)
        # A transposed convolution has a row for every place of its kernel, those of one output side by side.
        chosen = maths.choose(rows, index.repeat_interleave(rows.shape[1] // self._outputs))
        return self._map.from_matrix(chosen.view(matrices.shape[1:]), weight.shape[1:])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counts, what the calls since the last step brought included."""
        return {
            "values": dict(self.values),
            "first": dict(self._first),
            "second": dict(self._second),
            "gradient": dict(self._gradient),
            "sums": self._sums.tensors(),
            "moments": self.moments.to_dict(),
            "reference": self._reference,
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, on the device of the layer."""
        like = self.values["weight"]

        def here(value: Any) -> Any:
            return value.detach().to(like).clone() if isinstance(value, Tensor) else value

        self.values, self._first, self._second, self._gradient = (
            {name: here(value) for name, value in state[part].items()}
            for part in ("values", "first", "second", "gradient")
        )
        self._sums = Sums(*map(here, state["sums"]))
        self.moments = Moments(**{name: here(value) for name, value in state["moments"].items()})
        self._reference, self._updates = here(state["reference"]), int(state["updates"])
