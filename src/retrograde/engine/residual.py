"""Whether a gradient goes round a block: read off autograd's graph of one pass, never off names.

A block is a residual branch where its output is added to something by which the gradient reaches the block's input all
the same. Two passes show that:

- one of a copy without data, on torch's meta device, with a made-up input, when a model is planned: `trace` finds the
  branches of any module that can be run so;
- the first pass of training, for what could not be: `goes_round`.

Neither changes anything in the model.
"""

import copy
import inspect
import random
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from retrograde.engine.blocks import cross

Edge = tuple[Any, int]
"""A node of autograd's graph and the number of its output."""

_SUMS = ("AddBackward", "SubBackward", "AddcmulBackward", "LerpBackward")
_DEPTH = 2
"""How deep below a module its branches may end, as ``output.dense`` does."""
_LENGTHS = 4
"""How many widths of layers are tried as the number of positions."""


def edges(values: Any) -> set[Edge]:
    """Where the gradients of all tensors in `values`, however nested, arrive."""
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return {(edge.node, edge.output_nr) for edge in map(get_gradient_edge, tensors)}


def goes_round(block: Any, inputs: Collection[Edge], outputs: Any, cut: Collection[Any] = ()) -> bool | None:
    """Whether a sum joins `block`, which is all of a term, with a way by which the gradient reaches all behind it.

    Args:
        block: what the boundaries of the block carry as their program.
        inputs: of a module around the block, as they were before its forward pass.
        outputs: of that module.
        cut: other blocks that may be skipped at the same time.

    Returns:
        None where the pass does not say: the block did not run in it, or its input needs no gradient.
    """
    ends = edges(outputs)
    everything = _reached(ends, inputs)
    mine = [edge for edge in everything if _program(edge) is block]
    behind = _reached([e for edge in mine for e in _next(edge)], inputs).intersection(inputs)
    if not behind:
        return None
    both = (block, *cut)
    if not behind <= _reached(ends, inputs, both):
        return False
    sums = [edge for edge in everything if edge[0].name().startswith(_SUMS)]
    return any(_joins(edge, block, inputs, both) for edge in sums)


def _joins(edge: Edge, block: Any, inputs: Collection[Edge], cut: Collection[Any]) -> bool:
    terms = [_reached([term], inputs, cut) for term in _next(edge)]
    ending = [any(_program(e) is block for e in term) and term.isdisjoint(inputs) for term in terms]
    return any(ending) and any(not term.isdisjoint(inputs) for term in terms)


def _reached(start: Iterable[Edge], inputs: Collection[Edge], cut: Collection[Any] = ()) -> set[Edge]:
    """What a gradient that begins at `start` comes to, up to the inputs, where nothing passes `cut`."""
    seen: set[Edge] = set()
    waiting = list(start)
    while waiting:
        edge = waiting.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge not in inputs and not any(_program(edge) is block for block in cut):
            waiting.extend(_next(edge))
    return seen


def _next(edge: Edge) -> list[Edge]:
    return [(node, number) for node, number in edge[0].next_functions if node is not None]


def _program(edge: Edge) -> Any:
    return getattr(edge[0], "program", None)


# A pass without data.


@dataclass(frozen=True)
class Traced:
    """A residual branch of a module.

    Attributes:
        name: of the module whose output is the branch's, below the module that was traced.
        members: names of the modules whose gradient passes there and nowhere else.
    """

    name: str
    members: tuple[str, ...]


def trace(owner: nn.Module) -> list[Traced] | None:
    """The residual branches of `owner`, from one pass of a copy on the meta device; None where it cannot be run.

    The copy has neither data nor hooks, and runs as in evaluation, without dropping anything at random.
    """
    state = random.getstate()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            twin, names = _twin(owner)
            for arguments in _arguments(twin):
                inputs = edges(arguments)
                try:
                    outputs = twin(*arguments)
                except Exception:
                    continue
                return _branches(twin, names, inputs, outputs)
        except Exception:
            return None
        finally:
            random.setstate(state)
    return None


