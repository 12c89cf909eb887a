"""Tokens and their positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, is_sequence


class Embedding(Op):
    """Token ids to a sequence: only ever the first step."""

    makes_silence = True

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids)


class Tokens(Op):
    """Class token, position embedding, or a choice of positions."""

    def __init__(self, count: int, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "class":
            self.token = nn.Parameter(torch.empty(1, 1, width))
        if how == "positions":
            self.embedding = nn.Parameter(torch.empty(1, count, width))
        if how == "lookup":
            self.embedding = nn.Embedding(count + 1, width)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and 1 < shapes[0][0] <= 16

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        how = choose(["class", "positions", "lookup", "tail", "reverse"])
        return {"count": shapes[0][0], "width": shapes[0][1], "how": how}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "class":
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.how == "positions":
            return x + self.embedding
        if self.how == "lookup":
            return x + self.embedding(torch.arange(x.shape[1]))
        return x[:, 1:] if self.how == "tail" else x.flip(1)
