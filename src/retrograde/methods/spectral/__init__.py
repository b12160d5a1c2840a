r"""Spectral backpropagation: weight gradients projected on the leading eigenvectors of a layer's activations.

With X (n × d) a layer's input, D (n × o) the gradient at its output, G = DᵀX the weight gradient, and U (d × k) the
leading eigenvectors of E[xxᵀ], all steps but a few use

    G U Uᵀ = (Dᵀ (X U)) Uᵀ                              (1)   input side: XU is kept, n × k numbers instead of n × d
    V Vᵀ G                                              (2)   output side: V leads E[zzᵀ], z = W x
    ‖G − G U Uᵀ‖ ≤ ‖D‖₂ sqrt(Σ_{i>k} λ_i(XᵀX))          (3)   the input side's guarantee; the output side has none
    W ← W − η β λ₁ e₁ e₁ᵀ W                             (4)   decay of the largest output direction (λ₁, e₁ of E[zzᵀ])
    U ← orth(E[xxᵀ] U)  or  Cayley(τA) U                (5)   every `every` steps; M ← M P_old P_new + M(I − P_old)
    G + (s − 1)(G − G U Uᵀ),  s = min(m, λ₁/λ_k)        (6)   every m-th step: ``residual="scaled"``; s = 1: "full-step"
    dW = Dᵀ X̂,  X̂ = X U Uᵀ + (X − X U Uᵀ) Π,  E[Π] = I   (7)   every step: ``residual="unbiased"``

**The unbiased form.** Π keeps some channels of X, drawn anew in every step and divided by their probability (`sketch`).
E[X̂] = X, so dW is unbiased in every step, whatever U is: no step is full, and X U and the channels that were drawn, n
× (k + j), are all that is kept of X beside the few rows that U is learnt from, an eighth of their memory; U itself, d ×
k, counts where batches are small. The variance that this adds is that of what U leaves of the gradient, times about
d/j. Convolutions keep channels of every pixel in place of patches, which makes the share (k + j)/channels whatever the
kernel's size.

**Why a residual path is on by default.** Steps confined to a dominant subspace stop making progress, and steps
confined to its complement train about as well as free ones (Song, Ahn, Yun 2025). `basis` and `residual` let that
be seen here: ``"top"``, ``"random"`` and ``"bulk"`` (I − P), with and without the path.

Deviations from the summaries of the source. P multiplies G from the side of the input by default: on the literal side
G must be formed first, and nothing is saved. The published decay β λ₁ e₁e₁ᵀ does not have W's shape; (4) does, with λ₁
of the mean, not the sum, over rows, and its factor never above 1. P acts on each call's own weight gradient: what
others add to a shared weight's gradient (a tied embedding, a penalty) is left as it is, and where a weight is computed
(weight norm, pruning) it is the gradient of what is multiplied that is projected, before the chain rule. Momentum is
carried along at refreshes where it is all that the optimizer keeps (SGD, Muon, Lion). Adam's kind divides it, entry by
entry, by the root of squares on which a change of basis has no meaning: a moment moved into an entry whose squares are
tiny would make a huge step, so there both are left. The division turns a step out of the subspace: what is confined is
the gradient. The factor s restores on full steps what the others left out, and its bound λ₁/λ_k keeps such steps as
stable as those along e₁. The first `warmup` steps are full, and the rank is then fixed, so that compiled code stays.

Convolutions: a row of X is a patch, and X U is the input convolved with U's columns as filters. It is smaller than the
input when k is below the input channels of a group times the stride's product, so that is where the rank is capped.

Cost for each projected call: 2nk(d + o) + 2kdo against 2ndo. Each refresh: about 8·rows·d·k. Full steps keep all of X,
and the few steps before a refresh up to `rows` rows of it, so with the default periods the *average* of memory falls;
its peak does not, and behind a ReLU of torch's, which keeps its output, nothing falls. Where no step is full
(``"unbiased"``; ``"none"`` after its `warmup`, whose steps all are) `nn.ReLU` modules keep a bit of each activation;
functional ones, pooling and GELU still keep it, and where all are of that kind the step keeps as much as before. In
batches of fewer rows than about d/4 U outweighs what is saved. With ``"none"`` accuracy falls, and `random` directions
did not help.

Suggested settings: the defaults, for layers from about 64 inputs on. They were chosen on the validation split of
Fashion-MNIST (two hidden layers of 128, SGD and AdamW): ``"scaled"`` every 2nd step came nearest to plain
backpropagation; every 4th saves more and loses a few tenths of a percent, and ``"full-step"`` about as much again.

References:
    Muthuraman, *Dynamic spectral backpropagation*, arXiv 2505.23369 (its base rule, from summaries).
    Song, Ahn, Yun, *Does SGD really happen in tiny subspaces?*, ICLR 2025.
    *PRAC: principal and random subspace compression of activations*, ICML 2026: equation (7) with random directions in
    place of drawn channels, which costs two products more and, measured, a third more variance.
    Zhao et al., *GaLore*, ICML 2024; Chen et al., *Fira*, arXiv 2410.01623: projected gradients and their residual.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from retrograde.engine.slots import Method, Rule, Site
from retrograde.errors import OptionError, check_option, check_steps, is_finite, is_whole
from retrograde.maths.philox import key_of
from retrograde.methods.spectral.core import SpectralRule
from retrograde.methods.spectral.sketch import Sketch
from retrograde.methods.spectral.subspace import Directions, Policy, Subspace, Update

__all__ = ["Spectral"]

Side = Literal["input", "output", "both"]
Residual = Literal["unbiased", "full-step", "scaled", "none"]

_LARGEST_RANK = 64
_SMALLEST_RANK = 4
_SHARE = 8
"""Of the width, one part in so many is the unbiased form's rank."""


