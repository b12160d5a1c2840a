"""Spectral transfer regularisation: fine-tuning keeps what each layer does to the source's inputs.

A layer with weights W̃ = (W, b) at its source values W̃₀ maps x̃ = (x, 1) to W̃ x̃. With Δ = W̃ − W̃₀ and C₀ = E_source[x̃x̃ᵀ]

    (μ/2) tr(Δ C₀ Δᵀ) = (μ/2) E_source ‖Δ x̃‖²                        (1)   how far its outputs moved on the source
    C₀ ≈ Q Λ Qᵀ + σ (I − Q Qᵀ),  σ = (tr C₀ − Σλ)/(D − k)             (2)   k eigenpairs, the rest of the trace even
    Δ ← Δ (I + μ C₀ H)⁻¹,  H = diag(η)                                (3)   after each step of the optimizer

(1) needs neither the source's examples nor a second forward pass once C₀ is known, and no term of the user's loss.
Directions that the source hardly excites are left to the target; those that carry it are held.

**The rest.** Without it (σ = 0, ``rest="none"``) Δ is free in D − k directions, and what the source has there is
forgotten. The even rest is the estimate of maximum likelihood for a covariance of this form (Tipping, Bishop 1999) and
keeps the trace; it holds these directions as L2-SP does, at the strength that the source's power there warrants. Rank 0
is L2-SP itself, at the scale of each layer's input.

**The step.** (3) is the proximal step of (1) in the metric of the learning rates η: it minimises
½ (Δ − A) H⁻¹ (Δ − A)ᵀ + (μ/2) Δ C₀ Δᵀ over Δ, A being what the optimizer left. It is stable for every μ; to first order
in η it is the gradient step W̃ ← W̃ − ημ Δ C₀, kept, as AdamW keeps weight decay, out of the moments of adaptive
optimizers. With B = Q (Λ − σ)^½ and K = (I + σμH)⁻¹, diagonal, it costs 4·o·D·k operations a layer:

    Δ ← ΔK − (ΔKB) (I + μ BᵀHKB)⁻¹ (μ KHB)ᵀ                           (4)   k × k is all that is solved

η is that of the parameter's own group in this step, so schedules and groups are followed. What an optimizer does not
own, or what is frozen, has η = 0: it stays, and is taken into account. Several optimizers (Muon for matrices, AdamW for
the rest) each take their part.

**Scale.** C₀ is divided by its mean eigenvalue (``"mean"``), so that μ is L2-SP's strength wherever a layer's input is
white, or by λ₁ (``"top"``), so that μ is the strength along e₁; ``"none"`` leaves (1) as it is.

Normalisations multiply x̂ of mean 0 and variance 1: for scale and shift C₀ = I, by what a normalisation is. Convolutions
are as linear layers, their rows being patches. Of a transposed convolution the rows are pixels, whose products overlap
in the output: (1) is then of the products, and its bias is free.

What is held is each layer at the source's *own* inputs, not the network: errors of earlier layers are not followed.

References:
    Li, Grandvalet, Davoine, *Explicit inductive bias for transfer learning with convolutional networks*, ICML 2018:
    L2-SP.
    Tipping, Bishop, *Probabilistic principal component analysis*, J. R. Stat. Soc. B 61, 1999 (the even rest).
    Ritter, Botev, Barber, *Online structured Laplace approximations for overcoming catastrophic forgetting*, NeurIPS
    2018: the input factor of their Kronecker-factored penalty is C₀; its output factor needs the source's labels.
    Muthuraman, *Dynamic spectral backpropagation*, arXiv 2505.23369, names the extension; its form here is our own.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from retrograde.engine.clock import Listener
from retrograde.engine.layers import find_kind
from retrograde.errors import (
    NoEffectError,
    OptionError,
    RetrogradeWarning,
    StateError,
    check_value,
    is_finite,
    is_whole,
)
from retrograde.patterns import Choice, select, some
from retrograde.spectral.transfer.restrained import Rest, Restrained, Scale, Statistics
from retrograde.spectral.transfer.sources import NORMALISATIONS, Forward, linear_like, source_moments

__all__ = ["TransferPenalty"]


class TransferPenalty(Listener):
    """Restrains fine-tuning by equation (1) from the next optimizer step on; the loss and the loop stay as they are.

    Make it when the model has its source weights, and keep the object: it acts as long as it lives, or until `remove`.
    Which layers it restrains is settled then, by object: a head that is put in later is a new object, and free. Layers
    of saved statistics are found by name, and one of another shape is free. `left_out` says what is free, and why.

    Args:
        model: ordinary or attached; nothing of it is changed.
        source: a loader of source batches (x, a tuple or list that begins with x, or a mapping of keyword arguments),
            of which labels are not needed, or what `statistics` gave.
        strength: μ, 0 or more; an attribute that may be changed between steps.
        rank: k, at most; 0 for L2-SP at each layer's scale.
        energy: share of tr C₀ for which fewer than `rank` eigenpairs are enough.
        rest: σ of equation (2): ``"even"``, or ``"none"`` for 0.
        scale: what C₀ is divided by: ``"mean"``, ``"top"`` or ``"none"``.
        only: patterns of the layers to restrain, or a function (name, layer) → bool; None for all.
        skip: patterns of layers to leave free.
        skip_head: leave the last linear-like layer free, as for a new head.
        normalisations: restrain scale and shift of normalisations too.
        rows: rows of each call of a layer that the statistics look at.
        batches: of the loader that they look at.
        forward: runs the model on one batch, where it is called otherwise than with its input.

    Raises:
        OptionError: a value out of its range, or a batch that the model does not take.
        PatternError: a pattern matches nothing.
        NoEffectError: no layer would be restrained.
        DataError: the loader is empty, or a layer's input is not finite.

    Source: see the module.

    Examples:
        >>> model, source = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), [torch.randn(32, 8)]
        >>> penalty = rg.spectral.TransferPenalty(model, source, strength=10.0, rank=4)
        >>> model[2] = nn.Linear(16, 2)  # the new head
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        >>> # … train as always …
        >>> penalty.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        source: Iterable[Any] | Statistics,
        strength: float = 1.0,
        *,
        rank: int = 32,
        energy: float = 1.0,
        rest: Rest = "even",
        scale: Scale = "mean",
        only: Choice | None = None,
        skip: Choice | None = None,
        skip_head: bool = True,
        normalisations: bool = True,
        rows: int = 512,
        batches: int = 64,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        self.steps = 0
        """Optimizer steps that have been followed by equation (3)."""
        self.left_out: dict[str, str] = {}
        """Full name → why a layer with weights of a known kind is not restrained."""
        self._active = False
        check_value("TransferPenalty", "rank", rank, is_whole(rank) and rank >= 0, "an integer, 0 or more")
        share = is_finite(energy) and 0 < energy <= 1
        check_value("TransferPenalty", "energy", energy, share, "a number above 0 and at most 1")
        check_value(
            "TransferPenalty", "rest", rest, rest in get_args(Rest), f"one of {', '.join(get_args(Rest))}"
        )
        check_value(
            "TransferPenalty",
            "scale",
            scale,
            scale in get_args(Scale),
            f"one of {', '.join(get_args(Scale))}",
        )
        _check_counts(rows=rows, batches=batches)
        if rank == 0 and rest == "none":
            raise OptionError("TransferPenalty: rank=0 with rest='none' restrains nothing. Give one of them.")
        self.strength = strength
        self._shape = rank, energy, rest, scale
        if isinstance(source, Mapping) and all(isinstance(v, Tensor) for v in source.values()):
            state = dict(cast(Statistics, source))
            if not any(key.rpartition(".")[2] == "trace" for key in state):
                raise OptionError(
                    "TransferPenalty: the mapping given as `source` holds no statistics: pass what "
                    "TransferPenalty.statistics(model, loader) returned, or a loader, or a list of batches."
                )
        else:
            loader = cast(Iterable[Any], source)
            state = self.statistics(
                model, loader, rank=max(rank, 1), rows=rows, batches=batches, forward=forward
            )
        self._state = state
        chosen = self._choose(model, state, only, skip, skip_head, normalisations)
        self._restrained = [one.cut(state, *self._shape) for one in chosen]
        if not self._restrained:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(self.left_out.items())[:8])
            raise NoEffectError(
                f"TransferPenalty would restrain no layer of {type(model).__name__}, so it would have no effect. "
                f"{why or 'It has no linear-like layer'}. Check `only`, `skip`, `skip_head` and the statistics."
            )
        if not any(p.requires_grad for one in self._restrained for p in one.parameters()):
            warnings.warn(
                f"all {len(self._restrained)} layers that TransferPenalty restrains "
                f"({some([one.name for one in self._restrained])}) are frozen, so there is nothing to restrain until "
                "one is unfrozen. With adapters beside frozen layers the penalty has no effect.",
                RetrogradeWarning,
                stacklevel=2,
            )
        self._active = True
        self.listen()

    @staticmethod
    def statistics(
        model: nn.Module,
        source: Iterable[Any],
        *,
        rank: int = 64,
        rows: int = 512,
        batches: int = 64,
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """What the penalty needs of the source, to be saved and given in place of a loader where the data may not go.

        It holds second moments and the source weights, and no example. In a group of ranks all must call it.

        Args:
            model: at its source weights; it runs in evaluation mode and is left as it was.
            source, rank, rows, batches, forward: as for the class.

        Returns:
            Flat dictionary of tensors, which ``torch.save`` and ``safetensors.torch.save_file`` write.

        Raises:
            NoEffectError: the model has no linear-like layer.
            OptionError: a batch that the model does not take.
            DataError: the loader is empty, or a layer's input is not finite.
        """
        _check_counts(rank=rank, rows=rows, batches=batches)
        return source_moments(model, source, rank=rank, rows=rows, batches=batches, forward=forward)

    @property
    def strength(self) -> float:
        """μ."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        _check_strength(value)
        self._strength = float(value)

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the layers that are restrained."""
        return tuple(one.name for one in self._restrained)

    @torch.no_grad()
    def by_layer(self) -> dict[str, float]:
        """Equation (1) of each restrained layer, in the chosen scale, where it is now."""
        return {one.name: 0.5 * self._strength * one.energy() for one in self._restrained}

    def penalty(self) -> float:
        """The sum of equation (1) over all restrained layers."""
        return sum(self.by_layer().values())

    def remove(self) -> None:
        """End it; the weights stay where they are."""
        if self._active and not self.steps:
            warnings.warn(_IDLE.format("removed"), RetrogradeWarning, stacklevel=2)
        self._active = False
        self.stop()

    def state_dict(self) -> dict[str, Any]:
        """Statistics with the source weights, μ and the number of steps, for ``torch.save``."""
        return {"statistics": dict(self._state), "strength": self._strength, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; the layers stay those that this object restrains.

        Raises:
            StateError: it is of another model, or no such state.
        """
        fits = f"does not fit this one, which restrains {some(list(self.layers))}"
        same = "Pass what state_dict() of a penalty over the same layers gave."
        try:
            statistics, strength, steps = (
                dict(state["statistics"]),
                float(state["strength"]),
                int(state["steps"]),
            )
            _check_strength(strength)
            for one in self._restrained:
                if reason := one.misfit(statistics):
                    raise StateError(
                        f"the state of a TransferPenalty {fits}: layer {one.name!r}: {reason}. {same}"
                    )
            found = [one.cut(statistics, *self._shape) for one in self._restrained]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(
                f"the state of a TransferPenalty {fits}: {type(error).__name__}: {error}. {same}"
            ) from error
        self._state, self._restrained, self.steps = statistics, found, steps
        self.strength = strength

    # What the optimizer's steps bring.

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it steps a parameter of a restrained layer."""
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in theirs for one in self._restrained for p in one.parameters())

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Equation (3) at each layer, for what this optimizer owns of it."""
        rates = {id(p): group.get("lr") for group in optimizer.param_groups for p in group["params"]}
        # Fused optimizers are stepped even where GradScaler found an overflow, and then do nothing.
        overflow = getattr(optimizer, "found_inf", None)
        acted = False
        for one in self._restrained:
            eta: list[Any] = [rates.get(id(p), 0.0) if p.requires_grad else 0.0 for p in one.parameters()]
            if None in eta:
                raise OptionError(
                    f"{type(optimizer).__name__} has no learning rate ('lr') in the parameter group of layer "
                    f"{one.name!r}, and TransferPenalty's step is as long as the optimizer's. Give it one."
                )
            if any(id(p) in rates for p in one.parameters()):
                one.pull(self._strength, eta, overflow)
                acted = True
        self.steps += acted

    def __getstate__(self) -> dict[str, Any]:
        # A thread's own place in nested steps is not copied.
        return {key: value for key, value in self.__dict__.items() if key != "_outermost"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        for key, value in state.items():
            setattr(self, key, value)
        if self._active:
            self.listen()

    def __del__(self) -> None:
        if self.__dict__.get("_active") and not self.steps:
            warnings.warn(_IDLE.format("dropped"), RetrogradeWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"TransferPenalty({len(self._restrained)} layers, strength={self._strength:g}, steps={self.steps})"

    def _choose(
        self,
        model: nn.Module,
        state: Statistics,
        only: Choice | None,
        skip: Choice | None,
        skip_head: bool,
        normalisations: bool,
    ) -> list[Restrained]:
        """The layers to restrain, as yet without their statistics; `left_out` is filled."""
        linear = linear_like(model)
        found = {name: Restrained.linear(name, layer, kind) for name, (layer, kind) in linear.items()}
        found |= {
            name: Restrained(name, layer, None, "weight", "bias")
            for name, layer in model.named_modules()
            if normalisations and isinstance(layer, NORMALISATIONS) and any(True for _ in layer.parameters())
        }
        names, modules = {name: [name] for name in found}, {name: one.layer for name, one in found.items()}
        if only is not None:
            kept, _ = select(names, only, "only", True, modules)
            self.left_out |= dict.fromkeys([name for name in found if name not in kept], "not in `only`")
        if skip is not None:
            dropped, _ = select(names, skip, "skip", True, modules)
            self.left_out |= dict.fromkeys(dropped, "named in `skip`")
        if skip_head and len(linear) > 1:
            self.left_out.setdefault(list(linear)[-1], "head (skip_head=False restrains it too)")
        for name, layer in model.named_modules():
            kind = find_kind(layer)
            if kind is not None and name not in found:
                computed = "its weight is computed anew in every forward pass"
                self.left_out[name] = kind if isinstance(kind, str) else computed
        for name, one in found.items():
            if name not in self.left_out and (reason := one.misfit(state)):
                self.left_out[name] = reason
        return [one for name, one in found.items() if name not in self.left_out]


def _check_strength(value: object) -> None:
    fine = is_finite(value) and value >= 0
    check_value("TransferPenalty", "strength", value, fine, "a finite number, 0 or more")


def _check_counts(**options: object) -> None:
    for option, value in options.items():
        check_value("TransferPenalty", option, value, is_whole(value) and value >= 1, "an integer, 1 or more")


_IDLE = (
    "a TransferPenalty was {} before any optimizer step reached it, so it had no effect. Keep the object while "
    "training (penalty = TransferPenalty(…)), and make the optimizer over the parameters of the model that it got."
)
