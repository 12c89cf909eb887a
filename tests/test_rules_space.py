"""Windows, shuffles and unpooling, which move elements between space and channels; tables that are looked up in bags."""

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters
from torch import Tensor, nn

aten = torch.ops.aten
A8 = "8: a.weight/0 a.bias/0 o.weight/1"
BAGS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(7))


def unpooled(net: Net, x: Tensor) -> Tensor:
    pooled, places = net.p(net.a(x))
    return net.o(net.u(pooled, places))


def unpooled_elsewhere(net: Net, x: Tensor) -> Tensor:
    """The values of one map at the places of the maxima of another."""
    _, places = F.max_pool2d(net.a(x), 2, return_indices=True)
    return net.o(F.max_unpool2d(F.avg_pool2d(net.b(x), 2), places, 2))


WINDOWS = (
    Case(
        "unfold",
        lambda: Net(lambda n, x: n.o(F.unfold(n.a(x), 3, padding=1).mean(2)), a=conv(3, 8), o=nn.Linear(72, 2)),
        image(),
        (A8,),
    ),
    Case(
        "fold",
        lambda: Net(lambda n, x: n.o(F.fold(n.a(x.flatten(2)), (5, 7), 2, stride=1)[..., :6]), a=nn.Conv1d(3, 32, 13), o=conv(8, 2)),
        image(),
        ("8: a.weight/0 a.bias/0 o.weight/1",),
    ),
    Case(
        "unfold_and_fold",
        lambda: Net(lambda n, x: n.o(F.fold(F.unfold(n.a(x), 2, stride=2), (6, 6), 2, stride=2)), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "unfold_of_one_example",
        lambda: Net(lambda n, x: n.o(F.unfold(n.a(x)[0], 2).mean(1)) + x.mean(), a=conv(3, 8), o=nn.Linear(32, 2)),
        image(),
        (A8,),
    ),
    Case(
        "sliding_windows",
        lambda: Net(lambda n, x: n.o(n.a(x).unfold(2, 2, 2).unfold(3, 3, 1).sum((-2, -1))), a=conv(3, 8), o=conv(8, 2)),
        image(),
        (A8,),
    ),
    Case(
        "sliding_windows_over_channels_pin",
        lambda: Net(lambda n, x: n.p(n.o(n.a(x).unfold(1, 2, 2).sum(-1))), a=conv(3, 8), o=conv(4, 6), p=conv(6, 2)),
        image(),
        ("6: o.weight/0 o.bias/0 p.weight/1",),
        {"a.weight/0": "is cut into windows"},
    ),
    Case("max_unpool", lambda: Net(unpooled, a=conv(3, 8), p=nn.MaxPool2d(2, return_indices=True), u=nn.MaxUnpool2d(2), o=conv(8, 2)), image(), (A8,)),
    Case("max_unpool_of_rows", lambda: Net(unpooled, a=nn.Conv1d(3, 8, 1), p=nn.MaxPool1d(2, return_indices=True), u=nn.MaxUnpool1d(2), o=nn.Conv1d(8, 2, 1)), torch.randn(2, 3, 8), (A8,)),
    Case("max_unpool_of_volumes", lambda: Net(unpooled, a=nn.Conv3d(3, 8, 1), p=nn.MaxPool3d(2, return_indices=True), u=nn.MaxUnpool3d(2), o=nn.Conv3d(8, 2, 1)), torch.randn(2, 3, 4, 4, 4), (A8,)),
    Case("max_unpool_of_another_map", lambda: Net(unpooled_elsewhere, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1",)),
    Case("channel_shuffle", lambda: nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 2)), image(), ("8: 0.weight/0 0.bias/0 2.weight/1",)),
    Case(
        "channel_shuffle_between_grouped_convs",
        lambda: nn.Sequential(conv(3, 12), conv(12, 12, groups=3), nn.ChannelShuffle(3), conv(12, 12, groups=3), conv(12, 2)),
        image(),
        ("12: 0.weight/0 0.bias/0 1.weight/01", "12: 1.weight/0 1.bias/0 3.weight/01", "12: 3.weight/0 3.bias/0 4.weight/1"),
    ),
)  # fmt: skip

BAGGED = (
    *(
        Case(
            f"embedding_bag_of_the_{mode}",
            lambda mode=mode: nn.Sequential(nn.EmbeddingBag(20, 8, mode=mode), nn.Linear(8, 2)),
            BAGS,
            ("8: 0.weight/1 1.weight/1",),
            {"0.weight/0": "looked up by index"},
        )
        for mode in ("sum", "mean", "max")
    ),
    Case(
        "embedding_bag_by_its_inner_name",
        lambda: Net(lambda n, x: n.o(aten.embedding_bag.default(n.e, x.flatten(), torch.tensor([0, 3, 5]))[0]), e=nn.Parameter(torch.randn(20, 8)), o=nn.Linear(8, 2)),
        BAGS,
        ("8: e/1 o.weight/1",),
        {"e/0": "looked up by index"},
        mixes=True,  # the bags are those of the example
    ),
    Case(
        "embedding_bag_with_learned_weights",
        lambda: Net(lambda n, x: n.o(F.embedding_bag(x, n.e, mode="sum", per_sample_weights=n.w)), e=nn.Parameter(torch.randn(20, 8)), w=nn.Parameter(torch.randn(3, 5)), o=nn.Linear(8, 2)),
        BAGS,
        ("8: e/1 o.weight/1",),
        {"w/1": "goes with the indices"},
    ),
    Case(
        "embedding_of_bounded_length",
        lambda: nn.Sequential(nn.Embedding(20, 8, max_norm=1.5), nn.Linear(8, 2)),
        BAGS,
        ("8: 0.weight/1 1.weight/1",),
        {"0.weight/0": "looked up by index"},
        mixes=True,
    ),
)  # fmt: skip

CASES = WINDOWS + BAGGED


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)
