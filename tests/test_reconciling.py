"""Masks that leave no rectangle: the most goes that they allow, the rest stays multiplied by them, and it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from random_nets import Net as RandomNet
from random_nets import Program, example_inputs
from scipy.optimize import Bounds, LinearConstraint, milp
from test_masks import masked
from test_masks_random import COMMON, doubled, drawn_masks, programs
from test_rules import Net, conv, image, tokens
from torch import Tensor, nn

from speedup import ModelSpeedup
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.flow import Block
from speedup.labels import Index, Mask
from speedup.masks import produced_channels
from speedup.planning import make_plan
from speedup.reconciling import reconcile


def shrunk(build: Callable[[], nn.Module], x: Tensor, gone: Mapping[str, list[int]]) -> tuple[Any, dict[str, int]]:
    """The model without what masks on the weights of layers allow to go, and what was reconciled."""
    torch.manual_seed(0)
    model = build()
    masks = {}
    for layer, outputs in gone.items():
        for name, parameter in model.get_submodule(layer).named_parameters(prefix=layer):
            masks[name] = torch.ones_like(parameter)
            masks[name][outputs] = 0
    speedup = ModelSpeedup(model, x, masks)
    small = speedup.speedup_model()
    again = ModelSpeedup(model, x, masks)
    assert again.plan.to_json() == speedup.plan.to_json()
    assert not speedup.left_behind and speedup.difference is not None and speedup.difference < 1e-5
    torch.testing.assert_close(small(x), masked(model, masks)(x), rtol=1e-4, atol=1e-5)
    return small, {name.removesuffix(".weight"): n for name, n in speedup.reconciled.items() if name.endswith("weight")}


def test_as_many_go_from_each_group_as_from_the_group_with_the_fewest_masked() -> None:
    def build() -> nn.Module:
        return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6, groups=2), nn.ReLU(), conv(6, 2))

    small, told = shrunk(build, image(), {"0": [0, 1, 2, 5], "2": [0, 4, 5]})
    assert small[0].weight.shape[0] == 6 and small[2].weight.shape[:2] == (4, 3) and small[2].groups == 2
    assert told == {"0": 2, "2": 1}


def test_a_group_of_which_everything_is_masked_stays_where_the_convolution_makes_something_of_it() -> None:
    def build() -> nn.Module:
        return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6, groups=2, bias=False), nn.ReLU(), conv(6, 2))

    small, told = shrunk(build, image(), {"0": [0, 1, 2, 3, 5]})
    assert small[0].weight.shape[0] == 6 and small[2].groups == 2 and told == {"0": 3}
    small, told = shrunk(build, image(), {"0": [0, 1, 2, 3, 5], "2": [0, 1, 2, 4]})
    assert small[0].weight.shape[0] == 3 and small[2].weight.shape[:2] == (2, 3) and told == {"0": 0, "2": 0}


@pytest.mark.parametrize(
    ("gone", "channels", "outputs", "told"),
    [
        ({"0": [1, 3]}, 4, 12, {"0": 2}),  # what is made of them stays
        ({"0": [1, 3], "2": [3, 4, 5]}, 3, 9, {"0": 1, "2": 0}),  # all that is made of one goes
        ({"0": [1, 3], "2": [3, 4, 5, 9, 10]}, 3, 9, {"0": 1, "2": 2}),
        ({"0": [1], "2": [0, 3, 4, 5, 7, 11]}, 3, 6, {"0": 0, "2": 0}),  # of the others one each
    ],
)
def test_a_depthwise_convolution_with_three_outputs_for_each_input(
    gone: dict[str, list[int]], channels: int, outputs: int, told: dict[str, int]
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 12, groups=4, bias=False), nn.ReLU(), conv(12, 2))

    small, found = shrunk(build, image(), gone)
    assert small[0].weight.shape[0] == channels and small[2].weight.shape[0] == outputs and found == told


def test_what_convolution_and_depthwise_convolution_both_mask_goes() -> None:
    def build() -> nn.Module:
        return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 6, groups=6), nn.ReLU(), conv(6, 2))

    small, told = shrunk(build, image(), {"0": [1, 2, 3], "2": [2, 3, 4, 5]})
    assert small[0].weight.shape[0] == small[2].groups == 4 and told == {"0": 1, "2": 2}


def attend(net: Any, x: Tensor) -> Tensor:
    """Attention of three heads, four wide, of which each has a temperature of its own."""
    q, k, v = (layer(x).view(len(x), 5, 3, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
    weights = (q @ k.transpose(-2, -1) * net.temperature).softmax(-1)
    out: Tensor = net.o((weights @ v).transpose(1, 2).reshape(len(x), 5, 12))
    return out


def attention() -> nn.Module:
    parts = {name: nn.Linear(12, 12) for name in "qkvo"}
    return Net(attend, temperature=nn.Parameter(torch.rand(3, 1, 1) + 0.5), **parts)


@pytest.mark.parametrize(
    ("gone", "width", "value_width", "told"),
    [
        # of the heads 2, 1 and 3 dimensions
        ({"q": [0, 1, 4, 8, 9, 10], "k": [0, 1, 4, 8, 9, 10]}, 9, 12, {"q": 3, "k": 3}),
        # queries and keys agree on 0, 4 and 8
        ({"q": [0, 1, 4, 5, 8], "k": [0, 4, 8, 9]}, 9, 12, {"q": 2, "k": 1}),
        # all of a head, of which the values stay
        ({"q": [4, 5, 6, 7], "k": [4, 5, 6, 7]}, 12, 12, {"q": 4, "k": 4}),
        # all of a head; one dimension of each of the others
        ({"q": [0, 4, 5, 6, 7, 8], "k": [0, 4, 5, 6, 7, 8], "v": [4, 5, 6, 7]}, 6, 8, {"q": 0, "k": 0, "v": 0}),
    ],
)
def test_heads_that_disagree(gone: dict[str, list[int]], width: int, value_width: int, told: dict[str, int]) -> None:
    small, found = shrunk(attention, tokens(), gone)
    assert small.q.weight.shape[0] == small.k.weight.shape[0] == width and small.v.weight.shape[0] == value_width
    assert found == told and len(small.temperature) == (2 if value_width == 8 else 3)


def test_a_head_whose_temperature_alone_is_masked_stays() -> None:
    model = attention()
    speedup = ModelSpeedup(model, tokens(), {"temperature": torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1)})
    small: Any = speedup.speedup_model()
    assert small.temperature.shape == (3, 1, 1) and not small.temperature[1].any()
    assert speedup.reconciled == {"temperature": 1} and speedup.difference == 0


def test_the_fewest_come_back_with_which_a_shuffle_takes_turns() -> None:
    """Merged they are 0 4 1 5 2 6 3 7; 0 1 6 7 take turns with 4 between the first two and 3 between the others."""

    def build() -> nn.Module:
        return nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.ReLU(), conv(8, 2))

    small, told = shrunk(build, image(), {"0": [2, 3, 4, 5]})
    assert small[0].weight.shape[0] == 6 and told == {"0": 2}
    small, told = shrunk(build, image(), {"0": [1, 2, 3, 4, 5, 6]})
    assert small[0].weight.shape[0] == 2 and told == {"0": 0}


class _Fewest:
    """An integer program: the fewest classes that make a plan together with those that are needed."""

    def __init__(self, analysis: Analysis, needed: Mask) -> None:
        self.classes, count = analysis.classes, analysis.classes.count
        self.low, self.high, self.cost = list(needed.astype(float)), [1.0] * count, [1.0] * count
        self.rows: list[tuple[Index, float, float]] = []
        self.entries: list[list[tuple[int, float]]] = []
        for labels in analysis.parameters.values():
            for plane in labels.planes:
                self.keep(self.classes.plane(plane).reshape(-1), 1)
        for part in self.classes.parts:
            self.keep(part.members, part.least)
        for block in self.classes.blocks:
            self.level(block)
        for weave in self.classes.weaves:
            self.take_turns(weave.turns)

    def variable(self, high: float = 1) -> int:
        self.low.append(0)
        self.high.append(high)
        self.cost.append(0)
        return len(self.low) - 1

    def between(self, entries: list[tuple[int, float]], low: float, high: float) -> None:
        self.entries.append(entries)
        self.rows.append((np.array([column for column, _ in entries]), low, high))

    def keep(self, members: Index, least: int) -> None:
        self.between([(int(one), 1) for one in members], least, np.inf)

    def level(self, block: Block) -> None:
        """A row that lives has the number of its block, one that does not has nothing."""
        width, number = block.members.shape[1], self.variable(block.members.shape[1])
        for place, row in enumerate(block.members.tolist()):
            lives = self.variable() if block.slabs is None else int(block.slabs[place])
            self.low[lives] = max(self.low[lives], float(block.every))
            members = [(one, 1.0) for one in row]
            self.between([*members, (lives, -1)], 0, np.inf)
            self.between([*members, (number, -1)], -np.inf, 0)
            self.between([*members, (lives, -width)], -np.inf, 0)
            self.between([*members, (number, -1), (lives, -width)], -width, np.inf)

    def take_turns(self, turns: Index) -> None:
        """Everywhere along a weave the first rows have one more than the others, or all have the same."""
        rows, sequence = turns.shape[1], turns.reshape(-1).tolist()
        for end in range(1, len(sequence) + 1):
            taken = [[(one, 1.0) for one in sequence[row:end:rows]] for row in range(rows)]
            for row in range(rows - 1):
                behind = [(one, -1.0) for one, _ in taken[row + 1]]
                self.between([*taken[row], *behind], 0, 1)
            if rows > 1:
                self.between([*taken[0], *((one, -1.0) for one, _ in taken[-1])], 0, 0 if end == len(sequence) else 1)

    def solve(self) -> int:
        matrix = np.zeros((len(self.entries), len(self.low)))
        for place, entries in enumerate(self.entries):
            for column, value in entries:
                matrix[place, column] += value
        constraints = LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows])
        result = milp(self.cost, constraints=constraints, bounds=Bounds(self.low, self.high), integrality=1)
        assert result.success
        return round(result.fun)


def check_fewest(program: Program, number: int) -> None:
    """No fewer channels can stay: an integer program, which knows nothing of how they are found, says the same."""
    model = RandomNet(program).double().eval()
    analysis = analyse(capture(model, doubled(example_inputs(program))))
    masks = drawn_masks(analysis, model, number)
    if masks and analysis.classes.count < 500:
        needed = produced_channels(analysis, masks)
        live = reconcile(analysis, needed)
        make_plan(analysis, live)
        slabs = [block.slabs for block in analysis.classes.blocks if block.slabs is not None]
        needed[np.concatenate([np.empty(0, dtype=np.int64), *slabs])] = False  # they go with their rows
        needed |= analysis.classes.pin_of >= 0
        assert live.sum() == _Fewest(analysis, needed).solve()


@settings(max_examples=12, derandomize=True, **COMMON)
@given(programs(), st.integers(0, 1000))
def test_nothing_stays_that_need_not(program: Program, number: int) -> None:
    check_fewest(program, number)


@pytest.mark.slow
@seed(20261120)
@settings(max_examples=300, database=None, **COMMON)
@given(programs(), st.integers(0, 1000))
def test_nothing_stays_that_need_not_in_more_networks(program: Program, number: int) -> None:
    check_fewest(program, number)
