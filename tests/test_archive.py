"""Captured models come back as they were, and a file never gets to run anything."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from graphprune.archive import read_program, save_program
from graphprune.errors import ModelError
from speedup.capture import capture, captured_from

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"


class Net(nn.Module):
    """With what an archive has to bring back: a tie, buffers of both kinds, constants, sizes that follow the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.register_buffer("kept", torch.randn(8))
        self.register_buffer("dropped", torch.randn(8), persistent=False)
        self.plain = torch.randn(8)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        x = self.b(self.a(x + self.kept).relu() * scale) + self.dropped + self.plain
        return x.view(x.shape[0] * 2, 4).reshape(x.shape[0], 8) + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    save_program(capture(Net(), {"x": torch.randn(2, 8), "scale": torch.randn(2, 1)}).program, path)
    return path


def rewritten(saved: Path, path: Path, changes: dict[str, bytes | Callable[[Any], Any]]) -> Path:
    """A copy of an archive in which some members are others: bytes, or what a function makes of their JSON."""
    reader = PT2ArchiveReader(str(saved))
    own = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}
    members: dict[str, bytes] = {name: reader.read_bytes(name) for name in reader.get_file_names() if name not in own}
    for name, change in changes.items():
        members[name] = change if isinstance(change, bytes) else json.dumps(change(json.loads(members[name]))).encode()
    with PT2ArchiveWriter(str(path)) as writer:
        for name, content in members.items():
            writer.write_bytes(name, content)
    return path


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def replaced(old: str, new: str) -> Callable[[Any], Any]:
    return lambda data: json.loads(json.dumps(data).replace(old, new))


def test_a_captured_model_survives_its_file(saved: Path, tmp_path: Path) -> None:
    model = Net()
    fresh = capture(model, {"x": torch.randn(2, 8), "scale": torch.randn(2, 1)})
    save_program(fresh.program, tmp_path / "net.pt2")
    again = captured_from(read_program(tmp_path / "net.pt2"))
    assert [(n.name, n.op, str(n.target)) for n in again.nodes] == [(n.name, n.op, str(n.target)) for n in fresh.nodes]
    for one, other in zip(again.nodes, fresh.nodes, strict=True):
        assert str(getattr(one.meta.get("val"), "shape", None)) == str(getattr(other.meta.get("val"), "shape", None))
    x = {"x": torch.randn(5, 8), "scale": torch.randn(5, 1)}
    assert torch.equal(again.graph_module(**x), model(**x))
    assert set(again.kwargs) == {"x", "scale"} and not again.args
    unchanged = read_program(rewritten(saved, tmp_path / "same.pt2", {}))
    assert len(unchanged.state_dict) == len(fresh.program.state_dict)


def test_pickles_are_refused(saved: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    path = rewritten(saved, tmp_path / "samples.pt2", {SAMPLES: pickled(Trap(sprung))})
    with pytest.raises(ModelError, match=f"{SAMPLES} would run code"):
        read_program(path)

    def as_pickle(data: Any) -> Any:
        next(iter(data["config"].values()))["use_pickle"] = True
        return data

    weights: dict[str, bytes | Callable[[Any], Any]] = {
        "data/weights/model_weights_config.json": as_pickle,
        "data/weights/weight_0": pickled(Trap(sprung)),
    }
    with pytest.raises(ModelError, match="weight_0 would run code"):
        read_program(rewritten(saved, tmp_path / "weights.pt2", weights))
    assert not sprung.exists()


@pytest.mark.parametrize(
    "member", ["data/aotinductor/model/code.so", "data/weights/model.pt", "data/constants/custom_obj_0", "extra/note"]
)
def test_members_that_no_captured_model_has(saved: Path, tmp_path: Path, member: str) -> None:
    path = rewritten(saved, tmp_path / "more.pt2", {member: b"anything"})
    with pytest.raises(ModelError, match=f"holds {member}"):
        read_program(path)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "Symbol('s0').__class__",
        "print(1)",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "Symbol('a b; c')",
        "1 +",
    ],
)
def test_expressions_that_are_no_sizes(saved: Path, tmp_path: Path, expression: str) -> None:
    def change(data: Any) -> Any:
        for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
            change(value)
        if isinstance(data, dict) and "expr_str" in data:
            data["expr_str"] = expression
        return data

    with pytest.raises(ModelError, match="would evaluate"):
        read_program(rewritten(saved, tmp_path / "sizes.pt2", {MODEL: change}))


def test_imports_are_refused(saved: Path, tmp_path: Path) -> None:
    hidden = json.dumps([1, {"\\u005f_enum__": True, "fqn": "this:x", "name": "y"}]).replace("\\\\u005f", "\\u005f")

    def change(data: Any) -> Any:
        data["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = hidden
        return data

    with pytest.raises(ModelError, match="would import"):
        read_program(rewritten(saved, tmp_path / "enum.pt2", {MODEL: change}))


@pytest.mark.parametrize(
    "target", ["torch.ops.load_library", "torch.load", "torch.hub.load", "torch.nn.functional.relu"]
)
def test_calls_that_are_no_operators(saved: Path, tmp_path: Path, target: str) -> None:
    path = rewritten(saved, tmp_path / "calls.pt2", {MODEL: replaced("torch.ops.aten.relu.default", target)})
    with pytest.raises(ModelError, match=r"which is no operator|is not a model"):
        read_program(path)


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 nothing"])
def test_what_is_no_archive(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not a model that"):
        read_program(path)
    with pytest.raises(ModelError, match="no such file"):
        read_program(tmp_path / "missing.pt2")
    assert not capfd.readouterr().err


def test_half_an_archive(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "half.pt2"
    path.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    with pytest.raises(ModelError, match="is not a model that"):
        read_program(path)
    path = rewritten(saved, path, {MODEL: lambda data: {"graph_module": {}}})
    with pytest.raises(ModelError, match="is not a model that"):
        read_program(path)
    assert not capfd.readouterr().err


def test_what_an_archive_cannot_hold(tmp_path: Path) -> None:
    program = capture(nn.Linear(3, 3), torch.randn(2, 3)).program
    program._example_inputs = ((lambda: None,), {})
    with pytest.raises(ModelError, match=r"x\.pt2: torch\.export cannot save the model"):
        save_program(program, tmp_path / "x.pt2")
