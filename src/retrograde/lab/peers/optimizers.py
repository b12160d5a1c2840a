"""Optimizers of other packages as peers: Muon, SOAP, Shampoo, PSGD, schedule-free AdamW and GaLore; and MUD.

Each is what its package computes. State dictionaries hold tensors and plain values only, and a run resumed from one
goes on as if it had not stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.kernels.choose import fast_precision
from retrograde.lab.peers.base import Base, Peer, trainable


@dataclass(frozen=True)
class _Packaged(Peer):
    """An optimizer of a package."""

    package: ClassVar[str | None] = "pytorch-optimizer"
    optimizer: ClassVar[str] = "pytorch_optimizer"
    """Module and class."""

    def _settings(self) -> dict[str, Any]:
        """This peer's options, as the package calls them."""
        raise NotImplementedError

    def _groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[Any]:
        """Parameters, or groups of them with their own settings."""
        return trainable(model)

    def _class(self) -> Any:
        """The package's class."""
        module, _, name = self.optimizer.rpartition(".")
        return getattr(self._load(module), name)

    def make_optimizer(self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base) -> Any:
        """The package's optimizer, with decoupled weight decay."""
        groups = self._groups(model, learning_rate, weight_decay)
        return self._class()(
            # A group of nothing is refused.
            [group for group in groups if not isinstance(group, dict) or group["params"]],
            lr=learning_rate,
            weight_decay=weight_decay,
            **self._settings(),
        )


