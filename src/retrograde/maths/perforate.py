r"""Candidate dendrites: the correlation that they climb, its gradient, and running moments. Letters as in the papers.

One candidate per neuron c, p over a batch and its positions, f the activation, δ = dL/dy:

    a_pc = f(z_pc)                                                        (1)
    C_c = mean_p[(a_pc − ā_c)(δ_pc − δ̄_c)]                                (2)   S = Σ_c |C_c| is maximised
    dS/dz_pc = sign(C_c) (δ_pc − δ̄_c) f'(z_pc) / P                        (3)   and dS/dθ = Σ_pc dS/dz_pc dz_pc/dθ
    r_c = C_c / (σ_a σ_δ)                                                 (4)   free of scale: compares candidates

(3) is exact for means over the batch: the derivative of ā is multiplied by mean_p(δ_pc − δ̄_c) = 0.

Index letters: ``m`` candidates per neuron, ``c`` channels, ``p`` rows (examples and positions).

References: Fahlman, Lebiere, *The cascade-correlation learning architecture*, NIPS 1990;
Brenner, Itti, arXiv 2501.18018.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from retrograde.maths.philox import uniform

Activation = Literal["tanh", "sigmoid", "relu"]
ACTIVATIONS: tuple[Activation, ...] = ("tanh", "sigmoid", "relu")

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def activate(z: Tensor, activation: Activation) -> Tensor:
    """f of equation (1)."""
    if activation == "tanh":
        return torch.tanh(z)
    return torch.sigmoid(z) if activation == "sigmoid" else torch.relu(z)


def slope(a: Tensor, activation: Activation) -> Tensor:
    """f'(z), from a = f(z) alone."""
    if activation == "tanh":
        return 1 - a * a
    return a * (1 - a) if activation == "sigmoid" else (a > 0).to(a.dtype)


