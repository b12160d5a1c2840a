r"""Weights kept orthogonal: the optimizer's step becomes a rotation, by Cayley's transform.

A layer's weight W (o × d) is Q, n × p with n ≥ p: W itself where it is tall, Wᵀ where it is wide. QᵀQ = I, so Q lies on
the Stiefel manifold. The optimizer, any optimizer, proposes Z = ΔW, and

    G ← G − Q sym(QᵀG)                                          (1)   the gradient along the manifold, before the step
    A = M Qᵀ − Q Mᵀ,   M = Z − ½ Q (QᵀZ)                        (2)   skew, n × n, of rank 2p at most
    Q ← (I − A/2)⁻¹ (I + A/2) Q                                 (3)   Cayley's transform of A
    Q ← Q (3I − QᵀQ)/2                                          (4)   Newton–Schulz: rounding does not add up

AQ = Z − Q sym(QᵀZ) is the part of Z along the manifold, so (3) moves as the optimizer asks to first order, and a step
of any length ends on the manifold. (3) takes a p × p system, not an n × n one (`retrograde.maths.spectral`, its
equation 5), for square weights too. Its condition grows as ‖Z‖², so a long step is computed in float64, and one that is
too long for that by the eigenpairs of A, whose transform is orthonormal whatever their size. A parametrization computes
W from free parameters in each forward pass and differentiates through that; here the forward and backward passes are
those of a plain layer.

Deviations from the source and its references. The source turns a basis; here the same transform turns a weight. Wen and
Yin take A = GQᵀ − QGᵀ from the gradient; (2) halves the part within span(Q), so that the step is the orthogonal
projection of the optimizer's and a learning rate keeps its meaning. Momentum is not transported: it stays in the
ambient space, and (2) removes what has left the tangent space in every step. (1) keeps the normal part of the gradient
out of Adam's second moments. It is skipped where `step` is given a closure, since the gradient is made inside the step.

Cost for each step and layer, in FLOPs: (1) 4np², (2) and (3) 8np² + 2p³, (4) 4np². All of it is independent of the
batch. Memory: one copy of the weight while the optimizer steps.

What it does not do. Weight decay has no effect on such a weight (its step, −Q, is normal to the manifold). A bfloat16
or float16 weight is orthonormal to its own rounding alone, and steps below that rounding are lost as they are in plain
training. Each group of a convolution is orthonormal as a matrix (o/g × d) on patches, which is not orthogonality of
the convolution as an operator.

References:
    Wen, Yin, *A feasible method for optimization with orthogonality constraints*, Math. Program. 142, 2013.
    Li, Fuxin, Todorovic, *Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform*,
        ICLR 2020.
    Muthuraman, *Dynamic spectral backpropagation*, arXiv 2505.23369 (extension 5, by name and purpose).
"""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from retrograde.engine import ranks
from retrograde.engine.clock import Listener
from retrograde.engine.layers import find_kind
from retrograde.engine.maps.attention import AttentionKind
from retrograde.engine.maps.base import LayerKind, Map, wide
from retrograde.errors import AttachError, NoEffectError, RetrogradeWarning
from retrograde.maths import spectral
from retrograde.patterns import ROOT, Choice, select, some

__all__ = ["Orthogonal", "keep_orthogonal", "nearest_orthonormal", "stiefel_step", "tangent"]


_LONG = 0.5
"""Rounding of equation (3) grows as ε‖Z‖², and (4) squares it: up to ‖Z‖ = ε^-¼ it is gone."""
_POLISHES = 4
"""Bring bfloat16's rounding to that of float64."""


def tangent(q: Tensor, z: Tensor) -> Tensor:
    """``Z − Q sym(QᵀZ)``: the part of z (…, n, p) along the manifold at q (…, n, p), equation (1)."""
    inner = q.mT @ z
    return z - q @ (0.5 * (inner + inner.mT))


