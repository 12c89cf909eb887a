"""Random networks under random masks: what is folded is exact, what is certain is so, and nothing differs silently."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from random_nets import Net, Program, draw_program, example_inputs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from speedup import ModelSpeedup
from speedup.analysis import Analysis, analyse
from speedup.capture import Captured, attribute, capture
from speedup.constants import Constants
from speedup.masked import exact_defaults
from speedup.masks import _produced_axes
from speedup.numeric import exact, relative_difference

NEAR = 1e-9
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    return draw_program(lambda options: draw(st.sampled_from(options)))


def doubled(values: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, values)


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def check(model: nn.Module, masks: dict[str, Tensor], x: Any, others: list[Any], allowed: Callable[..., bool]) -> str:
    """Whether anything went, was folded or was left; where nothing was left the shrunk model is the masked one.

    No masks are refused: where they leave no rectangle, they are reconciled.
    """
    speedup = ModelSpeedup(model, x, masks)
    small = speedup.speedup_model().eval()
    expected = masked(model, masks)
    if not speedup.left_behind:
        assert speedup.difference is not None and speedup.difference < NEAR
        for inputs in others:
            if allowed(small, inputs):
                with torch.no_grad():
                    pairs = zip(
                        *(pytree.tree_leaves(one(*copy.deepcopy(inputs))) for one in (expected, small)), strict=True
                    )
                assert max(relative_difference(*pair) for pair in pairs) < NEAR
    return "left" if speedup.left_behind else "folded" if speedup.folded else "nothing"


def drawn_masks(analysis: Analysis, model: nn.Module, number: int) -> dict[str, Tensor]:
    """Masks without some channels in all weights that produce them, and in some of the vectors."""
    rng = np.random.default_rng(number)
    free = np.flatnonzero(analysis.classes.pin_of < 0)
    gone = free[rng.random(len(free)) < 0.4]
    masks = {}
    for name, parameter in model.named_parameters():
        if name not in analysis.parameters or (parameter.dim() < 2 and rng.random() < 0.6):
            continue
        mask = torch.ones_like(parameter)
        for dims, classes in _produced_axes(analysis, name):
            mask.movedim(dims, tuple(range(len(dims))))[torch.from_numpy(np.isin(classes, gone))] = 0
        if not mask.all():
            masks[name] = mask
    return masks


def check_program(program: Program, number: int) -> str:
    model = Net(program).double().eval()
    x = doubled(example_inputs(program))
    masks = drawn_masks(analyse(capture(model, x)), model, number)
    others = [doubled(example_inputs(program, batch=batch, seed=batch)) for batch in (1, 3, 5)]
    return check(model, masks, x, others, lambda *_: True) if masks else "nothing"


@settings(max_examples=12, derandomize=True, **COMMON)
@given(programs(), st.integers(0, 1000))
def test_random_networks_under_masks(program: Program, number: int) -> None:
    check_program(program, number)


@pytest.mark.slow
@seed(20261120)
@settings(max_examples=500, database=None, **COMMON)
@given(programs(), st.integers(0, 1000))
def test_more_random_networks_under_masks(program: Program, number: int) -> None:
    check_program(program, number)


class Block(nn.Module):
    """A convolution and what may come after it, at any size of the image."""

    def __init__(self, choose: Callable[[list[Any]], Any], before: int, after: int) -> None:
        super().__init__()
        kernel, mode = choose([1, 1, 3]), choose(["zeros", "zeros", "reflect", "replicate"])
        pad = choose([0, kernel // 2])
        up = nn.ConvTranspose2d(before, after, kernel, stride=choose([1, 2]), padding=pad)
        groups, bias = choose([1, 1, 1, 2]), choose([True, True, False])
        down = nn.Conv2d(before, after, kernel, padding=pad, padding_mode=mode if pad else "zeros", bias=bias)
        if groups > 1 and before % 2 == 0:
            down = nn.Conv2d(before, after, kernel, padding=pad, groups=groups, bias=bias)
        norms = [nn.BatchNorm2d(after), nn.BatchNorm2d(after, track_running_stats=False), nn.GroupNorm(2, after)]
        norms += [nn.InstanceNorm2d(after, affine=True), nn.Identity(), nn.BatchNorm2d(after), nn.Identity()]
        steps = [nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Hardswish(), nn.PReLU(after), nn.Softplus()]
        pools = [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), nn.LPPool2d(2, 2)]
        pools += [nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Upsample(scale_factor=2, mode="bilinear")]
        self.conv = choose([*[down] * 7, up])
        self.norm, self.step = choose(norms), choose(steps)
        self.pool = choose([*[nn.Identity()] * 5, *pools])
        depthwise = nn.Conv2d(after, after, 3, groups=after, padding=choose([0, 1]))
        self.depthwise = choose([nn.Identity(), nn.Identity(), depthwise])
        self.gate = nn.Conv2d(after, after, 1) if choose([False] * 5 + [True]) else None
        self.residual = choose([False, False, True])

    def forward(self, x: Tensor) -> Tensor:
        y = self.step(self.norm(self.conv(x)))
        if self.gate is not None:
            y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        if self.residual and x.shape == y.shape:
            y = y + x
        return self.depthwise(self.pool(y))  # type: ignore[no-any-return]  # a module gives anything


class Chain(nn.Module):
    """Blocks, one of them perhaps twice, and a head."""

    def __init__(self, number: int) -> None:
        super().__init__()
        choose = random.Random(number).choice
        widths = [3, *(choose([4, 6, 6]) for _ in range(choose([2, 3, 4])))]
        self.blocks = nn.ModuleList(Block(choose, before, after) for before, after in itertools.pairwise(widths))
        self.twice = widths[-1] == widths[-2] and choose([False, True])
        self.head = choose(["mean", "map", "maximum"])
        self.out = nn.Conv2d(widths[-1], 2, 1) if self.head == "map" else nn.Linear(widths[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks[-1:]] if self.twice else self.blocks:
            x = block(x)
        if self.head != "map":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1) if self.head == "mean" else x.amax((2, 3))
        return self.out(x)  # type: ignore[no-any-return]  # a module gives anything


def chain(number: int) -> tuple[Chain, dict[str, Tensor]]:
    """A chain with weights in general position, and masks without the same channels in all layers of a width."""
    torch.manual_seed(number)
    model = Chain(number).double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) / 2)
    gone = {width: torch.rand(width) < 0.4 for width in (4, 6)}
    masks = {}
    for name, parameter in model.blocks.named_parameters(prefix="blocks"):
        owner = model.get_submodule(name.rpartition(".")[0])
        dim = 1 if isinstance(owner, nn.ConvTranspose2d) and parameter.dim() > 1 else 0
        if (parameter.dim() > 1 or torch.rand(()) < 0.4) and parameter.shape[dim] in gone:
            masks[name] = torch.ones_like(parameter)
            masks[name].movedim(dim, 0)[gone[parameter.shape[dim]]] = 0
    return model, masks


def runs(model: nn.Module, x: Tensor) -> bool:
    """Whether enough places are left of an image for what comes after, norms with statistics of their own above all."""
    try:
        with torch.no_grad():
            model(x)
    except (RuntimeError, ValueError):
        return False
    return True


def check_chain(number: int) -> str:
    """As for any network; the own class is compared with larger images, too."""
    model, masks = chain(number)
    x, *others = (
        torch.randn(*shape).double() for shape in ((2, 3, 12, 12), (1, 3, 12, 12), (3, 3, 12, 12), (2, 3, 20, 23))
    )
    if not runs(model, x):
        return "nothing"
    others = [(other,) for other in others if runs(model, other)]
    return check(model, masks, x, others, lambda small, y: isinstance(small, Chain) or y[0].shape[2:] == x.shape[2:])


def test_random_chains_at_other_sizes() -> None:
    found = [check_chain(number) for number in range(12)]
    assert found.count("folded") > 1 and found.count("left") > 1


@pytest.mark.slow
def test_more_random_chains_at_other_sizes() -> None:
    found = [check_chain(number) for number in range(12, 400)]
    assert found.count("folded") > 60


def constants(captured: Captured, inputs: Any) -> Constants:
    state, given = Constants(), iter(inputs)
    with exact_defaults(), torch.no_grad():
        for node in captured.nodes:
            if node.op == "placeholder":
                state.give(node, exact(next(given)).clone(), varies=True)
            elif node.op == "get_attr":
                state.give(node, exact(attribute(captured.graph_module, str(node.target))), varies=False)
            elif node.op == "call_function":
                state.run(node)
    return state


def check_certain(program: Program, number: int) -> None:
    """All that is certain is the same for two inputs."""
    model = Net(program).double().eval()
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or number % 3 == 0:
                parameter[torch.rand(parameter.shape[:1], generator=generator) < 0.4] = 0
    captured = capture(model, doubled(example_inputs(program)))
    one, other = (constants(captured, doubled(example_inputs(program, seed=seed))) for seed in (1, 2))
    for node in captured.nodes:
        held = [pytree.tree_leaves(state.values.get(node.name)) for state in (one, other)]
        masks = [pytree.tree_leaves(state.varies.get(node.name)) for state in (one, other)]
        for first, second, varies, again in zip(*held, *masks, strict=True):
            if isinstance(first, Tensor) and first.shape == second.shape:
                certain = ~varies & ~again
                torch.testing.assert_close(first[certain], second[certain], rtol=1e-7, atol=1e-9, equal_nan=True)


@settings(max_examples=15, derandomize=True, **COMMON)
@given(programs(), st.integers(0, 1000))
def test_what_is_certain_does_not_depend_on_the_inputs(program: Program, number: int) -> None:
    check_certain(program, number)


@pytest.mark.slow
@seed(20261120)
@settings(max_examples=500, database=None, **COMMON)
@given(programs(), st.integers(0, 1000))
def test_more_of_what_is_certain_does_not_depend_on_the_inputs(program: Program, number: int) -> None:
    check_certain(program, number)
