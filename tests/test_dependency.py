"""Channel groups as values, and as the graph of axes and ties that people reason about."""

import time

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, described, image, tokens, weight
from test_rules_contraction import Attention
from torch import nn

import graphprune
from graphprune import DependencyGraph
from graphprune.groups import ChannelGroup


def traced(model: nn.Module, x: torch.Tensor) -> DependencyGraph:
    torch.manual_seed(0)
    return graphprune.trace(model, x)


def added() -> Net:
    return Net(lambda n, x: n.o((n.a(x) + n.b(x)).relu()), a=conv(3, 8), b=conv(3, 8, 1), o=conv(8, 2))


def group(d: DependencyGraph, name: str) -> ChannelGroup:
    return next(g for g in d.prunable if g.name == name)


def test_members_say_what_they_are() -> None:
    members = group(traced(added(), image()), "a.weight").members
    assert [(m.tensor, m.dims, m.channels, m.role, m.node, m.module) for m in members] == [
        ("a.weight", (0,), 8, "out", "conv2d", "a"),
        ("a.bias", (0,), 8, "out", "conv2d", "a"),
        ("b.weight", (0,), 8, "out", "conv2d_1", "b"),
        ("b.bias", (0,), 8, "out", "conv2d_1", "b"),
        ("o.weight", (1,), 8, "in", "conv2d_2", "o"),
    ]


def test_a_group_of_plain_channels() -> None:
    a = group(traced(added(), image()), "a.weight")
    assert (a.units, a.size, a.width, a.pin) == (8, 8, 1, None)
    assert not a.locked.any() and not a.counts and not a.weaves
    assert sorted(a.classes.tolist()) == a.classes.tolist() and len(a.classes) == 8


def test_a_group_of_heads() -> None:
    heads = group(traced(Attention(), tokens()), "q.weight")
    assert (heads.units, heads.size, heads.width) == (3, 3, 4)
    assert np.bincount(heads.unit_of).min() >= 8  # four of queries and keys and four of values, and slabs


def test_every_class_is_in_one_group_at_most() -> None:
    for net, x in ((added(), image()), (Attention(), tokens())):
        d = traced(net, x)
        classes = np.concatenate([g.classes for g in d.groups])
        assert len(classes) == len(set(classes.tolist()))
        assert [g.index for g in d.groups] == list(range(len(d.groups)))


def test_pinned_groups_name_the_node() -> None:
    d = traced(added(), image())
    pins = {(g.name, g.units): g.pin for g in d.groups if g.pin and "kernel" not in g.pin}
    assert pins == {
        ("a.weight", 3): "is multiplied by a tensor whose size is fixed (conv2d)",
        ("b.weight", 3): "is multiplied by a tensor whose size is fixed (conv2d_1)",
        ("o.weight", 2): "is an output of the model (output)",
    }
    assert {g.name for g in d.prunable} == {"a.weight"}


def test_what_is_pinned_of_an_axis_is_a_group_of_its_own() -> None:
    net = Net(lambda n, x: n.o(torch.cat([n.a(x)[:, :6], n.a(x)[:, 6:] + x[:, :2]], 1)), a=conv(3, 8), o=conv(8, 2))
    d = traced(net, image())
    assert described(d) == {"6: a.bias/0*6 a.weight/0*6 o.weight/1*6"}
    pinned = next(g for g in d.groups if g.pin and "meets" in g.pin)
    assert [(m.tensor, m.channels) for m in pinned.members] == [("a.weight", 2), ("a.bias", 2)]


