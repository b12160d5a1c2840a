"""Activations in a few bits: what a backward pass needs of a layer's input, rounded without bias.

Each 256 entries that lie side by side, a group, have a range of their own:

    Δ = (max x − min x)/(2^b − 1),   q = floor((x − min x)/Δ + u),  u ~ U[0, 1),   x̂ = min x + Δ q,   E[x̂] = x

and are kept in b bits each, beside min x and Δ in float32: b + 1/4 bits an entry. Where max x − min x is beyond
float32, all of it is computed with halves, which are exact there. A group with an entry that is not finite in float32
comes back as NaN. Noise is `retrograde.maths.philox.uniform`'s, counted in the order of memory.

Reference: Chen et al., *ActNN: Reducing training memory footprint via 2-bit activation compressed training*, ICML 2021,
arXiv 2104.14129.
"""

import struct

import torch
from torch import Tensor

from retrograde.kernels import compiled
from retrograde.kernels.cpu_memory import lies_channels_last
from retrograde.maths.philox import mix_key, uniform

GROUP = 256
"""Entries of a range."""
BITS = (2, 4, 8)
_SAMPLED = 64
"""Entries by which a call is told from others of its step."""

_LIBRARY = torch.library.Library("retrograde", "FRAGMENT")
_LIBRARY.define("pack(Tensor x, Tensor key, int bits) -> (Tensor, Tensor, Tensor)")


