"""Transformer encoder (Vaswani et al. 2017, arXiv:1706.03762) as a text classifier, 128 token ids -> 4 classes.

For pruning: `nn.MultiheadAttention` with a padding mask, whose packed q, k, v weight is used outside any Linear;
post-norm residual sums; sinusoidal positions in a buffer; a mean over the tokens that are not padding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sines on the even columns, cosines on the odd ones (section 3.5)."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout(attended))
        out = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(out))


class TextClassifier(nn.Module):
    def __init__(
        self,
        vocabulary: int = 30522,
        length: int = 128,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        num_classes: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=PADDING)
        self.positions: Tensor
        self.register_buffer("positions", sinusoids(length, dim))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, 4 * dim, dropout) for _ in range(depth))
        self.classifier = nn.Linear(dim, num_classes)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == PADDING
        x = self.embedding(ids) * math.sqrt(self.dim) + self.positions[: ids.size(1)]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)
        return self.classifier((x * kept).sum(1) / kept.sum(1))


def build_model() -> TextClassifier:
    return TextClassifier()


def example_inputs() -> Tensor:
    ids = torch.randint(1, 30522, (2, 128))
    ids[1, 100:] = PADDING
    return ids
