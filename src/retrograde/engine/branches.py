"""Which parts of a model are residual branches, and the class swap that puts a boundary at their outputs.

Found without being told:

- `Residual`: its branch;
- torch's ``TransformerEncoderLayer`` and ``TransformerDecoderLayer``: attention and feed-forward sub-blocks, with the
  norm before them where it comes first;
- in any other module that a made-up input can be run through, whatever it is called: what is added to something that
  goes round it (`retrograde.engine.residual.trace`);
- in the others: children called as sub-blocks of transformers are (``self_attn``, ``mlp``). No such block is skipped
  before a pass of training has shown that the gradient goes round it.

Other branches are named by the user, and given up where a pass shows that nothing goes round them.
"""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from retrograde.engine.blocks import BlockProgram
from retrograde.engine.layers import AttachedLayer, copied, find_kind, reduced, subclass
from retrograde.engine.maps.base import LayerKind
from retrograde.engine.residual import crossed, edges, goes_round, trace
from retrograde.engine.slots import Block
from retrograde.errors import DetachError, OptionError, PatternError

_SUB_BLOCKS = ("attn", "attention", "self_attn", "self_attention", "mlp", "ffn", "feed_forward", "ff")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_AROUND = 3
"""How many modules around a block that the user names are asked whether its gradient goes round."""


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
        for block in (*_residual(name, module), *_transformer(name, module)):
            key = (id(block.module), block.method)
            if _trains(block) and key not in seen:
                seen.add(key)
                found[block.name] = block
    inside = {id(module) for block in found.values() for module in _modules(block)}
    # Inner modules first: what an outer one holds is known by then.
    for name, module in reversed(list(model.named_modules())):
        for block in _added(name, module):
            if _trains(block) and id(block.module) not in inside:
                inside |= {id(module) for module in _modules(block)}
                found[block.name] = block
    return tuple(found.values()) if patterns is None else _named(model, found, patterns)


def _trains(block: Block) -> bool:
    return any(True for member in block.members for _ in member.parameters())


def _modules(block: Block) -> Iterator[nn.Module]:
    for member in block.members:
        yield from member.modules()


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
        module, parts = modules[name], name.split(".")
        above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        around = [m for m in above[-_AROUND:] if not isinstance(m, nn.ModuleList | nn.ModuleDict)]
        owners = tuple(reversed(around))
        blocks.append(Block(name, "branch", module, (module,), why="named in `blocks`", owners=owners))
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
        # What an override adds is not known, nor whether the memory gets its gradient elsewhere.
        known = part != "mha" and type(module).forward in _KNOWN
        yield Block(
            _join(name, f"{part}_block"),
            "branch",
            module,
            inside,
            method=f"_{part}_block",
            why="sub-block of a transformer layer" + ("" if known else _UNSHOWN),
            owners=() if known else (module,),
            trusted=known,
        )


_KNOWN = (nn.TransformerEncoderLayer.forward, nn.TransformerDecoderLayer.forward)
_UNSHOWN = "; skipped only where the first pass of training shows that the gradient goes round it"


