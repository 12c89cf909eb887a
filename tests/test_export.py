"""Exported files: real networks, nested inputs and outputs, types, batches that cannot be open, and every refusal."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from speedup.agreement import off_by, varied
from speedup.capture import capture
from speedup.cut import shrink_graph
from speedup.errors import ExportError
from speedup.export import check_onnx, export_onnx, export_pt2
from speedup.inputs import split_inputs, with_batch
from speedup.plan import Axis, ShrinkPlan

MODELS = Path(__file__).parent.parent / "models"


class Function(nn.Module):
    """A model of one function and no weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Nested(nn.Module):
    """Takes and returns nested things; outputs have the names of inputs, of weights and of what happens inside."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(
        self, x: Tensor, flag: bool = True, *, mask: Tensor | None = None, state: dict[str, Any]
    ) -> dict[str, Any]:
        out = self.relu(x) * self.scale
        maps = [out + state["u"], state["t"][0] * 2]
        return {"relu": out, "maps": maps, "x": x, "mask": mask, "scale": self.scale, "again": out, "none": None}


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3), nn.Flatten(1)
    ).to(dtype)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def declared(path: Path) -> tuple[dict[str, list[int | str]], dict[str, list[int | str]]]:
    """The inputs and outputs of an ONNX file with their shapes."""
    session = ort.InferenceSession(path)
    return tuple(
        {value.name: value.shape for value in values} for values in (session.get_inputs(), session.get_outputs())
    )


@pytest.fixture
def silence(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Fails a test in which anything is printed or warned of."""
    yield
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Real networks


@pytest.mark.parametrize("name", ["digits", "resnet20_cifar", "wide_deep"])
def test_one_file_serves_any_batch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(MODELS)
    module = importlib.import_module(name)
    torch.manual_seed(0)
    model, inputs = module.build_model(), module.example_inputs()
    file = export_onnx(model, inputs, tmp_path / "model.onnx")
    archive = export_pt2(model, inputs, tmp_path / "model.pt2")
    assert file.checked and file.dynamic_batch and file.batches == archive.batches == (1, 3)
    assert file.difference is not None and file.difference < 1e-5 and archive.difference == 0
    assert file.note == archive.note == ""
    assert file.size == file.path.stat().st_size

    session, loaded = ort.InferenceSession(file.path), torch.export.load(archive.path).module()
    for batch in (1, 3, 5):
        args, kwargs = split_inputs(with_batch(inputs, batch))
        with torch.no_grad():
            expected, again = model.eval()(*args, **kwargs), loaded(*args, **kwargs)
        named = kwargs or {"x": args[0]}
        (found,) = session.run(None, {name: value.numpy() for name, value in named.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(again, expected)


def test_a_shrunk_graph_takes_the_place_of_the_dense_model(tmp_path: Path) -> None:
    model = small_net()
    keep = np.array([0, 2, 3, 7])
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    plan = ShrinkPlan({Axis(name, 0): keep for name in names} | {Axis("4.weight", 1): keep})
    shrunk = shrink_graph(capture(model, images()), plan).train()
    dense_file = export_onnx(model, images(), tmp_path / "dense.onnx")
    shrunk_file = export_onnx(shrunk, images(), tmp_path / "shrunk.onnx")
    assert export_pt2(shrunk, images(), tmp_path / "shrunk.pt2").checked
    assert shrunk_file.checked and shrunk_file.dynamic_batch and shrunk_file.size < dense_file.size
    shape: dict[str, list[int | str]] = {"output": ["batch", 64]}
    assert declared(shrunk_file.path) == declared(dense_file.path) == ({"input": ["batch", 3, 8, 8]}, shape)
    assert shrunk.training and not torch.equal(shrunk(images()), shrunk(images())), "dropout is still on"


@pytest.mark.usefixtures("silence")
def test_an_export_leaves_no_trace_but_the_file(tmp_path: Path) -> None:
    model = small_net().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)

    def facts() -> list[Any]:
        modes = [module.training for module in model.modules()]
        return [modes, torch.is_grad_enabled(), *[(p.requires_grad, p.grad) for p in model.parameters()]]

    before, state = facts(), {name: value.clone() for name, value in model.state_dict().items()}
    file = export_onnx(model, images(), tmp_path / "model.onnx")
    export_pt2(model, images(), tmp_path / "model.pt2")
    assert before == facts()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert entries(tmp_path) == {"model.onnx", "model.pt2"}
    assert b".py" not in file.path.read_bytes(), "source lines of the model"
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(file.path).graph.node}, "it is optimised"