def ascent(a: Tensor, delta: Tensor, mean_delta: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    """Equation (3) without 1/P: the gradient of P·S at the candidates' pre-activations.

    Args:
        a: activations; channels along the last dimension.
        delta: δ, same shape.
        mean_delta: δ̄ (c,).
        weight: sign(C_c) (c,), or that over any positive scale of the channel.
        activation: f.
    """
    return (delta - mean_delta) * weight * slope(a, activation)


@dataclass
class Sums:
    """Sums over rows about the running means; they add over calls and over ranks.

    Attributes:
        count: (), rows.
        delta: (c,), Σ(δ − δ̄).
        delta_delta: (c,), Σ(δ − δ̄)².
        a: (m, c), Σ(a − ā).
        a_a: (m, c), Σ(a − ā)².
        a_delta: (m, c), Σ(a − ā)(δ − δ̄).
    """

    count: Tensor
    delta: Tensor
    delta_delta: Tensor
    a: Tensor
    a_a: Tensor
    a_delta: Tensor

    @staticmethod
    def zeros(candidates: int, channels: int, like: Tensor) -> "Sums":
        """Nothing seen yet; dtype and device of `like`."""
        one, many = like.new_zeros(channels), like.new_zeros(candidates, channels)
        return Sums(like.new_zeros(()), one, one.clone(), many, many.clone(), many.clone())

    def add_delta(self, delta: Tensor, moments: "Moments") -> None:
        """Take in δ of one call, (p, c)."""
        centred = delta - moments.mean_delta
        self.count += delta.shape[0]
        self.delta += centred.sum(0)
        self.delta_delta += centred.square().sum(0)

    def add_candidate(self, index: int, a: Tensor, delta: Tensor, moments: "Moments") -> None:
        """Take in one candidate's activations of one call, (p, c)."""
        centred = a - moments.mean_a[index]
        self.a[index] += centred.sum(0)
        self.a_a[index] += centred.square().sum(0)
        self.a_delta[index] += (centred * (delta - moments.mean_delta)).sum(0)

    def tensors(self) -> list[Tensor]:
        """The fields, for reductions in place."""
        return [self.count, self.delta, self.delta_delta, self.a, self.a_a, self.a_delta]


@dataclass
class Moments:
    """Running means, variances and covariance of candidates and δ.

    The weight of a new batch is 1/n for the n-th until that reaches the momentum, so the first ones prime the means.

    Attributes:
        steps: batches taken in.
        mean_a: ā, (m, c).
        mean_delta: δ̄, (c,).
        variance_a: σ_a², (m, c).
        variance_delta: σ_δ², (c,).
        covariance: C of equation (2), (m, c).
    """

    steps: int
    mean_a: Tensor
    mean_delta: Tensor
    variance_a: Tensor
    variance_delta: Tensor
    covariance: Tensor

    @staticmethod
    def zeros(candidates: int, channels: int, like: Tensor) -> "Moments":
        """Before the first batch."""
        one, many = like.new_zeros(channels), like.new_zeros(candidates, channels)
        return Moments(0, many, one, many.clone(), one.clone(), many.clone())

    def absorbed(self, sums: Sums, momentum: float) -> "Moments":
        """These moments mixed with one batch's; exact for the mixture of the two distributions."""
        w = max(1 / (self.steps + 1), momentum)
        shift_a, shift_delta = w * sums.a / sums.count, w * sums.delta / sums.count

        def mixed(old: Tensor, new: Tensor, shift: Tensor) -> Tensor:
            return (1 - w) * old + w * new / sums.count - shift

        return Moments(
            self.steps + 1,
            self.mean_a + shift_a,
            self.mean_delta + shift_delta,
            mixed(self.variance_a, sums.a_a, shift_a.square()).clamp_min(0),
            mixed(self.variance_delta, sums.delta_delta, shift_delta.square()).clamp_min(0),
            mixed(self.covariance, sums.a_delta, shift_a * shift_delta),
        )

    def score(self) -> Tensor:
        """|r| of equation (4), (m, c); 0 where a candidate or δ does not vary."""
        scale = (self.variance_a * self.variance_delta).sqrt()
        return torch.where(scale > 0, self.covariance.abs() / scale.clamp_min(1e-38), 0.0).clamp(max=1.0)

    def direction(self) -> Tensor:
        """sign(C)/σ_δ, (m, c): the weight of `ascent` that makes it free of the loss's scale; 0 where δ is constant."""
        deviation = self.variance_delta.sqrt()
        return torch.where(deviation > 0, self.covariance.sign() / deviation.clamp_min(1e-38), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


SCALE = 5.0
"""s under an optimizer whose steps do not grow with the gradient."""


def output_scale(adapts: bool, scale: float | None) -> float:
    """s of ``y += s·w ⊙ a``, so that s·w learns five times as fast as a weight does.

    Adam moves w by the learning rate whatever the gradient is, so s·w by s times that: s = 5. SGD's step is the
    gradient of w, which has the factor s itself, so s·w moves by s² times what a weight moves: s = √5.

    Args:
        adapts: whether steps do not grow with the gradient.
        scale: s where it is given.
    """
    if scale is not None:
        return scale
    return SCALE if adapts else math.sqrt(SCALE)


def correlations(a: Tensor, delta: Tensor) -> Tensor:
    """r of equation (4) over all rows, differentiable; 0 where a or δ does not vary.

    Args:
        a: (p, c).
        delta: (p, c).
    """
    a, delta = a - a.mean(0), delta - delta.mean(0)
    square = a.square().sum(0) * delta.square().sum(0)
    fine = square > 0
    return torch.where(fine, (a * delta).sum(0) / torch.where(fine, square, 1.0).sqrt(), 0.0)


def best_of(score: Tensor) -> tuple[Tensor, Tensor]:
    """The best candidate of each neuron: ``(score (c,), index (c,))`` from (m, c)."""
    found, index = score.max(0)
    return found, index


def choose(values: Tensor, index: Tensor) -> Tensor:
    """From (m, c, …) the entries (c, …) of each neuron's chosen candidate."""
    return values[index, torch.arange(values.shape[1], device=values.device)]


def climb(value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float) -> None:
    """One step of Adam uphill, in place.

    Args:
        value: what is optimised; `first` and `second` are its moment estimates.
        gradient: of the objective that grows.
        first: m.
        second: v.
        step: from 1.
        rate: learning rate.
    """
    beta1, beta2 = _BETAS
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    deviation = (second / (1 - beta2**step)).sqrt_().add_(_EPSILON)
    value.addcdiv_(first, deviation, value=rate / (1 - beta1**step))


def normal(key: int, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers from Philox (Box–Muller), float32.

    Args:
        key: 64-bit key.
        shape: shape of the result.
        device: where to compute.
    """
    radius, angle = uniform(key, (2, *shape), device)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
