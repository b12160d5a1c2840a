"""The dendrite sets of one growth: S copies of a layer as one product, with a norm of their own.

    [z_1 … z_S] = [M_1 … M_S](x) + Σ_e V[e] ⊙ a_e        (1)   e: the sets of earlier growths, where they cascade
    a = f(γ (z − μ)/√(σ² + ε) + β)                        (2)   each channel's own; without a norm a = f(z)
    y = M(x) + Σ_s s·w[s] ⊙ a_s                           (3)

The outputs of the S·C channels lie as those of one wider layer: in each of the layer's groups those of the first set,
then those of the second. So the weights of all sets are one parameter, and nothing is put together in a step.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from retrograde.engine import ranks
from retrograde.engine.maps.base import Map
from retrograde.maths.perforate import Activation, activate


class Norm(_BatchNorm):
    """BatchNorm over all but one dimension, whichever that is.

    Attributes:
        seen: (3, channels), sums of the batches' means and variances since the last step, and their number.
    """

    seen: Tensor

    def __init__(self, channels: int, like: Tensor) -> None:
        super().__init__(channels, device=like.device, dtype=like.dtype)
        self.register_buffer("seen", like.new_zeros(3, channels), persistent=False)

    def _check_input_dim(self, input: Tensor) -> None: ...

    def normalised(self, z: Tensor, axis: int, *, aside: bool) -> Tensor:
        """`z` with channels along its last dimension or a negative `axis`.

        Args:
            z: before the activation.
            axis: of the channels.
            aside: keep the batch's statistics in `seen` until `settle`, instead of taking them in at once: a forward
                pass may be run twice (activation checkpointing), and the mean over it stays the same.
        """
        if z.dim() + axis == 1:
            return self._normalised(z, aside)
        rows = z.movedim(axis, -1)
        found = self._normalised(rows.reshape(-1, rows.shape[-1]), aside)
        return found.view(rows.shape).movedim(-1, axis)

    def _normalised(self, z: Tensor, aside: bool) -> Tensor:
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        given = (self.weight, self.bias, mean, variance)
        kept = z.dtype
        if len({t.dtype for t in given}) > 1 or self.weight.dtype not in (kept, torch.float32):
            # A half-precision model under autocast: no kernel mixes two such types.
            z, *given = z.float(), *(t.float() for t in given)
        weight, bias, mean, variance = given
        # A single row has no variance.
        if not self.training or z.numel() < 2 * z.shape[1]:
            return F.batch_norm(z, mean, variance, weight, bias, False, 0.0, self.eps).to(kept)
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
        found = F.batch_norm(z, mean, variance, weight, bias, True, 1.0, self.eps).to(kept)
        with torch.no_grad():
            batch = torch.stack((mean, variance, torch.ones_like(mean))).to(self.seen)
            if aside:
                self.seen += batch
            else:
                self._take(batch)
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: take in what its forward passes have seen, the same on all ranks."""
        ranks.add([self.seen])
        self._take(self.seen)
        self.seen.zero_()

    def _take(self, sums: Tensor) -> None:
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        # No question to a GPU: nothing seen, or nothing finite, weighs nothing.
        count = sums[2]
        use = (count > 0) & sums.isfinite().all(0)
        averages = torch.where(use, sums[:2] / count.clamp_min(1), 0.0)
        batches = cast(Tensor, self.num_batches_tracked)
        batches += (count[0] > 0).long()
        momentum = 1 / batches.clamp_min(1) if self.momentum is None else self.momentum
        weight = use.to(mean) * momentum
        mean += weight * (averages[0].to(mean) - mean)
        variance += weight * (averages[1].to(variance) - variance)

    @torch.no_grad()
    def prime(self, mean: Tensor, variance: Tensor, shift: Tensor) -> None:
        """γ = 1, β = `shift`, and statistics as if they had been seen."""
        self.reset_running_stats()
        cast(Tensor, self.running_mean).copy_(mean)
        cast(Tensor, self.running_var).copy_(variance)
        self.seen.zero_()
        ranks.write(self.weight, torch.ones_like(shift))
        ranks.write(self.bias, shift)


