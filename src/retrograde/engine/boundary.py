"""The autograd boundary of a product: where a layer's backward slots run, one function and one op for all maps.

Eager execution calls the layer's program straight. Compiled code, and whoever watches ops (torch's FLOP counter), sees
one registered op, opaque to compilers: what happens inside may depend on data, and is the same arithmetic. The op
declares the layer's token mutated, which keeps compiler passes from removing, merging or reordering calls.
"""

import itertools
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retrograde.engine.maps.base import Gradients, Map, map_of
from retrograde.errors import AttachError, DoubleBackwardError, TransformError
from retrograde.kernels import formulas


class Program(Protocol):
    """What the boundary asks of a layer's program."""

    name: str
    token: Tensor
    clocked: float

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The z of a call, and what is kept for its backward pass."""
        ...

    def backward(
        self,
        delta: Tensor,
        saved: Sequence[Tensor],
        rows: Tensor | None,
        weight: Tensor,
        input_shape: Sequence[int],
        map: Map,
        needs: Sequence[bool],
    ) -> Gradients:
        """Gradients of a call; `needs` says of input, weight and bias whether autograd asks for theirs."""
        ...


# An op takes tensors and numbers only, so a layer's op finds its program by number; weakly, to keep nothing alive.
_programs: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_handles = itertools.count()


def token(program: Any) -> Tensor:
    """What names `program` in compiled code: a tensor, so that code is shared between layers."""
    formulas.register()
    handle = next(_handles)
    _programs[handle] = program
    return torch.tensor([handle])


def named(token: Tensor, what: str) -> Any:
    """The program that `token` names."""
    program = _programs.get(int(token[0]))
    if program is None:
        raise AttachError(
            f"a backward pass reached a {what} whose session is gone: it was detached, or no reference to the attached "
            "model is left. Run the forward pass again after detaching."
        )
    return program


class Boundary(torch.autograd.Function):
    """``z = W x + b`` whose backward pass is a program's."""

    @staticmethod
    def forward(  # noqa: D102  as of `torch.autograd.Function`
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        program: Program,
        map: Map,
    ) -> Tensor:
        z, kept = program.multiply(x, weight, bias, map)
        if not torch.compiler.is_compiling() and z._is_view():  # pyright: ignore[reportPrivateUsage]
            # torch lets nobody change a view in place that a function returns, and a linear layer's may be one.
            z = torch.ops.aten._unsafe_view(z, z.shape)
        ctx.save_for_backward(weight, rows, *kept)
        ctx.set_materialize_grads(False)
        ctx.program, ctx.map, ctx.input_shape = program, map, x.shape
        return z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        (delta,) = grad_outputs
        if delta is None:
            return None, None, None, None, None, None
        weight, rows, *saved = ctx.saved_tensors
        needs, program, map = ctx.needs_input_grad, ctx.program, ctx.map
        compiling = torch.compiler.is_compiling()
        if not compiling and has_batches(delta):
            raise untransformed(f"layer {program.name!r}")
        if not compiling and torch.is_grad_enabled():
            # Gradients are only recorded in a backward pass that was run with create_graph=True.
            raise DoubleBackwardError(
                f"a gradient of a gradient was asked for (create_graph=True) through layer {program.name!r}: the "
                "backward passes of retrograde's methods are estimates and have no derivative. Compute that term "
                "inside `with session.paused():`, forward pass included, where plain autograd runs."
            )
        if compiling or torch._C._len_torch_dispatch_stack():  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            asked = list(needs[:3])
            found = torch.ops.retrograde.backward(
                delta, saved, rows, weight, program.token, ctx.input_shape, asked, map.name, map.numbers
            )
            dx, dw, db = (g if need else None for g, need in zip(found, asked, strict=True))
            return dx, dw, db, None, None, None
        start = time.perf_counter()
        dx, dw, db = program.backward(delta, saved, rows, weight, ctx.input_shape, map, needs)
        program.clocked += time.perf_counter() - start
        return dx, dw, db, None, None, None


