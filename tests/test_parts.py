"""Models that torch.export cannot capture whole: which parts of them are found, and that they are pruned as models are."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_rules import conv
from torch import Tensor, nn

import graphprune
from graphprune.archive import read_program
from graphprune.audit import audit
from graphprune.compress import Result, compress
from graphprune.config import Request
from graphprune.deliver import deliver
from graphprune.errors import ModelError
from graphprune.source import Source
from speedup.analysis import analyse
from speedup.capture import capture
from speedup.errors import CaptureError, MisfitError
from speedup.planning import make_plan
from speedup.shrink import shrink

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


def tower(width: int = 16) -> nn.Sequential:
    return nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.ReLU(), conv(width, 8))


def head_like() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


class Detector(nn.Module):
    """A tower; the pixels above a threshold, however many, go through a head, in as many rounds as they ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower()
        self.head = head_like()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.tower(x) * self.scale[:, None, None]
        rows = y.permute(0, 2, 3, 1)[y.mean(1) > 0]
        while rows.abs().max() > 0.1:
            rows = self.head(rows) / 4
        return rows


def shrunk(model: nn.Module, size: int = 8, **options: object) -> Result:
    torch.manual_seed(0)
    return compress(model.eval(), torch.randn(2, 3, size, size), 0.5, round_to=1, **options)


def kept(result: Result, name: str) -> tuple[int, ...]:
    return tuple(result.model.get_parameter(name).shape)


def masked(model: nn.Module, result: Result) -> nn.Module:
    """The original with everything that was removed set to zero: every removed channel of these nets is then silent."""
    twin = copy.deepcopy(model)
    for axis, indices in result.plan.keep.items():
        tensor = twin.get_parameter(axis.tensor) if axis.tensor in dict(twin.named_parameters()) else None
        if tensor is not None:
            gone = torch.ones(tensor.shape[axis.dim], dtype=torch.bool)
            gone[torch.as_tensor(indices)] = False
            tensor.data.index_fill_(axis.dim, gone.nonzero()[:, 0], 0.0)
    return twin


def test_the_largest_submodules_that_can_be_captured_are_parts() -> None:
    model = Detector()
    result = shrunk(model)
    report = result.report["parts"]
    assert report["captured"] == ["tower", "head"]
    assert list(report["stopped"]) == [""] and "depends on the data, at" in report["stopped"][""]
    assert report["parameters_outside"] == 8 and report["used_outside"] == []
    assert type(result.model) is Detector
    assert kept(result, "tower.0.weight") == (8, 3, 3, 3)
    assert kept(result, "tower.3.weight") == (8, 8, 3, 3)
    assert kept(result, "head.0.weight") == (6, 8)
    assert kept(result, "head.2.weight") == (8, 6)
    reasons = {pinned["reason"] for pinned in result.report["pinned"]}
    assert "leaves what could be captured of the model (output)" in reasons


def test_the_whole_model_equals_the_masked_one_on_other_data_and_sizes() -> None:
    model = Detector().eval()
    result = shrunk(model)
    twin = masked(model, result)
    for size in (8, 13):
        x = torch.randn(3, 3, size, size)
        with torch.no_grad():
            assert torch.allclose(result.model(x), twin(x), atol=1e-6)
            assert not torch.allclose(model(x)[:4], twin(x)[:4], atol=1e-6)


def test_the_model_is_left_as_it_was_and_has_no_hooks() -> None:
    model = Detector().train()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, torch.randn(2, 3, 8, 8), 0.5, round_to=1)
    assert model.training and model.tower.training and result.model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    result.model.tower(torch.randn(2, 3, 8, 8)).sum().backward()


class Nested(nn.Module):
    """The refusal is deep inside: what surrounds it is captured layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = tower()
        self.body = nn.ModuleList([nn.ModuleDict({"first": conv(8, 8), "work": head_like()}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = block["first"](x)
            if x.sum() > 0:
                x = x + 1
            x = x + block["work"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x


def test_containers_are_searched_and_borders_are_pinned() -> None:
    result = shrunk(Nested())
    assert result.report["parts"]["captured"] == ["stem", "body.0.first", "body.0.work", "body.1.first", "body.1.work"]
    assert kept(result, "body.1.work.0.weight") == (6, 8)
    assert kept(result, "body.1.first.weight") == (8, 8, 3, 3)


class Pyramid(Detector):
    """One head, called with several sizes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [self.tower(x), self.tower(nn.functional.avg_pool2d(x, 2))]
        return [level[level.mean((1, 2, 3)) > 0] for level in levels]


def test_a_part_that_is_called_with_several_sizes_is_proven_at_each() -> None:
    result = shrunk(Pyramid())
    captured = result.dependencies.analysis.captured
    assert captured.parts is not None and captured.parts.paths == ("tower", "tower")
    assert result.report["parts"]["captured"] == ["tower"]
    assert kept(result, "tower.0.weight") == (8, 3, 3, 3)