@dataclass(frozen=True)
class Muon(_Packaged):
    """Muon: momentum, made orthogonal by Newton-Schulz iteration, for the weights of hidden layers.

    Hidden weights are those of linear and convolution layers but the last; a convolution's is flattened to (out, in ·
    height · width). The head, embeddings, normalisations and biases get AdamW. The iteration runs on the small Gram
    matrix, which takes fewer products where a weight is not square, and in bfloat16 where this machine multiplies it
    faster than float32: other processors emulate it, and would take ten times as long.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon, 2024.

    Attributes:
        momentum: of the hidden weights, Nesterov's.
        steps: Newton-Schulz iterations.
        adam_learning_rate: of everything else; the schedule moves it in step with the recipe's, which the hidden
            weights have.
        match_rms: scale the update to AdamW's size (Liu et al. 2025: 0.2·√max(out, in)) instead of Jordan's
            √max(1, out/in), so that AdamW's learning rate fits.
    """

    optimizer: ClassVar[str] = "pytorch_optimizer.Muon"

    momentum: float = 0.95
    steps: int = 5
    adam_learning_rate: float = 3e-4
    match_rms: bool = False

    def _settings(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "ns_steps": self.steps, "use_adjusted_lr": self.match_rms}

    def _class(self) -> Any:
        iterate = self._load("pytorch_optimizer.optimizer.utils.matrix").zero_power_via_gram_newton_schulz

        def orthogonalise(update: Tensor, group: dict[str, Any]) -> Tensor:
            fast = update.is_cuda or fast_precision("bfloat16")
            dtype = torch.bfloat16 if fast else torch.float32
            return iterate(update, num_steps=group["ns_steps"], weights=group["ns_coeffs"], dtype=dtype)

        return _with_update(super()._class(), orthogonalise)

    def _groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[Any]:
        """Hidden weights, and the rest."""
        hidden = hidden_weights(model)
        ids = {id(p) for p in hidden}
        rest = [p for p in trainable(model) if id(p) not in ids]
        adam = {"lr": self.adam_learning_rate, "weight_decay": weight_decay, "eps": 1e-8}
        return [
            {"params": hidden, "use_muon": True, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": rest, "use_muon": False, **adam},
        ]


@dataclass(frozen=True)
class Mud(Muon):
    """MUD: Muon whose momentum is whitened by one triangular solve in place of the iteration.

    With M (out × in, rows and columns exchanged where out > in) of rows of length 1: solve tril(M Mᵀ) Q = M, and make
    Q's rows of length 1 again. The update has AdamW's size, 0.2·√max(out, in) times the learning rate.

    Source: https://arxiv.org/abs/2603.17970, 2026.
    """

    match_rms: bool = True

    def _class(self) -> Any:
        return _with_update(_Packaged._class(self), lambda update, _: whiten_by_rows(update))


def whiten_by_rows(update: Tensor) -> Tensor:
    """MUD's update of a matrix, or of a batch of them, (…, out, in): its shape, rows or columns of length 1."""
    if update.shape[-2] > update.shape[-1]:
        return whiten_by_rows(update.mT).mT
    rows = F.normalize(update.float(), dim=-1)
    gram = rows @ rows.mT
    # Rows of zeros have no direction: 1 on the diagonal leaves them at zero.
    gram.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return F.normalize(torch.linalg.solve_triangular(gram.tril(), rows, upper=False), dim=-1)


def _with_update(base: Any, update: Callable[[Tensor, dict[str, Any]], Tensor]) -> Any:
    """The package's Muon with another `update` of the momentum of each matrix."""

    class Optimizer(base):
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
            return [update(u.reshape(len(u), -1), group) for u in updates]

    Optimizer.__name__ = base.__name__
    return Optimizer


@dataclass(frozen=True)
class Soap(_Packaged):
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

    The first step only gathers statistics. Biases and other vectors get Adam.

    Source: Vyas et al., https://arxiv.org/abs/2409.11321, 2024.

    Attributes:
        beta1: momentum.
        beta2: of the second moment and of the preconditioner.
        interval: steps between updates of the eigenbasis.
        largest: dimensions above it keep the identity as their basis.
    """

    optimizer: ClassVar[str] = "pytorch_optimizer.SOAP"

    beta1: float = 0.95
    beta2: float = 0.95
    interval: int = 10
    largest: int = 10_000

    def _settings(self) -> dict[str, Any]:
        return {
            "betas": (self.beta1, self.beta2),
            "precondition_frequency": self.interval,
            "max_precondition_dim": self.largest,
        }


@dataclass(frozen=True)
class Shampoo(_Packaged):
    """Shampoo, blocked and grafted: Kronecker factors L⁻¹ᐟ⁴ G R⁻¹ᐟ⁴ with the size of RMSProp's update.

    The blocked, grafted form is the one that trains networks; the original has neither momentum nor a decaying memory.

    Sources: Gupta et al., https://arxiv.org/abs/1802.09568, 2018; Anil et al., https://arxiv.org/abs/2002.09018, 2020.

    Attributes:
        beta1: momentum, Nesterov's, as a moving average.
        beta2: of the statistics.
        interval: steps between computations of the inverse roots.
        start: steps before which the grafted update alone is used.
        block: largest side of a block; neighbouring dimensions are merged up to it.
        graft: whose size the update has: ``"rmsprop"``, ``"sgd"``, ``"adagrad"``, or ``"none"``.
    """

    optimizer: ClassVar[str] = "pytorch_optimizer.ScalableShampoo"

    beta1: float = 0.9
    beta2: float = 0.99
    interval: int = 10
    start: int = 10
    block: int = 256
    graft: Literal["rmsprop", "sgd", "adagrad", "none"] = "rmsprop"

    def _settings(self) -> dict[str, Any]:
        grafting = self._load("pytorch_optimizer.optimizer.utils.graft").LayerWiseGrafting
        return {
            "betas": (self.beta1, self.beta2),
            "moving_average_for_momentum": True,
            "decoupled_weight_decay": True,
            "start_preconditioning_step": self.start,
            "preconditioning_compute_steps": self.interval,
            "block_size": self.block,
            "graft_type": getattr(grafting, self.graft.upper()),
            "use_svd": True,
        }

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base
    ) -> torch.optim.Optimizer:
        """Shampoo, whose state can be saved."""
        optimizer = super().make_optimizer(model, learning_rate, weight_decay, base)

        def rebuild(group: dict[str, Any], p: Tensor) -> dict[str, Any]:
            kept = optimizer.state.pop(p)
            optimizer.init_group({**group, "params": [p]})
            made, optimizer.state[p] = optimizer.state[p], kept
            return {key: made[key] for key in ("pre_conditioner", "graft")}

        _save_plainly(optimizer, rebuild)
        return optimizer


@dataclass(frozen=True)
class Psgd(_Packaged):
    """PSGD with Kronecker factors: a preconditioner fitted by its own gradient descent.

    The package's random balancing of the factors (a precaution for low precision, by NumPy's global generator) is off:
    a run could not be resumed exactly. Its probes come from torch's generator, and the preconditioner is updated ever
    less often, from each step to 3 % of them. Its contractions need opt-einsum: in the order in which they are written,
    they would first form the outer product of the factors.

    Source: Li, https://arxiv.org/abs/1512.04202, 2015; https://arxiv.org/abs/2402.11858, 2024.

    Attributes:
        momentum: of the gradient, before it is preconditioned.
        largest: dimensions above it get a diagonal factor.
    """

    optimizer: ClassVar[str] = "pytorch_optimizer.Kron"

    momentum: float = 0.9
    largest: int = 8192

    def _settings(self) -> dict[str, Any]:
        self._load("opt_einsum")
        return {"momentum": self.momentum, "max_size_triangular": self.largest, "balance_prob": 0.0}


@dataclass(frozen=True)
class Galore(_Packaged):
    """GaLore: AdamW whose moments live in the top singular subspace of a matrix's gradient.

    Weights of two dimensions are projected; convolution weights, biases and normalisations get plain AdamW, as in the
    paper's code.

    Source: Zhao et al., https://arxiv.org/abs/2403.03507, 2024.

    Attributes:
        rank: of the subspace.
        interval: T, steps between singular value decompositions.
        scale: α, of the projected update.
    """

    optimizer: ClassVar[str] = "pytorch_optimizer.GaLore"

    rank: int = 128
    interval: int = 200
    scale: float = 0.25

    def _settings(self) -> dict[str, Any]:
        return {"eps": 1e-8}

    def _projection(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "update_proj_gap": self.interval,
            "scale": self.scale,
            "projection_type": "std",
        }

    def _groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[Any]:
        """Matrices, and the rest."""
        parameters = trainable(model)
        return [
            {"params": [p for p in parameters if p.ndim == 2], **self._projection()},
            {"params": [p for p in parameters if p.ndim != 2]},
        ]

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base
    ) -> torch.optim.Optimizer:
        """GaLore, whose state can be saved."""
        optimizer = super().make_optimizer(model, learning_rate, weight_decay, base)
        projector = self._load("pytorch_optimizer.optimizer.utils.galore").GaLoreProjector

        def rebuild(group: dict[str, Any], p: Tensor) -> dict[str, Any]:
            return {"projector": projector(**self._projection())}

        _save_plainly(optimizer, rebuild)
        return optimizer


@dataclass(frozen=True)
class ScheduleFree(_Packaged):
    """Schedule-free AdamW: an average of the iterates instead of a schedule.

    The weights are trained at one point and evaluated at another. A hook before the model's forward pass puts there
    those that its mode (`train` or `eval`) asks for, so that no caller need know. Give the recipe a constant schedule.
    Running statistics of batch normalisation belong to the training point.

    Source: Defazio et al., https://arxiv.org/abs/2405.15682, 2024.

    Attributes:
        beta1: interpolation between the average and the iterate.
        beta2: of the second moment.
        warmup: steps of linear warm-up.
    """

    package: ClassVar[str | None] = "schedulefree"
    optimizer: ClassVar[str] = "schedulefree.AdamWScheduleFree"

    beta1: float = 0.9
    beta2: float = 0.999
    warmup: int = 0

    def _settings(self) -> dict[str, Any]:
        return {"betas": (self.beta1, self.beta2), "warmup_steps": self.warmup}

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base
    ) -> torch.optim.Optimizer:
        """Schedule-free AdamW, which follows the mode of `model`."""
        optimizer = super().make_optimizer(model, learning_rate, weight_decay, base)
        optimizer.train()
        model.register_forward_pre_hook(_FollowMode(optimizer))
        return optimizer

    def finish(self, model: nn.Module) -> nn.Module:
        """The model at its evaluation point, without the hook."""
        hooks = model._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        for key, hook in list(hooks.items()):
            if isinstance(hook, _FollowMode):
                hook.evaluate()
                del hooks[key]
        return model


class _FollowMode:
    """A forward pre-hook: the optimizer's mode is the model's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._optimizer is not None:
            (self._optimizer.train if module.training else self._optimizer.eval)()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FollowMode":
        # A copied model has its own parameters, which the optimizer does not know.
        return _FollowMode(None)

    def evaluate(self) -> None:
        if self._optimizer is not None:
            self._optimizer.eval()


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of linear, convolution and attention layers, but those of the last one: what Muon is for."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    found = [
        p
        for module in model.modules()
        if isinstance(module, kinds)
        for name, p in module.named_parameters(recurse=False)
        if name.endswith("weight") and p.requires_grad
    ]
    tied = [p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]
    left_out = {id(p) for p in (*found[-1:], *tied)}
    return [p for p in dict.fromkeys(found) if id(p) not in left_out]


