"""What is handed over: the user's own class wherever its code still fits, else the graph; the model itself is left alone."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image, tokens, weight
from test_rules_contraction import Attention
from torch import Tensor, nn

import graphprune
from graphprune import Result
from speedup.cut import ShrunkGraph
from speedup.repair import Repair

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


def compressed(model: nn.Module, x: Any, **options: Any) -> Result:
    return graphprune.compress(model, x, 0.5, round_to=1, **options)


class Heads(nn.Module):
    """Attention with its sizes in attributes."""

    def __init__(self, temperature: bool = False) -> None:
        super().__init__()
        self.heads, self.width, self.shape = 4, 3, (4, 3)
        self.temperature = temperature
        self.qkv = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, *self.shape).transpose(1, 2) for layer in self.qkv)
        scores = q @ k.transpose(2, 3) / (self.heads if self.temperature else 2.0)
        y = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.out(y.reshape(b, n, self.heads * self.width))


def bare_view() -> Net:
    """A size that stands in the code itself."""
    return Net(lambda n, x: n.o(n.a(x).view(-1, 8, 3, 3)), a=nn.Linear(5, 72), o=nn.ConvTranspose2d(8, 2, 3))


# The user's own class.


def test_sizes_of_standard_layers_follow() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.PReLU(16), nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.GroupNorm(4, 16), nn.ConvTranspose2d(16, 12, 2), nn.InstanceNorm2d(12, affine=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 10), nn.LayerNorm(10), nn.Linear(10, 8), nn.RMSNorm(8), nn.Linear(8, 2),
    )  # fmt: skip
    result = compressed(net, image())
    assert result.report["result"]["form"] == "module"
    small: Any = result.model
    assert type(small) is nn.Sequential
    assert (small[0].in_channels, small[0].out_channels) == (3, 8)
    assert (small[1].num_features, small[2].num_parameters) == (8, 8)
    assert (small[3].in_channels, small[3].out_channels, small[3].groups, small[3].kernel_size) == (8, 8, 8, (3, 3))
    assert (small[4].num_channels, small[4].num_groups) == (8, 2)  # groups as many as channels in each go whole
    assert (small[5].in_channels, small[5].out_channels) == (8, 6)
    assert small[6].num_features == 6
    assert (small[9].in_features, small[9].out_features, small[10].normalized_shape) == (24, 5, (5,))
    assert (small[11].in_features, small[11].out_features, small[12].normalized_shape, small[13].in_features) == (
        5,
        4,
        (4,),
        4,
    )


def test_an_embedding_knows_its_width() -> None:
    net = Net(lambda n, x: n.o(n.e(x)), e=nn.Embedding(20, 8), o=nn.Linear(8, 2))
    small = compressed(net, torch.randint(0, 20, (2, 5))).model
    assert (small.e.num_embeddings, small.e.embedding_dim) == (20, 4)


def test_only_sizes_are_repaired() -> None:
    small: Any = compressed(nn.Sequential(conv(3, 6), conv(6, 6, groups=3), conv(6, 2)), image()).model
    assert (small[1].groups, small[1].kernel_size, small[1].padding) == (1, (3, 3), (1, 1))


def test_head_counts_in_attributes_are_repaired() -> None:
    result = compressed(Heads(), tokens())
    assert type(result.model) is Heads
    assert (result.model.heads, result.model.width, result.model.shape) == (2, 3, (2, 3))
    assert set(result.shrunk.repairs) == {Repair("", "heads", 4, 2), Repair("", "shape", (4, 3), (2, 3))}
    assert result.model.out.weight.shape == (12, 6)


def test_an_attribute_that_means_something_else_too_is_an_obstacle() -> None:
    result = compressed(Heads(temperature=True), tokens())
    assert isinstance(result.model, ShrunkGraph)
    assert result.report["result"] == {"form": "graph", "obstacle": result.shrunk.obstacle, "repairs": []}


def test_weights_of_zero_hide_nothing() -> None:
    net = Heads(temperature=True)
    nn.init.zeros_(net.out.weight)
    nn.init.zeros_(net.out.bias)
    assert isinstance(compressed(net, tokens()).model, ShrunkGraph)


def test_a_size_in_the_code_is_an_obstacle_that_is_named() -> None:
    result = compressed(bare_view(), torch.randn(2, 5))
    assert isinstance(result.model, ShrunkGraph)
    place, _, reason = str(result.shrunk.obstacle).partition(": ")
    assert place.startswith(f"{__file__}:") and "expected input" in reason


def test_large_numbers_hide_nothing() -> None:
    class Masked(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.ones(5, 12).tril().bool(), -1e9)

    result = compressed(Masked(temperature=True), tokens())
    assert isinstance(result.model, ShrunkGraph)


def test_a_split_that_is_not_even_any_more_is_an_obstacle() -> None:
    net = Net(lambda n, x: n.o(n.a(x).split([3, 5], 1)[1]), a=conv(3, 8), o=conv(5, 2))
    assert isinstance(compressed(net, image()).model, ShrunkGraph)


def test_code_that_returns_another_type_is_an_obstacle() -> None:
    net = Net(
        lambda n, x: sum(o(part) for o, part in zip(n.o, n.a(x).split(3, 1)[1:], strict=False)),
        a=conv(3, 8), o=nn.ModuleList([conv(3, 2), conv(2, 2)]),
    )  # fmt: skip
    result = compressed(net, image())
    assert result.shrunk.obstacle or result.model(image()).shape == (2, 2, 6, 6)


def test_constants_made_in_forward_are_no_obstacle() -> None:
    net = Net(lambda n, x: n.o(n.a(x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))), a=conv(3, 8), o=conv(8, 2))
    assert type(compressed(net, image()).model) is Net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "module": (lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), conv(8, 2)), image),
    "repaired": (Heads, tokens),
    "graph": (bare_view, lambda: torch.randn(2, 5)),
    "merged": (lambda: Attention("merged with the batch"), tokens),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_batch_size_runs_alike_in_both_forms(name: str, batch: int) -> None:
    build, example = NETWORKS[name]
    result = compressed(build(), example())
    x = torch.cat([example()] * 3)[:batch] + 0.1
    with torch.no_grad():
        found, expected = result.model.eval()(x), result.shrunk.graph.eval()(x)
    assert found.shape[0] == batch
    torch.testing.assert_close(found, expected)


# What stays as it was.


@pytest.mark.parametrize("name", NETWORKS)
def test_the_users_model_is_not_changed(name: str) -> None:
    build, example = NETWORKS[name]
    model, x = build(), example()
    model.train()
    next(model.children()).eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes = {
        path: {k: v for k, v in vars(m).items() if isinstance(v, int | tuple)} for path, m in model.named_modules()
    }
    before = x.clone()
    result = compressed(model, x)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert attributes == {
        path: {k: v for k, v in vars(m).items() if isinstance(v, int | tuple)} for path, m in model.named_modules()
    }
    assert torch.equal(x, before) and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.zero_()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_buffers_that_forward_updates_are_put_back() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        n.steps.add_(1)
        return n.o(n.a(x))

    net = Net(forward, a=conv(3, 8), o=conv(8, 2), steps=torch.zeros(()))
    compressed(net, image())
    assert net.steps == 0


def test_names_of_parameters_stay() -> None:
    for build, example in NETWORKS.values():
        model = build()
        result = compressed(model, example())
        names = [name for name, _ in model.named_parameters()]
        assert sorted(name for name, _ in result.model.named_parameters()) == sorted(names)
        assert sorted(name for name, _ in result.shrunk.graph.named_parameters()) == sorted(names)


def test_frozen_parameters_stay_frozen() -> None:
    net = nn.Sequential(conv(3, 8), conv(8, 2))
    net[0].weight.requires_grad_(False)
    small = compressed(net, image()).model
    assert [p.requires_grad for p in small.parameters()] == [False, True, True, True]


def test_tied_weights_stay_tied() -> None:
    net = Net(lambda n, x: n.h(n.l(n.e(x))), e=nn.Embedding(20, 8), l=nn.Linear(8, 8), h=nn.Linear(8, 20, bias=False))
    net.h.weight = net.e.weight
    result = compressed(net, torch.randint(0, 20, (2, 5)))
    assert result.model.h.weight is result.model.e.weight and result.model.e.weight.shape == (20, 4)
    assert result.report["params"]["shrunk"] == sum(p.numel() for p in result.model.parameters()) == 20 * 4 + 4 * 4 + 4


def test_unused_parameters_stay() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o, self.spare = conv(3, 8), conv(8, 2), conv(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.a(x))

    net = Spare()
    result = compressed(net, image())
    assert torch.equal(result.model.spare.weight, net.spare.weight)
    assert "spare.weight" not in {member["tensor"] for group in result.report["groups"] for member in group["members"]}


def test_the_model_and_its_graph_share_their_tensors() -> None:
    result = compressed(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 2)), image())
    assert result.model[0].weight is result.shrunk.graph.get_parameter("0.weight")


# Training.


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_that_of_the_result(name: str, training: bool) -> None:
    build, example = NETWORKS[name]
    assert compressed(build().train(training), example()).model.training is training


@pytest.mark.parametrize("name", NETWORKS)
def test_the_result_trains(name: str) -> None:
    build, example = NETWORKS[name]
    result = compressed(build().train(), example())
    result.model.train()(example()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in result.model.parameters())


def forced_to_a_graph() -> Net:
    """With batch norm and dropout, and a size in the code."""
    return Net(
        lambda n, x: n.o(n.d(n.n(n.a(x))).view(-1, 8, 36).mean(2)),
        a=conv(3, 8),
        n=nn.BatchNorm2d(8),
        d=nn.Dropout(0.5),
        o=nn.Linear(8, 2),
    )


def test_train_and_eval_reach_the_nodes_of_a_graph() -> None:
    graph: Any = compressed(forced_to_a_graph(), image()).model
    assert isinstance(graph, ShrunkGraph)
    x, before = image() + 1, graph.get_buffer("n.running_mean").clone()
    graph.eval()
    assert torch.equal(graph(x), graph(x)) and torch.equal(graph.get_buffer("n.running_mean"), before)
    graph.train()
    assert not torch.equal(graph(x), graph(x)) and not torch.equal(graph.get_buffer("n.running_mean"), before)
    graph.eval()
    assert torch.equal(graph(x), graph(x))


def test_what_is_always_training_stays_so() -> None:
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), conv(8, 2))
    result = compressed(net, image())
    x = image() + 1
    torch.testing.assert_close(result.shrunk.graph.eval()(x), result.model.eval()(x))
    torch.testing.assert_close(result.shrunk.graph.train()(x), result.model.train()(x))


def test_a_batch_that_the_code_fixes_is_refused_or_right() -> None:
    net = Net(lambda n, x: n.o(n.a(x).view(len(x), -1, 8).mean(1)), a=nn.Linear(12, 8), o=nn.Linear(8, 2))
    model = compressed(net, torch.randn(2, 6, 12)).model
    try:
        assert model(torch.randn(4, 6, 12)).shape == (4, 2)
    except Exception as error:
        assert "captured for inputs of 2x6x12" in str(error)


# Inputs and outputs of any form.


def test_inputs_and_outputs_keep_their_form() -> None:
    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, *, mask: Tensor, extra: dict[str, Tensor]) -> dict[str, Any]:
            y = self.a(x) + self.b(extra["y"])
            return {"out": (self.o(y * mask), [y.sum()]), "same": x}

    kwargs = {"x": torch.randn(2, 6), "mask": torch.rand(2, 1), "extra": {"y": torch.randn(2, 4)}}
    result = compressed(Forms(), kwargs)
    for model in (result.model, result.shrunk.graph):
        out = model(**kwargs)
        assert set(out) == {"out", "same"} and type(out["out"]) is tuple and type(out["out"][1]) is list
        assert out["out"][0].shape == (2, 3) and out["out"][1][0].shape == ()


def test_a_forward_of_any_number_of_inputs() -> None:
    class Any_(nn.Module):  # noqa: N801  # stands for any
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.o(self.a(inputs[0]) * inputs[1])

    small = compressed(Any_(), (image(), torch.rand(2, 1, 6, 6))).model
    assert small(image(), torch.rand(2, 1, 6, 6)).shape == (2, 2, 6, 6)


def test_a_model_in_half_precision_stays_so() -> None:
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16()
    small = compressed(net, tokens().bfloat16()).model
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small(tokens().bfloat16()).dtype == torch.bfloat16


def test_weights_under_a_parametrisation_survive() -> None:
    net = nn.Sequential(conv(3, 8), nn.utils.parametrizations.weight_norm(conv(8, 8)), conv(8, 6), conv(6, 2))
    result = compressed(net, image())
    assert result.model[2].weight.shape[0] == 3
    assert result.model(image()).shape == (2, 2, 6, 6)


def test_a_module_in_the_result_can_be_pickled_and_copied() -> None:
    small = compressed(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 2)), image()).model.eval()
    for again in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert torch.equal(again(image()), small(image()))


def test_a_norm_without_vectors_does_not_warn() -> None:
    small = compressed(nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8), conv(8, 2)), image()).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(image())


def test_a_gain_of_a_grouped_weight_keeps_the_class() -> None:
    net = Net(
        lambda n, x: n.o(F.conv2d(n.a(x), n.w * n.g, groups=2)),
        a=conv(3, 8),
        w=weight(8, 4, 1, 1),
        g=weight(8, 1, 1, 1),
        o=conv(8, 2),
    )
    result = compressed(net, image())
    assert type(result.model) is Net
    assert (result.model.w.shape[:2], result.model.g.shape[0]) == ((4, 2), 4)
