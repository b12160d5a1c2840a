"""Generated models: a `Part` is a value that says what is built, `build` makes the module."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from retrograde.testing.cases import Turned


def brief(value: Any) -> str:
    """A dataclass without the fields that have their defaults: it can be evaluated."""
    shown = [
        f"{f.name}={getattr(value, f.name)!r}" for f in fields(value) if getattr(value, f.name) != f.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Part:
    """A module of the model: a layer, an operation, or a container of other parts; `build` reads its fields."""

    kind: str
    inputs: int = 3
    outputs: int = 2
    options: tuple[tuple[str, Any], ...] = ()
    around: str = ""
    inner: tuple["Part", ...] = ()

    __repr__ = brief


SHAPES: dict[str, tuple[int, ...]] = {"sequence": (3,), "attention": (3,), "encoder": (3,), "lstm": (3,)}
"""Of an input without batch and features, by kind; for convolutions 4 in each dimension."""


class Fitted(nn.Module):
    """A module whose input is cut or filled with zeros to the shape that it takes."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...], channels_last: bool = False) -> None:
        super().__init__()
        self.module, self.shape, self.channels_last = module, shape, channels_last

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.Size(self.shape).numel()
        x = x.reshape(len(x), -1) if len(x) else x.new_empty(0, numbers)
        x = F.pad(x, (0, numbers - x.shape[1])).reshape(len(x), *self.shape)
        if self.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module(x, x, x, need_weights=False)[0]
        if isinstance(self.module, nn.LSTM):
            return self.module(x)[0]
        return self.module(x)


class Operation(nn.Module):
    """An activation, a view, or an operation in place, by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "dropout":
            return F.dropout(x, 0.5, self.training)
        return OPERATIONS[self.name](x)


def _spoiled(x: Tensor) -> Tensor:
    z = x * 1.5
    x.mul_(0.5)
    return z


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "add in place": lambda x: x.add_(0.1),
    "set in place": lambda x: x.index_fill_(-1, torch.tensor([], dtype=torch.long), 0.0),
    "spoil the input": _spoiled,
    "transpose": lambda x: x.transpose(-1, -2) if x.dim() > 2 else x,
    "every other": lambda x: x[..., ::2],
    "chunk": lambda x: x.chunk(2, -1)[0],
    "expand": lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]),
    "dropout": lambda x: x,
    "detach": lambda x: x.detach(),
    "double": lambda x: x.double().to(x.dtype),
}


class Container(nn.Module):
    """Parts in a row, and what the kind makes of them."""

    def __init__(self, part: Part, channels_last: bool) -> None:
        super().__init__()
        self.kind = part.kind
        self.inner = nn.ModuleList(build(inner, channels_last) for inner in part.inner)
        if part.kind == "tied" and len(self.inner) > 1:
            layers = [m for m in self.inner.modules() if type(m) is nn.Linear]
            for layer in layers[1:]:
                if layer.weight.shape == layers[0].weight.shape:
                    layer.weight = layers[0].weight

    def row(self, x: Tensor) -> Tensor:
        for module in self.inner:
            x = module(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "unused":
            return x * 1.0
        if self.kind == "checkpoint" and torch.is_grad_enabled():
            return checkpoint(self.row, x, use_reentrant=False)
        z = self.row(x)
        if self.kind == "twice":
            return self.row(z)
        if self.kind == "residual":
            z = z.reshape(len(z), -1) if len(z) else z.new_empty(0, x[:1].numel())
            flat = x.reshape(len(x), -1) if len(x) else x.new_empty(0, z.shape[1])
            return flat + F.pad(z, (0, flat.shape[1] - z.shape[1]))
        return z


class Model(nn.Module):
    """The parts in a row, with an output as the program asks for it."""

    def __init__(self, parts: tuple[Part, ...], channels_last: bool, returns: str) -> None:
        super().__init__()
        self.body = Container(Part("nested", inner=parts), channels_last)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        z = self.body(x)
        found: dict[str, Any] = {"tensor": z, "tuple": (z, z * 2), "dict": {"z": z, "x": [x, None]}}
        return found[self.returns]


def _module(part: Part) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer, and the shape of its input without the batch."""
    i, o, options = part.inputs, part.outputs, dict(part.options)
    kind, dim = part.kind.rstrip("123"), int(part.kind[-1]) if part.kind[-1] in "123" else 0
    shape = (*SHAPES.get(part.kind, ()), i)
    if kind in ("conv", "transposed", "batchnorm"):
        groups = options.get("groups", 1)
        i, o = i * groups, o * groups
        shape = (i, *[4] * dim)
        prefix = {"conv": "Conv", "transposed": "ConvTranspose", "batchnorm": "BatchNorm"}[kind]
        made = getattr(nn, f"{prefix}{dim}d")
        return (made(i) if kind == "batchnorm" else made(i, o, **options)), shape
    match kind:
        case "linear" | "sequence":
            return nn.Linear(i, o, **options), shape
        case "turned":
            return Turned(i, o), shape
        case "lazy":
            return nn.LazyLinear(o, **options), shape
        case "attention":
            return nn.MultiheadAttention(2 * i, 2, batch_first=True, **options), (3, 2 * i)
        case "encoder":
            layer = nn.TransformerEncoderLayer(2 * i, 2, 2 * o, 0.0, batch_first=True, **options)
            return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), (3, 2 * i)
        case "lstm":
            return nn.LSTM(i, o, batch_first=True), shape
        case "layernorm":
            return nn.LayerNorm(i), shape
        case _:
            return Operation(kind), ()


def build(part: Part, channels_last: bool) -> nn.Module:
    """The module of a part, wrapped as its field `around` says."""
    if part.inner:
        return Container(part, channels_last)
    module, shape = _module(part)
    weight = getattr(module, "weight", None)
    match part.around:
        case "weight_norm" | "spectral_norm" | "orthogonal" if weight is not None and weight.dim() > 1:
            getattr(parametrizations, part.around)(module)
        case "prune" if weight is not None:
            prune.l1_unstructured(module, "weight", 0.3)
        case "frozen weight" if weight is not None:
            weight.requires_grad_(False)
        case "frozen":
            module.requires_grad_(False)
        case "backward hook":
            module.register_full_backward_hook(
                lambda m, grads, _: tuple(g if g is None else 2 * g for g in grads)
            )
        case "forward hook":
            module.register_forward_hook(lambda m, args, z: z * 0.5 if isinstance(z, Tensor) else None)
        case "parameter hook":
            for parameter in module.parameters():
                parameter.register_hook(lambda grad: grad * 0.5)
        case _:
            pass
    return module if isinstance(module, Operation) else Fitted(module, shape, channels_last)
