"""The autograd boundary: where slots 3 to 6 run and work is counted, one `torch.autograd.Function` for each layer kind.

The backward pass is one registered op for each kind, opaque to compilers: what happens inside may depend on data, and
is the same arithmetic eager and compiled. The op declares the layer's token mutated, which keeps compiler passes from
removing, merging or reordering calls.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from retrograde.accounting.flops import convolution_flops, linear_flops
from retrograde.engine.program import Gradients, LayerProgram
from retrograde.engine.slots import Needs, Operands
from retrograde.errors import DoubleBackwardError
from retrograde.kernels.geometry import Geometry

_LIBRARY = torch.library.Library("retrograde", "DEF")
_LIBRARY.define(
    "linear_backward(Tensor delta, Tensor[] saved, Tensor? rows, Tensor weight, Tensor(a!) token,"
    " SymInt[] input_shape, bool[] needs, bool fixed_layout) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "convolution_backward(Tensor delta, Tensor[] saved, Tensor? rows, Tensor weight, Tensor(a!) token,"
    " SymInt[] input_shape, bool[] needs, bool fixed_layout, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " bool transposed, SymInt[] output_padding, int groups) -> (Tensor, Tensor, Tensor)",
)


def apply(operands: Operands, program: LayerProgram, rows: Tensor | None) -> Tensor:
    """``z = W x̂ + b`` whose backward pass `program` runs; casts to the autocast dtype first.

    Args:
        operands: of the product, slot 1 behind them.
        program: of the layer.
        rows: rows for the layer's statistics, handed on to the backward pass.
    """
    x, weight, bias = operands.x, operands.weight, operands.bias
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    if operands.geometry is None:
        return _LinearBoundary.apply(x, weight, bias, rows, program)  # pyright: ignore[reportReturnType]
    return _ConvolutionBoundary.apply(x, weight, bias, rows, program, operands.geometry)  # pyright: ignore[reportReturnType]


def multiply(operands: Operands) -> Tensor:
    """The same product without a boundary."""
    if operands.geometry is None:
        return F.linear(operands.x, operands.weight, operands.bias)
    return _convolution(operands.x, operands.weight, operands.bias, operands.geometry)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves float64 alone, and so do we.
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    return torch.convolution(
        x, weight, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups
    )


class _LinearBoundary(torch.autograd.Function):
    """``(…, i) → (…, o)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, program: LayerProgram
    ) -> Tensor:
        z, kept = program.multiply(x, weight, bias)
        ctx.save_for_backward(weight, rows, *kept)
        ctx.set_materialize_grads(False)
        ctx.program, ctx.input_shape = program, x.shape
        return z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (delta,) = grad_outputs
        if delta is None:
            return None, None, None, None, None
        _refuse_double_backward(ctx.program)
        weight, rows, *saved = ctx.saved_tensors
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        found = torch.ops.retrograde.linear_backward(
            delta,
            saved,
            rows,
            weight,
            ctx.program.token,
            ctx.input_shape,
            needs,
            torch.compiler.is_compiling(),
        )
        return *_asked(found, needs), None, None


