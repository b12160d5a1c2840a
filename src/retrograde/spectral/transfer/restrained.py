"""One layer that fine-tuning may move only so far: equations (2) to (4) of `retrograde.spectral.transfer`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.maps.base import Map, wide
from retrograde.errors import StateError
from retrograde.maths.spectral import rank_for_energy
from retrograde.spectral.transfer.sources import has_bias_entry

Rest = Literal["even", "none"]
Scale = Literal["mean", "top", "none"]
Statistics = Mapping[str, Tensor]


def _nothing() -> Tensor:
    return torch.empty(0)


@dataclass(eq=False)
class Restrained:
    """One layer in the letters of the module's docstring; groups g stand in front, and one is a convolution's.

    Attributes:
        name: full name.
        layer: itself.
        map: how its weight is a matrix; None for a normalisation.
        weight, bias: names of its parameters; empty where it has none.
        source: W̃₀ (g, o, D), float32 or float64.
        basis: Q (g, D, k).
        values: Λ (g, k), scaled.
        rest: σ (g,), scaled.
    """

    name: str
    layer: nn.Module
    map: Map | None
    weight: str
    bias: str
    source: Tensor = field(default_factory=_nothing)
    basis: Tensor = field(default_factory=_nothing)
    values: Tensor = field(default_factory=_nothing)
    rest: Tensor = field(default_factory=_nothing)

    @classmethod
    def linear(cls, name: str, layer: nn.Module, kind: Any) -> "Restrained":
        """Of a layer of this kind."""
        weight, bias = kind.names(layer)
        return cls(name, layer, kind.map(layer), weight, bias if has_bias_entry(layer, kind) else "")

    def parameters(self) -> list[nn.Parameter]:
        """As the layer has them now."""
        own = self.layer._parameters  # pyright: ignore[reportPrivateUsage]
        return [p for name in (self.weight, self.bias) if name and (p := own.get(name)) is not None]

    def misfit(self, state: Statistics) -> str | None:
        """Why the statistics are not of this layer."""
        for key, p in zip(("weight", "bias"), self.parameters(), strict=False):
            known = state.get(f"{self.name}.{key}")
            if known is None:
                return "the statistics have no layer of this name"
            if known.shape != p.shape:
                return (
                    f"its {key} is {tuple(p.shape)}, and was {tuple(known.shape)} at the source: a new layer"
                )
        if self.map is None:
            return None
        if f"{self.name}.basis" not in state:
            return "the source's inputs did not reach it"
        groups, _, width = self.joint([wide(p) for p in self.parameters()]).shape
        parts, there = state[f"{self.name}.basis"].shape[:2]
        if there != width:
            return f"its rows have {width} entries, and had {there} at the source"
        return None if parts == groups else f"it has {groups} groups, and had {parts} at the source"

    def cut(self, state: Statistics, rank: int, energy: float, rest: Rest, scale: Scale) -> "Restrained":
        """With its part of the statistics, of equation (2)."""
        parameters = self.parameters()
        keys = ("weight", "bias")[: len(parameters)]
        source = self.joint([wide(state[f"{self.name}.{key}"].to(parameters[0].device)) for key in keys])
        width = source.shape[-1]
        if self.map is None:
            one = source.new_ones(1)
            return replace(
                self,
                source=source,
                basis=source.new_empty(1, width, 0),
                values=source.new_empty(1, 0),
                rest=one,
            )
        basis, values, trace = (
            state[f"{self.name}.{key}"].to(source) for key in ("basis", "values", "trace")
        )
        k = min(rank, values.shape[-1])
        k = min(k, rank_for_energy(values, trace, energy)) if energy < 1 else k
        basis, values = basis[..., :k], values[..., :k]
        sigma = (trace - values.sum(-1)).clamp_min(0) / max(width - k, 1)
        if rest == "none":
            sigma = torch.zeros_like(sigma)
        unit = torch.ones_like(trace).mean()
        if scale == "mean":
            unit = trace.mean() / width
        elif scale == "top":
            unit = torch.maximum(values.amax() if k else sigma.amax(), sigma.amax())
        unit = unit.clamp_min(torch.finfo(unit.dtype).tiny)
        return replace(self, source=source, basis=basis, values=values / unit, rest=sigma / unit)

    def joint(self, parameters: list[Tensor]) -> Tensor:
        """Weight and bias as W̃ (g, o, D)."""
        if self.map is None:
            return torch.stack([p.flatten() for p in parameters], -1).unsqueeze(0)
        matrix = self.map.matrix(parameters[0])
        if len(parameters) == 1:
            return matrix
        return torch.cat((matrix, parameters[1].reshape(*matrix.shape[:2], 1)), -1)

    def energy(self) -> float:
        """tr(Δ C₀ Δᵀ)."""
        one = self._here()
        delta = one.joint([wide(ranks.whole(p)) for p in one.parameters()]) - one.source
        return float(_quadratic(delta, one.basis, one.values, one.rest).sum())

    def pull(self, strength: float, eta: list[float | Tensor], overflow: Tensor | None) -> None:
        """Equation (3) with the learning rate of each parameter."""
        one, parameters = self._here(), self.parameters()
        here = one.joint([wide(ranks.whole(p)) for p in parameters])
        if here.shape != one.source.shape:
            raise StateError(
                f"layer {self.name!r} has become {tuple(here.shape)} as a matrix since TransferPenalty was made, and "
                f"was {tuple(one.source.shape)}. Put a new layer in its place rather than a new weight, or make the "
                "penalty anew."
            )
        steps = torch.stack(
            [strength * torch.as_tensor(e, dtype=here.dtype, device=here.device) for e in eta]
        )
        if overflow is not None:
            steps = steps * (1 - overflow.to(steps))
        # The last entry of a row is the bias's, where there is one; of a normalisation one entry is each parameter's.
        counts = [1] * len(eta) if self.map is None or len(eta) == 1 else [here.shape[-1] - 1, 1]
        if len(eta) == 1:
            counts = [here.shape[-1]]
        h = steps.repeat_interleave(torch.tensor(counts, device=here.device))
        moved = one.source + proximal(here - one.source, one.basis, one.values, one.rest, h)
        for p, value, e in zip(parameters, one._apart(moved, parameters), eta, strict=True):
            if isinstance(e, Tensor) or e:
                ranks.write(p, value.to(p.dtype))

    def _apart(self, joint: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        """The inverse of `joint`."""
        shapes = [p.shape for p in parameters]
        if self.map is None:
            return [part.reshape(shape) for part, shape in zip(joint[0].unbind(-1), shapes, strict=True)]
        if len(parameters) == 1:
            return [self.map.from_matrix(joint, shapes[0])]
        return [self.map.from_matrix(joint[..., :-1], shapes[0]), joint[..., -1].reshape(shapes[1])]

    def _here(self) -> "Restrained":
        """On the device and in the precision of the layer, which may have been moved since."""
        like = self.parameters()[0]
        dtype = wide(torch.empty(0, dtype=like.dtype)).dtype
        if (like.device, dtype) != (self.source.device, self.source.dtype):
            for key in ("source", "basis", "values", "rest"):
                setattr(self, key, getattr(self, key).to(like.device, dtype))
        return self


def proximal(delta: Tensor, basis: Tensor, values: Tensor, rest: Tensor, h: Tensor) -> Tensor:
    """Equation (4): ``Δ (I + C₀ diag(h))⁻¹`` for the C₀ of equation (2).

    Args:
        delta: Δ (g, o, D).
        basis: Q (g, D, k).
        values: Λ (g, k).
        rest: σ (g,), not above Λ.
        h: μη of each entry of a row, (D,), 0 or more.
    """
    keep = 1 / (1 + rest[:, None] * h)
    delta = delta * keep[:, None]
    if not basis.shape[-1]:
        return delta
    b = basis * (values - rest[:, None]).clamp_min(0).sqrt()[:, None]
    right = b * (h * keep)[..., None]
    inner = b.mT @ right + torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    return delta - (delta @ b) @ torch.linalg.solve(inner, right.mT)


def _quadratic(delta: Tensor, basis: Tensor, values: Tensor, rest: Tensor) -> Tensor:
    """tr(Δ C₀ Δᵀ) of each group, (g,)."""
    inside = (delta @ basis).square().sum(-2)
    outside = (delta.square().sum((-2, -1)) - inside.sum(-1)).clamp_min(0)
    return (inside * values).sum(-1) + rest * outside
