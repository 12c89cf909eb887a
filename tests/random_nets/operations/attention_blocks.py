"""Attention as blocks of known networks: of the library, over windows, over pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import WIDTHS, Shape, is_image, is_sequence


class LibraryAttention(Op):
    """nn.MultiheadAttention and nn.TransformerEncoderLayer."""

    def __init__(self, width: int, heads: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "encoder":
            self.layer = nn.TransformerEncoderLayer(width, heads, 6, 0.0, batch_first=True)
        else:
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True, bias=how != "no_bias")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = shapes[0][1]
        return {
            "width": width,
            "heads": choose([h for h in (2, 3, 4) if width % h == 0]),
            "how": choose(["plain", "weights", "encoder", "no_bias"]),
        }

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return settings["how"] == "encoder" or all(flags)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "encoder":
            return self.layer(x)
        y, _ = self.attention(x, x, x, need_weights=self.how == "weights")
        return x + y


class CrossAttention(Op):
    """nn.MultiheadAttention between two sequences, its outputs added to the first."""

    arity = 2

    def __init__(self, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, kdim=other, vdim=other)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and is_sequence(shapes[1]) and shapes[0][1] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][1], "other": shapes[1][1], "heads": 2}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.attention(x, y, y, need_weights=False)[0]


class WindowAttention(Op):
    """Swin: attention inside windows of 2x2, cyclic shift."""

    def __init__(self, width: int, heads: int, shift: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv = nn.Linear(width, 3 * width)
        self.table = nn.Parameter(torch.empty(9, heads))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1])
        self.proj = nn.Linear(width, width)
        self.heads, self.shift, self.scale = heads, shift, (width // heads) ** -0.5

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] == 4 and shapes[0][0] % 2 == 0

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        width = shapes[0][0]
        heads = choose([h for h in (2, 3, 4) if width % h == 0])
        return {"width": width, "heads": heads, "shift": choose([0, 1]), "norm": choose([False, True])}

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x.permute(0, 2, 3, 1))
        if self.shift:
            y = torch.roll(y, (-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(y.shape[0], 4, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q * self.scale @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).unsqueeze(0)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c)
        y = self.proj(y).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            y = torch.roll(y, (1, 1), (1, 2))
        return x + y.permute(0, 3, 1, 2)


class NonLocal(Op):
    """Self-attention over pixels with 1x1 convolutions."""

    def __init__(self, width: int, inner: int, how: str) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, width, 1)
        self.gamma = nn.Parameter(torch.empty(1))
        self.inner, self.how = inner, how

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_image(shapes[0]) and shapes[0][1] <= 4

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0], "inner": choose(WIDTHS), "how": choose(["view", "flatten", "einsum", "channel"])}

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if self.how == "view":
            q, k, v = (f(x).view(b, self.inner, h * w) for f in (self.query, self.key, self.value))
        else:
            q, k, v = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        if self.how == "einsum":
            scores = torch.einsum("bcn,bcm->bnm", q, k).softmax(-1)
            y = torch.einsum("bnm,bcm->bcn", scores, v)
        elif self.how == "channel":
            y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        else:
            scores = (q.transpose(1, 2) @ k).softmax(-1)
            y = v @ scores.transpose(1, 2)
        y = y.view(b, self.inner, h, w) if self.how == "view" else y.unflatten(2, (h, w))
        return x + self.gamma * self.out(y)