def stiefel_step(q: Tensor, z: Tensor) -> Tensor:
    """Equations (2) to (4): q turned by what a step z asks of it.

    Args:
        q: (…, n, p), orthonormal columns, n ≥ p.
        z: (…, n, p), any step.

    Returns:
        Orthonormal columns, q + tangent(q, z) to first order in z.
    """
    if _length(z) <= _LONG * torch.finfo(z.dtype).eps ** -0.25:
        inner = q.mT @ z
        return spectral.polish(spectral.turned(q, z - q @ inner, 0.5 * (inner - inner.mT)))
    if not z.isfinite().all():
        return q + z
    exact, z = q.double(), z.double()
    for _ in range(_POLISHES):
        exact = spectral.polish(exact)
    inner = exact.mT @ z
    outside, inside = z - exact @ inner, 0.5 * (inner - inner.mT)
    short = _length(z) <= _LONG * torch.finfo(z.dtype).eps ** -0.25
    turned = spectral.turned(exact, outside, inside) if short else _turned_far(exact, outside, inside)
    return spectral.polish(turned).to(q)


def _length(z: Tensor) -> float:
    """The longest step of a group; nan or infinite where it has no length in its own precision."""
    return float(torch.linalg.matrix_norm(z).amax())


def _turned_far(q: Tensor, outside: Tensor, inside: Tensor) -> Tensor:
    """`retrograde.maths.spectral.turned` by the eigenpairs of A: orthonormal to rounding for every finite A.

    A lies in the span of Q and N, so that with an orthonormal basis E of it and M = N + QΩ/2

        S = Eᵀ(M Qᵀ − Q Mᵀ)E,  iS = V diag(w) Vᴴ,  Q ← E V diag((1 − iw/2)/(1 + iw/2)) Vᴴ EᵀQ
    """
    basis, _ = torch.linalg.qr(torch.cat((q, outside), -1))
    here, m = basis.mT @ q, basis.mT @ (outside + 0.5 * q @ inside)
    skew = m @ here.mT - here @ m.mT
    w, v = torch.linalg.eigh(1j * skew)
    phases = (1 - 0.5j * w) / (1 + 0.5j * w)
    return basis @ ((v * phases.unsqueeze(-2)) @ (v.mH @ here.to(v))).real


def nearest_orthonormal(q: Tensor) -> Tensor:
    """The polar factor of q (…, n, p), computed in float64; q itself where its columns are orthonormal already."""
    if spectral.orthonormality(q) <= 16 * torch.finfo(q.dtype).eps:
        return q
    u, _, vh = torch.linalg.svd(q.double(), full_matrices=False)
    return (u @ vh).to(q)


@dataclass(eq=False)
class _Kept:
    """One weight, and how it lies as matrices."""

    weight: nn.Parameter
    map: Map
    before: Tensor | None = field(default=None, repr=False)
    version: int = -1
    """Of the weight when it was last made orthonormal: another one means that others wrote to it since."""
    stepped: int = -1
    """Of the weight when another optimizer last stepped it."""

    def columns(self, tensor: Tensor) -> Tensor:
        """What is shaped like the weight as (g, n, p), n ≥ p, in the precision of statistics."""
        matrix = wide(self.map.matrix(ranks.whole(tensor.detach())))
        return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT

    def write(self, target: Tensor, q: Tensor) -> None:
        """The inverse of `columns`, into `target`."""
        _, o, d = self.map.matrix(ranks.whole(target.detach())).shape
        ranks.write(target, self.map.from_matrix(q if o >= d else q.mT, self.weight.shape))

    def distance(self) -> float:
        """``max |QᵀQ − I|``."""
        return spectral.orthonormality(self.columns(self.weight))

    def strayed(self) -> float:
        """The distance where others wrote to the weight and took it further away than rounding does; else 0."""
        if self.weight._version == self.version:
            return 0.0
        found = self.distance()
        return found if not found <= torch.finfo(self.weight.dtype).eps ** 0.5 else 0.0

    def settle(self) -> Tensor:
        """Q; made orthonormal where others wrote to the weight, as a loaded checkpoint does."""
        q = self.columns(self.weight)
        if self.weight._version != self.version:
            self.write(self.weight, nearest_orthonormal(q))
            q, self.version = self.columns(self.weight), self.weight._version
        return q

    def turn(self) -> None:
        """Equations (2) to (4) in place of the step that the optimizer has made."""
        if self.before is not None:
            q = self.columns(self.before)
            self.write(self.weight, stiefel_step(q, self.columns(self.weight) - q))
            self.before, self.version = None, self.weight._version


