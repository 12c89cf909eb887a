"""The contract: what a plan keeps, how it cuts a tensor, its way to JSON and back, and from what lives to a plan and back."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_rules import Net, conv, image, tokens
from test_rules_contraction import Attention
from torch import nn

from graphprune.criteria import CRITERIA
from graphprune.dependency import find_dependencies
from graphprune.evidence import Evidence
from graphprune.select import select
from speedup.analysis import Analysis, analyse
from speedup.capture import capture
from speedup.cut import shrink_graph
from speedup.errors import PlanError
from speedup.plan import Axis, Scaled, ShrinkPlan
from speedup.planning import live_from_keep, make_plan


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def test_cut_keeps_indices_along_each_axis_in_their_order() -> None:
    plan = ShrinkPlan({Axis("w", 0): ints(2, 0), Axis("w", 1): ints(1), Axis("v", 0): ints(3)})
    assert plan.cut("w", numbered(3, 2)).tolist() == [[5], [1]]
    assert plan.cut("v", numbered(4)).tolist() == [3]
    assert plan.cut("u", numbered(2)).tolist() == [0, 1]


def test_cut_gathers_the_rows_of_a_grouped_weight() -> None:
    plan = ShrinkPlan({Axis("w", 0): ints(0, 3)}, {"w": np.array([[1], [0]])})
    assert plan.cut("w", numbered(4, 2)).tolist() == [[1], [6]]
    assert plan.cut("w", numbered(4, 2, 2)).tolist() == [[[2, 3]], [[12, 13]]]


def test_cut_is_a_copy_that_leaves_the_tensor_as_it_was() -> None:
    dense = numbered(3, 2)
    ShrinkPlan({Axis("w", 0): ints(1)}).cut("w", dense).zero_()
    assert dense.equal(numbered(3, 2))


@pytest.mark.parametrize(
    "plan",
    [
        ShrinkPlan({Axis("w", 0): ints(0, 3)}),
        ShrinkPlan({Axis("w", 0): ints(-1, 0)}),
        ShrinkPlan({Axis("w", 2): ints(0)}),
        ShrinkPlan({}, {"w": np.array([[0], [0]])}),
        ShrinkPlan({}, {"w": np.array([[0], [2], [0]])}),
    ],
)
def test_a_plan_that_does_not_fit_names_the_tensor(plan: ShrinkPlan) -> None:
    with pytest.raises(PlanError, match=r"^w: the plan keeps .* Use the model that the plan was made for\."):
        plan.cut("w", numbered(3, 2))


def test_tensors_are_those_that_shrink() -> None:
    plan = ShrinkPlan({Axis("a", 0): ints(0), Axis("a", 1): ints(0)}, {"b": np.array([[0]])}, {"view": {"shape": [1]}})
    assert plan.tensors == {"a", "b"}


def test_axes_are_ordered_by_tensor_and_dimension() -> None:
    assert sorted([Axis("b", 0), Axis("a", 1), Axis("a", 0)]) == [Axis("a", 0), Axis("a", 1), Axis("b", 0)]


PLAN = ShrinkPlan(
    {Axis("a.weight", 1): ints(0, 2), Axis("a.weight", 0): ints(1)},
    {"g.weight": np.array([[0, 1], [1, 2]])},
    {
        "view": {"shape": [Scaled(4, 6), -1, 3]},
        "sdpa": {"scale": 0.25},
        "index": {"indices": [None, [1, 0]]},
        "conv": {"groups": 2},
    },
)


def test_to_json_is_plain() -> None:
    assert PLAN.to_json() == {
        "keep": {"a.weight": {"0": [1], "1": [0, 2]}},
        "rows": {"g.weight": [[0, 1], [1, 2]]},
        "literals": {
            "view": {"shape": [{"new": 4, "old": 6}, -1, 3]},
            "sdpa": {"scale": 0.25},
            "index": {"indices": [None, [1, 0]]},
            "conv": {"groups": 2},
        },
    }


def test_from_json_gives_the_plan_back() -> None:
    again = ShrinkPlan.from_json(json.loads(json.dumps(PLAN.to_json())))
    assert again.to_json() == PLAN.to_json()
    assert again.literals == PLAN.literals
    assert {axis: kept.tolist() for axis, kept in again.keep.items()} == {
        Axis("a.weight", 0): [1],
        Axis("a.weight", 1): [0, 2],
    }
    assert again.rows["g.weight"].dtype == np.int64


def test_an_empty_plan_is_a_plan() -> None:
    assert ShrinkPlan.from_json(ShrinkPlan().to_json()) == ShrinkPlan()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"keep": {}, "rows": {}},
        {"keep": [], "rows": {}, "literals": {}},
        {"keep": {"a": {"x": [0]}}, "rows": {}, "literals": {}},
        {"keep": {"a": {"0": ["one"]}}, "rows": {}, "literals": {}},
        {"keep": {}, "rows": {}, "literals": {"view": {"shape": [{"new": 1}]}}},
    ],
)
def test_what_is_no_plan_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"^plan: is not the plan of a shrunk model .* Compress the model again\.$"):
        ShrinkPlan.from_json(data)


def conv_net() -> nn.Module:
    return nn.Sequential(
        conv(3, 12),
        nn.BatchNorm2d(12),
        conv(12, 12, groups=3),
        nn.GroupNorm(3, 12),
        conv(12, 12, groups=6),
        nn.Flatten(),
        nn.Linear(432, 2),
    )


def cat_net() -> nn.Module:
    return Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), o=conv(10, 2))


NETS = {"conv": (conv_net, image), "cat": (cat_net, image), "attention": (Attention, tokens)}


def analysed(name: str) -> Analysis:
    torch.manual_seed(0)
    build, example = NETS[name]
    return analyse(capture(build().eval(), example()))


def test_a_plan_that_keeps_all_is_empty() -> None:
    analysis = analysed("conv")
    live = np.ones(analysis.classes.count, dtype=np.bool_)
    assert make_plan(analysis, live) == ShrinkPlan()
    assert live_from_keep(analysis, ShrinkPlan()).all()


@pytest.mark.parametrize("name", NETS)
def test_a_plan_says_what_lives(name: str) -> None:
    analysis = analysed(name)
    for seed in range(3):
        live = select(find_dependencies(analysis), CRITERIA["random"](analysis, Evidence(seed)), 0.5).live
        plan = make_plan(analysis, live)
        assert not live.all()
        assert (live_from_keep(analysis, plan) == live).all()
        again = ShrinkPlan.from_json(json.loads(json.dumps(plan.to_json())))
        assert make_plan(analysis, live_from_keep(analysis, again)).to_json() == plan.to_json()


@pytest.mark.parametrize("name", NETS)
def test_a_plan_from_json_shrinks_like_the_one_it_was(name: str) -> None:
    analysis = analysed(name)
    plan = make_plan(analysis, select(find_dependencies(analysis), CRITERIA["l1"](analysis), 0.5).live)
    again = ShrinkPlan.from_json(json.loads(json.dumps(plan.to_json())))
    x = NETS[name][1]()
    first, second = (shrink_graph(analysis.captured, p).eval() for p in (plan, again))
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x[:1]), second(x[:1]))


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^elsewhere: the plan keeps channels of it"):
        live_from_keep(analysed("cat"), ShrinkPlan({Axis("elsewhere", 0): ints(0)}))


def test_literals_are_only_those_that_change() -> None:
    torch.manual_seed(0)
    net = Net(lambda n, x: n.o(n.a(x).flatten(1).view(-1, 288).unflatten(1, (8, 6, 6))), a=conv(3, 8), o=conv(8, 2))
    analysis = analyse(capture(net.eval(), image()))
    live = select(find_dependencies(analysis), CRITERIA["l1"](analysis), 0.5).live
    assert make_plan(analysis, live).literals == {"view": {"shape": [-1, 144]}, "unflatten": {"sizes": [4, 6, 6]}}


def test_the_batch_in_a_size_is_scaled() -> None:
    torch.manual_seed(0)
    analysis = analyse(capture(Attention("merged with the batch").eval(), tokens()))
    live = select(find_dependencies(analysis), CRITERIA["l1"](analysis), 0.5).live
    literals = make_plan(analysis, live).literals
    assert literals["reshape"] == {"shape": [Scaled(2, 6), 5, 4]}
    assert Scaled(1, 1) not in literals["view"]["shape"]