class Stubborn(nn.Module):
    """A part whose Python repeats a size that no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Literal()
        self.head = head_like()

    def forward(self, x: Tensor) -> Tensor:
        y = self.work(x)
        return self.head(y.permute(0, 2, 3, 1)[y.mean(1) > 0])


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 16), conv(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y.reshape(len(y), 16, -1).relu().reshape(y.shape))


def test_a_part_whose_code_does_not_fit_is_left_alone() -> None:
    result = shrunk(Stubborn())
    assert kept(result, "work.one.weight") == (16, 3, 3, 3)
    assert kept(result, "head.0.weight") == (6, 8)
    notes = [group["note"] for group in result.report["groups"] if group["note"]]
    assert len(notes) == 1 and notes[0].startswith("code does not fit a smaller work: ")
    assert "test_parts.py:" in notes[0]
    with pytest.raises(ModelError, match=r"\(code does not fit a smaller work: .*test_parts\.py:"):
        shrunk(Stubborn(), only="work")


def test_a_misfit_is_named_where_nothing_else_is_done() -> None:
    captured = capture(Stubborn().eval(), torch.randn(2, 3, 8, 8))
    analysis = analyse(captured)
    live = np.ones(analysis.classes.count, dtype=np.bool_)
    wide = analysis.classes.of[np.unique(analysis.labels["work_one_weight"].planes[0].numpy())]
    live[wide[analysis.classes.pin_of[wide] < 0][::2]] = False
    with pytest.raises(MisfitError, match=r"test_parts.py:\d+: .*captured in parts.* Exclude the module") as caught:
        shrink(captured, make_plan(analysis, live))
    assert list(caught.value.parts) == ["work"]


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = (nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8))
        self.second = False

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.two if self.second else self.one)(x).relu())


class Switching(Detector):
    """The code around a part sets what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Switched()

    def forward(self, x: Tensor) -> Tensor:
        y = self.tower(x)
        rows = y.permute(0, 2, 3, 1)[y.mean(1) > 0]
        first = self.head(rows)
        self.head.second = True
        second = self.head(rows)
        self.head.second = False
        return first + second


def test_what_is_called_in_other_modes_is_no_part() -> None:
    result = shrunk(Switching())
    assert result.report["parts"]["captured"] == ["tower", "head.one", "head.two", "head.out"]
    assert "in another mode" in result.report["parts"]["stopped"]["head"]
    with torch.no_grad():
        result.model(torch.randn(2, 3, 8, 8))


class Chosen(nn.Module):
    def __init__(self, ways: int) -> None:
        super().__init__()
        self.rows = nn.ModuleList([nn.Linear(8, 12) for _ in range(ways)])
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor, way: int) -> Tensor:
        return self.out(self.rows[way](x).relu())


class Choosing(Detector):
    """A part that is told by a number what to do."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.head = Chosen(ways)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tower(x)
        rows = y.permute(0, 2, 3, 1)[y.mean(1) > 0]
        return sum((self.head(rows, way) for way in range(len(self.head.rows))), rows)


def test_every_way_in_which_a_part_is_called_is_captured() -> None:
    assert kept(shrunk(Choosing(10)), "head.rows.9.weight") == (6, 8)
    result = shrunk(Choosing(20))
    assert result.report["parts"]["stopped"]["head"] == "is called in too many ways"
    assert kept(result, "head.rows.19.weight") == (12, 8)


class Once(Detector):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(1)
        if len(self.runs) > 2:
            raise RuntimeError("enough")
        return super().forward(x)


def test_a_model_that_runs_only_so_often_is_refused_in_one_line() -> None:
    with pytest.raises(CaptureError, match=r"^Once: raises RuntimeError when it runs again \(enough\)\. .*\.$"):
        capture(Once(), torch.randn(2, 3, 8, 8))


class Hopeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x[x.mean((1, 2, 3)) > 0] * self.weight[:, None, None]


def test_a_model_of_which_nothing_can_be_captured_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"^Hopeless: "):
        capture(Hopeless(), torch.randn(2, 3, 8, 8))


def test_a_folder_of_a_model_in_parts_is_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Source("detector", "detector.py", Detector().eval(), torch.randn(2, 3, 8, 8), None)
    delivery = deliver(source, tmp_path / "out", Request.of(round_to=1), limits=None)
    assert delivery.report["exports"]["model.onnx"]["checked"]
    assert [finding.subject for finding in audit(tmp_path / "out", lambda name: None)][-1] == "report.json"
    program = read_program(tmp_path / "out" / "dense.pt2")
    assert "scale" in program.state_dict
    again = graphprune.load(tmp_path / "out", Detector().eval())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), delivery.result.model(x))


def test_a_submodule_that_is_named_like_a_word_of_python_is_refused() -> None:
    model = nn.Sequential(nn.ModuleDict({"in": conv(3, 4)}))
    model.forward = lambda x: model[0]["in"](x)  # type: ignore[method-assign]
    with pytest.raises(
        CaptureError, match=r"\.in\..*: a submodule is named like a word of Python\. Give it another name\.$"
    ):
        capture(model.eval(), torch.randn(2, 3, 8, 8))
