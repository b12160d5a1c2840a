"""Layers with their spectra, on the way to ranks and to the rows of a report."""

from collections.abc import Mapping

from torch import nn

from retrograde.spectral.factorisation.factors import parameters_of, shape_of, split
from retrograde.spectral.factorisation.moments import Plain, Spectrum, largest_rank, macs_for_a_rank
from retrograde.spectral.factorisation.ranks import Curve, allocate
from retrograde.spectral.factorisation.report import FactorRow


class Part:
    """A layer that may be factorised.

    Attributes:
        name: full name.
        layer: itself.
        spectrum: of its outputs, or of its weight.
        macs: multiply-adds of the whole layer, for one example.
        largest: the largest rank that may be chosen; 0: it must stay whole.
        why: it is not factorised, in case it is not.
    """

    def __init__(self, name: str, layer: Plain, spectrum: Spectrum, macs: float) -> None:
        self.name = name
        self.layer = layer
        self.spectrum = spectrum
        self.macs = macs
        # A convolution of few inputs may have fewer directions than ranks that would save.
        self.largest = min(largest_rank(layer), len(spectrum.eigenvalues))
        self.why = "the budget is met without it" if self.largest else "no rank saves multiply-adds"
        self.shares = spectrum.shares()

    def cost(self, rank: int) -> float:
        """Multiply-adds of the two layers."""
        return self.macs * macs_for_a_rank(self.layer) * rank

    def limit(self, rank: int, why: str) -> None:
        """Allow no rank above this one."""
        if rank < self.largest:
            self.largest, self.why = rank, why

    def pair(self, rank: int) -> nn.Sequential:
        """The two layers."""
        return split(self.layer, self.spectrum, rank)

    def rank_for_energy(self, energy: float) -> int | None:
        """The smallest rank that keeps the share; None where it is not allowed, and then `why` says so."""
        # Rounding may leave the last share a unit below 1.
        rank = 1 + sum(share < energy - 1e-12 for share in self.shares[:-1])
        if rank <= self.largest:
            return rank
        if self.largest == largest_rank(self.layer):
            self.why = f"needs rank {rank}, and ranks to {self.largest} save"
        elif self.largest:
            self.why = f"needs rank {rank}, and was faster up to {self.largest}"
        return None


def ranks_within(parts: Mapping[str, Part], budget: float) -> dict[str, int | None]:
    """Ranks of all layers jointly, by `retrograde.spectral.factorisation.ranks`; None where a layer stays whole."""
    curves = {name: Curve(p.macs, p.cost(1), p.shares[: p.largest]) for name, p in parts.items()}
    return allocate(curves, budget)


def report_rows(
    layers: Mapping[str, nn.Module],
    parts: Mapping[str, Part],
    ranks: Mapping[str, int],
    pairs: Mapping[str, nn.Module],
    left: Mapping[str, str],
    macs: Mapping[str, float],
    seconds: Mapping[str, tuple[float, float]],
) -> tuple[FactorRow, ...]:
    """A row for every layer, in the model's order."""
    rows: list[FactorRow] = []
    for name, layer in layers.items():
        done = name in ranks
        size, part = parameters_of(layer), parts.get(name)
        rows.append(
            FactorRow(
                name=name,
                type=type(layer).__name__,
                shape=shape_of(layer),
                status="factorised" if done else "left",
                why="" if done else left[name],
                rank=ranks.get(name),
                largest=0 if part is None else largest_rank(part.layer),
                energy=parts[name].shares[ranks[name] - 1] if done else None,
                macs=(macs[name], parts[name].cost(ranks[name]) if done else macs[name]),
                parameters=(size, parameters_of(pairs[name]) if done else size),
                seconds=seconds.get(name),
            )
        )
    return tuple(rows)
