"""How rules meet in small nets: blocks as people build them, tied and shared weights, unused parameters, several outputs."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

A8 = "8: a.weight/0 a.bias/0 o.weight/1"


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depth = conv(3, 6), conv(6, 12, 1, bias=False), conv(12, 12, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Linear(12, 4), nn.Linear(4, 12)
        self.project, self.head = conv(12, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(self.expand(x).relu()))
        gate = self.excite(self.squeeze(y.mean((2, 3))).relu()).sigmoid()
        x = x + self.project(y * gate[:, :, None, None])
        return self.head(x.mean((2, 3)))


class Shuffle(nn.Module):
    """A ShuffleNet unit: split, one half through a convolution, cat, shuffle; twice, so that the halves mix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = conv(3, 8), conv(4, 4), conv(4, 4), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in (self.one, self.two):
            kept, worked = x.chunk(2, 1)
            x = torch.cat([kept, layer(worked)], 1)
            x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(x)


class Dense(nn.Module):
    """Two layers of a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = conv(3, 6), conv(6, 4), conv(10, 4), conv(14, 2)
        self.norm = nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.one(x)], 1)
        x = torch.cat([x, self.two(self.norm(x))], 1)
        return self.head(x)


class Recurrent(nn.Module):
    """A GRU cell written out, over three steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state, self.head = nn.Linear(12, 18), nn.Linear(6, 18), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for step in range(3):
            ir, iz, i = self.inputs(x[:, step]).chunk(3, 1)
            hr, hz, n = self.state(h).chunk(3, 1)
            r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
            h = (1 - z) * (i + r * n).tanh() + z * h
        return self.head(h)


