"""Peers that change the model: low-rank adapters (peft) and int8 matrix products (torchao)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retrograde.errors import OptionError
from retrograde.lab.peers.base import Base, Peer, trainable


@dataclass(frozen=True)
class _Adapters(Peer):
    """Adapters of peft beside frozen layers."""

    package: ClassVar[str | None] = "peft"

    def finish(self, model: nn.Module) -> nn.Module:
        """The original model with the adapters added to its weights."""
        unwrap: Any = model
        return unwrap.merge_and_unload()


@dataclass(frozen=True)
class Lora(_Adapters):
    """LoRA: each weight is frozen and W + (α/r)·B·A is trained, B zero at first.

    Adapters sit on all `nn.Linear` and ungrouped `nn.Conv2d` layers, the head included; all else is frozen. Layers of
    other classes are left alone, as is an attention's output projection, whose weight is read past its forward.

    Source: Hu et al., https://arxiv.org/abs/2106.09685, 2021.

    Attributes:
        rank: r.
        alpha: α.
    """

    rank: int = 8
    alpha: float = 16.0

    def prepare(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """`model` within peft's wrapper, with adapters."""
        peft = self._load("peft")
        names = _targets(model, (nn.Linear, nn.Conv2d))
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, target_modules=names)
        return peft.get_peft_model(model, config)


@dataclass(frozen=True)
class AdaLora(_Adapters):
    """AdaLoRA: adapters P·Λ·Q whose ranks are pruned by importance to an average budget.

    Adapters sit on all `nn.Linear` layers; all else is frozen. The recipe's optimizer gets two hooks: before a step the
    gradient of the penalty γ·(‖PᵀP − I‖ + ‖QQᵀ − I‖), averaged over layers, is added; after it the ranks are
    reallocated. peft keeps the running importance of ranks outside of every state dictionary, so a run that is resumed
    before `total` starts these averages anew.

    Source: Zhang et al., https://arxiv.org/abs/2303.10512, 2023.

    Attributes:
        rank: average rank at the end.
        initial: rank at the start.
        alpha: α, scales the adapters by α/`initial`.
        warmup: steps before pruning.
        final: steps at the end with the ranks fixed.
        interval: steps between reallocations.
        total: steps of the run, which the pruning schedule needs.
        penalty: γ.
    """

    rank: int = 8
    initial: int = 12
    alpha: float = 16.0
    warmup: int = 0
    final: int = 0
    interval: int = 1
    total: int = 1000
    penalty: float = 0.5

    def __post_init__(self) -> None:
        if self.initial <= self.rank:
            raise OptionError(
                f"adalora: initial={self.initial} is not above rank={self.rank}, so there is no rank to prune. "
                "Start with more ranks, or use lora."
            )
        if self.warmup >= self.total - self.final:
            raise OptionError(
                f"adalora: warmup={self.warmup} and final={self.final} leave no step of total={self.total} for "
                "pruning. Give the run's number of steps as `total`, or shorten the others."
            )

    def prepare(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """`model` within peft's wrapper, with adapters."""
        peft = self._load("peft")
        config = peft.AdaLoraConfig(
            target_r=self.rank,
            init_r=self.initial,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            tinit=self.warmup,
            tfinal=self.final,
            deltaT=self.interval,
            total_step=self.total,
            target_modules=_targets(model, (nn.Linear,)),
        )
        return peft.get_peft_model(model, config)

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base
    ) -> torch.optim.Optimizer:
        """The recipe's optimizer, which prunes ranks too."""
        optimizer = base(trainable(model))
        factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
        wrapped: Any = model
        done = 0

        def penalise(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            with torch.enable_grad():
                loss = self.penalty * torch.stack([_skew(p) for p in factors]).mean()
            for p, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
                p.grad = gradient if p.grad is None else p.grad + gradient

        def prune(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal done
            done += 1
            wrapped.base_model.update_and_allocate(done)

        if self.penalty:
            optimizer.register_step_pre_hook(penalise)
        optimizer.register_step_post_hook(prune)
        return optimizer


@dataclass(frozen=True)
class Int8(Peer):
    """Int8 mixed-precision training: the three products of each linear layer in int8, weights in full precision.

    Rows of both factors are scaled by their largest entry; no rounding is random. Tensor cores make it fast; on a CPU
    it shows the accuracy only.

    Source: torchao, ``prototype.quantized_training``; after Ao et al., SwitchBack, https://arxiv.org/abs/2304.13013.

    Attributes:
        output: the forward product.
        grad_input: the product for the layer's input.
        grad_weight: the product for its weight.
    """

    package: ClassVar[str | None] = "torchao"

    output: bool = True
    grad_input: bool = True
    grad_weight: bool = True

    def prepare(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """`model` with its linear layers exchanged; parameters and their names stay."""
        training = self._load("torchao.prototype.quantized_training")
        config = training.int8_mixed_precision_training(
            output=self.output,
            grad_input=self.grad_input,
            grad_weight=self.grad_weight,
            # A subclass of Tensor as weight could not be read back from a checkpoint of plain tensors.
            module_swap=True,
        )
        self._load("torchao.quantization").quantize_(model, config)
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """`model` with ordinary linear layers, in place; it computes what the full-precision weights say."""
        kind = self._load("torchao.prototype.quantized_training").Int8MixedPrecisionTrainingLinear
        for module in model.modules():
            if isinstance(module, kind):
                module.__class__ = nn.Linear
                del module.config
        return model


def _targets(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in kinds and not (isinstance(module, nn.Conv2d) and module.groups > 1)
    ]
    if not names:
        raise OptionError(
            f"{type(model).__name__} has no {' or '.join(k.__name__ for k in kinds)} layer for an adapter. "
            "Choose another model or peer."
        )
    return names


def _skew(factor: Tensor) -> Tensor:
    """‖F·Fᵀ − I‖ of a factor (r, in), or ‖Fᵀ·F − I‖ of one (out, r): how far its r vectors are from orthonormal."""
    wide = factor if factor.shape[0] <= factor.shape[1] else factor.T
    return torch.linalg.norm(wide @ wide.T - torch.eye(wide.shape[0], device=wide.device, dtype=wide.dtype))
