"""The code around the parts of a model: what it uses of them stays, and it goes on doing what it did."""

import copy
from typing import Any

import pytest
import torch
from test_parts import Detector, kept, masked, shrunk
from torch import Tensor, nn

from graphprune.compress import compress
from speedup.errors import MisfitError

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


class Reader(Detector):
    """Code outside of the parts reads a weight of one of them."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.head[0].weight.norm(dim=1).sum()


class Tied(Detector):
    """A tensor of a part is held outside of it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.head[0].bias


@pytest.mark.parametrize(("build", "name"), [(Reader, "head.0.weight"), (Tied, "head.0.bias")])
def test_tensors_that_are_used_outside_of_their_part_stay(build: type[Detector], name: str) -> None:
    result = shrunk(build())
    assert result.report["parts"]["used_outside"] == [name]
    assert kept(result, "head.0.weight") == (12, 8)
    assert kept(result, "tower.0.weight") == (8, 3, 3, 3)


class Caller(Detector):
    """A layer of a part is called by the rest, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.tower[0](x).sum()


def test_layers_that_the_rest_calls_as_well_stay() -> None:
    result = shrunk(Caller())
    assert kept(result, "tower.0.weight") == (16, 3, 3, 3)
    assert kept(result, "head.0.weight") == (6, 8)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.gain(x) * len(bias)


class Lender(Detector):
    """A tensor of one part is an argument of another."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        y = self.tower(x)
        return self.scaled(self.head(y.permute(0, 2, 3, 1)[y.mean(1) > 0]), self.tower[0].bias)


def test_a_tensor_that_another_part_uses_stays() -> None:
    result = shrunk(Lender())
    assert result.report["parts"]["used_outside"] == ["tower.0.bias"]
    assert kept(result, "tower.0.weight") == (16, 3, 3, 3)
    assert kept(result, "head.0.weight") == (6, 8)


class Named(Detector):
    """A part that is called by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.tower

    def forward(self, x: Tensor) -> Tensor:
        y = self.tower(x) + self.alias(x)
        return y[y.mean((1, 2, 3)) > 0]


def test_a_part_with_two_names_is_not_used_outside() -> None:
    result = shrunk(Named())
    assert result.report["parts"]["used_outside"] == []
    assert kept(result, "tower.0.weight") == (8, 3, 3, 3)


class Training(Detector):
    """In training mode code around the parts calls a layer of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.tower(x)
        rows = self.head(y.permute(0, 2, 3, 1)[y.mean(1) > 0])
        return (rows, self.aux(self.tower[0](x))) if self.training else rows


def test_what_training_uses_around_the_parts_stays() -> None:
    model = Training().train()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, torch.randn(2, 3, 8, 8), 0.5, round_to=1)
    assert result.report["parts"]["used_outside"] == ["tower.0.bias", "tower.0.weight"]
    assert kept(result, "tower.0.weight") == (16, 3, 3, 3) and kept(result, "head.0.weight") == (6, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rows, extra = result.model.train()(torch.randn(2, 3, 8, 8))
    (rows.sum() + extra.sum()).backward()


class Around(Detector):
    """Code around the parts reads a size that no tensor tells."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.tower(x)
        return self.head(y.permute(0, 2, 3, 1)[y.mean(1) > 0]) / self.head[0].out_features


def test_code_around_the_parts_must_do_the_same() -> None:
    model = Around().eval()
    result = shrunk(model)
    assert kept(result, "tower.0.weight") == (8, 3, 3, 3) and kept(result, "head.0.weight") == (12, 8)
    notes = [group["note"] for group in result.report["groups"] if group["note"]]
    assert notes == ["code does not fit a smaller head: the code around the parts returns something else"]
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(result.model(x), masked(model, result)(x), atol=1e-6)


class Recorded(Detector):
    """A hook that keeps what a layer of a part gives out, in the model and not in a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        self.tower[2].register_forward_hook(lambda module, inputs, output: self.seen.update(last=output))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.seen["last"].abs().sum()


def test_a_model_whose_copy_does_something_else_is_refused_and_left_as_it_was() -> None:
    model = Recorded().eval()
    with pytest.raises(MisfitError, match=r"^the code around the parts raises KeyError \('last'\): "):
        shrunk(model)
    assert not model.seen
