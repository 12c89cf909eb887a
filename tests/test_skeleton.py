"""Models without weights, on the meta device: they are captured and planned as those with weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.checkpoints.skeleton import Skeleton
from graphprune.criteria import CRITERIA
from graphprune.dependency import find_dependencies
from graphprune.select import select
from speedup.analysis import analyse
from speedup.capture import capture
from speedup.errors import CaptureError
from speedup.plan import ShrinkPlan
from speedup.planning import make_plan

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

IDS = torch.arange(24).reshape(2, 12)


def small(llama: Any, **changed: Any) -> Callable[[], nn.Module]:
    config = replace(
        llama.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=8), **changed
    )
    return lambda: llama.Llama(config)


class Buffers(nn.Module):
    """A buffer that is computed, two names for one parameter, and a constant index."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.mid = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.mid.weight
        self.down = nn.Linear(16, 4)
        self.register_buffer("order", torch.arange(15, -1, -1), persistent=False)
        self.register_buffer("scale", torch.linspace(1, 2, 16), persistent=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.mid(self.up(x).relu() * self.scale).relu())
        return self.down(x[:, self.order].relu())


def plan_of(model: nn.Module, example: Any) -> ShrinkPlan:
    analysis = analyse(capture(model, example))
    dependencies = find_dependencies(analysis)
    return make_plan(analysis, select(dependencies, CRITERIA["random"](analysis), 0.5).live)


def test_a_model_without_weights_gets_the_plan_of_one_with_weights(llama: Any) -> None:
    with torch.device("meta"):
        hollow = small(llama)()
    assert plan_of(hollow, IDS).to_json() == plan_of(small(llama)(), IDS).to_json()


def test_what_needs_numbers_says_that_there_are_none(llama: Any) -> None:
    with torch.device("meta"):
        hollow = small(llama)()
    with pytest.raises(CaptureError, match="meta device and holds nothing"):
        graphprune.compress(hollow, IDS)


def test_twice_the_layers_are_twice_the_work(llama: Any) -> None:
    def calls(layers: int) -> int:
        with torch.device("meta"):
            captured = capture(small(llama, num_hidden_layers=layers)(), IDS)
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        sys.setprofile(counted)
        try:
            analysis = analyse(captured)
            dependencies = find_dependencies(analysis)
            make_plan(analysis, select(dependencies, CRITERIA["random"](analysis), 0.5).live)
        finally:
            sys.setprofile(None)
        return count

    few, some, many = calls(2), calls(4), calls(8)
    assert many - some == pytest.approx(2 * (some - few), rel=0.02)


def test_a_skeleton_has_shapes_ties_and_buffers() -> None:
    skeleton = Skeleton.of(Buffers)
    assert all(tensor.is_meta for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers()))
    assert skeleton.model.again.weight is skeleton.model.mid.weight
    assert torch.equal(skeleton.buffers["scale"], Buffers().scale)
    assert not any(parameter.is_meta for parameter in Buffers().parameters())
