"""ReLUs that keep a bit of each activation in place of the whole.

torch's keeps its output for the backward pass, the same tensor that the next layer keeps as its input. Where that layer
keeps less, the whole would stay for the ReLU's sake alone, though all that it needs is where it is positive.
"""

import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrograde.engine.boundary import has_batches, has_tangent, transforming
from retrograde.engine.layers import copied, reduced, subclass
from retrograde.errors import TransformError
from retrograde.kernels import pack
from retrograde.kernels.cpu_memory import lies_channels_last


class _Relu(torch.autograd.Function):
    """max(x, 0), whose backward pass is 0 where x ≤ 0 and δ elsewhere: bit for bit torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        z = x.relu_() if inplace else x.relu()
        ctx.last, ctx.compiled = lies_channels_last(z), torch.compiler.is_compiling()
        ctx.save_for_backward((z <= 0).logical_not() if ctx.compiled else pack.signs(z))
        return z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        (delta,) = grad_outputs
        # torch's operations where a kernel would not be followed: by compilers (compiled autograd meets what an eager
        # forward pass kept), by batches of gradients, and by a gradient of this gradient, which is torch's own: of x
        # it knows nothing but where it is positive.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or has_batches(delta):
            where = bits if ctx.compiled else pack.mask(bits, delta.shape, ctx.last)
            return torch.where(where, delta, 0), None
        return pack.where_positive(delta, bits, ctx.last), None


class LightReLU(nn.Module):
    """Mixin of `nn.ReLU` in an attached model. Copies and pickles are plain."""

    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.ReLU.forward`; shapes as of the plain module."""
        if self.training and torch.is_grad_enabled() and input.requires_grad and not self._is_plain(input):
            return cast(Tensor, _Relu.apply(input, self.inplace))
        return super().forward(input)

    def _is_plain(self, input: Tensor) -> bool:
        """Whether torch's own must run: compilers follow no function in place, and transforms look into none."""
        if torch.compiler.is_compiling():
            return self.inplace
        return input.is_nested or transforming() or has_tangent(input)

    def __prepare_scriptable__(self) -> nn.Module:
        # torch would put what is returned into the model that trains.
        raise TransformError(
            "torch.jit.script compiles a module's source, and this ReLU of an attached model keeps a bit of each "
            "activation. Script the folded model (session.fold()), or inside `with session.paused():`."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copied(self, nn.ReLU, self.__dict__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, nn.ReLU, self.__dict__, protocol)


class Lightened:
    """The plain `nn.ReLU` among modules keep less from here on, until `end`.

    One that several models share keeps less as long as any of their `Lightened` is there, and none is paused.

    Attributes:
        modules: those that it is about.
        paused: whether it wants torch's own to run for now.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.paused = False
        self.modules = [
            module
            for module in modules
            if isinstance(module, LightReLU) or (type(module) is nn.ReLU and "forward" not in module.__dict__)
        ]
        for module in self.modules:
            _holders.setdefault(module, weakref.WeakSet()).add(self)
            _settle(module)

    def pause(self, paused: bool) -> None:
        """Let torch's own run, or not any more."""
        self.paused = paused
        for module in self.modules:
            _settle(module)

    def end(self) -> None:
        """Make plain what no other one holds, where nothing else has changed the class since."""
        for module in self.modules:
            _holders[module].discard(self)
            _settle(module)


# Beside the modules, whose copies and pickles must hold nothing of it.
_holders: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Lightened]]" = weakref.WeakKeyDictionary()


def _settle(module: nn.Module) -> None:
    holders = _holders[module]
    light = bool(holders) and not any(holder.paused for holder in holders)
    if light and type(module) is nn.ReLU:
        cast(Any, module).__class__ = subclass(nn.ReLU, LightReLU)
    elif not light and isinstance(module, LightReLU):
        cast(Any, module).__class__ = nn.ReLU