class _ConvolutionBoundary(torch.autograd.Function):
    """``(N, C_in, spatial…) → (N, C_out, spatial'…)``, plain or transposed, in groups or not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        program: LayerProgram,
        geometry: Geometry,
    ) -> Tensor:
        kept = program.keep(x) if weight.requires_grad else ()
        ctx.save_for_backward(weight, rows, *kept)
        ctx.set_materialize_grads(False)
        ctx.program, ctx.input_shape, ctx.geometry = program, x.shape, geometry
        return _convolution(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (delta,) = grad_outputs
        if delta is None:
            return None, None, None, None, None, None
        _refuse_double_backward(ctx.program)
        weight, rows, *saved = ctx.saved_tensors
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        g = ctx.geometry
        found = torch.ops.retrograde.convolution_backward(
            delta,
            saved,
            rows,
            weight,
            ctx.program.token,
            ctx.input_shape,
            needs,
            torch.compiler.is_compiling(),
            g.stride,
            g.padding,
            g.dilation,
            g.transposed,
            g.output_padding,
            g.groups,
        )
        return *_asked(found, needs), None, None, None


def _refuse_double_backward(program: LayerProgram) -> None:
    # Gradients are only recorded in a backward pass that was run with create_graph=True.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise DoubleBackwardError(
            f"a gradient of a gradient was asked for (create_graph=True) through layer {program.name!r}: the backward "
            "passes of retrograde's methods are estimates and have no derivative. Compute that term inside "
            "`with session.paused():`, forward pass included, where plain autograd runs."
        )


def _asked(found: Sequence[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(found, needs, strict=True))


def _run(
    delta: Tensor,
    saved: Sequence[Tensor],
    rows: Tensor | None,
    weight: Tensor,
    token: Tensor,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    fixed_layout: bool,
    geometry: Geometry | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    program = LayerProgram.find(token)
    start = time.perf_counter()
    found: Gradients = program.backward(delta, saved, rows, weight, input_shape, geometry, Needs(*needs))
    program.clocked += time.perf_counter() - start
    # An op cannot return None: what was not asked for comes back empty. A compiler is promised contiguous results;
    # eager execution takes them as the kernels lay them out.
    return tuple(  # pyright: ignore[reportReturnType]
        delta.new_empty(0) if g is None else g.contiguous() if fixed_layout else g
        for g in (found.input, found.weight, found.bias)
    )


def _run_convolution(
    delta: Tensor,
    saved: Sequence[Tensor],
    rows: Tensor | None,
    weight: Tensor,
    token: Tensor,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    fixed_layout: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(delta, saved, rows, weight, token, input_shape, needs, fixed_layout, Geometry.of(*geometry))


def _fake(
    delta: Tensor,
    saved: Sequence[Tensor],
    rows: Tensor | None,
    weight: Tensor,
    token: Tensor,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    fixed_layout: bool,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
    transposed: bool = False,
    output_padding: Sequence[int] = (),
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    return (
        delta.new_empty(tuple(input_shape)) if needs[0] else delta.new_empty(0),
        weight.new_empty(tuple(weight.shape)) if needs[1] else delta.new_empty(0),
        delta.new_empty(outputs) if needs[2] else delta.new_empty(0),
    )


_LIBRARY.impl("linear_backward", _run, "CompositeExplicitAutograd")
_LIBRARY.impl("convolution_backward", _run_convolution, "CompositeExplicitAutograd")
torch.library.register_fake("retrograde::linear_backward", _fake, lib=_LIBRARY)
torch.library.register_fake("retrograde::convolution_backward", _fake, lib=_LIBRARY)


# torch's FLOP counter sees the dense-equivalent work of our ops, as it sees that of aten's.


@register_flop_formula(torch.ops.retrograde.linear_backward)
def _linear_formula(  # pyright: ignore[reportUnusedFunction]
    delta_shape: Sequence[int],
    saved: Any,
    rows: Any,
    weight_shape: Sequence[int],
    token: Any,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    fixed_layout: bool,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return linear_flops(torch.Size(delta_shape[:-1]).numel(), *weight_shape) * (needs[0] + needs[1])


@register_flop_formula(torch.ops.retrograde.convolution_backward)
def _convolution_formula(  # pyright: ignore[reportUnusedFunction]
    delta_shape: Sequence[int],
    saved: Any,
    rows: Any,
    weight_shape: Sequence[int],
    token: Any,
    input_shape: Sequence[int],
    needs: Sequence[bool],
    fixed_layout: bool,
    *geometry: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    flops = convolution_flops(input_shape, weight_shape, delta_shape, Geometry.of(*geometry))
    return flops * (needs[0] + needs[1])
