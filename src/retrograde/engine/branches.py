"""Which parts of a model are residual branches, and the class swap that puts a boundary at their outputs.

Found without being told:

- `Residual`: its branch;
- torch's ``TransformerEncoderLayer`` and ``TransformerDecoderLayer``: attention and feed-forward sub-blocks, with the
  norm before them where it comes first;
- residual blocks of convolutions as torchvision and timm write them (``conv1``, ``bn1``, …, ``downsample``): all up to
  the last convolution or norm, after which nothing but a gate (squeeze-and-excitation) may come before the addition.

Other branches are named by the user.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from retrograde.engine.blocks import BlockProgram, cross
from retrograde.engine.layers import AttachedLayer, copied, reduced, subclass
from retrograde.engine.slots import Block
from retrograde.errors import DetachError, OptionError, PatternError


class Residual(nn.Module):
    """``shortcut(x) + branch(x)``: x of any shape that both accept, out of the shape that both return.

    Args:
        branch: one tensor in and one out, so that its backward pass can be treated, or left out, as a whole.
        shortcut: the same; None for the identity.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return ``shortcut(x) + branch(x)``."""
        return self.shortcut(x) + self.branch(x)


def find_branches(model: nn.Module, patterns: Iterable[str] | None = None) -> tuple[Block, ...]:
    """The residual branches of `model`, in its order.

    Args:
        model: any module.
        patterns: glob patterns over names of branches as found and of modules, each of which the user says is a
            branch: its output is added to something that goes round it. None takes all that are found.

    Raises:
        PatternError: a pattern matches nothing.
        OptionError: a named module cannot be a branch.
    """
    found: dict[str, Block] = {}
    seen: set[tuple[int, str]] = set()
    for name, module in model.named_modules():
        for block in (*_residual(name, module), *_transformer(name, module), *_convolutions(name, module)):
            key = (id(block.module), block.method)
            trains = any(True for member in block.members for _ in member.parameters())
            if trains and key not in seen:
                seen.add(key)
                found[block.name] = block
    return tuple(found.values()) if patterns is None else _named(model, found, patterns)


def _named(model: nn.Module, found: dict[str, Block], patterns: Iterable[str]) -> tuple[Block, ...]:
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in (*found, *modules) if fnmatchcase(name, pattern)}
        if not matches:
            known = ", ".join([*found, *modules][:8])
            raise PatternError(
                f"pattern {pattern!r} in `blocks` matches no branch and no module of the model. Name modules whose "
                f"output is added to a shortcut. The first names: {known}."
            )
        chosen |= matches
    blocks: list[Block] = []
    for name in (*modules, *(name for name in found if name not in modules)):
        if name not in chosen:
            continue
        if name in found:
            blocks.append(found[name])
            continue
        parent, _, child = name.rpartition(".")
        if isinstance(model.get_submodule(parent), nn.Sequential):
            raise OptionError(
                f"`blocks` names {name!r}, child {child} of an nn.Sequential: its output is added to nothing, so "
                "skipping it would cut the gradient to everything before it. Name the branch of a residual "
                "connection, or put one there with retrograde.Residual."
            )
        module = modules[name]
        blocks.append(Block(name, "branch", module, (module,), why="named in `blocks`"))
    return tuple(blocks)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _residual(name: str, module: nn.Module) -> Iterator[Block]:
    if isinstance(module, Residual):
        yield Block(
            _join(name, "branch"), "branch", module.branch, (module.branch,), why="branch of Residual"
        )


def _transformer(name: str, module: nn.Module) -> Iterator[Block]:
    if isinstance(module, nn.TransformerEncoderLayer):
        parts = {"sa": (module.self_attn, module.norm1), "ff": (module.linear1, module.linear2, module.norm2)}
    elif isinstance(module, nn.TransformerDecoderLayer):
        parts = {
            "sa": (module.self_attn, module.norm1),
            "mha": (module.multihead_attn, module.norm2),
            "ff": (module.linear1, module.linear2, module.norm3),
        }
    else:
        return
    for part, (*members, norm) in parts.items():
        # A norm before the sub-block lies behind its boundary; one after the addition does not.
        inside = (norm, *members) if module.norm_first else tuple(members)
        yield Block(
            _join(name, f"{part}_block"),
            "branch",
            module,
            inside,
            method=f"_{part}_block",
            why="sub-block of a transformer layer",
        )


def _convolutions(name: str, module: nn.Module) -> Iterator[Block]:
    children = dict(module.named_children())
    numbers = [int(child[4:]) for child in children if re.fullmatch(r"conv\d+", child)]
    if not {1, 2} <= set(numbers) or not (hasattr(module, "downsample") or hasattr(module, "shortcut")):
        return
    order = list(children)
    convolution = f"conv{max(numbers)}"
    norm = next((n for n in (f"bn{max(numbers)}", f"norm{max(numbers)}") if n in children), None)
    # Norm after convolution, or (pre-activation) before it: then the first norm feeds the shortcut too.
    after = norm is not None and order.index(norm) > order.index(convolution)
    last = norm if norm is not None and after else convolution
    excluded = () if after else ("bn1", "norm1")
    inside = [c for c in order if re.fullmatch(r"(conv|bn|norm)\d+", c) and c not in excluded]
    members = tuple(children[child] for child in inside)
    why = f"residual block of convolutions, up to {last}"
    yield Block(_join(name, last), "branch", children[last], members, why=why)


# The class swap.


class AttachedBlock(nn.Module):
    """Mixin of a module with boundaries. Copies and pickles are of the plain class."""

    # Empty on the class: a slice of an attached nn.Sequential is of its class and has no boundary of its own.
    _retrograde_blocks: ClassVar[dict[str, BlockProgram]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass; what it returns crosses the boundary."""
        return self._cross("forward", super().forward(*args, **kwargs))

    def _cross(self, method: str, y: Any) -> Any:
        program = self._retrograde_blocks.get(method)
        if program is None or not (program.active and self.training and torch.is_grad_enabled()):
            return y
        if not isinstance(y, Tensor):
            raise OptionError(
                f"block {program.block.name!r} returns a {type(y).__name__}, not one tensor, so there is no single "
                "gradient at its output. Name the module inside it whose result is added to the shortcut."
            )
        return cross(y, program)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copied(self, _swapped_from(self), _plain_state(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(_swapped_from(self), _plain_state(self), protocol)


class AttachedTransformer(AttachedBlock):
    """The same for sub-blocks that are methods of a transformer layer."""

    def _sa_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._cross("_sa_block", super()._sa_block(*args, **kwargs))  # type: ignore[misc]

    def _mha_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._cross("_mha_block", super()._mha_block(*args, **kwargs))  # type: ignore[misc]

    def _ff_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._cross("_ff_block", super()._ff_block(*args, **kwargs))  # type: ignore[misc]


def swap_in_blocks(programs: Sequence[BlockProgram]) -> None:
    """Put the boundaries of branches in place; layers are attached already."""
    for program in programs:
        module = program.block.module
        if program.block.kind == "chain":
            continue
        if isinstance(module, AttachedLayer):
            module._retrograde.exit = program  # pyright: ignore[reportPrivateUsage]
        elif isinstance(module, AttachedBlock):
            module._retrograde_blocks[program.block.method] = program  # pyright: ignore[reportPrivateUsage]
        else:
            module.__class__ = _block_class(type(module))
            object.__setattr__(module, "_retrograde_blocks", {program.block.method: program})


def swap_out_blocks(programs: Sequence[BlockProgram]) -> None:
    """Give the modules their own classes back: all of them, or none when one cannot."""
    modules = {id(p.block.module): p.block.module for p in programs if p.block.kind == "branch"}
    swapped: list[tuple[nn.Module, type[nn.Module]]] = [
        (module, _swapped_from(module)) for module in modules.values() if isinstance(module, AttachedBlock)
    ]
    for module, base in swapped:
        module.__class__ = base
        del module.__dict__["_retrograde_blocks"]


def _swapped_from(module: nn.Module) -> type[nn.Module]:
    base = cast(type[nn.Module], type(module)._retrograde_base)  # pyright: ignore[reportAttributeAccessIssue]
    if type(module) is not _block_class(base):
        names = ", ".join(repr(p.block.name) for p in module.__dict__["_retrograde_blocks"].values())
        raise DetachError(
            f"the module of block {names} has become a {type(module).__name__} since it was attached, so its plain "
            "class cannot be told. Undo that first (a parametrization, for example)."
        )
    return base


def _block_class(base: type[nn.Module]) -> type[nn.Module]:
    transformer = issubclass(base, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return subclass(base, AttachedTransformer if transformer else AttachedBlock)


def _plain_state(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k != "_retrograde_blocks"}