def _save_plainly(
    optimizer: torch.optim.Optimizer, rebuild: Callable[[dict[str, Any], Tensor], dict[str, Any]]
) -> None:
    """Have `optimizer` save the objects in its state as dictionaries, since checkpoints hold only plain values.

    Args:
        optimizer: keeps objects of its package in ``state[p]``.
        rebuild: makes from a group and one of its parameters those objects anew, by key.
    """

    def save(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
        state = {
            index: {
                k: _plain(v) if hasattr(v, "__dict__") and not isinstance(v, Tensor) else v
                for k, v in s.items()
            }
            for index, s in content["state"].items()
        }
        return content | {"state": state}

    def restore(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Before the first step after loading, since the package's own loading ends after torch's hooks for it.
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                saved = {k: v for k, v in state.items() if isinstance(v, dict)}
                if saved and p.grad is not None:
                    for key, value in rebuild(group, p).items():
                        vars(value).update(saved[key])
                        state[key] = value

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_step_pre_hook(restore)


def _plain(value: Any) -> dict[str, Any]:
    return {
        k: v
        for k, v in vars(value).items()
        if isinstance(v, Tensor)
        or type(v) in (bool, int, float)
        or (isinstance(v, list) and v and all(isinstance(t, Tensor) for t in v))  # pyright: ignore[reportUnknownVariableType]
    }