# Inputs and outputs


def test_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    rows = torch.rand(2, 4)  # torch.export would take one tensor in three places for one input
    inputs = {"state": {"u": rows, "t": [rows]}, "mask": rows, "x": rows - 0.5, "flag": False}
    file = export_onnx(Nested(), inputs, tmp_path / "model.onnx")
    takes, gives = declared(file.path)
    assert list(takes) == ["state_u", "state_t_0", "mask", "x"]
    # A name that is taken by an input gets a number.
    assert list(gives) == ["relu", "maps_0", "maps_1", "x_1", "mask_1", "scale", "again"]
    assert gives["maps_0"] == ["batch", 4] and gives["scale"] == [4]
    assert export_pt2(Nested(), inputs, tmp_path / "model.pt2").checked


def test_large_weights_lie_next_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    file = export_onnx(small_net(), images(), tmp_path / "model.onnx")
    assert entries(tmp_path) == {"model.onnx", "model.onnx.data"}
    assert file.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert check_onnx(file.path, small_net(), images()).checked


# Batches


def by_rows(x: Tensor) -> Tensor:
    return torch.stack([x[row] * row for row in range(x.shape[0])])


def by_pairs(x: Tensor) -> Tensor:
    return x.view(x.shape[0] // 2, 2, -1) + 1


@pytest.mark.parametrize(
    ("function", "batch", "reason"),
    [
        (by_rows, 2, "makes a number of the batch of args_0."),
        (by_pairs, 2, "cannot be run with batch 1 (shape"),
        (lambda x: x.view(1, 4), 1, "torch.export cannot capture it whole (shape"),
    ],
)
def test_a_batch_that_cannot_be_open_is_fixed_and_said(
    function: Callable[[Tensor], Tensor], batch: int, reason: str, tmp_path: Path
) -> None:
    inputs = torch.rand(batch, 4)
    file = export_onnx(Function(function), inputs, tmp_path / "model.onnx")
    archive = export_pt2(Function(function), inputs, tmp_path / "model.pt2")
    for written in (file, archive):
        assert written.checked and not written.dynamic_batch and written.batches == (batch,)
        assert written.note.startswith(f"The batch is fixed at {batch}. ")
        assert reason in written.note and "\n" not in written.note
    assert declared(file.path)[0] == {"args_0": [batch, 4]}
    assert check_onnx(file.path, Function(function), inputs).batches == (batch,)


# Types


@pytest.mark.parametrize(
    ("dtype", "opset", "note"),
    [
        (torch.float16, 20, ""),
        (torch.float64, 20, "Not compared: Could not find an implementation for Conv("),
        (torch.bfloat16, 22, "Not compared: Could not find an implementation for Conv("),
    ],
)
def test_types_work_as_far_as_onnxruntime_goes(dtype: torch.dtype, opset: int, note: str, tmp_path: Path) -> None:
    file = export_onnx(small_net(dtype), images(dtype), tmp_path / "model.onnx")
    assert file.opset == opset and file.dynamic_batch
    assert file.note.startswith(note) and file.checked == (not note)
    assert (file.difference is None, file.batches) == ((True, ()) if note else (False, (1, 3)))
    onnx.checker.check_model(file.path, full_check=True)
    assert export_pt2(small_net(dtype), images(dtype), tmp_path / "model.pt2").checked


def test_arrays_that_numpy_does_not_have_are_not_compared(tmp_path: Path) -> None:
    model = Function(lambda x, y: [x.float() + 1, (y, y)])
    file = export_onnx(model, (images(torch.bfloat16), images()), tmp_path / "model.onnx")
    assert not file.checked
    assert [list(names) for names in declared(file.path)] == [
        ["args_0", "args_1"],
        ["output_0", "output_1_0", "output_1_1"],
    ]
    assert file.note == "Not compared: onnxruntime takes and gives no arrays of tensor(bfloat16)."


def test_the_opset_is_what_was_asked_for(tmp_path: Path) -> None:
    latest = 25 if sys.version_info >= (3, 11) else 23  # of the last onnxruntime for that Python
    file = export_onnx(small_net(), images(), tmp_path / "model.onnx", opset=latest)
    assert file.opset == latest == onnx.load(file.path).opset_import[0].version
    assert file.checked


# Refusals


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize(
    ("model", "opset", "message"),
    [
        (small_net(), 17, "{path}: opset 17 is not supported. Use one from 18 to 25."),
        (small_net(), 0, "{path}: opset 0 is not supported."),
        (small_net(torch.bfloat16), 18, "{path}: is not valid ONNX ([ShapeInferenceError] (op_type:Conv"),
        (Function(torch.linalg.svdvals), None, "Function: ONNX has no operator for aten._linalg_svd. Replace it"),
        (Function(lambda x: (x, 3)), None, "Function: returns a number, which ONNX has no output for."),
        (Function(lambda x: x if x.sum() > 0 else -x), None, "Function: torch.export cannot capture it whole ("),
    ],
)
def test_a_refusal_is_one_line_and_leaves_the_file_before(
    model: nn.Module, opset: int | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the file before")
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    with pytest.raises(ExportError) as caught:
        export_onnx(model, images(dtype), path, opset=opset)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == {"model.onnx"} and path.read_text() == "the file before"


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "model.onnx", tmp_path / "file" / "model.onnx", tmp_path):
        with pytest.raises(ExportError, match=r"cannot be written .* Name a file in a folder that you may write to"):
            export_onnx(Function(torch.relu), images(), path)
    with pytest.raises(ExportError, match=r"model\.pt: torch\.export\.load takes the suffix \.pt2 only"):
        export_pt2(small_net(), images(), tmp_path / "model.pt")
    assert entries(tmp_path) == {"file"}


def test_another_model_is_found_out(tmp_path: Path) -> None:
    model = small_net()
    path = export_onnx(model, images(), tmp_path / "model.onnx").path
    assert check_onnx(path, model, images()) == check_onnx(str(path), model, (images(),))
    assert check_onnx(path, model, images(), batches=(2,), tolerance=1e-6).batches == (2,)
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] += 0.01
    with pytest.raises(ExportError, match=r"model\.onnx: output 0 for batch 1 is off by 0\.0\d+ of the model's"):
        check_onnx(path, model, images())
    with pytest.raises(
        ExportError, match=r"returns 1x64 float32 for batch 1, the model 1x4x4x4 float32\. Name the dim"
    ):
        check_onnx(path, model[:-1], images())
    with pytest.raises(
        ExportError, match=r"model\.onnx: takes input, but the model args_0\. Write it with export_onnx\."
    ):
        check_onnx(path, Function(torch.relu), images())
    path.write_text("no model")
    with pytest.raises(ExportError, match=r"model\.onnx: is not valid ONNX \("):
        check_onnx(path, model, images())


# The comparison


def test_inputs_vary_within_what_they_mean() -> None:
    mask = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 0.5, 2.0]])
    ids = torch.tensor([[5, 6], [7, 8]])
    first, second = varied((mask, {"ids": ids, "zeros": torch.zeros(2, 3), "flag": True}), 3)
    assert torch.equal(first[:, 0], torch.zeros(3)) and first[0, 1] == first[2, 1] == -math.inf
    assert 0.75 <= first[0, 2] <= 1 and first[0, 2] != first[2, 2]
    assert second["ids"].tolist() == [[5, 6], [7, 8], [5, 6]]
    assert second["zeros"].unique().numel() == 9
    assert second["flag"] is True
    assert torch.equal(varied(mask, 3), first)


@pytest.mark.parametrize(
    ("right", "other", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([math.inf, math.nan, 2.0], [math.inf, math.nan, 2.0], 0.0),
        ([math.inf, 2.0], [math.inf, 1.0], 0.5),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [math.inf, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_to_the_largest_value(
    right: list[float], other: list[float], difference: float
) -> None:
    assert off_by(torch.tensor(right), torch.tensor(other)) == difference
