"""`nn.MultiheadAttention`: its packed input projection is a linear layer, and its output projection a layer of its own.

torch's class multiplies by both weights inside one function. In training the forward pass below takes its place: the
same arithmetic, with the products given to the layers' programs. Evaluation is torch's own, fast path included.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.engine.maps.base import LayerKind, Map, register_layer
from retrograde.engine.maps.linear import LINEAR

Product = Callable[..., Tensor]


class AttentionKind(LayerKind):
    """The packed projections of queries, keys and values: weight (3E, E)."""

    weight = "in_proj_weight"
    bias = "in_proj_bias"

    def map(self, layer: nn.Module) -> Map:
        """A linear layer's."""
        return LINEAR

    def refuse(self, layer: Any) -> str | None:
        """Keys or values of another width have weights of their own."""
        if layer.in_proj_weight is None:
            return (
                "keys or values of another width than queries (kdim, vdim): their projections are not packed"
            )
        return None

    def describe(self, layer: Any) -> str:
        """inputs→outputs."""
        return f"{layer.embed_dim}→{3 * layer.embed_dim}"

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        layer: Any,
        product: Product,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        projected = _project(layer, product, query, key, value)
        if not batched:
            projected = [p.unsqueeze(0) for p in projected]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not layer.batch_first:
            projected = [p.transpose(0, 1) for p in projected]
        padding = F._canonical_mask(  # pyright: ignore[reportPrivateUsage]
            mask=key_padding_mask,
            mask_name="key_padding_mask",
            other_type=F._none_or_dtype(attn_mask),  # pyright: ignore[reportPrivateUsage]
            other_name="attn_mask",
            target_type=query.dtype,
        )
        # The hint stands for the mask where nothing has to be merged into that.
        hinted = is_causal and padding is None and not need_weights
        mask = None
        if not hinted:
            mask = F._canonical_mask(  # pyright: ignore[reportPrivateUsage]
                mask=attn_mask,
                mask_name="attn_mask",
                other_type=None,
                other_name="",
                target_type=query.dtype,
                check_other=False,
            )
        attended, weights = _attend(layer, projected, padding, mask, need_weights, hinted)
        # Called as a module: it is an attached layer, with hooks of its own.
        z = layer.out_proj(attended)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return z.squeeze(1), None if weights is None else weights.squeeze(0)
        return z.transpose(0, 1) if layer.batch_first else z, weights


def _project(layer: Any, product: Product, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values (…, E); whatever comes from one input comes from one product."""
    weight, bias, width = layer.in_proj_weight, layer.in_proj_bias, layer.embed_dim
    if query is key and key is value:
        return list(product(query, weight, bias, LINEAR).chunk(3, -1))
    parts = [(query, 0, 1), (key, 1, 3)] if key is value else [(query, 0, 1), (key, 1, 2), (value, 2, 3)]
    found: list[Tensor] = []
    for x, first, last in parts:
        rows = slice(first * width, last * width)
        z = product(x, weight[rows], None if bias is None else bias[rows], LINEAR)
        found += z.chunk(last - first, -1)
    return found


def _attend(
    layer: Any,
    projected: list[Tensor],
    padding: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, L, E) queries to (B, S, E) keys: (L, B, E), and the weights (B, H, L, S) where needed."""
    q, k, v = projected
    batch, heads = q.shape[0], layer.num_heads
    if layer.bias_k is not None:
        k = torch.cat([k, layer.bias_k.expand(batch, 1, -1)], 1)
        v = torch.cat([v, layer.bias_v.expand(batch, 1, -1)], 1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if layer.add_zero_attn:
        nothing = k.new_zeros(batch, heads, 1, k.shape[-1])
        k, v = torch.cat([k, nothing], 2), torch.cat([v, nothing], 2)
    if mask is not None:
        # (L, S), or one for each example and head.
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
    if padding is not None:
        padding = F.pad(padding, (0, k.shape[2] - padding.shape[-1]))[:, None, None]
        mask = padding if mask is None else mask + padding
    dropout = layer.dropout if layer.training else 0.0
    if need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask.to(scores.dtype)
        weights = F.dropout(scores.softmax(-1), dropout)
        attended = weights @ v
    else:
        weights = None
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    # As it lies in torch's own: a dropout behind draws its mask in the order of memory.
    return attended.permute(2, 0, 1, 3).flatten(2), weights


register_layer(nn.MultiheadAttention, AttentionKind())