class Orthogonal(Listener):
    """The weights that `keep_orthogonal` keeps, for as long as their optimizer steps.

    It has no state of its own: weights are in the model's `state_dict` and moments in the optimizer's. To resume, load
    both and call `keep_orthogonal` again, which leaves orthonormal weights as they are. Hooks do not go with a pickle
    or a deep copy of an optimizer: there too, call it again. A step of another optimizer than that one is not turned;
    it brings a warning.

    Attributes:
        replaced: layers whose torch parametrization was replaced by a plain weight.
        left_out: chosen layers that are not kept, with the reason.
    """

    def __init__(
        self,
        kept: dict[str, _Kept],
        optimizer: torch.optim.Optimizer,
        replaced: tuple[str, ...],
        left_out: dict[str, str],
    ) -> None:
        super().__init__()
        self.replaced, self.left_out = replaced, left_out
        self._kept = kept
        self._optimizer, self._given = weakref.ref(optimizer), type(optimizer).__name__
        self._steps = 0
        self._said: set[str] = set()
        self._said_replaced = False
        self._settle(
            "keep_orthogonal: the weights of {} were up to {} from orthonormal (max |QᵀQ − I|) and were replaced by "
            "the nearest orthonormal ones, so the model computes another function now. Initialise new weights by "
            "torch.nn.init.orthogonal_; measure a trained model again, or leave its layers out by `only`."
        )
        self._active = True
        self.listen()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def __repr__(self) -> str:
        return (
            f"Orthogonal({some(list(self._kept))}; {self._steps} steps{'' if self._active else ', removed'})"
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the layers whose weights are kept orthogonal."""
        return tuple(self._kept)

    def orthonormality(self) -> dict[str, float]:
        """``max |QᵀQ − I|`` of each layer."""
        return {name: kept.distance() for name, kept in self._kept.items()}

    def remove(self) -> None:
        """Let the optimizer's steps be plain again; weights stay what they are."""
        self._active = False
        self.stop()
        for hook in self._hooks:
            hook.remove()

    def keeps(self, weight: nn.Parameter) -> bool:
        """Whether this weight is one of those."""
        return any(kept.weight is weight for kept in self._kept.values())

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # The first of `args` is the optimizer itself.
        closed = callable(kwargs.get("closure")) or (len(args) > 1 and callable(args[1]))
        self._settle(
            "the weights of {} were written to since the last step and were up to {} from orthonormal "
            "(max |QᵀQ − I|): each was replaced by the nearest orthonormal matrix, so the model computes another "
            "function than what was written. Write weights that are orthonormal, as checkpoints of this run are, or "
            "call remove() first."
        )
        self._steps += 1
        for kept in self._kept.values():
            with torch.autocast(kept.weight.device.type, enabled=False):
                q, grad = kept.settle(), kept.weight.grad
                kept.before = kept.weight.detach().clone()
                if grad is not None and not closed:
                    kept.write(grad, tangent(q, kept.columns(grad)))

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for kept in self._kept.values():
            with torch.autocast(kept.weight.device.type, enabled=False):
                kept.turn()

    @torch.no_grad()
    def _settle(self, message: str) -> None:
        """Make every weight orthonormal, and say where that changed one by more than rounding."""
        stepped: dict[str, float] = {}
        written: dict[str, float] = {}
        for name, kept in self._kept.items():
            with torch.autocast(kept.weight.device.type, enabled=False):
                if far := kept.strayed():
                    others = kept.weight._version == kept.stepped
                    (stepped if others else written)[name] = far
                kept.settle()
        # Two optimizers in turns would bring the first in every step; what is written in between is news each time.
        if stepped and not self._said_replaced:
            self._said_replaced = True
            _warn(
                "the weights of {} had been taken up to {} from orthonormal (max |QᵀQ − I|) by steps of an optimizer "
                "that is not the one keep_orthogonal was given, and each was replaced by the nearest orthonormal "
                f"matrix. Step with {self._given}, which it was given, alone, or call remove().",
                stepped,
            )
        if written:
            _warn(message, written)

    def __getstate__(self) -> dict[str, Any]:
        # A copy hears nothing.
        gone = {"_outermost": None, "_optimizer": None, "_hooks": [], "_active": False}
        return {key: value for key, value in self.__dict__.items() if key not in gone} | gone

    # What other optimizers do.

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it steps a kept weight."""
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(kept.weight) in theirs for kept in self._kept.values())

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Say that a step was not turned, where it took weights away from the manifold."""
        if optimizer is self._optimizer():
            return
        strayed: dict[str, float] = {}
        for name, kept in self._kept.items():
            if far := kept.strayed():
                strayed[name], kept.stepped = far, kept.weight._version
        theirs = type(optimizer).__name__
        if strayed and theirs not in self._said:
            self._said.add(theirs)
            given = f"another {theirs}" if theirs == self._given else self._given
            _warn(
                f"a step of {theirs} took the weights of {{}} up to {{}} from orthonormal (max |QᵀQ − I|): "
                f"keep_orthogonal was given {given}, and turns the steps of "
                f"that optimizer alone. Give it this {theirs} in place of the other, or call remove() of what it "
                "returned.",
                strayed,
            )

    def __del__(self) -> None:
        if self.__dict__.get("_active") and not self._steps:
            warnings.warn(
                f"the optimizer that keep_orthogonal was given for {some(list(self._kept))} was dropped before it made "
                "a step, so nothing was kept. Give it the optimizer that the training loop steps.",
                RetrogradeWarning,
                stacklevel=2,
            )


def _warn(message: str, strayed: Mapping[str, float]) -> None:
    worst = f"{max(strayed.values()):.2g}"
    warnings.warn(message.format(some(list(strayed)), worst), RetrogradeWarning, stacklevel=5)


def keep_orthogonal(
    model: nn.Module, optimizer: torch.optim.Optimizer, only: Choice | None = None
) -> Orthogonal:
    """From now on the optimizer's steps keep the weights of the chosen layers orthonormal.

    Weights that are not orthonormal become so at once: each is replaced by the nearest such matrix (its polar factor).
    That changes what the model computes, and is said by a warning: initialise by `torch.nn.init.orthogonal_`, and
    expect a trained model to need training.
    A layer made by `torch.nn.utils.parametrizations.orthogonal` gets its present weight as a plain parameter, the same
    object that the optimizer holds; the key of its weight in `state_dict` is then ``weight`` again, its forward pass
    computes nothing, and moments of the old coordinates are dropped. Steps that `GradScaler` skips change nothing.

    Args:
        model: with linear layers or convolutions. The weight of a linear layer is a matrix (o × d), that of a
            convolution one for each group, d being the values of a patch. Tall ones get orthonormal columns, wide ones
            orthonormal rows. `nn.RNN`, `nn.LSTM` and `nn.GRU`, which hold several weights, are not among them.
        optimizer: made over the model's parameters. The one whose `step` the training loop calls: steps of any other
            are not turned, and bring a warning.
        only: glob patterns over full layer names, or a function of a layer's name and the layer; None takes all that
            `optimizer` trains but the last, which is the head as a rule.

    Returns:
        What is kept; ``remove()`` ends it.

    Raises:
        PatternError: a pattern matches no layer.
        NoEffectError: no chosen layer can be kept: frozen, not this optimizer's, or with a computed weight.
        AttachError: another call keeps the weight already, or a layer has a parametrization other than one
            `orthogonal` of a linear layer.

    Warns:
        RetrogradeWarning: weights were not orthonormal, now or when others wrote to them later; or another optimizer
            stepped them.

    Examples:
        >>> model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> for layer in (model[0], model[2]):
        ...     _ = nn.init.orthogonal_(layer.weight)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> kept = keep_orthogonal(model, optimizer)  # then train as before
        >>> kept.layers
        ('0', '2')

    Source: module docstring, equations (1) to (4).
    """
    modules = dict(model.named_modules())
    kinds = {
        name: kind for name, module in modules.items() if isinstance(kind := find_kind(module), LayerKind)
    }
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    weights: dict[str, nn.Parameter] = {}
    left_out: dict[str, str] = {}
    for name in _chosen(modules, kinds, only):
        found = _weight(name or ROOT, modules[name], kinds[name], owned)
        if isinstance(found, str):
            left_out[name or ROOT] = found
        elif all(weight is not found for weight in weights.values()):
            _refuse_twice(name or ROOT, found, optimizer)
            weights[name] = found
    if not weights:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(left_out.items())[:4])
        raise NoEffectError(
            f"no layer's weight can be kept orthogonal ({reasons or 'the model has no linear layer or convolution'}). "
            "Give a model with trainable weights, and the optimizer that was made over them."
        )
    replaced = [name for name in weights if parametrize.is_parametrized(modules[name], kinds[name].weight)]
    for name in replaced:
        parametrize.remove_parametrizations(modules[name], kinds[name].weight)
        # torch gives the parameter the strides that the product had, and its moments were of other coordinates.
        weights[name].data = weights[name].data.contiguous()
        optimizer.state.pop(weights[name], None)
    kept = {name or ROOT: _Kept(weight, kinds[name].map(modules[name])) for name, weight in weights.items()}
    return Orthogonal(kept, optimizer, tuple(name or ROOT for name in replaced), left_out)