def _added(name: str, module: nn.Module) -> Iterator[Block]:
    """What is added, in `module`, to something that goes round it."""
    known = (*_CONTAINERS, Residual, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    children = dict(module.named_children())
    if not children or isinstance(module, known) or isinstance(find_kind(module), LayerKind):
        return
    traced = trace(module)
    if traced is not None:
        for branch in traced:
            members = tuple(module.get_submodule(member) for member in branch.members)
            last = module.get_submodule(branch.name)
            yield Block(_join(name, branch.name), "branch", last, members, why="added to what goes round it")
        return
    for child in _SUB_BLOCKS:
        if child in children:
            part = children[child]
            why = f"called as a residual branch is{_UNSHOWN}"
            yield Block(_join(name, child), "branch", part, (part,), why=why, owners=(module,), trusted=False)


# The class swap.


class AttachedBlock(nn.Module):
    """Mixin of a module with boundaries. Copies and pickles are of the plain class."""

    # Empty on the class: a slice of an attached nn.Sequential is of its class and has no boundary of its own.
    _retrograde_blocks: ClassVar[dict[str, BlockProgram]] = {}
    _retrograde_watched: ClassVar[tuple[BlockProgram, ...]] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass; what it returns crosses the boundary."""
        watching = self._retrograde_watched and self.training and torch.is_grad_enabled()
        if not watching or torch.compiler.is_compiling():
            return self._cross("forward", super().forward(*args, **kwargs))
        inputs = edges((args, kwargs))
        y = super().forward(*args, **kwargs)
        out = self._cross("forward", y)
        _judge(self, inputs, y)
        return out

    def _cross(self, method: str, y: Any) -> Any:
        program = self._retrograde_blocks.get(method)
        if program is None or not (program.active and self.training and torch.is_grad_enabled()):
            return y
        out = crossed(y, program)
        if out is y:
            raise OptionError(
                f"block {program.block.name!r} returns a {type(y).__name__}, not a tensor or a tuple that begins with "
                "one, so there is no single gradient at its output. Name the module inside it whose result is added "
                "to the shortcut."
            )
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copied(self, _swapped_from(self), _plain_state(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, _swapped_from(self), _plain_state(self), protocol)


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
        else:
            _swapped(module)._retrograde_blocks[program.block.method] = program  # pyright: ignore[reportPrivateUsage]
        for owner in program.block.owners:
            if not isinstance(owner, AttachedLayer):
                watched = (*_swapped(owner)._retrograde_watched, program)  # pyright: ignore[reportPrivateUsage]
                object.__setattr__(owner, "_retrograde_watched", watched)


def _swapped(module: nn.Module) -> AttachedBlock:
    if not isinstance(module, AttachedBlock):
        module.__class__ = _block_class(type(module))
        object.__setattr__(module, "_retrograde_blocks", {})
    return cast(AttachedBlock, module)


def _judge(owner: AttachedBlock, inputs: set[Any], outputs: Any) -> None:
    """After one pass of `owner`: which of the blocks that it watches does the gradient go round?"""
    watched = owner._retrograde_watched  # pyright: ignore[reportPrivateUsage]
    for program in watched:
        others = [p for p in watched if p is not program and p.may_skip]
        found = None if program.settled else goes_round(program, inputs, outputs, others)
        # A wider module may show what this one does not.
        if found or (found is False and owner is program.block.owners[-1]):
            program.settle(goes_round=found)
    left = tuple(program for program in watched if not program.settled)
    object.__setattr__(owner, "_retrograde_watched", left)
    if not left and not owner._retrograde_blocks:  # pyright: ignore[reportPrivateUsage]
        _restore(owner, _swapped_from(owner))


def swap_out_blocks(programs: Sequence[BlockProgram]) -> None:
    """Give the modules their own classes back: all of them, or none when one cannot."""
    branches = [program.block for program in programs if program.block.kind == "branch"]
    modules = {id(m): m for block in branches for m in (block.module, *block.owners)}
    swapped: list[tuple[nn.Module, type[nn.Module]]] = [
        (module, _swapped_from(module)) for module in modules.values() if isinstance(module, AttachedBlock)
    ]
    for module, base in swapped:
        _restore(module, base)


def _restore(module: nn.Module, base: type[nn.Module]) -> None:
    module.__class__ = base
    for name in _OURS:
        module.__dict__.pop(name, None)


_OURS = ("_retrograde_blocks", "_retrograde_watched")


def _swapped_from(module: nn.Module) -> type[nn.Module]:
    base = cast(type[nn.Module], type(module)._retrograde_base)  # pyright: ignore[reportAttributeAccessIssue]
    if type(module) is not _block_class(base):
        swapped = cast(AttachedBlock, module)
        programs = (*swapped._retrograde_blocks.values(), *swapped._retrograde_watched)  # pyright: ignore[reportPrivateUsage]
        names = ", ".join(repr(program.block.name) for program in programs)
        raise DetachError(
            f"the module of block {names} has become a {type(module).__name__} since it was attached, so its plain "
            "class is not known. Undo that first (a parametrization, for example)."
        )
    return base


def _block_class(base: type[nn.Module]) -> type[nn.Module]:
    transformer = issubclass(base, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return subclass(base, AttachedTransformer if transformer else AttachedBlock)


def _plain_state(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in _OURS}
