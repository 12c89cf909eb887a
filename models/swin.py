"""Swin-T (Liu et al. 2021, arXiv:2103.14030), 3x224x224 -> 1000 classes.

For pruning: windows cut and joined by `view` and `permute`, shifts by `roll`, a bias table with one column a head read
through an index buffer, an attention mask over an image's windows, and patch merging that concatenates four slices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def window_partition(x: Tensor, size: int) -> Tensor:
    """(b, h, w, c) -> (b * windows, size * size, c)."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def window_reverse(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    """(b * windows, size * size, c) -> (b, h, w, c)."""
    x = windows.view(-1, h // size, w // size, size, size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, windows.shape[-1])


def relative_position_index(size: int) -> Tensor:
    """(size ** 2, size ** 2): the bias table's row for each pair of positions in a window."""
    row, column = torch.arange(size * size) // size, torch.arange(size * size) % size
    down = row[:, None] - row[None, :] + size - 1
    right = column[:, None] - column[None, :] + size - 1
    return down * (2 * size - 1) + right


def shift_mask(resolution: int, size: int, shift: int) -> Tensor:
    """(windows, size ** 2, size ** 2): -100 between positions that only the shift brought together."""
    regions = torch.zeros(1, resolution, resolution, 1)
    bands = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            regions[:, rows, columns] = 3 * i + j
    windows = window_partition(regions, size).squeeze(-1)
    return (windows[:, None, :] != windows[:, :, None]).float() * -100.0


class WindowAttention(nn.Module):
    def __init__(self, dim: int, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, num_heads))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(size))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(n, n, -1)
        attn = q @ k.transpose(-2, -1) + bias.permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(b // windows, windows, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, n, n)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


class SwinBlock(nn.Module):
    def __init__(self, dim: int, resolution: int, num_heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.size = size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, size, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", shift_mask(resolution, size, shift) if shift > 0 else None)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        out = self.norm1(x)
        if self.shift > 0:
            out = torch.roll(out, (-self.shift, -self.shift), dims=(1, 2))
        out = self.attn(window_partition(out, self.size), self.attn_mask)
        out = window_reverse(out, self.size, h, w)
        if self.shift > 0:
            out = torch.roll(out, (self.shift, self.shift), dims=(1, 2))
        x = x + out
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Each 2x2 patch becomes one position with twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinTransformer(nn.Module):
    def __init__(
        self,
        image_size: int = 224,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.patch_norm = nn.LayerNorm(dim)
        resolution = image_size // 4
        self.layers = nn.Sequential()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            if i > 0:
                self.layers.append(PatchMerging(dim))
                dim, resolution = 2 * dim, resolution // 2
            for j in range(depth):
                shift = window // 2 if j % 2 == 1 and resolution > window else 0
                self.layers.append(SwinBlock(dim, resolution, heads, window, shift))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1))
        x = self.norm(self.layers(x))
        return self.head(x.mean(dim=(1, 2)))


def build_model() -> SwinTransformer:
    return SwinTransformer()


def example_inputs() -> Tensor:
    return torch.randn(2, 3, 224, 224)