def test_tracing_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(0.5), conv(8, 2)).train()
    net[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x = image()
    first = x.clone()
    graphprune.trace(net, x)
    assert [m.training for m in net.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and torch.equal(x, first)


def test_tracing_twice_gives_the_same_groups() -> None:
    first, second = (traced(Attention(bias=True), tokens()) for _ in range(2))
    assert described(first) == described(second)
    assert [(g.name, g.pin, g.classes.tolist()) for g in first.groups] == [
        (g.name, g.pin, g.classes.tolist()) for g in second.groups
    ]


def test_tied_weights_are_one_tensor() -> None:
    net = Net(lambda n, x: n.h(n.l(n.e(x))), e=nn.Embedding(20, 8), l=nn.Linear(8, 8), h=nn.Linear(8, 20, bias=False))
    net.h.weight = net.e.weight
    d = traced(net, torch.randint(0, 20, (2, 5)))
    tied = {m.tensor for g in d.groups for m in g.members} & {"e.weight", "h.weight"}
    assert len(tied) == 1
    assert described(d) == {f"8: {tied.pop()}/1 l.bias/0 l.weight/0 l.weight/1"}


# The graph of axes and ties.


def components(d: DependencyGraph) -> set[frozenset[tuple[str, int, int]]]:
    return {frozenset(part) for part in nx.connected_components(d.graph)}


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (added, image()),
        (Attention, tokens()),
        (
            lambda: Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), o=conv(10, 2)),
            image(),
        ),
        (lambda: Net(lambda n, x: n.o(n.a(x).chunk(2, 1)[0]), a=conv(3, 8), o=conv(4, 2)), image()),
    ],
)
def test_connected_components_are_the_groups(build, x) -> None:
    d = traced(build(), x)
    for part in components(d):
        assert len({index for _, _, index in part}) == 1
    by_group = {next(iter(part))[2]: part for part in components(d)}
    assert len(by_group) == len(components(d))
    for g in d.groups:
        axes = {(m.tensor, dim, g.index) for m in g.members for dim in m.dims}
        assert axes <= by_group[g.index]


def test_nodes_are_axes_and_edges_are_ties_with_kind_and_node() -> None:
    d = traced(added(), image())
    graph, index = d.graph, group(d, "a.weight").index
    assert graph.nodes["a.weight", 0, index] == {"tensor": "a.weight", "dim": 0, "group": index}
    ties = {(data["kind"], data["node"]) for _, _, data in graph.edges(data=True)}
    assert {("add", "add"), ("convolution", "conv2d"), ("convolution", "conv2d_2"), ("elementwise", "relu")} <= ties
    kinds = {data["kind"] for *_, data in graph.edges(("add", 1, index), data=True)}
    assert "add" in kinds
    assert nx.has_path(graph, ("a.weight", 0, index), ("o.weight", 1, index))


def test_an_axis_that_groups_share_stands_once_for_each() -> None:
    net = Net(lambda n, x: n.o(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), o=conv(10, 2))
    d = traced(net, image())
    assert {index for name, dim, index in d.graph.nodes if (name, dim) == ("o.weight", 1)} == {
        g.index for g in d.prunable
    }


def test_kinds_of_ties() -> None:
    net = Net(
        lambda n, x: n.o(F.pad(torch.cat([n.a(x) * n.g, n.b(x)], 1).unflatten(1, (4, 2)).flatten(1, 2), (0, 0, 0, 0, 1, 1))),
        a=conv(3, 4), b=conv(3, 4), g=weight(4, 1, 1), o=conv(10, 2),
    )  # fmt: skip
    kinds = {data["kind"] for _, _, data in traced(net, image()).graph.edges(data=True)}
    assert {"mul", "concat", "reshape", "pad", "convolution"} <= kinds


def test_an_unknown_operator_is_an_unknown_tie() -> None:
    net = Net(lambda n, x: n.p(n.o(n.a(x).cummax(1).values)), a=conv(3, 8), o=conv(8, 4), p=conv(4, 2))
    d = traced(net, image())
    assert [node.name for node in d.analysis.unknown] == ["cummax"]
    assert described(d) == {"4: o.bias/0 o.weight/0 p.weight/1"}


def test_many_channels_take_no_time() -> None:
    net = nn.Sequential(nn.Linear(4, 300_000), nn.ReLU(), nn.Linear(300_000, 2))
    start = time.perf_counter()
    d = traced(net, torch.randn(2, 4))
    assert [g.units for g in d.prunable] == [300_000]
    assert time.perf_counter() - start < 20  # capture and all; a loop over channels would take minutes
