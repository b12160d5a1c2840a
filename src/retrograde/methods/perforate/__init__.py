r"""Perforated backpropagation: artificial dendrites, added to a trained layer where error remains.

A dendrite set d is a copy M_d of the layer with one dendrite for each of its C neurons. Its activation is
added before the network's own nonlinearity:

    z_d = M_d(x) + Σ_{e<d} V[d,e,:] ⊙ a_e                                 (1)   cascade
    a_d = f(z_d)                                                          (2)   tanh, sigmoid or relu
    y   = M(x) + Σ_d w[d,:] ⊙ a_d                                         (3)   a new row of w is exactly zero

Two learning rules:

*gradient*: M_d, V and w train by the loss, like the rest.

*perforated*: no error passes back through dendrites (they read x and give a without a gradient; w trains by
the loss). They learn in a phase of their own, with the network frozen, to follow the error that remains at
their neuron:

    C_c = mean_p[(a_pc − ā_c)(δ_pc − δ̄_c)]                                (4)   Σ_c |C_c| is maximised
    dS/dθ = Σ_c sign(C_c) mean_p[(δ_pc − δ̄_c) f'(z_pc) dz_pc/dθ]          (5)
    r_c = C_c / (σ_a σ_δ)                                                 (6)   picks each neuron's best candidate

Means and signs are running averages (weight 0.01; the first hundred batches prime them). Candidates climb by
Adam.

Phases, driven by ``session.validated(…)``: train until no new best score came for `patience` reports;
restore the best state; grow one set at every layer at once (perforated: after a dendrite phase); train on. A
set that brought no new best is undone and tried again, `tries` times in all; then the best state stays.
`bound` says how many reports that can take.

Deviations from the papers: (5) is divided by each channel's σ_δ, which changes no channel's direction and
frees Adam of the loss's scale; the first batch of a phase only primes the means. A dendrite has a bias if its
layer has one.

What it cannot do yet: recurrent cells, whole transformer blocks, computed weights, a compression helper. Dendrites
of a convolution sit before the BatchNorm behind it, not inside a wrapped block: their own z is then not normalised,
so f can saturate, and BatchNorm rescales their share with the sum; that is weaker than a dendrite with a norm of its
own. Dendrites' own products run in plain autograd: other methods do not act on them. Leave out (`where`, or `skip` of
attach) the layer that feeds a softmax. Learning rate schedules run on through all phases; one that decays to zero
makes a false plateau, and a warning says so.

The layer's ``state_dict`` gains the keys ``dendrite_*``, all of them from the start. A state without any loads as one
without dendrites. Copies, pickles and averages keep keys and function; ``session.fold()`` keeps only the dendrites
in use.

Cost: each set costs one more forward product of the layer, and under the gradient rule one more backward
pass; in a dendrite phase two products for each candidate. Memory: capacity for `max_dendrites` sets, D·P_M +
C·D(D+1)/2 parameters, and the best state on the CPU. Unused capacity takes no part in forward and does not
move.

Data parallelism: candidates are drawn on rank 0, their sums and gradients are added over ranks before they
decide, and scores are averaged: every rank must report. The unused capacity is part of DDP's reduction.

Suggested settings: small bases and little data; ``activation="tanh"``, so that w does not act as a bias at
first.

Reference:
    Brenner, Itti. *Perforated backpropagation: a neuroscience inspired extension to artificial neural networks.*
    arXiv 2501.18018. Brenner et al., arXiv 2506.00356. Fahlman, Lebiere. *The cascade-correlation learning
    architecture.* NIPS 1990. An independent implementation from these papers, not affiliated with Perforated AI; it
    grants no rights under third-party patents (US 11,580,403).

"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, cast, get_args

from torch import nn

from retrograde.engine.slots import Method, Rule, Site
from retrograde.errors import OptionError, check_option
from retrograde.maths.perforate import ACTIVATIONS, Activation
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.conductor import PerforateConductor
from retrograde.methods.perforate.perforated import PerforatedRule
from retrograde.methods.perforate.rule import DendriteRule

Learning = Literal["gradient", "perforated"]


@dataclass(frozen=True)
class Perforate(Method):
    """Artificial dendrites; `retrograde methods perforate` prints its equations, cost and source.

    Args:
        rule: ``"gradient"``, dendrites train by the loss; ``"perforated"``, by correlation in a phase of
            their own.
        where: glob pattern or patterns over full layer names; None for every layer.
        max_dendrites: D, dendrite sets that a layer can get.
        activation: f: ``"tanh"``, ``"sigmoid"`` or ``"relu"``.
        patience: reports without a new best score that make a plateau.
        tries: cycles that a set may take to bring a new best score.
        candidates: candidate dendrites for each neuron (perforated).
        limit: most reports in one neuron phase.
        candidate_patience: reports without an improved candidate that end a dendrite phase.
        candidate_limit: most reports in one dendrite phase.
        candidate_rate: learning rate of the candidates' Adam.
        momentum: weight of a new batch in the running means.
        period: steps of a phase when no score is ever reported; None takes 10,000, and warns at the 1,000th that no
            score has come.

    Raises:
        OptionError: a value out of its range.

    Examples:
        >>> session = rg.attach(model, rg.Perforate(where="features.*"))
        >>> session.validated(accuracy)  # after each validation
    """

    name: ClassVar[str] = "perforate"
    adds_parameters: ClassVar[bool] = True
    short_run: ClassVar[Mapping[str, Any]] = {"patience": 2, "limit": 6, "max_dendrites": 2}
    forecast_note: ClassVar[str] = (
        "perforate: the forecast is of the model as it starts, without dendrites. Each set that grows costs one more "
        "forward product of its layer, and under the gradient rule one more backward pass."
    )
    whole_run: ClassVar[str] = (
        "it grows dendrites when validation stops improving, which short runs do not show: use `compare`"
    )

    rule: Learning = "gradient"
    where: str | tuple[str, ...] | None = None
    max_dendrites: int = 3
    activation: Activation = "tanh"
    patience: int = 10
    tries: int = 2
    candidates: int = 1
    limit: int = 100
    candidate_patience: int = 5
    candidate_limit: int = 30
    candidate_rate: float = 0.01
    momentum: float = 0.01
    period: int | None = None

    def __post_init__(self) -> None:
        check_option(self, "rule", self.rule in get_args(Learning), "one of 'gradient', 'perforated'")
        check_option(
            self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(map(repr, ACTIVATIONS))}"
        )
        for name in _COUNTS:
            value = getattr(self, name)
            fine = (isinstance(value, int) and value >= 1) or (value is None and name == "period")
            check_option(self, name, fine, "a whole number, 1 or more")
        rate = self.candidate_rate
        check_option(self, "candidate_rate", math.isfinite(rate) and rate > 0, "a positive number")
        check_option(self, "momentum", 0 < self.momentum <= 1, "above 0 and 1 at most")
        if self.candidates > 1 and self.rule == "gradient":
            raise OptionError(
                f"Perforate: candidates={self.candidates} has no effect with rule='gradient', which has no "
                "dendrite phase to choose in. Leave it at 1, or use rule='perforated'."
            )
        fine = self.where is None or all(isinstance(p, str) and p for p in self._patterns())  # pyright: ignore[reportUnnecessaryIsInstance]
        check_option(self, "where", fine, "a glob pattern or several")

    def make_rule(self, site: Site) -> Rule | str:
        """Every linear-like layer with a weight of its own, as far as `where` names it."""
        if self.where is not None and not any(
            fnmatchcase(site.name, pattern) for pattern in self._patterns()
        ):
            return "not in `where`"
        if isinstance(site.layer, dendrites.Dendritic):
            return "has dendrites already, of an earlier session"
        if any(isinstance(module, nn.MultiheadAttention) for module in site.fused_by):
            return "nn.MultiheadAttention multiplies by this weight itself in evaluation, past any dendrite"
        if site.weight is None:
            return "dendrites would be copies of a weight that is computed"
        if site.adapter == "peft":
            return "in a peft model, which saves and merges its own adapters alone, and would leave dendrites out"
        if site.adapter == "factor":
            return (
                "factor of a low-rank adapter: a merge multiplies its weight, and would leave dendrites out"
            )
        if not site.weight.requires_grad:
            if self.rule == "perforated":
                return "weight frozen: its input, which candidate dendrites read, is not kept"
            if self.where is None:
                return (
                    "weight frozen, and dendrites would train: name it in Perforate(where=…) if you want that"
                )
        rule = (PerforatedRule if self.rule == "perforated" else DendriteRule)(site, site.kind, self)
        names = ", ".join(f"dendrite_{part}_*" for part in dendrites.NAMES)
        grows = "each session.validated(…) decides" if self.period is None else f"every {self.period} steps"
        rule.remark = (
            f"parameters for {self.max_dendrites} dendrite sets from the start, and keys in state_dict: {names}; "
            f"when one grows: {grows}"
        )
        return rule

    def conductor(self, model: nn.Module, rules: Mapping[str, Rule]) -> PerforateConductor:
        """Phases of the whole model."""
        return PerforateConductor(self, model, cast(Mapping[str, DendriteRule], rules))

    def bound(self) -> int:
        """Most calls of ``session.validated`` until the method has finished.

        One neuron phase, then for each try at each set a dendrite phase (perforated) and a neuron phase.
        """
        phase = self.candidate_limit if self.rule == "perforated" else 0
        return self.limit + self.max_dendrites * self.tries * (phase + self.limit)

    def _patterns(self) -> tuple[str, ...]:
        return (self.where,) if isinstance(self.where, str) else tuple(self.where or ())


_COUNTS = (
    *("max_dendrites", "patience", "tries", "candidates", "limit", "candidate_patience", "candidate_limit"),
    "period",
)
