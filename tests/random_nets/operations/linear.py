"""Linear layers and perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import IMAGE, SEQUENCE, VECTOR, WIDTHS, Shape, channels


class Linear(Op):
    """A linear layer over channels."""

    takes = SEQUENCE | VECTOR
    space = "keeps"
    makes_silence = True

    def __init__(self, cin: int, cout: int, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(cin, cout, bias)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"cin": channels(shapes[0]), "cout": choose(WIDTHS), "bias": choose([True, False])}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Mlp(Op):
    """The perceptron of a transformer, plain or gated, with its shortcut."""

    takes = SEQUENCE | VECTOR
    space = "keeps"

    def __init__(self, width: int, hidden: int, gated: str) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(width, hidden if gated in ("no", "separate") else 2 * hidden)
        self.gate = nn.Linear(width, hidden) if gated == "separate" else None
        self.fc2 = nn.Linear(hidden, width)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "width": channels(shapes[0]),
            "hidden": choose(WIDTHS),
            "gated": choose(["no", "separate", "chunk", "glu"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.gate is not None:
            y = F.silu(self.gate(x)) * y
        elif self.gated == "chunk":
            a, b = y.chunk(2, dim=-1)
            y = a * F.gelu(b)
        elif self.gated == "glu":
            y = F.glu(y, -1)
        else:
            y = F.gelu(y)
        return x + self.fc2(y)


class ChannelsLastMlp(Op):
    """ConvNeXt: permute, layer norm, linear, gelu, linear, scale, permute, add."""

    takes = IMAGE
    space = "keeps"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.empty(width))

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"width": shapes[0][0], "hidden": choose(WIDTHS)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class TokenMixing(Op):
    """MLP mixer: linear over the positions."""

    takes = SEQUENCE

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(tokens, hidden)
        self.fc2 = nn.Linear(hidden, tokens)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {"tokens": shapes[0][0], "hidden": choose(WIDTHS)}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return False  # the biases of positions reach every channel

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)
