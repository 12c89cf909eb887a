"""Recurrent layers and cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import SEQUENCE, WIDTHS, Shape, channels

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Recurrent(Op):
    """Stacked layers in one or both directions: what they give at every step, or their last states."""

    takes = SEQUENCE
    makes_silence = True

    def __init__(self, cin: int, kind: str, projected: int, give: str, **options: Any) -> None:
        super().__init__()
        more = {"proj_size": projected} if projected else {}
        self.layer = LAYERS[kind](cin, batch_first=True, **options, **more)
        self.give = give

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        kind = choose(list(LAYERS))
        return {
            "cin": channels(shapes[0]),
            "kind": kind,
            "hidden_size": choose(WIDTHS),
            "num_layers": choose([1, 1, 2]),
            "bidirectional": choose([False, False, True]),
            "bias": choose([True, True, False]),
            "projected": choose([0, 0, 3]) if kind == "lstm" else 0,
            "give": choose(["steps", "steps", "last", "all", "turns", "sum"]),
        }

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.layer(x)
        state = state[0] if isinstance(state, tuple) else state
        if self.give == "last":
            return state[-1]
        if self.give == "all":
            return state.transpose(0, 1).flatten(1)
        if self.give == "turns":
            return state.permute(1, 2, 0).flatten(1)
        return state.sum(0) if self.give == "sum" else steps


class Steps(Op):
    """A cell or two, step by step."""

    takes = SEQUENCE
    makes_silence = True

    def __init__(self, cin: int, kind: str, sizes: list[int], bias: bool) -> None:
        super().__init__()
        pairs = zip([cin, *sizes], sizes, strict=False)
        self.cells = nn.ModuleList(CELLS[kind](before, after, bias) for before, after in pairs)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        return {
            "cin": channels(shapes[0]),
            "kind": choose(list(CELLS)),
            "sizes": [choose(WIDTHS) for _ in range(choose([1, 2]))],
            "bias": choose([True, False]),
        }

    def forward(self, x: Tensor) -> Tensor:
        states: list[Any] = [None] * len(self.cells)
        taken = []
        for step in x.unbind(1):
            for place, cell in enumerate(self.cells):
                states[place] = cell(step, states[place])
                step = states[place][0] if isinstance(states[place], tuple) else states[place]
            taken.append(step)
        return torch.stack(taken, 1)
