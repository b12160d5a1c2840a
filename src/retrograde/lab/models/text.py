"""Text classifiers on token ids, where 0 is padding."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrograde.engine.branches import Residual
from retrograde.lab.models.transformer import blocks


def masked_mean(x: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean (B, D) of x (B, L, D) over the places where tokens (B, L) are not padding."""
    real = (tokens != 0).to(x.dtype).unsqueeze(-1)
    return (x * real).sum(1) / real.sum(1).clamp(min=1)


class TextBag(nn.Module):
    """Mean of word vectors, then two hidden layers: tokens (B, L) → logits (B, classes)."""

    def __init__(self, vocabulary: int, classes: int, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of tokens (B, L)."""
        return self.head(self.body(masked_mean(self.embedding(tokens), tokens)))


class TextResidual(nn.Module):
    """Mean of word vectors, then residual branches of two layers: tokens (B, L) → logits (B, classes)."""

    def __init__(
        self, vocabulary: int, classes: int, width: int = 256, depth: int = 6, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Residual(
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 2 * width),
                        nn.ReLU(),
                        nn.Linear(2 * width, width),
                    )
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of tokens (B, L)."""
        x = self.drop(masked_mean(self.embedding(tokens), tokens))
        return self.head(self.drop(self.norm(self.blocks(x))))


class TextCNN(nn.Module):
    """Convolutions over words, then maxima over the text (Kim 2014): tokens (B, L) → logits (B, classes)."""

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        width: int = 64,
        channels: int = 100,
        sizes: Sequence[int] = (3, 4, 5),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, channels, size, padding=size // 2) for size in sizes
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels * len(sizes), classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of tokens (B, L)."""
        x = self.embedding(tokens).transpose(1, 2)
        features = [F.relu(convolution(x)).amax(-1) for convolution in self.convolutions]
        return self.head(self.dropout(torch.cat(features, dim=-1)))


class TextTransformer(nn.Module):
    """Small transformer encoder, averaged over the words: tokens (B, L) → logits (B, classes).

    Padding is attended to like a word, so that every branch is a map of one tensor; the mean leaves it out.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        classes: int,
        *,
        layers: int = 2,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position = nn.Parameter(torch.empty(length, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = blocks(layers, width, heads, causal=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of tokens (B, L)."""
        x = self.drop(self.embedding(tokens) + self.position[: tokens.shape[1]])
        return self.head(self.drop(masked_mean(self.norm(self.blocks(x)), tokens)))
