r"""A PAC-Bayes bound on a trained network, with the conditions under which it is one.

Let P be a distribution of networks that does not depend on the sample S of n i.i.d. examples, and ℓ a loss in [0, 1].
With probability 1 − δ over S, for all Q at once (McAllester 1999; Maurer 2004, for n ≥ 8),

    kl(E_Q L_S ‖ E_Q L_D) ≤ (KL(Q‖P) + ln(2√n/δ)) / n                              (1)
    E_Q L_D ≤ E_Q L_S + sqrt((KL(Q‖P) + ln(2√n/δ)) / (2n))                         (2)   by Pinsker; weaker than (1)

kl(q‖p) is that of two coins. Here P = N(W₀, σ²I) and Q = N(W, σ²I), over all trainable parameters, so that

    KL = Σ_l ‖W_l − W_l0‖² / (2σ²)                                                 (3)

or, for a layer with a basis U_l (d × k, orthonormal), both on the plane W_l0 + A U_lᵀ alone, A (o × k) being normal:

    KL_l = ‖(W_l − W_l0) U_l‖² / (2σ²)                                             (4)

Then **the bound is about the projected network**, whose mean is W_l0 + (W_l − W_l0) U_l U_lᵀ, with noise in the plane
alone. It is the trained network where training never left the plane; `outside` says how far it did. Without that
reading (4) would be no divergence of anything: what lies outside the plane costs nothing only if it is left out.

E_Q L_S is estimated by L̂, the mean of m draws from Q: with probability 1 − δ′ (Langford, Caruana 2001)

    kl(L̂ ‖ E_Q L_S) ≤ ln(2/δ′)/m                                                    (5)

σ may be chosen after training from a grid of s values fixed beforehand: (1) and (5) then hold for each with δ/s and
δ′/s. The `delta` that is given is the whole: four fifths are for (1), one fifth for (5).

**A basis from the training inputs.** "Label-independent" does not suffice for L_D: a basis made from the inputs in S
makes P depend on S. Given the inputs, the labels are still independent, and Maurer's lemma holds for independent
variables that are not identically distributed, since a sum of them is more concentrated. So (1) holds with the risk on
*these inputs with fresh labels*, (1/n) Σ E[ℓ(xᵢ, y) | xᵢ], in place of L_D. A basis from other, unlabelled inputs gives
L_D itself. The result says which of the two it bounds.

References: McAllester, COLT 1999; Maurer, *A note on the PAC Bayesian theorem*, cs.LG/0411099; Langford, Caruana,
*(Not) bounding the true error*, NIPS 2001; Dziugaite, Roy, *Computing nonvacuous generalization bounds*, UAI 2017.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrograde.errors import OptionError
from retrograde.maths import spectral
from retrograde.spectral.theory.bounds import Condition, PacBayes, kl_inverse

Statement = Literal["iid", "prior", "sigma", "basis-independent", "basis-inputs"]
"""What no program can check, and the user must say: see `pac_bayes`."""

_SHARE_OF_DRAWS = 0.2


def pac_bayes(
    model: nn.Module,
    initial: nn.Module,
    data: tuple[Tensor, Tensor],
    sigma: float | Sequence[float],
    *,
    stated: Collection[Statement],
    basis: Mapping[str, Tensor] | None = None,
    delta: float = 0.05,
    draws: int = 500,
    loss: Literal["zero-one", "clipped"] = "zero-one",
    clip: float = 4.0,
    batch_size: int = 1024,
    seed: int = 0,
) -> PacBayes:
    """The bound for a trained classifier, and whether its conditions hold.

    Args:
        model: trained, W; used in evaluation mode, left as it is.
        initial: of the same architecture, W₀, the mean of the prior.
        data: the sample S: inputs (n, …) and labels (n,), without augmentation.
        sigma: σ, or the grid from which the best is taken.
        stated: what you vouch for, since nothing can check it. ``"iid"``: the examples are independent draws of the
            distribution that L_D is of. ``"prior"``: W₀ was made without looking at S. ``"sigma"``: σ or its grid and
            the loss were fixed before looking at S. With bases one of ``"basis-independent"``: they were made without
            looking at S, and ``"basis-inputs"``: from the inputs of S and not from its labels.
        basis: U (d, k), orthonormal columns, by the full name of a layer's weight, which is taken as (o, d).
        delta: δ in all, in (0, 1).
        draws: m, networks drawn from Q for each σ, each a pass over S; fewer loosen (5).
        loss: ``"zero-one"``, or cross-entropy ``"clipped"`` at `clip` nats and divided by it.
        clip: in nats.
        batch_size: rows of one forward pass.
        seed: of the draws.

    Returns:
        The bound with its conditions; its ``bound`` is None where one fails.

    Raises:
        OptionError: an option out of its range, parameters that differ in name or shape, a basis that fits none, no
            examples, labels that are not (n,) class numbers, or outputs that are not (n, classes).

    Examples:
        >>> found = pac_bayes(model, initial, (x, y), [0.01, 0.03, 0.1], stated={"iid", "prior", "sigma"})
        >>> print(found)

    Source: module docstring, equations (1) to (5).
    """
    grid = [float(sigma)] if isinstance(sigma, int | float) else [float(s) for s in sigma]
    _check(grid, delta, draws, loss, clip, stated)
    if initial is model:
        raise OptionError(
            "pac_bayes: model and initial are one object, so the distance between them is 0 and the bound means "
            "nothing. Pass copy.deepcopy(model) as it was before training."
        )
    inputs, labels = data
    _check_data(inputs, labels, loss)
    n, bases = len(inputs), dict(basis or {})
    weights, priors = dict(model.named_parameters()), dict(initial.named_parameters())
    _check_pair(weights, priors, bases)
    conditions = _conditions(model, initial, n, bases, frozenset(stated), len(grid), loss)
    distance, outside = _distances(weights, priors, bases)
    share = delta * _SHARE_OF_DRAWS
    found: list[tuple[float, float, float, float, float, float]] = []
    for s in grid:
        kl = distance / (2 * s * s)
        losses = _draw_losses(model, priors, bases, (inputs, labels), s, draws, loss, clip, batch_size, seed)
        empirical = float(losses.mean())
        upper = kl_inverse(empirical, math.log(2 * len(grid) / share) / draws)
        complexity = (kl + math.log(2 * math.sqrt(n) * len(grid) / (delta - share))) / n
        found.append(
            (kl_inverse(upper, complexity), upper + math.sqrt(complexity / 2), empirical, upper, kl, s)
        )
    bound, pinsker, empirical, upper, kl, chosen = min(found)
    holds = all(condition.holds for condition in conditions)
    return PacBayes(
        bound=bound if holds else None,
        pinsker=pinsker if holds else None,
        risk="fixed inputs" if "basis-inputs" in stated and bases else "L_D",
        empirical=empirical,
        empirical_bound=upper,
        kl=kl,
        sigma=chosen,
        outside=outside,
        n=n,
        delta=delta,
        conditions=conditions,
    )


def _conditions(
    model: nn.Module,
    initial: nn.Module,
    n: int,
    bases: Mapping[str, Tensor],
    stated: frozenset[str],
    grid: int,
    loss: str,
) -> tuple[Condition, ...]:
    before = dict(initial.named_buffers())
    moved = [
        name
        for name, value in model.named_buffers()
        if value.is_floating_point()
        and not torch.equal(value, before.get(name, value.new_empty(0)).to(value))
    ]
    weights, priors = dict(model.named_parameters()), dict(initial.named_parameters())
    stuck = [
        name
        for name, value in weights.items()
        if not value.requires_grad and not torch.equal(value, priors[name].to(value))
    ]
    span = "one value" if grid == 1 else f"{grid} values, each with its share of δ"

    def said(name: str, what: str) -> Condition:
        return Condition(name, name in stated, what if name in stated else f"not stated: {what}")

    found = [
        Condition(
            "loss in [0, 1]", True, "0-1 loss" if loss == "zero-one" else "cross-entropy, clipped and divided"
        ),
        Condition("n ≥ 8", n >= 8, f"n = {n}; Maurer's lemma is proved from 8 on"),
        said("iid", "the examples are independent draws of one distribution"),
        said("prior", "W₀ was made without looking at the sample"),
        said("sigma", f"σ ({span}) and the loss were fixed before looking at the sample"),
        Condition(
            "all that was learnt is in KL",
            not moved and not stuck,
            f"differ from the initial model, and are in no divergence: {', '.join((moved + stuck)[:4])}"
            if moved or stuck
            else "buffers and frozen parameters are those of the initial model",
        ),
    ]
    if bases:
        ways = stated & {"basis-independent", "basis-inputs"}
        why = {
            "basis-independent": "stated: made without looking at the sample",
            "basis-inputs": "stated: made from the sample's inputs alone, so the bounded risk is that on these inputs",
        }
        reason = "; ".join(why[way] for way in sorted(ways)) or "not stated: made before the labels were seen"
        found.append(
            Condition(
                "bases",
                len(ways) == 1,
                reason if len(ways) <= 1 else f"two that exclude each other: {reason}",
            )
        )
    return tuple(found)


def _distances(
    weights: Mapping[str, Tensor], priors: Mapping[str, Tensor], bases: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Σ‖(W − W₀)U‖² and the share of Σ‖W − W₀‖² that bases leave out."""
    inside = total = 0.0
    for name, weight in weights.items():
        if weight.requires_grad:
            moved = (weight.detach().double() - priors[name].detach().double()).reshape(
                len(weight) if weight.dim() else 1, -1
            )
            total += float(moved.square().sum())
            inside += float((moved @ bases[name].double() if name in bases else moved).square().sum())
    return inside, max(1 - inside / total, 0.0) if total else 0.0


