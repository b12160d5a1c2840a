r"""Spectral meta learning: MAML whose inner steps stay in the leading subspace of each layer's input.

A task has a support set to adapt on and a query set to be judged by. With W (o × d) a layer's weight and U (d × k)
the leading eigenvectors of E[xxᵀ] of its input, a task moves a small factor B (o × k) in place of W:

    W(B) = W + B Uᵀ,  B₀ = 0                                    (1)
    B ← B − a ∂L_support/∂B,  ∂L/∂B = G U = Dᵀ(X U)             (2)   so W' = W − a Σ_t G_t U Uᵀ, MAML's projected
    min_θ  mean over tasks of L_query(θ')                       (3)   by any optimizer; U is a constant to it
    z = x Wᵀ + (x U) Bᵀ                                         (4)   narrow: no o × d matrix of a task's own
    z = x (W + B Uᵀ)ᵀ                                           (5)   merged: the same, where a task has many rows

Biases, norms, embeddings and whatever else is no linear layer or convolution adapt in full, as in MAML; so do the
head, unless ``skip_head=False``, and layers with no more than k inputs, whose projection would be the identity.
``rank=None`` is MAML itself, ``first_order=True`` its first-order form and ``only="head"`` is ANIL, so that these are
one piece of code.

**U** is followed over tasks (``basis="tracked"``: one QR step on the support sets of a meta-batch every `every` outer
steps), found for each task from its own support set, starting from the tracked one (``basis="task"``), or drawn at
random once and kept (``basis="random"``), which is the control: what the eigenvectors bring beyond a small space.

**Deviations from the source**, whose text was not available: the rule θ' = θ − a P ∇L is taken from its summaries. P
multiplies from the side of the input, and G is never formed where (4) is used.

**What is saved.** By (4), a layer's weight is shared by all tasks of a meta-batch: o·k numbers a task instead of o·d
for the factor, its gradient and what the second-order pass keeps of both, and one product for all tasks' rows instead
of one a task. That counts where weights are large beside a task's activations (wide linear layers, few rows). Where a
task has many rows, as under convolutions, (4) would cost 2nk(d + o) more a product and (5) is taken: nothing is saved
there but the size of what a task keeps. Activations are not saved: the outer gradient of W needs all of X.

**Batch normalisation** uses the statistics of each set on its own, as in MAML's experiments, and its running
statistics are neither read nor written (``batch_statistics=False``: read, never written). Whatever else a forward pass
writes into buffers is dropped.

**Suggested settings.** k of 32 to 64, more where a support set has more rows: what a task can learn of G is confined to
k directions. Inner rates as for MAML. Where ANIL does as well, it is cheaper still.

Cost: the second-order step is a backward pass through each inner step. A refresh costs one forward pass of the support
sets and about 8·rows·d·k for each layer.

References:
    Muthuraman, *Dynamic spectral backpropagation*, arXiv 2505.23369 (from summaries).
    Finn, Abbeel, Levine, *Model-agnostic meta-learning*, ICML 2017: equations (1) to (3) with U = I; first order, §5.2.
    Raghu et al., *Rapid learning or feature reuse?*, ICLR 2020: ANIL.
    Lee, Choi, *Gradient-based meta-learning with learned layerwise metric and subspace*, ICML 2018: inner steps in a
    subspace, there a learned one.
"""

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograde.engine.maps.base import LayerKind, Map, kind_of
from retrograde.engine.maps.convolution import ConvolutionKind, TransposedKind
from retrograde.engine.maps.linear import LinearKind, LinearMap
from retrograde.errors import (
    NoEffectError,
    OptionError,
    RetrogradeWarning,
    StateError,
    check_value,
    is_finite,
    is_whole,
)
from retrograde.maths import spectral
from retrograde.maths.philox import key_of
from retrograde.methods.spectral.subspace import Policy, Subspace
from retrograde.patterns import Choice, select, some
from retrograde.spectral.meta.normalisation import Normalisation

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) of one task → scalar."""
Tasks = Tensor | Sequence[Tensor]
"""(tasks, rows, …), or a tensor (rows, …) for each task."""
Basis = Literal["tracked", "task", "random"]

_Tensors = dict[str, Tensor]
_Product = Callable[[str, Tensor, Tensor, Tensor | None, Map], Tensor]
"""(layer's name, x, W, b, map) → z."""

_TASK_STEPS = 2
_FEW = 4
_RUNNING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class _Layer:
    """A projected layer: its weight's name, its kind, the shape (g, o, d) of its matrix, and k."""

    weight: str
    kind: LayerKind
    shape: tuple[int, int, int]
    rank: int


class MetaLearner(nn.Module):
    """Find weights from which a few projected steps solve a new task.

    Calling it gives the outputs (tasks, query rows, …) of each task's adapted model. Its `state_dict` is the model's
    under ``model.`` and the bases, so that a resumed run goes on as it would have.

    Args:
        model: takes one tensor (rows, …). It stays an ordinary module: give its parameters to any optimizer.
        inner_steps: steps on the support set.
        lr: a, their length.
        rank: k, at most; None projects nothing, which is MAML.
        basis: U ``"tracked"`` over tasks, found for each ``"task"``, or drawn at ``"random"`` once.
        every: outer steps between refreshes of the tracked basis.
        first_order: take the inner gradients for constants: no second derivatives, and no graph of the inner steps.
        only: layers that adapt, by full name, glob or function; None adapts all. The head alone is ANIL.
        loss: of the outputs and targets of one task, inner and outer.
        batch_statistics: normalise by the statistics of each support and query set instead of the running ones.
        rows: rows of a layer's input that a refresh sees, at most.
        skip_head: adapt the model's last linear layer or convolution in full.
        vectorise: run all tasks of a meta-batch at once (`torch.func.vmap`) where they have the same shapes.

    Attributes:
        model: the model, the same object.
        adapted: names of the parameters that adapt.
        projected: full name of each projected layer → k.

    Raises:
        OptionError: a value out of its range.
        PatternError: `only` matches no layer that has parameters.
        NoEffectError: nothing adapts, or `rank` is given and no layer is projected.

    Examples:
        >>> learner = rg.spectral.maml(model, inner_steps=1, lr=0.4, rank=32)
        >>> optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        >>> learner.loss(support_x, support_y, query_x, query_y).backward()  # (tasks, rows, …)
        >>> optimizer.step()
        >>> adapted = learner.adapt(support_x[0], support_y[0])  # a module for one task
    """

    def __init__(
        self,
        model: nn.Module,
        inner_steps: int = 1,
        lr: float = 0.4,
        rank: int | None = 32,
        *,
        basis: Basis = "tracked",
        every: int = 10,
        first_order: bool = False,
        only: Choice | None = None,
        loss: Loss = F.cross_entropy,
        batch_statistics: bool = True,
        rows: int = 2048,
        vectorise: bool = True,
        skip_head: bool = True,
    ) -> None:
        super().__init__()
        for option, value in (("inner_steps", inner_steps), ("every", every), ("rows", rows)):
            check_value("maml", option, value, is_whole(value) and value >= 1, "a whole number, 1 or more")
        fine = rank is None or (is_whole(rank) and rank >= 1)
        check_value("maml", "rank", rank, fine, "a whole number, 1 or more, or None to project nothing")
        check_value("maml", "lr", lr, is_finite(lr) and lr > 0, "a positive number")
        known = get_args(Basis)
        check_value("maml", "basis", basis, basis in known, f"one of {', '.join(map(repr, known))}")
        self.model = model
        self.inner_steps, self.lr, self.basis, self.every = inner_steps, lr, basis, every
        self.first_order, self.batch_statistics, self.rows = first_order, batch_statistics, rows
        self._loss = loss
        self.adapted = _adapting(model, only)
        self._layers = {} if rank is None else _projectable(model, self.adapted, rank, skip_head)
        if rank is not None and not self._layers:
            raise NoEffectError(
                f"maml: rank={rank} projects no layer of {type(model).__name__}: of those that adapt none is a linear "
                "layer or convolution with a weight of its own and more inputs than that, the head apart. Lower "
                "`rank`, give skip_head=False, or rank=None for plain MAML."
            )
        self.projected = {name: layer.rank for name, layer in self._layers.items()}
        self._owners = {layer.weight: name for name, layer in self._layers.items()}
        directions = "random" if basis == "random" else "top"
        self._subspaces = {
            name: Subspace(Policy(layer.rank, layer.rank, 1.0, 0, directions, "qr", 1.0, key_of(name)))
            for name, layer in self._layers.items()
        }
        self._outer_steps = 0
        self._vectorise = vectorise

    def loss(self, support_x: Tasks, support_y: Tasks, query_x: Tasks, query_y: Tasks) -> Tensor:
        """Equation (3), a scalar to be differentiated by the model's parameters.

        Args:
            support_x: inputs (tasks, rows, …) to adapt on; or a sequence of (rows, …), where tasks differ in size.
            support_y: targets (tasks, rows, …).
            query_x: inputs (tasks, rows', …) to be judged by.
            query_y: targets (tasks, rows', …).
        """
        outputs = self(support_x, support_y, query_x)
        return torch.stack([self._loss(z, y) for z, y in zip(outputs, query_y, strict=True)]).mean()

    def forward(self, support_x: Tasks, support_y: Tasks, query_x: Tasks) -> Tensor | list[Tensor]:
        """Outputs for the query sets (tasks, rows', …), each by the model adapted on its support set.

        In training mode, with grad enabled, this counts as an outer step, and the basis may be refreshed.

        Raises:
            OptionError: the sets count different tasks, a support set is empty, or a refresh meets NaN or infinity.
        """
        if not len(support_x) == len(support_y) == len(query_x) > 0:
            raise OptionError(
                f"maml: {len(support_x)} tasks in support_x, {len(support_y)} in support_y, {len(query_x)} in the "
                "query. The first dimension of each counts the tasks: add it where there is one task."
            )
        _check_rows(support_x)
        if self.training and torch.is_grad_enabled():
            if self.basis != "random" and self._outer_steps % self.every == 0:
                self._refresh(support_x)
            self._outer_steps += 1
        if not self._known:
            self._refresh(support_x)
        theta = self._theta()
        bases = {name: subspace.basis for name, subspace in self._subspaces.items()}

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            fast, own = self._steps(theta, bases, support_x, support_y)
            return self._run(theta, fast, own, query_x)

        return self._over_tasks(task, support_x, support_y, query_x)

    @torch.no_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        """A copy of the model adapted to one task: an ordinary module, with each U folded into its layer.

        With `batch_statistics` its normalisation goes by the statistics of whatever batch it is given, in evaluation
        too; without, by the model's running ones, in training too, where nothing is written.

        Args:
            support_x: (rows, …).
            support_y: (rows, …).

        Raises:
            OptionError: the support set is empty, or the basis is found here and meets NaN or infinity.
        """
        _check_rows([support_x])
        if not self._known:
            self._refresh([support_x])
        theta = self._theta()
        bases = {name: subspace.basis for name, subspace in self._subspaces.items()}
        fast, own = self._steps(theta, bases, support_x, support_y)
        adapted = copy.deepcopy(self.model)
        for name, value in self._merged(theta, fast, own).items():
            adapted.get_parameter(name).copy_(value)
        for module in adapted.modules():
            if not isinstance(module, _RUNNING) or module.running_mean is None:
                continue
            if self.batch_statistics:
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
            else:
                # A hook, since ``adapted.train()`` would undo a mode.
                module.register_forward_pre_hook(_read_stored)
        return adapted

    def _theta(self) -> _Tensors:
        return dict(self.model.named_parameters())

    # One task.

    def _steps(
        self, theta: _Tensors, bases: Mapping[str, Any], x: Tensor, y: Tensor
    ) -> tuple[_Tensors, Mapping[str, Any]]:
        """Equation (2): what adapts, after the inner steps, and the bases that it was projected on."""
        if self.basis == "task" and self._layers:
            with torch.no_grad():
                found = self._record(theta, x)
                bases = {
                    name: spectral.qr_steps(
                        spectral.second_moment(found[name]), u.to(found[name]), _TASK_STEPS
                    )
                    for name, u in bases.items()
                }
        start = {name: self._start(name, theta[name]) for name in self.adapted}
        inner, fast = theta, start
        if self.first_order:
            inner = {name: value.detach() for name, value in theta.items()}
            fast = {name: value.detach() for name, value in start.items()}

        def support_loss(fast: _Tensors) -> Tensor:
            return self._loss(self._run(inner, fast, bases, x), y)

        for _ in range(self.inner_steps):
            gradients = grad(support_loss)(fast)
            fast = {name: value - self.lr * gradients.pop(name) for name, value in fast.items()}
        if self.first_order:
            # The step is a constant added to θ; each is dropped as soon as it is, since there is one a task.
            fast = {name: value + (fast.pop(name) - value.detach()) for name, value in start.items()}
        return fast, bases

    def _start(self, name: str, value: Tensor) -> Tensor:
        """B₀, or the parameter itself."""
        owner = self._owners.get(name)
        if owner is None:
            return value
        groups, outputs, _ = self._layers[owner].shape
        return value.new_zeros(groups, outputs, self._layers[owner].rank)

    def _run(self, theta: _Tensors, fast: _Tensors, bases: Mapping[str, Any], x: Tensor) -> Tensor:
        """The model's outputs for x with what adapts at `fast`."""
        low = {self._owners[name]: b for name, b in fast.items() if name in self._owners}

        def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
            u, b = bases[name].to(weight), low[name]
            if _narrow(map, x, weight):
                return map.forward(x, weight, bias) + map.narrow(x, u, weight) @ b[0].mT  # (4)
            return map.forward(x, weight + map.from_matrix(b @ u.mT, weight.shape), bias)  # (5)

        plain = {name: value for name, value in fast.items() if name not in self._owners}
        return self._call({**theta, **plain}, x, product)

    def _merged(self, theta: _Tensors, fast: _Tensors, bases: Mapping[str, Any]) -> _Tensors:
        """Every adapted parameter in its own shape."""
        found = dict(fast)
        for name, owner in self._owners.items():
            layer, weight = self._layers[owner], theta[name]
            map = layer.kind.map(self.model.get_submodule(owner))
            found[name] = weight + map.from_matrix(fast[name] @ bases[owner].to(weight).mT, weight.shape)
        return found

    # The tracked basis.

    @property
    def _known(self) -> bool:
        return all(subspace.basis is not None for subspace in self._subspaces.values())

    @torch.no_grad()
    def _refresh(self, support_x: Tasks) -> None:
        if not self._layers:
            return
        theta = self._theta()
        found = [self._record(theta, x, max(1, self.rows // len(support_x))) for x in support_x]
        for name, subspace in self._subspaces.items():
            rows = torch.cat([rows[name] for rows in found], 1)
            if not bool(rows.isfinite().all()):
                raise OptionError(
                    f"maml: the input of layer {name!r} has NaN or infinity on the support sets, from which no basis "
                    "can be found. Look for them in the data, or in the model's weights after too long a step."
                )
            subspace.refresh(rows)

    @property
    def energy(self) -> dict[str, float]:
        """Full name → share of E‖x‖² that the tracked basis held at its last refresh; empty before the first."""
        return {
            name: float((s.eigenvalues.sum(-1) / s.trace.clamp_min(torch.finfo(s.trace.dtype).tiny)).min())
            for name, s in self._subspaces.items()
            if s.eigenvalues is not None and s.trace is not None
        }

    def _record(self, theta: _Tensors, x: Tensor, budget: int | None = None) -> _Tensors:
        """Rows (g, n, d) of the input of each projected layer."""
        found: dict[str, list[Tensor]] = {}

        def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
            found.setdefault(name, []).append(map.rows(x, weight, budget or self.rows))
            return map.forward(x, weight, bias)

        self._call(theta, x, product)
        missing = [name for name in self._layers if name not in found]
        if missing:
            raise NoEffectError(
                f"layer {missing[0]!r} is projected, and the model's forward pass does not call it: its weight is used "
                "elsewhere, or not at all. Freeze it (requires_grad=False), leave it out by `only`, or call the layer."
            )
        return {name: torch.cat(rows, 1) for name, rows in found.items()}

    # What lies around a pass.

    def _call(self, parameters: _Tensors, x: Tensor, product: _Product) -> Tensor:
        """The model's outputs; what its forward pass writes into buffers is dropped."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        # Of the fused attention kernels, some have no second derivative.
        attention = nullcontext() if self.first_order else sdpa_kernel(SDPBackend.MATH)
        with self._products(product), Normalisation(self.batch_statistics), attention:
            return functional_call(self.model, {**parameters, **buffers}, (x,))

    @contextmanager
    def _products(self, product: _Product) -> Generator[None]:
        """Within, the projected layers multiply by `product`."""
        layers = {name: self.model.get_submodule(name) for name in self._layers}
        for name, module in layers.items():
            module.forward = partial(self._layers[name].kind.forward, module, partial(product, name))
        try:
            yield
        finally:
            for module in layers.values():
                del module.forward

    def _over_tasks(self, task: Callable[..., Tensor], *sets: Tasks) -> Tensor | list[Tensor]:
        """`task` of each task: all at once where that is possible, one after another otherwise."""
        reason: Exception | None = None
        if self._vectorise and all(isinstance(one, Tensor) for one in sets):
            try:
                return vmap(task, randomness="different")(*sets)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                reason = error
        outputs = [task(*one) for one in zip(*sets, strict=True)]
        if reason is not None:
            # Only now: a model that fails for one task too has said so itself.
            self._vectorise = False
            warnings.warn(
                f"maml: {type(self.model).__name__} cannot be vectorised over tasks ({str(reason).splitlines()[0]}); "
                "they run one after another.",
                RetrogradeWarning,
                stacklevel=4,
            )
        same = len({z.shape for z in outputs}) == 1
        return torch.stack(outputs) if same else outputs

    def get_extra_state(self) -> dict[str, Any]:
        """The bases, how they are found, and the count of outer steps."""
        subspaces = {name: subspace.state_dict() for name, subspace in self._subspaces.items()}
        return {"basis": self.basis, "outer_steps": self._outer_steps, "subspaces": subspaces}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `get_extra_state` gave.

        Raises:
            StateError: it is of other layers, of another rank, or of bases that are found in another way.
        """
        self._check_state(state)
        self._outer_steps = int(state["outer_steps"])
        for name, subspace in self._subspaces.items():
            subspace.load_state_dict(state["subspaces"][name])

    def _check_state(self, state: dict[str, Any]) -> None:
        basis = state.get("basis", self.basis)
        if basis != self.basis:
            raise StateError(
                f"maml: a state with basis={basis!r} does not fit a learner with basis={self.basis!r}, which would "
                f"go on from directions of another kind. Make it with basis={basis!r}."
            )
        theirs: dict[str, dict[str, Any]] = state["subspaces"]
        if theirs.keys() != self._layers.keys():
            raise StateError(
                f"maml: a state with bases of {some(list(theirs))} does not fit a learner that projects "
                f"{some(list(self._layers))}. Make it with the `rank`, `only` and `skip_head` of the one "
                "that was saved."
            )
        for name, layer in self._layers.items():
            basis, (groups, _, inputs) = theirs[name]["basis"], layer.shape
            if basis is not None and tuple(basis.shape) != (groups, inputs, layer.rank):
                raise StateError(
                    f"maml: the state's basis of layer {name!r} is {tuple(basis.shape)}, and this learner's is "
                    f"{(groups, inputs, layer.rank)}: groups, inputs and rank. Make it with the model and the `rank` "
                    "of the one that was saved."
                )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        state_dict, prefix = args[:2]
        # Before anything is written.
        saved = state_dict.get(f"{prefix}_extra_state")
        if saved is not None:
            self._check_state(saved)
        super()._load_from_state_dict(*args, **kwargs)


maml = MetaLearner
"""`MetaLearner` by the name of what it does: ``rg.spectral.maml(model, …)``."""


def _check_rows(support_x: Iterable[Tensor]) -> None:
    for number, x in enumerate(support_x):
        if not x.numel():
            raise OptionError(
                f"maml: the support set of task {number} is empty, {tuple(x.shape)}: nothing to adapt on. Give one row "
                "at least."
            )


def _read_stored(module: nn.Module, args: Any) -> None:
    """Before a call of a normalisation: it goes by its running statistics, whatever mode the model is in."""
    module.training = False


def _adapting(model: nn.Module, only: Choice | None) -> list[str]:
    """Names of the parameters that adapt: those with a gradient, of the chosen layers."""
    owners = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    if only is not None:
        chosen, _ = select({name: [name] for name in owners}, only, "only", True, owners)
        owners = {name: module for name, module in owners.items() if name in chosen}
    theirs = {id(p) for module in owners.values() for p in module.parameters(recurse=False)}
    found = [name for name, p in model.named_parameters() if id(p) in theirs and p.requires_grad]
    if not found:
        raise NoEffectError(
            f"maml: no parameter of {type(model).__name__} can adapt: all that are chosen are frozen. Set "
            "requires_grad=True where inner steps are to move them."
        )
    return found


def _projectable(model: nn.Module, adapted: Sequence[str], rank: int, skip_head: bool) -> dict[str, _Layer]:
    """The layers to project by full name: those with a weight that is theirs alone, and more than `rank` inputs."""
    linear = [name for name, module in model.named_modules() if kind_of(type(module)) is not None]
    names = {id(p): name for name, p in model.named_parameters() if name in set(adapted)}
    parameters = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    found: dict[str, _Layer] = {}
    for name, module in model.named_modules():
        kind = kind_of(type(module))
        weight_name = kind.names(module)[0] if kind is not None else ""
        # Attention multiplies by parts of its packed weight, and a transposed convolution's rows are single pixels.
        plain = isinstance(kind, LinearKind | ConvolutionKind) and not isinstance(kind, TransposedKind)
        # A forward pass that the user has put in place of the layer's own stays.
        plain = plain and "forward" not in vars(module)
        if kind is None or not plain or not weight_name or (skip_head and name == linear[-1]):
            continue
        weight = module.get_parameter(weight_name)
        groups, outputs, inputs = kind.map(module).matrix(weight).shape
        if id(weight) in names and parameters.count(id(weight)) == 1 and inputs > rank:
            found[name] = _Layer(names[id(weight)], kind, (groups, outputs, inputs), rank)
    return found


def _narrow(map: Map, x: Tensor, weight: Tensor) -> bool:
    """Whether (4) costs less than the o × d matrices of a task's own that (5) makes: where rows are few."""
    if not isinstance(map, LinearMap):
        return False
    return x.numel() // x.shape[-1] * sum(weight.shape) < _FEW * weight.numel()
