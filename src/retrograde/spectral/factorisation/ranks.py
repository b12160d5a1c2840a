"""Ranks of all layers chosen jointly, within a budget of multiply-adds.

A layer l kept whole costs M_l multiply-adds and loses nothing; at rank r it costs r·u_l and keeps the share E_l(r) of
its outputs' energy. What is minimised, as in Zhang et al. 2016, §3.3, who maximise the product of the shares, is

    Σ_l −ln E_l(r_l)    subject to    Σ_l cost_l(r_l) ≤ B                     (1)

In each layer the points (cost, loss), the whole layer's among them, have a lower convex hull; along it the loss of
the next multiply-add saved never falls. Walking all hulls together, always along the segment that loses least per
multiply-add saved, is the Lagrangian solution of (1): it is optimal for the budget at which it stops. What the last
segment saved beyond B is given back, rank by rank, to where it gains most. Cost: O(R log R) for R ranks in all.

Reference: Zhang, Zou, He, Sun, *Accelerating very deep convolutional networks for classification and detection*,
IEEE TPAMI 38, 2016.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """What a layer costs and keeps at each rank.

    Attributes:
        whole: M, multiply-adds of the layer as it is.
        unit: u, multiply-adds for each rank of the two layers in its place.
        shares: E(1), E(2), … up to the largest rank that may be chosen, never falling, in (0, 1].
    """

    whole: float
    unit: float
    shares: Sequence[float]

    @property
    def points(self) -> list[tuple[float, float, int | None]]:
        """(cost, −ln E, rank) from rank 1 on, in order of cost; last the whole layer, of rank None."""
        factored = [
            (self.unit * r, -math.log(max(share, 1e-300)), r) for r, share in enumerate(self.shares, 1)
        ]
        return [*(point for point in factored if point[0] < self.whole), (self.whole, 0.0, None)]


def allocate(curves: Mapping[str, Curve], budget: float) -> dict[str, int | None]:
    """Ranks that minimise (1); None where a layer stays whole.

    Args:
        curves: by layer.
        budget: B, for these layers together.

    Returns:
        Ranks by layer; where even the smallest exceed the budget, the smallest.
    """
    points = {name: curve.points for name, curve in curves.items()}
    at = {name: len(of) - 1 for name, of in points.items()}
    spent = sum(of[-1][0] for of in points.values())
    segments = sorted(
        (slope, -start, name, end) for name, of in points.items() for slope, start, end in _hull_segments(of)
    )
    for _, _, name, end in segments:
        if spent <= budget:
            break
        spent += points[name][end][0] - points[name][at[name]][0]
        at[name] = end
    _give_back(points, at, budget - spent)
    return {name: points[name][at[name]][2] for name in points}


def _hull_segments(points: Sequence[tuple[float, float, int | None]]) -> list[tuple[float, int, int]]:
    """Segments of the lower convex hull, from the whole layer downwards: (loss per cost saved, start, end)."""
    hull: list[int] = []
    for i in range(len(points)):
        while len(hull) > 1 and _slope(points, hull[-2], hull[-1]) >= _slope(points, hull[-1], i):
            hull.pop()
        hull.append(i)
    return [(-_slope(points, low, high), high, low) for low, high in itertools.pairwise(hull)][::-1]


def _slope(points: Sequence[tuple[float, float, int | None]], low: int, high: int) -> float:
    return (points[high][1] - points[low][1]) / (points[high][0] - points[low][0])


def _give_back(
    points: Mapping[str, Sequence[tuple[float, float, int | None]]], at: dict[str, int], slack: float
) -> None:
    """Spend what is left of the budget, step by step, where the loss falls most for each multiply-add."""
    while True:
        best: tuple[float, str] | None = None
        for name, of in points.items():
            i = at[name]
            if i + 1 < len(of) and of[i + 1][0] - of[i][0] <= slack:
                gain = -_slope(of, i, i + 1)
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, name
        if best is None:
            return
        name = best[1]
        slack -= points[name][at[name] + 1][0] - points[name][at[name]][0]
        at[name] += 1