@dataclass(frozen=True)
class Spectral(Method):
    """Spectral backpropagation; `retrograde methods spectral` prints its equations, cost and source.

    Args:
        rank: k; None takes the smallest that holds `energy`, at most 64, d/4 and, for a convolution, half of what would
            save memory. With ``residual="unbiased"`` k + j, by default an eighth of d or of the channels.
        energy: θ, share of E‖x‖² that the automatic rank holds.
        side: project the gradient from the side of the layer's ``"input"``, its ``"output"``, or ``"both"``.
        every: steps between refreshes of the basis.
        update: refresh by ``"qr"`` or on the Stiefel manifold by Cayley's transform, ``"lie"``.
        tau: length of a Cayley step.
        residual: the way out of the subspace: ``"scaled"`` (equation 6), ``"full-step"``, ``"unbiased"`` (7) or
            ``"none"``.
        full_every: m, of each so many steps one is full.
        warmup: full steps at the start, or their share of the run; None: none for ``"unbiased"``, 200 for the others.
        decay: β, in 0 to 1e-3 as a rule.
        random: how many of `rank` are random: channels drawn in each step, j, with ``residual="unbiased"``, of which
            None makes three quarters; directions drawn at each refresh otherwise, of which None makes none.
        basis: ``"top"``; for ablations ``"random"``, and ``"bulk"``, the complement, which saves no memory.
        rows: rows of the input that a refresh sees.
        skip_head: train the model's last linear-like layer in full.

    Raises:
        OptionError: a value out of its range.

    Examples:
        >>> session = rg.attach(model, rg.Spectral())
    """

    name: ClassVar[str] = "spectral"
    shares: ClassVar[Collection[str]] = ("warmup",)
    short_run: ClassVar[Mapping[str, Any]] = {"warmup": 20, "every": 20}

    rank: int | None = None
    energy: float = 0.95
    side: Side = "input"
    every: int = 100
    update: Update = "qr"
    tau: float = 1.0
    residual: Residual = "scaled"
    full_every: int = 2
    warmup: int | float | None = None
    decay: float = 0.0
    random: int | None = None
    basis: Directions = "top"
    rows: int = 1024
    skip_head: bool = True

    def __post_init__(self) -> None:
        for option, choices in (
            ("side", Side),
            ("update", Update),
            ("residual", Residual),
            ("basis", Directions),
        ):
            known = get_args(choices)
            check_option(self, option, getattr(self, option) in known, f"one of {', '.join(known)}")
        for option, least in (("every", 1), ("full_every", 2), ("rows", 1)):
            check_option(
                self,
                option,
                is_whole(getattr(self, option)) and getattr(self, option) >= least,
                f"a whole number, {least} or more",
            )
        fine = self.random is None or (is_whole(self.random) and self.random >= 0)
        check_option(self, "random", fine, "a whole number, 0 or more, or None")
        check_option(self, "skip_head", isinstance(self.skip_head, bool), "True or False")  # pyright: ignore[reportUnnecessaryIsInstance]
        if self.warmup is not None:
            check_steps(self, "warmup")
        fine = self.rank is None or (is_whole(self.rank) and self.rank >= 1)
        check_option(self, "rank", fine, "a whole number, 1 or more, or None to follow `energy`")
        check_option(self, "energy", is_finite(self.energy) and 0 < self.energy <= 1, "above 0 and at most 1")
        check_option(self, "tau", is_finite(self.tau) and self.tau > 0, "a positive number")
        check_option(self, "decay", is_finite(self.decay) and self.decay >= 0, "a finite number, 0 or more")
        if self.random and self.rank is not None and self.random >= self.rank:
            raise OptionError(
                f"Spectral: random={self.random} leaves none of rank={self.rank} to the leading directions. "
                "For random directions alone use basis='random'."
            )
        if self.residual == "unbiased":
            if self.side != "input" or self.basis != "top":
                raise OptionError(
                    f"Spectral: residual='unbiased' needs side='input' and basis='top', not side={self.side!r} and "
                    f"basis={self.basis!r}: the layer's input is what is compressed, and random directions are in it "
                    "already (`random`)."
                )
            for option, why in (
                ("full_every", "no step is full"),
                ("energy", "its rank is a share of the width"),
            ):
                if getattr(self, option) != type(self).__dataclass_fields__[option].default:
                    raise OptionError(
                        f"Spectral: {option}={getattr(self, option)} has no effect with residual='unbiased': {why}. "
                        "Leave it out."
                    )
            if self.random == 0:
                raise OptionError(
                    "Spectral: random=0 leaves no random direction, and without them nothing is unbiased. Give 1 or "
                    "more, or residual='none'."
                )
        if self.residual == "scaled" and self.basis != "top":
            raise OptionError(
                f"Spectral: residual='scaled' is stable only with basis='top', not {self.basis!r}: otherwise steep "
                "directions are left outside, and the scale would multiply their steps. Use 'full-step'."
            )
        if self.random and self.basis != "top":
            raise OptionError(f"Spectral: random={self.random} needs basis='top', not {self.basis!r}.")

    @property
    def lightens(self) -> bool:
        """Where no step after the first ones keeps a layer's input whole, a ReLU before it must not keep it either."""
        return self.side == "input" and self.residual in ("unbiased", "none")

    def make_rule(self, site: Site) -> Rule | str:
        """Every linear layer and convolution that is wide enough."""
        if self.skip_head and site.last:
            return "head: trained in full (skip_head=False projects it too)"
        if site.weight is None and (self.side != "input" or self.decay):
            return (
                "its weight is computed anew in every forward pass: other sides and `decay` need a parameter"
            )
        if site.shape is None:
            return "its weight is computed in its forward pass: nothing tells beforehand how wide it is"
        if not site.map.rows_are_outputs and (self.side != "input" or self.decay):
            return "transposed: its rows have no outputs of their own, which other sides and `decay` need"
        weight = torch.empty(site.shape, device="meta")
        _, outputs, inputs = site.map.matrix(weight).shape
        limit = site.map.narrow_width(weight)
        if self.residual == "unbiased":
            return self._unbiased(site, weight)
        caps = [min(_LARGEST_RANK, inputs // 4, limit // 2), min(_LARGEST_RANK, outputs // 4)]
        sides = {"input": [0], "output": [1], "both": [0, 1]}[self.side]
        for side in sides:
            width, what = ((inputs, "inputs"), (outputs, "outputs"))[side]
            if self.rank is None and caps[side] < _SMALLEST_RANK:
                return f"{width} {what}: too few for a projection to save anything (give `rank` to insist)"
            if self.rank is not None and self.rank > width:
                return f"rank={self.rank} is more than its {width} {what}: nothing to project"
        subspaces = [self._subspace(site.name, cap, side) for side, cap in enumerate(caps)]
        wants_outputs = self.side != "input" or self.decay > 0
        outside = subspaces[1] if wants_outputs else None
        return SpectralRule(site.name, self, subspaces[0], outside, tied=site.tied)

    def _unbiased(self, site: Site, weight: torch.Tensor) -> Rule | str:
        """Equation (7): leading directions and drawn channels."""
        width = site.map.channels(weight)
        rank = width // _SHARE if self.rank is None else self.rank
        if not width:
            return "its map has no channels to draw from (`Map.channels`)"
        if self.rank is None and rank < _SMALLEST_RANK:
            return f"{width} channels: too few for an eighth of them to stand for all (give `rank` to insist)"
        if rank < 2:
            return f"rank={rank}: one direction and one drawn channel are the least"
        if rank >= width:
            return f"rank={rank} is no less than its {width} channels: nothing is saved"
        # Measured: beyond a quarter, directions hold less of the gradient than drawn channels would save of variance.
        leading = min(max(1, rank // 4), _LARGEST_RANK) if self.random is None else rank - self.random
        if leading < 1:
            return f"random={self.random} leaves none of its rank {rank} to a leading direction"
        policy = Policy(leading, leading, 1.0, 0, "top", self.update, self.tau, key_of(f"{site.name}/0"))
        outside = self._subspace(site.name, 1, 1) if self.decay > 0 else None
        sketch = Sketch(site.map.groups, width, rank - leading)
        return SpectralRule(site.name, self, Subspace(policy), outside, tied=site.tied, sketch=sketch)

    def _subspace(self, name: str, cap: int, side: int) -> Subspace:
        seed = key_of(f"{name}/{side}")
        # Where the output side is only there for the decay, any rank will do.
        if side == 1 and self.side == "input":
            return Subspace(Policy(1, 1, 1.0, 0, "top", self.update, self.tau, seed))
        cap = max(cap, 1)
        return Subspace(
            Policy(self.rank, cap, self.energy, self.random or 0, self.basis, self.update, self.tau, seed)
        )