@torch.no_grad()
def _draw_losses(
    model: nn.Module,
    priors: Mapping[str, Tensor],
    bases: Mapping[str, Tensor],
    data: tuple[Tensor, Tensor],
    sigma: float,
    draws: int,
    loss: str,
    clip: float,
    batch_size: int,
    seed: int,
) -> Tensor:
    """L_S of each network drawn from Q, (m,)."""
    network = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    means: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        means[name] = weight.detach().clone()
        if name in bases:
            start = priors[name].detach().to(weight)
            u = bases[name].to(weight)
            moved = spectral.project_rows((weight - start).reshape(len(weight), -1), u)
            means[name] = start + moved.reshape(weight.shape)
    found: list[Tensor] = []
    for _ in range(draws):
        for name, weight in network.named_parameters():
            if not weight.requires_grad:
                continue
            shape = (len(weight), bases[name].shape[1]) if name in bases else tuple(weight.shape)
            noise = sigma * torch.randn(shape, generator=generator).to(weight)
            if name in bases:
                noise = (noise @ bases[name].to(weight).mT).reshape(weight.shape)
            weight.copy_(means[name] + noise)
        found.append(_risk(network, data, loss, clip, batch_size))
    return torch.stack(found)


def _risk(network: nn.Module, data: tuple[Tensor, Tensor], loss: str, clip: float, batch_size: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(data[0].split(batch_size), data[1].split(batch_size), strict=True):
        z = network(x)
        if z.dim() != 2 or z.shape[1] < 2 or len(z) != len(y):
            raise OptionError(
                f"pac_bayes: the model gives {tuple(z.shape)} for {len(y)} examples, and must give a score for each of "
                "two or more classes: (n, classes)."
            )
        if loss == "zero-one":
            lost = z.argmax(1) != y
        else:
            if not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]:
                raise OptionError(
                    f"pac_bayes: labels run from {int(y.min())} to {int(y.max())}, and the model has {z.shape[1]} "
                    "classes. Number them from 0."
                )
            lost = (
                F.cross_entropy(z.float(), y.long(), reduction="none").nan_to_num(nan=clip).clamp_max(clip)
                / clip
            )
        total += lost.double().sum().cpu()
    return total / len(data[0])


