"""When the user's own class comes back: only if it does, call by call, what the graph does, in training as well."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image, tokens
from test_shrink import compressed
from torch import Tensor, nn

from graphprune.errors import ModelError
from speedup.cut import ShrunkGraph
from speedup.errors import CaptureError, PlanError, ProofError
from speedup.plan import Axis

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


class Auxiliary(nn.Module):
    """With a head for training alone, and a parameter for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.aux, self.fc = conv(3, 8), conv(8, 2), conv(8, 6), nn.Linear(6, 2)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if self.training:
            return self.o(x), self.fc(self.aux(x).mean((2, 3)))
        return self.o(x)


class Sized(Auxiliary):
    """With a size in the code that only training runs."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.a(x).view(-1, 8, 6, 6)[:, :3] if self.training else x)


def test_a_head_for_training_shrinks_with_the_rest() -> None:
    model = Auxiliary().train()
    with torch.no_grad():
        model.a.weight[::2] *= 0.1
    result = compressed(model, image())
    small: Any = result.model
    assert type(small) is Auxiliary and small.training
    assert (small.a.weight.shape[0], small.aux.weight.shape[:2], small.fc.weight.shape) == (4, (3, 4), (2, 3))
    first, second = small(image())
    (first.sum() + second.sum()).backward()
    assert small.aux.weight.grad.abs().sum() > 0
    assert result.report["unused"] == ["spare"] and result.report["params"]["dense"] == 8 * 28 + 2 * 73
    expected = copy.deepcopy(model)
    with torch.no_grad():
        gone = torch.ones(8, dtype=torch.bool)
        gone[result.plan.keep[Axis("a.weight", 0)]] = False
        expected.a.weight[gone], expected.a.bias[gone] = 0, 0
        kept = torch.as_tensor(result.plan.keep[Axis("aux.weight", 0)])
        masked = torch.zeros(6).index_fill(0, kept, 1)
        expected.aux.weight.mul_(masked.view(-1, 1, 1, 1))
        expected.aux.bias.mul_(masked)
        for found, right in zip(small(image()), expected(image()), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_size_in_the_code_of_training_is_an_obstacle() -> None:
    result = compressed(Sized().train(), image())
    assert isinstance(result.model, ShrunkGraph)
    assert "invalid for input" in (result.shrunk.obstacle or "")


class Limited(nn.Module):
    """With a limit that is a channel count by chance, and matters for large inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.width = self.side = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).unflatten(-1, (2, self.width)).flatten(-2))
        return self.o(x.clamp(max=self.side))


def test_a_number_that_equals_a_size_by_chance_stays() -> None:
    result = compressed(Limited(), tokens())
    small: Any = result.model
    assert type(small) is Limited and (small.width, small.side) == (2, 4)
    assert [repair.attribute for repair in result.shrunk.repairs] == ["width"]


@dataclass(frozen=True)
class Frozen:
    width: int


