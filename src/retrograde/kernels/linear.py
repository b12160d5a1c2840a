"""The products of a linear layer's backward pass, by every kernel: ``G D`` for a gradient G (a, m) and D (m, i).

Kernels, by what they round and what they visit:

- ``dense``: everything, in the operand's own precision;
- ``skip``: the non-zeros, in float32;
- ``bfloat16``: everything, D rounded to bfloat16, and so is the result;
- ``skip-bfloat16``: the non-zeros, D rounded to bfloat16, sums in float32;
- ``int8``: everything, each column of D rounded to 8 bits, sums in int32.

Levels are whole numbers of 8 bits, which bfloat16 holds exactly; so are the numbers of a D that an 8-bit forward pass
left quantised. `register_kernel` adds others.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from retrograde.errors import OptionError, RetrogradeWarning
from retrograde.kernels import compiled, cpu_memory, int8
from retrograde.kernels.int8 import Quantised

if TYPE_CHECKING:
    from retrograde.kernels.cpu import Lists

KERNELS = ("dense", "skip", "bfloat16", "skip-bfloat16", "int8")
"""Those of this module; `registered` names the others."""
LISTED = ("skip", "skip-bfloat16")
"""Those that take index lists."""
SKIPPING = {*LISTED}
"""Those that visit the non-zeros alone."""
PRECISION: dict[str, str] = {"bfloat16": "bfloat16", "skip-bfloat16": "bfloat16", "int8": "int8"}
"""What a kernel rounds to; others leave the operand's own precision."""

_registered: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def register_kernel(
    name: str,
    run: Callable[[Tensor, Tensor], Tensor],
    *,
    precision: Literal["bfloat16", "int8"] | None = None,
    skips: bool = False,
) -> None:
    """Add a kernel: it is tried beside the others, and takes the products for which it is the fastest.

    Args:
        name: of the kernel, in figures and benchmarks; what it took is kept by it, so a faster one needs another.
        run: ``(levels, dense) → levels @ dense`` for int8 levels (a, m), which may be a transposed view, and float32
            (m, i); the result is float32, and its own to be overwritten.
        precision: what it rounds `dense` to: it then takes only the products whose method allows that.
        skips: whether it multiplies the non-zeros alone, for its FLOPs and for the terms of its time.

    Raises:
        OptionError: the name is taken, or the precision is none that a product can be rounded to.
    """
    if not name or any(letter.isspace() or letter == ":" for letter in name):
        raise OptionError(f"register_kernel: the name {name!r} must be one word without spaces and colons.")
    if name in KERNELS or _registered.get(name, run) is not run:
        raise OptionError(
            f"register_kernel: a kernel named {name!r} is registered already. Choose another name."
        )
    if precision not in (None, "bfloat16", "int8"):
        raise OptionError(
            f"register_kernel: precision={precision!r} of {name!r} must be 'bfloat16', 'int8' or None."
        )
    _registered[name] = run
    if precision is not None:
        PRECISION[name] = precision
    if skips:
        SKIPPING.add(name)
    if not compiled.installed():
        warnings.warn(
            f"register_kernel: {name!r} takes no product here, since kernels are chosen among all of them, "
            "which needs numba. Install it: pip install numba",
            RetrogradeWarning,
            stacklevel=2,
        )


def registered() -> tuple[str, ...]:
    """Names of the kernels that were added, in their order."""
    return tuple(_registered)


def run(
    kernel: str,
    values: Tensor,
    step: float | None,
    dense: Tensor | Quantised,
    *,
    transposed: bool = False,
    lists: "Lists | None" = None,
) -> Tensor:
    """``G D``, shape (a, i), in the dtype of D.

    Args:
        kernel: one of `KERNELS`, or a registered one, which takes levels and a float32 D.
        values: G, (a, m), or (m, a) when `transposed`: float32, or int8 levels.
        step: of the levels; None for a gradient that is no multiple of one.
        dense: D, (m, i).
        transposed: whether `values` holds Gᵀ.
        lists: the index lists of `values`, where they are known.
    """
    scale = 1.0 if step is None else step
    factor = values.T if transposed else values
    if kernel in _registered:
        assert isinstance(dense, Tensor)
        return _registered[kernel](factor, dense).mul_(scale)
    if kernel == "int8":
        return _int8(factor, scale, dense)
    if kernel == "bfloat16":
        return _bfloat16(factor, scale, dense)
    bare = dense.values if isinstance(dense, Quantised) else dense
    if kernel in LISTED:
        from retrograde.kernels import cpu  # where it is needed: a compiler comes with it

        sparse = cpu.lists(values) if lists is None else lists
        if transposed:
            sparse = sparse.transposed()
        packed = cpu.pack(bare, half=kernel == "skip-bfloat16" or bare.dtype == torch.bfloat16)
        found = cpu.product(sparse, packed, bare.shape[1], scale)
    else:
        own = torch.float32 if bare.dtype == torch.int8 else bare.dtype
        found = factor.to(own) @ bare.to(own)
        found = found if step is None else found.mul_(step)
    if isinstance(dense, Quantised):
        found = found.mul_(dense.scale)
    return found.to(dense.dtype)


@torch.no_grad()
def _bfloat16(factor: Tensor, scale: float, dense: Tensor | Quantised) -> Tensor:
    """Between operands and result only memory that is kept: a large layer's fresh pages would take half the time."""
    bare = dense.values if isinstance(dense, Quantised) else dense
    if bare.dtype != torch.bfloat16:
        bare = cpu_memory.bfloat16_room("dense", tuple(bare.shape)).copy_(bare)
    product = cpu_memory.bfloat16_room("product", (factor.shape[0], bare.shape[1]))
    torch.mm(factor.to(torch.bfloat16), bare, out=product)
    columns = dense.scale.float() * scale if isinstance(dense, Quantised) else _same(scale, bare.shape[1])
    from retrograde.kernels import cpu_quantise

    return cpu_quantise.widen(product, columns).to(dense.dtype)


@torch.no_grad()
def _int8(factor: Tensor, scale: float, dense: Tensor | Quantised) -> Tensor:
    operand = dense if isinstance(dense, Quantised) else int8.quantise_columns(dense)
    shape = factor.shape[0], operand.shape[1]
    sums = int8.int_product(
        factor.contiguous(), operand.values, torch.from_numpy(cpu_memory.room("sums", shape, np.int32))
    )
    from retrograde.kernels import cpu_quantise

    found = cpu_quantise.rescale(sums, _same(1.0, shape[0]), operand.scale.float() * scale, None)
    return found.to(operand.dtype)


def _same(value: float, size: int) -> Tensor:
    return torch.full((size,), value)