class DendriteSets(nn.Module):
    """The sets of one growth; all zero before it.

    Args:
        weight: the layer's.
        map: how the layer multiplies.
        sets: S.
        earlier: sets of earlier growths that these read.
        bias: whether M_s has a bias.
        norm: whether z is normalised; then no bias is needed.
        scale: s.

    Attributes:
        weight: as the layer's, with S·C outputs.
        bias: (S·C,), or None.
        cascade: V, (earlier, S·C), or None.
        output: w, (S·C,).
        scale: s, (); None where it is part of w, in a folded layer.
        norm: of z, or None.
    """

    bias: nn.Parameter | None
    cascade: nn.Parameter | None
    scale: Tensor | None

    def __init__(
        self, weight: Tensor, map: Map, sets: int, earlier: int, *, bias: bool, norm: bool, scale: float
    ) -> None:
        super().__init__()
        self.sets = sets
        self.groups = map.groups
        like = weight.detach()
        channels = like.new_zeros(sets * map.outputs(weight.shape))
        self.weight = nn.Parameter(like.new_zeros(stacked(map, weight.shape, sets)))
        self.register_parameter("bias", nn.Parameter(channels.clone()) if bias and not norm else None)
        cascade = nn.Parameter(channels.repeat(earlier, 1)) if earlier else None
        self.register_parameter("cascade", cascade)
        self.output = nn.Parameter(channels.clone())
        self.register_buffer("scale", like.new_tensor(scale))
        self.norm = Norm(channels.numel(), channels) if norm else None

    def activations(
        self,
        x: Tensor,
        map: Map,
        activation: Activation,
        earlier: Sequence[Tensor],
        *,
        detached: bool,
        aside: bool,
    ) -> Tensor:
        """Equations (1) and (2), all sets side by side.

        Args:
            x: what the layer multiplies.
            map: how.
            activation: f.
            earlier: a_e of the sets of earlier growths; read where they cascade.
            detached: let no gradient through to x or to M and V.
            aside: see `Norm.normalised`.
        """
        weight, bias, cascade = self.weight, self.bias, self.cascade
        if detached:
            x, weight = x.detach(), weight.detach()
            bias = None if bias is None else bias.detach()
            cascade = None if cascade is None else cascade.detach()
        z = map.forward(x, weight, bias)
        axis = map.axis(z)
        if cascade is not None:
            z = cascaded(z, cascade, [self.repeated(a, axis) for a in earlier], axis)
        if self.norm is not None:
            z = self.norm.normalised(z, axis, aside=aside)
        return activate(z, activation)

    def add(self, y: Tensor, a: Tensor, map: Map) -> Tensor:
        """Equation (3), in the precision of y."""
        axis = map.axis(a)
        # The scale goes to w, not to the product: so a folded layer, whose w has it, computes the same bits.
        output = self.output if self.scale is None else self.scale * self.output
        found = over_channels(output, axis) * a
        if self.sets > 1:
            found = self._by_set(found, axis).sum(axis - 1).flatten(axis - 1, axis)
        return y + found.to(y.dtype)

    def split(self, a: Tensor, map: Map) -> list[Tensor]:
        """The activations of each set, in the shape of the layer's output."""
        if self.sets == 1:
            return [a]
        axis = map.axis(a)
        return [each.flatten(axis - 1, axis) for each in self._by_set(a, axis).unbind(axis - 1)]

    def _by_set(self, values: Tensor, axis: int) -> Tensor:
        """(…, groups, sets, outputs of a group, …)."""
        return values.unflatten(axis, (self.groups, self.sets, -1))

    def repeated(self, a: Tensor, axis: int) -> Tensor:
        """One set's activations beside each of these sets'."""
        if self.sets == 1:
            return a
        wide = a.unflatten(axis, (self.groups, 1, -1))
        shape = list(wide.shape)
        shape[axis - 1] = self.sets
        return wide.expand(shape).flatten(axis - 2, axis)

    @torch.no_grad()
    def fold(self) -> None:
        """Make the scale part of w."""
        if self.scale is not None:
            self.output.mul_(self.scale)
            self.scale = None

    @torch.no_grad()
    def blank(self, prefix: str) -> dict[str, Tensor]:
        """The state of sets that are not in use."""
        found = {f"{prefix}{name}": torch.zeros_like(p) for name, p in self.named_parameters()}
        if self.scale is not None:
            found[f"{prefix}scale"] = self.scale.clone()
        if self.norm is not None:
            mean, variance = cast(Tensor, self.norm.running_mean), cast(Tensor, self.norm.running_var)
            batches = cast(Tensor, self.norm.num_batches_tracked)
            found |= {
                f"{prefix}norm.weight": torch.ones_like(self.norm.weight),
                f"{prefix}norm.running_mean": torch.zeros_like(mean),
                f"{prefix}norm.running_var": torch.ones_like(variance),
                f"{prefix}norm.num_batches_tracked": torch.zeros_like(batches),
            }
        return found


class Dendrites(nn.ModuleList):
    """All the sets of a layer, by growth."""


def over_channels(values: Tensor, axis: int) -> Tensor:
    """(C,) shaped to multiply what has its channels along a negative `axis`."""
    return values.view(-1, *[1] * (-1 - axis))


def cascaded(z: Tensor, weights: Iterable[Tensor], earlier: Sequence[Tensor], axis: int) -> Tensor:
    """``z + Σ_e V[e] ⊙ a_e`` of equation (1), for a_e as wide as z."""
    for row, a in zip(weights, earlier, strict=True):
        z = z + over_channels(row, axis) * a
    return z


def rows_of(values: Tensor, axis: int) -> Tensor:
    """The channels of `axis` last, all else flattened: (p, channels)."""
    return values.movedim(axis, -1).reshape(-1, values.shape[axis])


def _output_dimension(map: Map, shape: tuple[int, ...]) -> int:
    groups, outputs, d = _matrix_shape(map, shape)
    for dimension, size in enumerate(shape):
        wider = (*shape[:dimension], 2 * size, *shape[dimension + 1 :])
        # More groups have more outputs, too.
        if map.outputs(wider) == 2 * map.outputs(shape):
            with contextlib.suppress(RuntimeError):
                if _matrix_shape(map, wider) == (groups, 2 * outputs, d):
                    return dimension
    raise ValueError(f"a weight of shape {shape} has no dimension along which {map} has its outputs")


def _matrix_shape(map: Map, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map.matrix(torch.empty(shape, device="meta")).shape)


def stacked(map: Map, shape: Sequence[int], sets: int) -> tuple[int, ...]:
    """The shape of a weight with `sets` times the outputs."""
    dimension = _output_dimension(map, tuple(shape))
    return (*shape[:dimension], sets * shape[dimension], *shape[dimension + 1 :])


def fan_in(map: Map, shape: Sequence[int]) -> float:
    """Inputs that an output adds up, on average."""
    groups, outputs, d = _matrix_shape(map, tuple(shape))
    places = map.per_output(torch.ones(groups, outputs), shape)
    return d * float(places.mean())