class Configured(nn.Module):
    """Its size is in an object that cannot be changed; two other numbers equal it by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.one, self.two = Frozen(4), 4, 4
        self.a, self.b, self.o = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).unflatten(-1, (2, self.config.width)).flatten(-2) / self.one)
        return self.o(x) * self.two


def test_a_size_in_a_frozen_object_beside_numbers_that_equal_it() -> None:
    model = Configured()
    small: Any = compressed(model, tokens()).model
    assert type(small) is Configured and (small.config.width, small.one, small.two) == (2, 4, 4)
    assert model.config.width == 4


class Uncopyable(dict[str, int]):
    __getattr__ = dict.__getitem__


def test_a_model_that_cannot_be_copied_becomes_a_graph() -> None:
    model = Limited()
    model.held = Uncopyable(width=4)
    result = compressed(model, tokens())
    assert isinstance(result.model, ShrunkGraph)
    assert result.shrunk.obstacle == "Limited: cannot be copied (KeyError: '__deepcopy__')"


def test_a_class_that_agrees_by_chance_is_not_handed_over() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.o(h.relu() * (h.shape[1] / 8)).argmax(1)

    for seed in range(4):
        torch.manual_seed(seed)
        result = compressed(Net(forward, a=nn.Linear(12, 8), o=nn.Linear(8, 2)), torch.randn(2, 12))
        assert isinstance(result.model, ShrunkGraph)
        assert "something else" in (result.shrunk.obstacle or "")


def test_numbers_that_are_returned_are_those_of_the_original() -> None:
    net = Net(lambda n, x: (n.o(n.a(x)), n.a(x).shape[1]), a=conv(3, 8), o=conv(8, 2))
    assert compressed(net, image()).model(image())[1] == 8


def test_a_graph_refuses_sizes_it_was_not_captured_for() -> None:
    net = Net(lambda n, x: n.o(n.a(x)).sum((2, 3)) / (x.shape[2] * n.a(x).shape[1]), a=conv(3, 8), o=conv(8, 2))
    model = compressed(net, image()).model
    assert isinstance(model, ShrunkGraph) and model(torch.randn(5, 3, 6, 6)).shape == (5, 2)
    with pytest.raises(PlanError, match="^2x3x9x9: the graph was captured for inputs of anyx3x6x6 "):
        model(torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("example", [torch.rand(2, 3, 6, 6), torch.zeros(2, 3, 6, 6)])
def test_functions_of_positive_numbers(example: Tensor) -> None:
    net = Net(lambda n, x: n.o(n.a(x.sqrt().add(1e-3).log()) / n.a(x).shape[1]), a=conv(3, 8), o=conv(8, 2))
    result = compressed(net, example)
    assert isinstance(result.model, ShrunkGraph)


def test_nothing_is_proven_over_nan() -> None:
    net = Net(lambda n, x: n.o(n.a(x) + (-x.square() - 1).sqrt().sum()), a=conv(3, 8), o=conv(8, 2))
    with pytest.raises(ProofError, match="is nan everywhere at .*Use example inputs on which"):
        compressed(net, image())


def test_attributes_of_any_kind_are_left_alone() -> None:
    model = Limited()
    model.held = [torch.arange(8.0), np.arange(8), [4, "4", None], {"4": 4}, range(8), nn.ReLU]
    small: Any = compressed(model, tokens()).model
    assert small.width == 2 and small.held[2] == [4, "4", None]


def test_what_a_model_makes_once_and_keeps_is_not_left_in_it() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o, self.places = nn.Linear(12, 8), nn.Linear(8, 2), None

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if self.places is None:
                self.places = torch.arange(x.shape[1])[:, None].expand(x.shape[1:]) / 10
            return self.o(x + self.places)

    model = Lazy()
    result = compressed(model, tokens())
    assert model.places is None
    assert type(result.model) is Lazy and result.model.places is None
    assert result.model(tokens()).shape == (2, 5, 2)


def test_a_spectral_norm_in_training() -> None:
    spectral_norm = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(conv(3, 8), spectral_norm(conv(8, 6)), conv(6, 2)).train()
    small = compressed(net, image()).model
    assert small.training and small(image()).shape == (2, 2, 6, 6)


def test_dropout_that_is_always_random_pins() -> None:
    net = Net(
        lambda n, x: n.o(F.dropout(n.a(x), 0.5, True) + n.p(n.b(x))),
        a=conv(3, 8),
        b=conv(3, 8),
        p=conv(8, 8),
        o=conv(8, 2),
    )
    small: Any = compressed(net, image()).model
    assert (small.a.weight.shape[0], small.b.weight.shape[0]) == (8, 4)


def test_a_model_without_parameters() -> None:
    with pytest.raises(ModelError, match="nothing can be pruned"):
        compressed(nn.ReLU(), image())


@pytest.mark.parametrize("model", [None, nn.ReLU, lambda x: x])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(CaptureError, match=r"is no torch\.nn\.Module"):
        compressed(model, image())


@pytest.mark.parametrize(
    ("x", "fact"), [(torch.zeros(0, 3, 6, 6), "is empty"), (torch.full((2, 3, 6, 6), torch.nan), "holds nan")]
)
def test_examples_that_show_nothing(x: Tensor, fact: str) -> None:
    with pytest.raises(CaptureError, match=fact):
        compressed(nn.Sequential(conv(3, 8), conv(8, 2)), x)