def pack(x: Tensor, key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x in `bits` bits.

    Args:
        x: floating point, any shape.
        key: int64, (1,): of the noise, as a bit pattern; on the host.
        bits: one of `BITS`.

    Returns:
        Levels, uint8, as many to a byte as it holds; ranges, float32, (groups, 2), least entry and Δ; and an empty
        tensor that tells `unpack` how x lay in memory.
    """
    if torch.compiler.is_compiling():
        return torch.ops.retrograde.pack(x, key, bits)
    return _pack(x, key, bits)


def unpack(levels: Tensor, ranges: Tensor, order: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """x̂ of `shape` in `dtype`, as x lay in memory."""
    last = bool(order.numel())
    n, c, *rest = shape if last else (0, 0)
    whole = (n, *rest, c) if last else tuple(shape)
    size = torch.Size(whole).numel()
    if levels.is_cpu and compiled.usable():
        from retrograde.kernels import cpu_pack  # where it is needed: a compiler comes with it

        flat = cpu_pack.unpack(levels, ranges, size)
    else:
        flat = _unpack_in_torch(levels, ranges)[:size]
    found = flat.to(dtype).view(whole)
    return found.movedim(-1, 1) if last else found


def _pack(x: Tensor, key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    last = lies_channels_last(x)
    flat = (x.movedim(1, -1) if last else x).reshape(-1).detach()
    order = x.new_empty(int(last), dtype=torch.uint8)
    number = int(key[0]) & 0xFFFFFFFFFFFFFFFF
    if x.is_cpu and flat.numel():
        # Calls of one step differ by what they are given, and a forward pass that runs again does not.
        some = float(flat[:: max(1, flat.numel() // _SAMPLED)].double().sum())
        number = mix_key(int.from_bytes(struct.pack("d", some), "little"), start=number)
    if x.is_cpu and compiled.usable():
        from retrograde.kernels import cpu_pack  # where it is needed: a compiler comes with it

        return *cpu_pack.pack(flat.float(), number, bits), order
    return *_pack_in_torch(flat.float(), number, bits), order


def _pack_in_torch(flat: Tensor, key: int, bits: int) -> tuple[Tensor, Tensor]:
    groups, most = -(-flat.numel() // GROUP), 2**bits - 1
    missing = groups * GROUP - flat.numel()
    noise = uniform(key, (flat.numel(),), flat.device)
    if missing:
        # The last entry stands in for those behind it: no range is changed by it.
        flat = torch.cat((flat, flat[-1:].expand(missing)))
        noise = torch.cat((noise, noise.new_zeros(missing)))
    x = flat.view(groups, GROUP)
    low, high = x.aminmax(dim=1) if groups else (flat.new_empty(0), flat.new_empty(0))
    half = torch.where((high - low).isinf(), 0.5, 1.0)
    low_half = low * half
    step = (high * half - low_half) / most
    ratio = (x * half[:, None] - low_half[:, None]) / torch.where(step > 0, step, 1.0)[:, None]
    whole = ratio.floor()
    rounded = whole + (noise.view(groups, GROUP) < ratio - whole)
    levels = rounded.clamp_(0, most).nan_to_num_(0).to(torch.uint8)
    levels.view(-1)[flat.numel() - missing :] = 0
    parts = levels.view(groups, 8 // bits, GROUP * bits // 8)
    shifts = torch.arange(8 // bits, device=flat.device, dtype=torch.uint8) * bits
    packed = (parts << shifts[:, None]).sum(1, dtype=torch.uint8)
    return packed.reshape(-1), torch.stack((low, step / half), 1)


def _unpack_in_torch(levels: Tensor, ranges: Tensor) -> Tensor:
    groups = ranges.shape[0]
    if not groups:
        return ranges.new_empty(0)
    packed = levels.view(groups, 1, -1)
    per = GROUP // packed.shape[2]
    shifts = torch.arange(per, device=levels.device, dtype=torch.uint8) * (8 // per)
    most = 2 ** (8 // per) - 1
    parts = ((packed >> shifts[:, None]) & most).view(groups, GROUP).float()
    low, step = ranges[:, :1], ranges[:, 1:]
    # The last level may lie beyond float32, where Δ was rounded up too.
    half = torch.where((low + most * step).isinf(), 0.5, 1.0)
    largest = torch.finfo(torch.float32).max
    found = (parts * (step * half) + low * half).clamp_(-largest * half, largest * half) / half
    return found.view(-1)


def signs(x: Tensor) -> Tensor:
    """Whether each entry is not ≤ 0, in the order of memory: eight to a byte on a CPU, one elsewhere."""
    flat = (x.movedim(1, -1) if lies_channels_last(x) else x).reshape(-1).detach()
    if flat.is_cpu and compiled.usable() and flat.dtype in (torch.float32, torch.float64):
        from retrograde.kernels import cpu_pack  # where it is needed: a compiler comes with it

        return cpu_pack.signs(flat)
    return (flat <= 0).logical_not()


def mask(bits: Tensor, shape: torch.Size, last: bool) -> Tensor:
    """What `signs` found of a tensor of `shape`, an entry each.

    Args:
        bits: from `signs`.
        shape: of the tensor.
        last: whether it was channels-last.
    """
    if bits.dtype != torch.bool:
        eight = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
        lanes = bits.view(-1, 1, GROUP // 8)
        bits = (lanes >> eight & 1).view(-1)[: shape.numel()].bool()
    n, c, *rest = shape if last else (0, 0)
    return bits.view(n, *rest, c).movedim(-1, 1) if last else bits.view(shape)


def where_positive(delta: Tensor, bits: Tensor, last: bool) -> Tensor:
    """δ where `signs` of a tensor of its shape were set, and 0 elsewhere.

    Args:
        delta: δ.
        bits: from `signs`.
        last: whether the tensor was channels-last.
    """
    if bits.dtype == torch.bool:
        return torch.where(mask(bits, delta.shape, last), delta, 0)
    from retrograde.kernels import cpu_pack  # where it is needed: a compiler comes with it

    ordered = delta.movedim(1, -1) if last else delta
    found = cpu_pack.where_positive(ordered.contiguous(), bits)
    return found.movedim(-1, 1) if last else found


def _fake(x: Tensor, key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = (x.numel() + GROUP - 1) // GROUP
    levels = x.new_empty(groups * GROUP * bits // 8, dtype=torch.uint8)
    return levels, x.new_empty((groups, 2), dtype=torch.float32), x.new_empty(0, dtype=torch.uint8)


def _ordered(x: Tensor, key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    # A compiler is promised the shapes of all results, so in compiled code x lies in the order of its indices.
    return _pack(x.contiguous(), key, bits)


_LIBRARY.impl("pack", _ordered, "CompositeExplicitAutograd")
torch.library.register_fake("retrograde::pack", _fake, lib=_LIBRARY)