def _chosen(modules: dict[str, nn.Module], kinds: dict[str, LayerKind], only: Choice | None) -> list[str]:
    """Names of the chosen layers, in the model's order."""
    names = list(kinds)
    if only is None:
        return names[:-1] or names
    found, _ = select({name: [name] for name in names}, only, "only", True, modules)
    return [name for name in names if name in found]


def _weight(name: str, layer: nn.Module, kind: LayerKind, owned: set[int]) -> nn.Parameter | str:
    """The parameter that steps of the optimizer would turn; else why there is none.

    Raises:
        AttachError: a parametrization that is not torch's `orthogonal` of a matrix.
    """
    if isinstance(kind, AttentionKind):
        return "attention: its weight is three matrices in one. Use separate linear layers"
    if parametrize.is_parametrized(layer, kind.weight):
        chain: Any = cast(Any, layer.parametrizations)[kind.weight]
        weight = chain.original if chain.is_tensor else None
        # torch has no public name for the class that `parametrizations.orthogonal` registers.
        if len(chain) != 1 or type(chain[0]).__name__ != "_Orthogonal" or weight is None or weight.dim() != 2:
            raise AttachError(
                f"layer {name!r} has a parametrization of {kind.weight!r} other than one `orthogonal` of a linear "
                "layer, so its steps cannot be turned. Remove it by torch.nn.utils.parametrize."
                "remove_parametrizations, or leave the layer out by `only`."
            )
    else:
        weight = getattr(layer, kind.weight, None)
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed anew in every forward pass (weight norm, pruning)"
    if not weight.requires_grad:
        return "its weight is frozen"
    if id(weight) not in owned:
        return "its weight is not among the optimizer's parameters"
    return weight


def _refuse_twice(name: str, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    hooks: dict[int, Any] = optimizer._optimizer_step_pre_hooks  # pyright: ignore[reportPrivateUsage]
    for hook in hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Orthogonal) and owner.keeps(weight):
            raise AttachError(
                f"layer {name!r}: its weight is kept orthogonal already, by an earlier call with this optimizer. "
                "Call remove() of what that returned, or choose other layers by `only`."
            )
