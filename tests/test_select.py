"""Which channels stay: shares, rankings, rounding, minima, exclusions, blocks; always the same for the same seed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules import Net, conv, image, one_thread, tokens
from test_rules_contraction import Attention
from torch import nn

import graphprune
from graphprune import DependencyGraph
from graphprune.criteria import CRITERIA, Scores
from graphprune.errors import ConfigError, ModelError
from graphprune.evidence import Evidence
from graphprune.select import Selection, select
from graphprune.targets import Target
from speedup.cut import shrink_graph
from speedup.labels import support
from speedup.planning import make_plan
from speedup.proof import prove


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


def three_layers() -> nn.Sequential:
    """Two groups: ten channels of 0, eight of 1."""
    return nn.Sequential(conv(3, 10), conv(10, 8), conv(8, 2))


def chosen(
    dependencies: DependencyGraph, scores: Scores, sparsity: float, scope: str = "local", **options: Any
) -> Selection:
    target = Target(sparsity, ranking="all" if scope == "global" else None)
    return select(dependencies, scores, lambda group: target, **options)


def axis(dependencies: DependencyGraph, name: str, dim: int) -> np.ndarray:
    """The classes along a dimension of a parameter."""
    analysis = dependencies.analysis
    plane = next(p for p in analysis.parameters[name].planes if support(p) == (dim,))
    return analysis.classes.plane(plane)


def scored(dependencies: DependencyGraph, **values: list[float]) -> Scores:
    """Scores for the channels of layers, by name with underscores for dots; zero elsewhere."""
    scores = np.zeros(dependencies.analysis.classes.count)
    for name, numbers in values.items():
        scores[axis(dependencies, f"{name.removeprefix('_').replace('_', '.')}.weight", 0)] = numbers
    return scores


def kept(dependencies: DependencyGraph, selection: Selection, name: str, dim: int = 0) -> list[int]:
    return np.flatnonzero(selection.live[axis(dependencies, name, dim)]).tolist()


def counts(selection: Selection) -> dict[str, tuple[int, int]]:
    """Asked and kept of the prunable groups, by name."""
    return {c.group.name: (c.asked, c.kept) for c in selection.choices if c.group.pin is None}


TEN = [5.0, 1, 9, 3, 7, 0, 8, 2, 6, 4]
EIGHT = [10.0, 80, 20, 70, 30, 60, 40, 50]


def test_local_takes_the_lowest_of_each_group() -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d, _0=TEN, _1=EIGHT), 0.5)
    assert kept(d, selection, "0.weight") == kept(d, selection, "1.weight", 1) == [0, 2, 4, 6, 8]
    assert kept(d, selection, "1.weight") == kept(d, selection, "2.weight", 1) == [1, 3, 5, 7]
    assert counts(selection) == {"0.weight": (5, 5), "1.weight": (4, 4)}
    assert kept(d, selection, "2.weight") == [0, 1]


@pytest.mark.parametrize(
    ("sparsity", "ten", "eight"),
    [
        (0.0, 10, 8),
        (0.01, 9, 7),
        (0.1, 9, 7),
        (0.3, 7, 5),
        (0.5, 5, 4),
        (0.7, 3, 2),
        (0.75, 2, 2),
        (0.9, 1, 1),
        (0.999, 1, 1),
    ],
)
def test_at_least_the_share_goes_but_never_all(sparsity: float, ten: int, eight: int) -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d, _0=TEN, _1=EIGHT), sparsity)
    assert counts(selection) == {"0.weight": (ten, ten), "1.weight": (eight, eight)}


def test_global_ranks_all_channels_by_their_share_of_the_mean_of_their_group() -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d, _0=TEN, _1=[100.0] * 8), 0.5, scope="global")
    # nine of eighteen go: 0..8 of the first group are below or at twice its mean of 4.5, the others are at their mean
    values = np.array(TEN) / 4.5
    below = int((values < 1).sum())  # 0, 1, 2, 3, 4
    assert counts(selection)["0.weight"][0] == 10 - below
    assert counts(selection)["1.weight"][0] == 8 - (9 - below)
    assert sum(k for _, k in counts(selection).values()) == 9


def test_global_leaves_one_channel_in_every_group() -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d, _0=[0.0] * 9 + [10.0], _1=[1.0] * 8), 0.9, scope="global")
    assert all(k >= 1 for _, k in counts(selection).values())
    assert kept(d, selection, "0.weight") == [9]


def test_global_with_scores_of_nothing_but_zero() -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d), 0.5, scope="global")
    assert sum(k for _, k in counts(selection).values()) == 9


@pytest.mark.parametrize("scope", ["local", "global"])
def test_of_equal_scores_the_first_stay(scope: Any) -> None:
    d = graphprune.trace(three_layers(), image())
    first = chosen(d, scored(d, _0=[1.0] * 10, _1=[1.0] * 8), 0.5, scope=scope)
    again = chosen(d, scored(d, _0=[1.0] * 10, _1=[1.0] * 8), 0.5, scope=scope)
    assert (first.live == again.live).all()
    stay = kept(d, first, "0.weight")
    assert stay == list(range(len(stay)))


@pytest.mark.parametrize(
    ("round_to", "sparsity", "ten", "eight"),
    [
        (1, 0.5, 5, 4),
        (2, 0.5, 4, 4),
        (4, 0.5, 4, 4),
        (3, 0.5, 3, 3),
        (4, 0.9, 4, 4),
        (8, 0.5, 8, 8),
        (16, 0.5, 10, 8),
        (4, 0.1, 8, 8),
        (4, 0.25, 4, 4),
    ],
)
def test_what_stays_is_rounded_down_unless_that_is_too_much(
    round_to: int, sparsity: float, ten: int, eight: int
) -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d, _0=TEN, _1=EIGHT), sparsity, round_to=round_to)
    assert tuple(k for _, k in counts(selection).values()) == (ten, eight)


def test_rounding_says_so() -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d, _0=TEN, _1=EIGHT), 0.5, round_to=4)
    notes = {c.group.name: c.note for c in selection.choices if c.group.pin is None}
    assert notes["0.weight"] == "rounded to a multiple of 4" and notes["1.weight"] is None
    more = chosen(d, scored(d, _0=TEN, _1=EIGHT), 0.9, round_to=4)
    assert {c.note for c in more.choices if c.group.pin is None} == {"kept 4, not 1: a multiple of 4"}


def test_the_width_of_a_head_counts_for_rounding() -> None:
    d = graphprune.trace(Attention(), tokens())
    selection = chosen(d, CRITERIA["l1"](d.analysis), 0.5, round_to=8)
    group = d.prunable[0]
    assert (group.units, group.width) == (3, 4)
    assert counts(selection) == {"q.weight": (1, 2)}  # two heads of four are a multiple of eight


def test_min_channels() -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d, _0=TEN, _1=EIGHT), 0.9, min_channels=3)
    assert counts(selection) == {"0.weight": (1, 3), "1.weight": (1, 3)}
    assert kept(d, selection, "0.weight") == [2, 4, 6]
    heads = graphprune.trace(Attention(), tokens())
    selection = chosen(heads, CRITERIA["l1"](heads.analysis), 0.9, min_channels=5)
    assert counts(selection) == {"q.weight": (1, 2)}  # two heads have eight channels
    assert chosen(d, scored(d), 0.5, min_channels=100).live.all()


def test_min_channels_holds_for_blocks_and_multiples() -> None:
    d = graphprune.trace(nn.Sequential(conv(3, 8), conv(8, 8, groups=2), conv(8, 2)), image())
    selection = chosen(d, CRITERIA["l1"](d.analysis), 0.7, min_channels=6)
    assert [k for _, k in counts(selection).values()] == [6, 6]
    d = graphprune.trace(three_layers(), image())
    assert [k for _, k in counts(chosen(d, scored(d), 0.9, min_channels=5, round_to=4)).values()] == [8, 8]


def test_a_criterion_without_an_opinion_leaves_a_group_alone() -> None:
    net = nn.Sequential(conv(3, 10), nn.BatchNorm2d(10), conv(10, 8), conv(8, 2))
    d = graphprune.trace(net, image())
    selection = chosen(d, CRITERIA["bn_scale"](d.analysis), 0.5)
    assert counts(selection) == {"0.weight": (5, 5), "2.weight": (8, 8)}
    notes = {c.group.name: c.note for c in selection.choices if c.group.pin is None}
    assert notes["2.weight"] == "the criterion has no score for it"


@pytest.mark.parametrize("ranking", [None, "all"])
def test_groups_of_which_nothing_is_asked_stay_with_their_reason(ranking: str | None) -> None:
    d = graphprune.trace(three_layers(), image())
    target = Target(0.5, ranking=ranking)
    selection = select(d, scored(d, _0=TEN, _1=EIGHT), lambda group: "because" if group.name == "0.weight" else target)
    assert counts(selection) == {"0.weight": (10, 10), "1.weight": (4, 4)}
    assert next(c.note for c in selection.choices if c.group.name == "0.weight" and c.group.pin is None) == "because"


def test_pinned_groups_stay_with_their_reason() -> None:
    d = graphprune.trace(three_layers(), image())
    selection = chosen(d, scored(d), 0.9)
    pinned = {
        c.group.name: c.note for c in selection.choices if c.group.pin is not None and "kernel" not in str(c.note)
    }
    assert pinned["2.weight"] == "is an output of the model (output)"
    assert all(c.kept == c.asked == c.group.units for c in selection.choices if c.group.pin is not None)


# Blocks.


def in_groups() -> nn.Sequential:
    return nn.Sequential(conv(3, 12), conv(12, 12, groups=3), nn.GroupNorm(2, 12), conv(12, 2))


def test_every_row_of_a_block_keeps_the_same_number_and_the_best() -> None:
    d = graphprune.trace(nn.Sequential(conv(3, 8), conv(8, 8, groups=2), conv(8, 2)), image())
    scores = scored(d, _0=[9, 8, 7, 6, 1, 2, 3, 4])
    selection = chosen(d, scores, 0.5)
    assert kept(d, selection, "0.weight") == [0, 1, 6, 7]


def test_heads_go_whole_and_the_best_stay() -> None:
    d = graphprune.trace(Attention(), tokens())
    scores = np.zeros(d.analysis.classes.count)
    scores[axis(d, "v.weight", 0)] = [1] * 4 + [3] * 4 + [2] * 4
    selection = chosen(d, scores, 0.5)
    assert kept(d, selection, "q.weight") == kept(d, selection, "o.weight", 1) == [4, 5, 6, 7]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sparsity=st.floats(0, 0.95),
    round_to=st.sampled_from([1, 2, 4]),
    scope=st.sampled_from(["local", "global"]),
)
def test_whatever_is_selected_is_rectangular_and_can_be_proven(
    seed: int, sparsity: float, round_to: int, scope: Any
) -> None:
    d = GROUPED
    analysis = d.analysis
    selection = chosen(d, CRITERIA["random"](analysis, Evidence(seed)), sparsity, round_to=round_to, scope=scope)
    for choice in selection.choices:
        keep = np.ones(choice.group.units, dtype=np.bool_)
        keep[choice.group.unit_of] = selection.live[choice.group.classes]
        assert all(len({*(table @ keep).tolist()} - {0}) <= 1 for table in choice.group.counts)
        assert keep[choice.group.locked].all() and keep.sum() == choice.kept >= 1
        if choice.group.pin is None and choice.note is None:
            assert choice.kept == choice.asked
    plan = make_plan(analysis, selection.live)
    prove(analysis, selection.live, plan, shrink_graph(analysis.captured, plan))


torch.manual_seed(0)
GROUPED = graphprune.trace(in_groups(), image())


def test_no_axis_is_emptied() -> None:
    net = Net(
        lambda n, x: n.o(n.n(torch.cat([n.a(x), n.b(x)], 1))),
        a=conv(3, 6),
        b=conv(3, 6),
        n=nn.GroupNorm(4, 12),
        o=conv(12, 2),
    )
    d = graphprune.trace(net, image())
    scores = scored(d, a=[9.0] * 6, b=[0.1] * 6)
    for sparsity in (0.5, 0.8, 0.95):
        selection = chosen(d, scores, sparsity)
        assert kept(d, selection, "a.weight") and kept(d, selection, "b.weight")


# Asked by name.


def compressed(**options: Any) -> tuple[dict[str, Any], list[int]]:
    result = graphprune.compress(three_layers(), image(), 0.5, round_to=1, **options)
    return {g["name"]: g for g in result.report["groups"]}, [
        p.shape[0] for n, p in result.model.named_parameters() if "weight" in n
    ]


def test_exclude() -> None:
    groups, shapes = compressed(exclude=("0",))
    assert shapes == [10, 4, 2] and groups["0.weight"]["note"] == "excluded by name (0)"
    assert compressed(exclude=("1",))[1] == [5, 8, 2]
    assert compressed(exclude=("2",))[1] == [5, 4, 2]  # its inputs may go


def test_only() -> None:
    groups, shapes = compressed(only=("1",))
    assert shapes == [10, 4, 2] and groups["0.weight"]["note"] == "not among the modules asked for"
    assert compressed(only=("[01]",))[1] == [5, 4, 2]


def test_exclude_wins_over_only() -> None:
    assert compressed(only=("*",), exclude=("1",))[1] == [5, 8, 2]


def test_a_name_means_everything_inside() -> None:
    net = nn.Sequential(nn.Sequential(conv(3, 10), nn.ReLU()), conv(10, 8), conv(8, 2))
    result = graphprune.compress(net, image(), 0.5, round_to=1, exclude=("0",))
    assert [p.shape[0] for p in result.model.parameters() if p.dim() > 1] == [10, 4, 2]


def test_an_excluded_member_of_a_sum_holds_all_of_it() -> None:
    net = Net(lambda n, x: n.o(n.a(x) + n.b(x)), a=conv(3, 8), b=conv(3, 8), o=conv(8, 6), p=conv(6, 2))
    net.function = lambda n, x: n.p(n.o(n.a(x) + n.b(x)))
    small = graphprune.compress(net, image(), 0.5, round_to=1, exclude=("b",)).model
    assert (small.a.weight.shape[0], small.o.weight.shape[0]) == (8, 3)


def test_an_excluded_module_whose_weight_is_tied() -> None:
    net = Net(
        lambda n, x: n.h(n.e(x) * n.m(n.l(n.e(x)))),
        e=nn.Embedding(20, 8),
        l=nn.Linear(8, 6),
        m=nn.Linear(6, 8),
        h=nn.Linear(8, 20, bias=False),
    )
    net.h.weight = net.e.weight
    for name in ("e", "h", "m"):
        small = graphprune.compress(net, torch.randint(0, 20, (2, 5)), 0.5, round_to=1, exclude=(name,)).model
        assert small.e.weight.shape == (20, 4 if name == "h" else 8) and small.l.weight.shape[0] == 3


@pytest.mark.parametrize("option", ["exclude", "only"])
def test_a_name_that_no_module_has(option: str) -> None:
    net = Net(lambda n, x: n.head(n.stem(x)), stem=conv(3, 8), head=conv(8, 2))
    with pytest.raises(ConfigError, match=r"^'haed': no module has that name \(did you mean 'head'\?\)"):
        graphprune.compress(net, image(), 0.5, **{option: ("haed",)})


def test_nothing_left_to_prune() -> None:
    with pytest.raises(ModelError, match="^model: nothing can be pruned"):
        graphprune.compress(three_layers(), image(), 0.5, round_to=1, exclude=("*",))


# Asked and got.


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_same_request_gives_the_same_plan(criterion: str, scope: str) -> None:
    net = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), conv(12, 12, groups=3), nn.BatchNorm2d(12), conv(12, 2))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    options: dict[str, Any] = {"criterion": criterion, "scope": scope, "round_to": 1, "seed": 5}
    x = image()
    plans = [
        graphprune.compress(net, x, 0.5, calibrate=lambda model: model(x).sum().backward(), **options).plan.to_json()
        for _ in range(2)
    ]
    assert plans[0] == plans[1] and plans[0]["keep"]


def test_another_seed_gives_another_plan() -> None:
    net = three_layers()
    plans = [
        graphprune.compress(net, image(), 0.5, round_to=1, criterion="random", seed=s).plan.to_json() for s in (0, 1)
    ]
    assert plans[0] != plans[1]


def test_the_report_says_what_was_asked_and_what_was_got() -> None:
    groups, shapes = compressed()
    assert {name: (g["units"], g["unit_width"], g["asked"], g["kept"], g["note"]) for name, g in groups.items()} == {
        "0.weight": (10, 1, 5, 5, None),
        "1.weight": (8, 1, 4, 4, None),
    }
    assert shapes == [5, 4, 2]
    members = [(m["tensor"], m["dims"], m["channels"], m["role"]) for m in groups["0.weight"]["members"]]
    assert members == [("0.weight", [0], 10, "out"), ("0.bias", [0], 10, "out"), ("1.weight", [1], 10, "in")]
