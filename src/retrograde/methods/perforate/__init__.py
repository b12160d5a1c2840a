r"""Perforated backpropagation: artificial dendrites, added to a layer whose shape has to stay as it is.

Perforate grows S dendrite sets beside a layer M, each a copy M_s with one dendrite for each of its C neurons. Their
activations are added before the network's own nonlinearity:

    z_s = M_s(x) + Σ_e V[s,e] ⊙ a_e                                       (1)   V: with `cascade` alone
    a_s = f(γ (z_s − μ)/√(σ² + ε) + β)                                    (2)   relu; `norm=None`: f(z_s)
    y   = M(x) + Σ_s s·w[s] ⊙ a_s                                         (3)   w is exactly zero when it grows

Growth keeps the network's function to the bit, in training and in evaluation. M_s ~ N(0, 1/(fan_in · rms(x)²)) and
μ, σ² come from rows of the layer's input (of an optimizer step at most 50 steps ago); γ = 1, β ~ N(0, 1). With
s = 5 under optimizers whose step does not grow with the gradient (Adam), s·w moves five times as far as a weight
does. Under SGD the gradient of w has the factor s as well, so that s·w moves by s²: there s = √5.

When they grow: `grow_after`, a share of the run or a step; all sets at once. Learning goes on with the same
optimizer, whose moments of the new parameters begin at zero; where a schedule has lowered the learning rate, that of
the new parameters restarts at its largest value and then follows the schedule's shape. With ``grow_after=None``, and
where the run's length is not known, growth waits for a plateau of ``session.validated(…)``, see below.

Learning rules:

*gradient*: M_s, γ, β, V and w train by the loss, like the rest.

*hybrid*: for networks that are finished. A phase of a few steps, with the network frozen, keeps (x, δ) of 4,096 rows;
60 steps of Adam on Σ_c |r_c| of equation (6) over them fit the start; then the gradient rule.

*perforated*, the papers' rule: no error passes back through dendrites (they read x and give a without a gradient; w
trains by the loss). They learn in a phase of their own, with the network frozen, to follow the error that remains
at their neuron:

    C_c = mean_p[(a_pc − ā_c)(δ_pc − δ̄_c)]                                (4)   Σ_c |C_c| is maximised
    dS/dθ = Σ_c sign(C_c) mean_p[(δ_pc − δ̄_c) f'(z_pc) dz_pc/dθ]          (5)
    r_c = C_c / (σ_a σ_δ)                                                 (6)   picks each neuron's best candidate

Means and signs are running averages (weight 0.01; the first hundred batches prime them). Candidates climb by Adam.
The papers' method as a whole is ``Perforate(rule="perforated", activation="tanh", cascade=True)``: under this rule
growth is always by phases and of one set, s = 1, M_s is drawn as randn · 0.01, and there is no norm, since equation
(6) compares candidates whatever their scale and since a frozen dendrite has nothing to learn with γ and β.

Phases, driven by ``session.validated(…)``: train until no new best score came for `patience` reports; restore the
best state; grow at every layer at once (perforated, hybrid: after a dendrite phase); train on. A growth that brought no
new best is undone and tried again, `tries` times in all; then the best state stays. `bound` says how many reports
that can take.

Where: layers with at most four inputs for each output. In others a set's parameters buy inputs, of which there are
enough, instead of neurons; `where` names them all the same.

Deviations from the papers: everything above but the perforated rule. In that, (5) is divided by each channel's σ_δ,
which changes no channel's direction and frees Adam of the loss's scale, and the first batch of a phase only primes
the means. A dendrite without a norm has a bias if its layer has one.

What to expect, in points of test accuracy against the same network for as many epochs (95 % intervals; small subsets,
3 to 5 seeds, prototypes of these rules): +1.25 [+0.43, +2.06] on Fashion-MNIST 14×14 with layers 8-8, where the
defaults were chosen; +1.10 [+0.38, +1.81] on CIFAR-10 8×8 with 8-8; +0.74 [+0.26, +1.22] on Fashion-MNIST 784-8-8;
+0.54 [−0.15, +1.24] on CIFAR-10 3×64. Against a plain network as large, uniformly wider: +0.07 [−0.46, +0.60],
−0.91 [−1.24, −0.59], −0.50 [−1.28, +0.28], −0.56 [−0.98, −0.15]. So where widths may change, wider is as good or
better. And most of the gain is the norm's: on a network that has BatchNorm already, dendrites brought
+0.28 [−0.06, +0.62]. Perforate is for layers whose shapes must stay, of a pretrained or deployed network. Give the
network normalisation first, if it may have it. Where it overfits, leave dendrites out
(``session.validated(score, train=…)`` warns). "90 % fewer parameters" says nothing of dendrites without the narrow
network alone beside it.

What it cannot do yet: recurrent cells, whole transformer blocks, computed weights. Dendrites of a convolution sit
before the BatchNorm behind it, not inside a wrapped block. A call with a single row for each channel (an unbatched
vector, a batch of one) has no variance: it is normalised by the running statistics. The norm takes its statistics over
all positions, padded ones too, and in training over other positions of the same sequence: take ``norm=None`` where a
model must not see later ones (causal language models). Under DDP each rank normalises by its own batch; running
statistics are averaged over ranks. The hybrid start does not learn γ. Dendrites' own products run in plain autograd:
other methods do not act on them. Leave out (`where`, or `skip` of attach) the layer that feeds a softmax, unless you
want it.

The layer's ``state_dict`` gains the keys ``dendrites.*``, all of them from the start. A state without any loads as one
without dendrites; one of an earlier version, with keys ``dendrite_weight_0``, is refused (`StateError`). Copies,
pickles and averages keep keys and function; ``session.fold()`` keeps only the dendrites in use, with s in w.

Cost: the sets of one growth are one product of S·C outputs more in forward, and under the gradient rule two in
backward; in a dendrite phase two products for each candidate. Memory: capacity for all sets, S·(P_M + 3C) parameters
(w, γ and β beside the weight), and where phases are driven by scores the best state on the CPU. Unused capacity takes
no part in forward and does not move. The plan prints the parameters, and how wide a plain layer of as many would be.

Data parallelism: dendrites are drawn on rank 0, sums and gradients of candidates are added over ranks before they
decide, and scores are averaged: every rank must report. The unused capacity is part of DDP's reduction.

Suggested settings: the defaults, on small networks that underfit, with the learning rate tuned without dendrites first:
a gain of five points turned out to be a learning rate that suited the control badly. ``rule="hybrid", grow_after=0`` to
continue from a finished network: +0.33 [+0.21, +0.46] there.

Reference:
    Brenner, Itti. *Perforated backpropagation: a neuroscience inspired extension to artificial neural networks.*
    arXiv 2501.18018. Brenner et al., arXiv 2506.00356. Fahlman, Lebiere. *The cascade-correlation learning
    architecture.* NIPS 1990. An independent implementation from these papers, not affiliated with Perforated AI; it
    grants no rights under third-party patents (US 11,580,403).

"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self, cast, get_args

from torch import nn

from retrograde.engine.slots import Method, Rule, Site
from retrograde.errors import OptionError, check_option, check_steps
from retrograde.maths.perforate import ACTIVATIONS, Activation
from retrograde.methods.perforate import placement
from retrograde.methods.perforate.conductor import PerforateConductor
from retrograde.methods.perforate.hybrid import HybridRule
from retrograde.methods.perforate.perforated import PerforatedRule
from retrograde.methods.perforate.rule import DendriteRule

Learning = Literal["gradient", "hybrid", "perforated"]
Start = Literal["scaled", "small"]

_GROW_AFTER = 0.2
_RULES: Mapping[str, type[DendriteRule]] = {
    "gradient": DendriteRule,
    "hybrid": HybridRule,
    "perforated": PerforatedRule,
}


@dataclass(frozen=True)
class Perforate(Method):
    """Artificial dendrites; `retrograde methods perforate` prints its equations, cost and source.

    Args:
        rule: ``"gradient"``, dendrites train by the loss; ``"hybrid"``, likewise, from a start that is fitted to the
            error; ``"perforated"``, by correlation in a phase of their own, as in the papers.
        where: glob pattern or patterns over full layer names; None for every layer with at most four inputs for
            each output.
        max_dendrites: S, dendrite sets that a layer can get.
        norm: ``"batch"``, a BatchNorm of its own on each dendrite; None for none (perforated: always).
        activation: f: ``"relu"``, ``"tanh"`` or ``"sigmoid"``.
        initial: how M_s starts: ``"scaled"``, for z of unit variance; ``"small"``, 0.01 · randn (perforated: always).
        scale: s; None for 5, √5 under SGD (perforated: 1).
        at_once: sets of one growth; None for all of them, or for one where they cascade (perforated: one).
        cascade: dendrites read those of earlier growths.
        grow_after: steps after which all sets grow, or their share of the run; None waits for plateaus (perforated:
            always). Where the run's length is not known (``attach(…, steps=…)``), the default waits too.
        patience: reports without a new best score that make a plateau.
        tries: cycles that a growth may take to bring a new best score.
        candidates: candidate dendrites for each neuron (perforated).
        limit: most reports in one neuron phase.
        candidate_patience: reports without an improved candidate that end a dendrite phase (perforated).
        candidate_limit: most reports in one dendrite phase (perforated).
        candidate_rate: learning rate of the candidates' Adam (perforated).
        momentum: weight of a new batch in the candidates' running means (perforated).
        fit_steps: Adam's steps on a start (hybrid).
        fit_rows: rows of x and δ that a start is fitted to (hybrid).
        period: steps of a phase when growth waits for a plateau and no score is ever reported; None takes 10,000, and
            warns at the 1,000th that no score has come.

    Raises:
        OptionError: a value out of its range, or one without effect.

    Examples:
        >>> session = rg.attach(model, rg.Perforate(where="features.*"), steps=len(loader) * epochs)
    """

    name: ClassVar[str] = "perforate"
    adds_parameters: ClassVar[bool] = True
    shares: ClassVar[Collection[str]] = ("grow_after",)
    short_run: ClassVar[Mapping[str, Any]] = {"patience": 2, "limit": 6, "max_dendrites": 2}
    forecast_note: ClassVar[str] = (
        "perforate: the forecast is of the model as it starts, without dendrites. Each set that grows costs as much as "
        "one more forward product of its layer, and under the gradient rule one more backward pass."
    )
    whole_run: ClassVar[str] = (
        "it adds parameters for accuracy, of which short runs show nothing: use `compare`"
    )

    rule: Learning = "gradient"
    where: str | tuple[str, ...] | None = None
    max_dendrites: int = 3
    norm: Literal["batch"] | None = "batch"
    activation: Activation = "relu"
    initial: Start = "scaled"
    scale: float | None = None
    at_once: int | None = None
    cascade: bool = False
    grow_after: int | float | None = _GROW_AFTER
    patience: int = 10
    tries: int = 2
    candidates: int = 1
    limit: int = 100
    candidate_patience: int = 5
    candidate_limit: int = 30
    candidate_rate: float = 0.01
    momentum: float = 0.01
    fit_steps: int = 60
    fit_rows: int = 4096
    period: int | None = None

    def __post_init__(self) -> None:
        check_option(self, "rule", self.rule in _RULES, f"one of {', '.join(map(repr, _RULES))}")
        check_option(self, "norm", self.norm in ("batch", None), "'batch' or None")
        check_option(
            self,
            "initial",
            self.initial in get_args(Start),
            f"one of {', '.join(map(repr, get_args(Start)))}",
        )
        check_option(
            self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(map(repr, ACTIVATIONS))}"
        )
        for name in _COUNTS:
            value = getattr(self, name)
            fine = (isinstance(value, int) and value >= 1) or (
                value is None and name in ("period", "at_once")
            )
            check_option(self, name, fine, "a whole number, 1 or more")
        rate = self.candidate_rate
        check_option(self, "candidate_rate", math.isfinite(rate) and rate > 0, "a positive number")
        check_option(self, "momentum", 0 < self.momentum <= 1, "above 0 and 1 at most")
        scale = self.scale
        check_option(
            self, "scale", scale is None or (math.isfinite(scale) and scale > 0), "a positive number or None"
        )
        if self.grow_after is not None:
            check_steps(self, "grow_after")
        self._check_effects()
        fine = self.where is None or all(isinstance(p, str) and p for p in self._patterns())  # pyright: ignore[reportUnnecessaryIsInstance]
        check_option(self, "where", fine, "a glob pattern or several")

    def _check_effects(self) -> None:
        if self.candidates > 1 and self.rule != "perforated":
            raise OptionError(
                f"Perforate: candidates={self.candidates} has no effect with rule={self.rule!r}, which has no "
                "candidates to choose from. Leave it at 1, or use rule='perforated'."
            )
        if self.rule == "perforated" and self.grow_after not in (None, _GROW_AFTER):
            raise OptionError(
                f"Perforate: grow_after={self.grow_after} has no effect with rule='perforated', whose phases "
                "follow the validation score. Leave it out, or use rule='hybrid'."
            )
        if self.at_once is not None and self.at_once > self.max_dendrites:
            raise OptionError(
                f"Perforate: at_once={self.at_once} is more than max_dendrites={self.max_dendrites}. Lower it, or "
                "leave it out."
            )
        if self.at_once is not None and self.at_once > 1 and self.rule == "perforated":
            raise OptionError(
                f"Perforate: at_once={self.at_once} has no effect with rule='perforated', which grows one set "
                "after the other. Leave it out, or use rule='hybrid'."
            )
        if self.cascade and 1 < self.max_dendrites == self.at_once:
            raise OptionError(
                f"Perforate: cascade=True has no effect with at_once={self.at_once}: dendrites read those of earlier "
                "growths, and all sets grow at once. Leave one of them out."
            )

    # The settings as a rule uses them: the papers' rule has some of its own.

    @property
    def growths(self) -> tuple[int, ...]:
        """Sets of each growth."""
        one = self.cascade or self.rule == "perforated"
        most = self.at_once or (1 if one else self.max_dendrites)
        return tuple(min(most, self.max_dendrites - n) for n in range(0, self.max_dendrites, most))

    @property
    def normalises(self) -> bool:
        """Whether dendrites have a norm."""
        return self.norm is not None and self.rule != "perforated"

    @property
    def scales_start(self) -> bool:
        """Whether M starts for z of unit variance."""
        return self.initial == "scaled" and self.rule != "perforated"

    @property
    def samples(self) -> bool:
        """Whether a start needs rows of the layer's input; a fitted one has kept its own."""
        return self.rule == "gradient" and (self.normalises or self.scales_start)

    @property
    def output_scale(self) -> float | None:
        """The s that is given; None where the optimizer decides."""
        return 1.0 if self.scale is None and self.rule == "perforated" else self.scale

    @property
    def first_growth(self) -> int | None:
        """The step after which all sets grow; None where growth waits for a plateau."""
        return self.grow_after if isinstance(self.grow_after, int) and self.rule != "perforated" else None

    def for_run(self, steps: int | None) -> Self:
        """As of every method; the default share waits for a plateau where the run's length is not known."""
        if self.rule == "perforated":
            return replace(self, grow_after=None)
        return self if steps is None and self.grow_after == _GROW_AFTER else super().for_run(steps)

    def make_rule(self, site: Site) -> Rule | str:
        """Every linear-like layer with a weight of its own, as far as `where` names it."""
        if self.where is not None and not any(
            fnmatchcase(site.name, pattern) for pattern in self._patterns()
        ):
            return "not in `where`"
        if reason := placement.refusal(self, site):
            return reason
        rule = _RULES[self.rule](site, site.kind, self)
        rule.cost, rule.remark = placement.cost(self, site), placement.remark(self, site)
        return rule

    def notes(self, model: nn.Module, rules: Mapping[str, Rule]) -> Sequence[str]:
        """What all dendrites cost, and whether the network has normalisation."""
        return placement.notes(self, model, cast(Mapping[str, DendriteRule], rules))

    def conductor(self, model: nn.Module, rules: Mapping[str, Rule]) -> PerforateConductor:
        """Phases of the whole model."""
        return PerforateConductor(self, model, cast(Mapping[str, DendriteRule], rules))

    def bound(self) -> int:
        """Most calls of ``session.validated`` until the method has finished.

        One neuron phase, then for each try at each growth a dendrite phase (perforated) and a neuron phase.
        """
        phase = self.candidate_limit if self.rule == "perforated" else 0
        return self.limit + len(self.growths) * self.tries * (phase + self.limit)

    def _patterns(self) -> tuple[str, ...]:
        return (self.where,) if isinstance(self.where, str) else tuple(self.where or ())


_COUNTS = (
    *("max_dendrites", "patience", "tries", "candidates", "limit", "candidate_patience", "candidate_limit"),
    *("period", "at_once", "fit_steps", "fit_rows"),
)