class Spare(nn.Module):
    """With a layer that only training uses, and a parameter that nobody does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.aux, self.spare = conv(3, 8), conv(8, 2), conv(3, 8), weight(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.o(self.a(x))
        return (y, self.aux(x)) if self.training else y


def scaled_heads(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.a(x)
    y = (y.unflatten(1, (2, 4)) * net.w).flatten(1, 2)
    return net.d(y), net.o(net.b(x))


def grouped_queries(net: Net, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for y in (k, v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def heads_and_groups(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).unflatten(1, (3, 4))
    return net.o(net.g((y + y.sum(2, keepdim=True)).flatten(1, 2)))


def heads_with_a_fixed_channel(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.o(y.unflatten(1, (3, 2)).relu().flatten(1, 2)) + net.p(y[:, 5:])


def transposed_twice(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    for _ in range(2):
        y = y.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
    return net.o(y) + net.p(net.b(x))


def without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    return net.o(y)


def twice(net: Net, x: Tensor) -> Tensor:
    return net.o(net.c(net.c(net.a(x)).relu()))


CASES = (
    Case(
        "inverted_residual",
        Inverted,
        image(),
        (
            "6: stem.weight/0 stem.bias/0 expand.weight/1 project.weight/0 project.bias/0 head.weight/1",
            "12: expand.weight/0 depth.weight/0 norm.weight/0 norm.bias/0 norm.running_mean/0 norm.running_var/0 squeeze.weight/1 "
            "excite.weight/0 excite.bias/0 project.weight/1",
            "4: squeeze.weight/0 squeeze.bias/0 excite.weight/1",
        ),
    ),
    Case(
        "dense_block",
        Dense,
        image(),
        (
            "6: stem.weight/0 stem.bias/0 one.weight/1 norm.weight/0*6 norm.bias/0*6 norm.running_mean/0*6 norm.running_var/0*6 two.weight/1*6 "
            "head.weight/1*6",
            "4: one.weight/0 one.bias/0 norm.weight/0*4 norm.bias/0*4 norm.running_mean/0*4 norm.running_var/0*4 two.weight/1*4 head.weight/1*4",
            "4: two.weight/0 two.bias/0 head.weight/1*4",
        ),
    ),
    Case(
        "shuffle_unit",
        Shuffle,
        image(),
        ("16: stem.weight/0 stem.bias/0 one.weight/0 one.weight/1 one.bias/0 two.weight/0 two.weight/1 two.bias/0 head.weight/1",),
    ),
    Case(
        "gated_cell",
        Recurrent,
        tokens(),
        ("6: inputs.weight/0 inputs.bias/0 state.weight/0 state.weight/1 state.bias/0 head.weight/1",),
        mixes=True,  # a half of nothing is nothing, but the filler of the state is not masked
    ),
    Case(
        "unused_parameters_stay",
        Spare,
        image(),
        (A8,),
    ),
    Case(
        "fixed_rows_of_rows",
        lambda: Net(scaled_heads, a=conv(3, 8), w=weight(2, 1, 1, 1), d=conv(8, 16, groups=8), b=conv(3, 8), o=conv(8, 2)),
        image(),
        ("8: b.weight/0 b.bias/0 o.weight/1",),
        {"a.weight/0": "is an output", "w/0": "is an output"},
    ),
    Case(
        "key_value_heads_repeated_by_expand",
        lambda: Net(grouped_queries, q=nn.Linear(12, 16), k=nn.Linear(12, 8), v=nn.Linear(12, 8), o=nn.Linear(16, 2)),
        tokens(),
        ("2: q.weight/0 q.bias/0 k.weight/0 k.bias/0 v.weight/0 v.bias/0 o.weight/1",),
    ),
    Case(
        "heads_of_whole_groups",
        lambda: Net(heads_and_groups, a=conv(3, 12), g=conv(12, 12, groups=6), o=conv(12, 2)),
        image(),
        ("3: a.weight/0 a.bias/0 g.weight/0 g.weight/01 g.bias/0 o.weight/1",),
    ),
    Case(
        "heads_with_a_fixed_channel",
        lambda: Net(heads_with_a_fixed_channel, a=conv(3, 6), o=conv(6, 2), p=conv(1, 2)),
        image(),
        ("6: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "transposed_twice",
        lambda: Net(transposed_twice, a=conv(3, 6), o=conv(6, 2), b=conv(3, 6), p=conv(6, 2)),
        image(),
        ("6: b.weight/0 b.bias/0 p.weight/1",),
        {"a.weight/0": "would have to go all at once"},
    ),
    Case(
        "deviation_over_channels",
        lambda: Net(lambda n, x: n.o(n.a(x) / n.a(x).std(1, keepdim=True)), a=conv(3, 3), o=conv(3, 2)),
        image(),
        ("3: a.weight/0 a.bias/0 o.weight/1",),
        mixes=True,
    ),
    Case(
        "filler_that_nothing_scores",
        lambda: Net(lambda n, x: n.o(torch.cat([x.new_zeros(x.shape[0], 2, 6, 6), n.a(x)], 1)), a=conv(3, 6), o=conv(8, 2)),
        image(),
        ("6: a.weight/0 a.bias/0 o.weight/1*6", "2: o.weight/1*2"),
    ),
    Case(
        "no_grad_inside_forward",
        lambda: Net(without_gradients, a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "output_used_twice",
        lambda: Net(lambda n, x: n.o(n.a(x)) + n.p(n.a(x)), a=conv(3, 8), o=conv(8, 2), p=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1 p.weight/1",),
        {"o.weight/0": "is an output of the model", "p.bias/0": "is an output of the model"},
    ),
    Case(
        "two_outputs",
        lambda: Net(lambda n, x: {"o": n.o(n.a(x)), "p": [n.a(x).mean((2, 3)) @ n.w, n.b(x)]}, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2), w=weight(8, 3)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1 w/0",),
        {"b.weight/0": "is an output of the model", "w/1": "is an output of the model"},
    ),
    Case(
        "hidden_layer_that_is_an_output_too",
        lambda: Net(lambda n, x: (n.o(n.a(x)), n.a(x)), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (),
        {"a.weight/0": "is an output of the model"},
    ),
    Case(
        "module_called_twice",
        lambda: Net(twice, a=conv(3, 8), c=conv(8, 8), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 c.weight/0 c.weight/1 c.bias/0 o.weight/1",),
    ),
    Case(
        "embedding_tied_to_the_output",
        lambda: Net(lambda n, x: F.linear(n.l(n.e(x)), n.e.weight), e=nn.Embedding(20, 8), l=nn.Linear(8, 8)),
        torch.randint(0, 20, (2, 5)),
        ("8: e.weight/1 l.weight/0 l.weight/1 l.bias/0",),
        {"e.weight/0": ""},
    ),
    Case(
        "weight_tied_to_its_transpose",
        lambda: Net(lambda n, x: n.o(F.linear(F.linear(n.a(x), n.w).relu(), n.w.t())), a=nn.Linear(12, 8), w=weight(6, 8), o=nn.Linear(8, 2)),
        tokens(),
        ("8: a.weight/0 a.bias/0 w/1 o.weight/1", "6: w/0"),
    ),
    Case(
        "constant_tensor_made_in_forward",
        lambda: Net(lambda n, x: n.o(n.a(x) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]).view(8, 1, 1)), a=conv(3, 8), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1 lifted_tensor_0/0",),
    ),
    Case(
        "filter_made_from_the_input",
        lambda: Net(lambda n, x: n.o((n.k(x.mean((2, 3))).view(-1, 1, 8) @ n.a(x).flatten(2)).transpose(1, 2)), a=conv(3, 8), k=nn.Linear(3, 8), o=nn.Linear(1, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 k.weight/0 k.bias/0",),
    ),
    Case(
        "selective_kernels",
        lambda: Net(
            lambda n, x: n.o((torch.stack([n.a(x), n.b(x)], 1) * n.g(n.a(x).mean((2, 3)) + n.b(x).mean((2, 3))).view(-1, 2, 8, 1, 1).softmax(1)).sum(1)),
            a=conv(3, 8), b=conv(3, 8), g=nn.Linear(8, 16), o=conv(8, 2),
        ),
        image(),
        ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 g.weight/0 g.weight/1 g.bias/0 o.weight/1",),
    ),
    Case(
        "shift_of_a_quarter_of_the_channels",
        lambda: Net(
            lambda n, x: n.o(torch.cat([n.a(x)[:, :2].roll(1, 2), n.a(x)[:, 2:4].roll(-1, 2), n.a(x)[:, 4:]], 1)), a=conv(3, 8), o=conv(8, 2)
        ),
        image(),
        (A8,),
    ),
    Case(
        "space_to_depth_by_slices",
        lambda: Net(
            lambda n, x: n.o(torch.cat([n.a(x)[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)), a=conv(3, 4), o=conv(16, 2)
        ),
        image(),
        ("4: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "window_partition_and_reverse",
        lambda: Net(
            lambda n, x: n.o(
                n.m(n.a(x).view(-1, 8, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, 8))
                .view(-1, 2, 2, 3, 3, 8).permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, 6, 6)
            ),
            a=conv(3, 8), m=nn.Linear(8, 8), o=conv(8, 2),
        ),
        image(),
        ("8: a.weight/0 a.bias/0 m.weight/1", "8: m.weight/0 m.bias/0 o.weight/1"),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)