def _check(
    grid: Sequence[float], delta: float, draws: int, loss: str, clip: float, stated: Collection[str]
) -> None:
    known = get_args(Statement)
    for option, fine, must in (
        ("sigma", bool(grid) and all(0 < s < math.inf for s in grid), "above 0, one or several"),
        ("delta", 0 < delta < 1, "between 0 and 1"),
        ("draws", draws >= 1, "1 or more"),
        ("loss", loss in ("zero-one", "clipped"), "'zero-one' or 'clipped'"),
        ("clip", clip > 0, "above 0"),
        ("stated", set(stated) <= set(known), f"some of {', '.join(known)}"),
    ):
        if not fine:
            raise OptionError(f"pac_bayes: {option} must be {must}.")


def _check_data(inputs: Tensor, labels: Tensor, loss: str) -> None:
    n = len(inputs)
    if not n:
        raise OptionError("pac_bayes: the sample has no examples. Give inputs (n, …) and labels (n,).")
    if tuple(labels.shape) != (n,):
        raise OptionError(
            f"pac_bayes: labels are {tuple(labels.shape)}, and must be ({n},), one class number for each example. Give "
            f"{'labels.flatten()' if labels.numel() == n else 'those of these inputs'}."
        )
    if loss == "clipped" and labels.is_floating_point():
        raise OptionError(
            f"pac_bayes: labels are {labels.dtype}, and cross-entropy needs whole class numbers. Give labels.long()."
        )


def _check_pair(
    weights: Mapping[str, Tensor], priors: Mapping[str, Tensor], bases: Mapping[str, Tensor]
) -> None:
    shapes, expected = ({name: tuple(w.shape) for name, w in each.items()} for each in (weights, priors))
    if shapes != expected:
        name = next(iter(dict(shapes.items() ^ expected.items())))
        raise OptionError(
            f"pac_bayes: parameter {name!r} of the model and of the initial one differ. Give two of one architecture, "
            "folded if a method was attached."
        )
    for name, u in bases.items():
        width = math.prod(shapes[name][1:]) if name in shapes and len(shapes[name]) > 1 else None
        if width is None or u.dim() != 2 or u.shape[0] != width:
            raise OptionError(
                f"pac_bayes: the basis of {name!r} is {tuple(u.shape)}, and must be (d, k) for a weight (o, d) of that "
                f"full name. Weights: {', '.join(list(shapes)[:6])}."
            )
        if spectral.orthonormality(u.double()) > 1e-4:
            raise OptionError(
                f"pac_bayes: the basis of {name!r} is not orthonormal. Orthonormalise it, as by QR."
            )