# What `torch.autograd.Function.apply` calls when it has looked for transforms of `torch.func`; that look takes as long
# as a small product.
_straight: Any = super(torch.autograd.Function, Boundary).apply  # pyright: ignore[reportAttributeAccessIssue]
transforming: Any = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
_functorch: Any = torch._C._functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def has_batches(delta: Tensor) -> bool:
    """Whether δ is many gradients in one: of ``is_grads_batched``, a vectorized jacobian, or `torch.func.vmap`."""
    return _functorch.is_legacy_batchedtensor(delta) or _functorch.is_functorch_wrapped_tensor(delta)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation follows one of the tensors."""
    if forward_ad._current_level < 0:  # pyright: ignore[reportPrivateUsage]
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def untransformed(what: str) -> TransformError:
    """The refusal of transforms, where `what` has a backward pass of its own."""
    return TransformError(
        f"{what} was called inside a transform of torch.func (grad, vmap, jvp, jacrev), in forward mode, or was sent "
        "many gradients at once (is_grads_batched, a vectorized jacobian): its backward pass is a program of its own, "
        "which transforms cannot look into. Compute that term inside `with session.paused():`, forward pass included, "
        "where plain autograd runs."
    )


def apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, program: Program, map: Map
) -> Tensor:
    """`Boundary`, by the shortest way there is."""
    if torch.compiler.is_compiling():
        return Boundary.apply(x, weight, bias, rows, program, map)  # pyright: ignore[reportReturnType]
    if transforming() or has_tangent(x, weight, bias):
        raise untransformed(f"layer {program.name!r}")
    return _straight(x, weight, bias, rows, program, map)


_LIBRARY = torch.library.Library("retrograde", "FRAGMENT")
_LIBRARY.define(
    "backward(Tensor delta, Tensor[] saved, Tensor? rows, Tensor weight, Tensor(a!) token, SymInt[] input_shape,"
    " bool[] needs, str map, SymInt[] numbers) -> (Tensor, Tensor, Tensor)"
)


def _run(
    delta: Tensor,
    saved: Sequence[Tensor],
    rows: Tensor | None,
    weight: Tensor,
    token: Tensor,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    map: str,
    numbers: Sequence[int],
) -> tuple[Tensor, ...]:
    program: Program = named(token, "layer")
    start = time.perf_counter()
    found = program.backward(delta, saved, rows, weight, torch.Size(input_shape), map_of(map, numbers), needs)
    program.clocked += time.perf_counter() - start
    # An op cannot return None: what was not asked for comes back empty. A compiler is promised contiguous results.
    return tuple(delta.new_empty(0) if g is None else g.contiguous() for g in found)


def _fake(
    delta: Tensor,
    saved: Sequence[Tensor],
    rows: Tensor | None,
    weight: Tensor,
    token: Tensor,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    map: str,
    numbers: Sequence[int],
) -> tuple[Tensor, ...]:
    outputs = map_of(map, numbers).outputs(weight.shape)
    return (
        delta.new_empty(tuple(input_shape)) if needs[0] else delta.new_empty(0),
        weight.new_empty(tuple(weight.shape)) if needs[1] else delta.new_empty(0),
        delta.new_empty(outputs) if needs[2] else delta.new_empty(0),
    )


_LIBRARY.impl("backward", _run, "CompositeExplicitAutograd")
torch.library.register_fake("retrograde::backward", _fake, lib=_LIBRARY)


@formulas.formula(torch.ops.retrograde.backward)
def _formula(  # pyright: ignore[reportUnusedFunction]
    delta_shape: Sequence[int],
    saved: Any,
    rows: Any,
    weight_shape: Sequence[int],
    token: Any,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    map: str,
    numbers: Sequence[int],
    **kwargs: Any,
) -> int:
    """torch's FLOP counter sees the dense-equivalent work of our op, as it sees that of aten's."""
    return map_of(map, numbers).flops(input_shape, weight_shape, delta_shape) * (needs[0] + needs[1])