def _twin(owner: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy without data, and its modules with parameters, which have boundaries: each is its own program."""
    memo: dict[int, Any] = {}
    for tensor in (*owner.parameters(), *owner.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    twin = copy.deepcopy(owner, memo).eval()
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):  # pyright: ignore[reportPrivateUsage]
            hooks.clear()
    names = {
        name: module
        for name, module in twin.named_modules()
        if name and name.count(".") < _DEPTH and next(module.parameters(), None) is not None
    }
    for module in names.values():
        module.register_forward_hook(_mark)
    return twin, names


def _mark(module: nn.Module, arguments: Any, y: Any) -> Any:
    return crossed(y, module)


def crossed(y: Any, program: Any) -> Any:
    """`y` with a boundary: at the tensor that it is, or at its first item, as attention returns it with its weights."""
    if isinstance(y, Tensor):
        return cross(y, program)
    if isinstance(y, tuple | list) and y and isinstance(y[0], Tensor):
        rest = list(y[1:])  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        made = [cross(y[0], program), *rest]
        if isinstance(y, list):
            return made
        return type(y)(*made) if hasattr(y, "_fields") else tuple(made)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return y


def _arguments(twin: nn.Module) -> Iterator[tuple[Tensor | None, ...]]:
    """Made-up inputs that the first layer could take, for every argument that has no default, or for the first one."""
    first = next((m for m in twin.modules() if next(m.parameters(recurse=False), None) is not None), None)
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    wanted = [
        p
        for p in inspect.signature(twin.forward).parameters.values()
        if p.kind in kinds and p.default is inspect.Parameter.empty
    ]
    count, dtype = max(len(wanted), 1), next(twin.parameters()).dtype
    for shape in _shapes(twin, first):
        given = [torch.zeros(shape, dtype=dtype, device="meta", requires_grad=True) * 1 for _ in range(count)]
        yield tuple(given)
        if count > 1:
            yield (given[0], *[None] * (count - 1))


def _shapes(twin: nn.Module, first: nn.Module | None) -> list[tuple[int, ...]]:
    for dims, kinds in (
        (1, (nn.Conv1d, nn.ConvTranspose1d)),
        (2, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)),
        (3, (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)),
    ):
        if isinstance(first, kinds):
            width = first.num_features if hasattr(first, "num_features") else first.in_channels
            return [(2, int(width), *[32] * dims), (2, int(width), *[8] * dims)]  # pyright: ignore[reportArgumentType]
    if isinstance(first, nn.GroupNorm):
        return [(2, first.num_channels, *[32] * dims) for dims in (2, 1, 3)]
    if first is None or isinstance(first, nn.Embedding | nn.EmbeddingBag):
        return []
    weight = next(first.parameters(recurse=False))
    width = int(getattr(first, "in_features", weight.shape[-1] if weight.dim() else 1))
    # Layers over positions fix their number.
    lengths = sorted({m.in_features for m in twin.modules() if isinstance(m, nn.Linear)})
    positions = [(2, length, width) for length in lengths[:_LENGTHS]]
    return [(2, 16, width), (16, width), (2, 8, 8, width), *positions, (2, width, 16), (2, width, 32, 32)]


def _branches(twin: nn.Module, names: dict[str, nn.Module], inputs: set[Edge], outputs: Any) -> list[Traced]:
    ends = edges(outputs)
    ran = [_program(edge) for edge in _reached(ends, inputs)]
    names = {name: module for name, module in names.items() if any(module is p for p in ran)}
    round_it = [name for name, module in names.items() if goes_round(module, inputs, outputs)]
    inside: dict[str, list[str]] = {}
    for name in round_it:
        left = [_program(edge) for edge in _reached(ends, inputs, (names[name],))]
        inside[name] = [n for n, module in names.items() if n != name and not any(module is p for p in left)]
    last = [name for name in round_it if not any(name in within for within in inside.values())]

    def size(name: str) -> int:
        held = {id(p): p.numel() for n in (name, *inside[name]) for p in names[n].parameters()}
        return sum(held.values())

    found: list[Traced] = []
    # Of two ways that are added, a branch and its shortcut, the larger is the branch: without both nothing is left.
    for name in sorted(last, key=size, reverse=True):
        others = [names[branch.name] for branch in found]
        if not others or goes_round(names[name], inputs, outputs, others):
            members = [n for n in names if n == name or n in inside[name]]
            outer = [n for n in members if not any(n.startswith(f"{m}.") for m in members)]
            found.append(Traced(name, tuple(outer)))
    return found
