"""Transformers of pre-normalised residual branches: a character-level GPT and a vision transformer.

Attention is written with two ``nn.Linear`` and ``scaled_dot_product_attention``, for
``nn.MultiheadAttention`` reads the weight of its output layer without calling the layer, and nothing that is
attached there would run.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrograde.engine.branches import Residual


class SelfAttention(nn.Module):
    """Multi-head self-attention: x (B, L, D) → (B, L, D); ``causal`` hides what comes later."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended x, (B, L, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(attended.transpose(1, 2).flatten(2))


def blocks(layers: int, width: int, heads: int, *, causal: bool) -> nn.Sequential:
    """Return ``layers`` pairs of residual branches, attention and a two-layer network: (B, L, D) → (B, L, D).

    Linear weights start at deviation 0.02, those that end a branch 1/√(2 layers) of it (Radford et al. 2019).
    """
    sequence: list[nn.Module] = []
    for _ in range(layers):
        attention = SelfAttention(width, heads, causal=causal)
        inner, outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (attention.qkv, attention.out, inner, outer):
            last = layer in (attention.out, outer)
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
            nn.init.zeros_(layer.bias)
        sequence += [
            Residual(nn.Sequential(nn.LayerNorm(width), attention)),
            Residual(nn.Sequential(nn.LayerNorm(width), inner, nn.GELU(), outer)),
        ]
    return nn.Sequential(*sequence)


class GPT(nn.Module):
    """Decoder that predicts each next token: tokens (B, L ≤ length) → logits (B, L, vocabulary)."""

    def __init__(
        self, vocabulary: int, length: int, *, layers: int = 4, width: int = 256, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.blocks = blocks(layers, width, heads, causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for weight in (self.embedding.weight, self.position, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, L, vocabulary) of tokens (B, L)."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """Vision transformer on square patches, averaged at the end: x (B, C, H, W) → logits (B, classes).

    The patch is the largest that tiles the image into 7 by 7 or more (half the side for images below 14
    pixels).
    """

    def __init__(
        self, input_shape: Sequence[int], classes: int, layers: int = 6, width: int = 192, heads: int = 3
    ) -> None:
        super().__init__()
        channels, height, rest = input_shape
        fewest = min(7, min(height, rest) // 2)
        tiling = [
            size
            for size in range(1, min(height, rest) + 1)
            if height % size == rest % size == 0 and min(height, rest) // size >= fewest
        ]
        patch = max(tiling, default=1)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty((height // patch) * (rest // patch), width))
        self.blocks = blocks(layers, width, heads, causal=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of x (B, C, H, W)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))
