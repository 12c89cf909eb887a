"""A folder is proven again from its files alone: audit passes what was delivered and finds whatever was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_folder import MODELS

from graphprune import folder as files
from graphprune.audit import audit
from graphprune.deliver import Delivery
from graphprune.errors import ConfigError
from speedup.errors import SpeedupError


@pytest.mark.parametrize("name", MODELS)
def test_audit(deliveries: dict[str, Delivery], name: str) -> None:
    found = audit(deliveries[name].folder)
    assert [one.subject for one in found] == [
        files.DENSE_PROGRAM, files.PLAN, "proof", files.WEIGHTS, files.PROGRAM, files.ONNX, files.DENSE_ONNX,
        files.REPORT,
    ]  # fmt: skip


def change_plan(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / files.PLAN).read_text())
    change(data)
    (folder / files.PLAN).write_text(json.dumps(data))


def test_audit_finds_a_kept_channel_that_a_tied_tensor_drops(plain: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        kept = data["keep"]["norm.bias"]["0"]
        kept[0] = next(index for index in range(32) if index not in kept)

    change_plan(plain, change)
    with pytest.raises(SpeedupError, match=r"plan\.json: (keep of \S+ is not what follows|cannot keep)"):
        audit(plain)


def test_audit_finds_a_wrong_literal(deliveries: dict[str, Delivery], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(deliveries["stubborn"].folder, tmp_path / "stubborn"))

    def change(data: dict[str, Any]) -> None:
        ((node, literals),) = data["literals"].items()
        data["literals"][node] = {name: [*value[:-1], value[-1] + 1] for name, value in literals.items()}

    change_plan(folder, change)
    with pytest.raises(SpeedupError, match=r"plan\.json: literals of \w+ is not what follows"):
        audit(folder)


def test_audit_finds_an_unknown_tensor(plain: Path) -> None:
    change_plan(plain, lambda data: data["keep"].update(nothing={"0": [1]}))
    with pytest.raises(SpeedupError, match=r"keeps channels of (it|nothing)"):
        audit(plain)


def test_audit_finds_other_weights(plain: Path) -> None:
    path = plain / files.WEIGHTS
    weights = load_file(path)
    weights["unused.bias"][0] += 1
    save_file(weights, path)
    with pytest.raises(SpeedupError, match=r"weights\.safetensors: unused\.bias is not what the plan keeps"):
        audit(plain)
    del weights["unused.bias"]
    save_file(weights, path)
    with pytest.raises(SpeedupError, match=r"weights\.safetensors: lacks unused\.bias"):
        audit(plain)


@pytest.mark.parametrize("name", [files.PROGRAM, files.ONNX, files.DENSE_ONNX])
def test_audit_finds_other_models(plain: Path, name: str) -> None:
    other = {files.PROGRAM: files.DENSE_PROGRAM, files.ONNX: files.DENSE_ONNX, files.DENSE_ONNX: files.ONNX}[name]
    shutil.copy(plain / other, plain / name)
    with pytest.raises(SpeedupError, match=rf"{name}: output 0 .* is off by"):
        audit(plain)
    (plain / name).unlink()
    with pytest.raises(SpeedupError, match=f"{name}.*(missing|no such file)"):
        audit(plain)


def test_audit_finds_a_boasting_report(plain: Path) -> None:
    report = json.loads((plain / files.REPORT).read_text())
    for change, message in (
        ({"params": {"dense": report["params"]["dense"], "shrunk": 1}}, "says params"),
        ({"macs": {"dense": 1, "shrunk": 1}}, "says macs"),
        ({"files": report["files"] | {files.ONNX: {"bytes": 3, "sha256": ""}}}, "model.onnx: is not the file that"),
        ({"files": 3}, "is not the report"),
        ({"files": {}}, "is not the report"),
        ({"accuracy": {"dense": 1, "shrunk": 2}}, "is not as it was written"),
    ):
        (plain / files.REPORT).write_text(json.dumps(report | change))
        with pytest.raises(SpeedupError, match=message):
            audit(plain)


@pytest.mark.parametrize("name", sorted({*files.FILES} - {files.REPORT}))
def test_audit_finds_a_single_byte(plain: Path, name: str) -> None:
    path = plain / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpeedupError):
        audit(plain)


def test_audit_finds_other_repairs(deliveries: dict[str, Delivery], tmp_path: Path) -> None:
    for name, made in deliveries.items():
        folder = tmp_path / name
        shutil.copytree(made.folder, folder)
        plan = json.loads((folder / files.PLAN).read_text())
        plan["repairs"] = [{"module": "", "attribute": "width", "old": 8, "new": 4}]
        (folder / files.PLAN).write_text(json.dumps(plan))
        with pytest.raises(SpeedupError, match=r"plan\.json: is not the file that"):
            audit(folder)


def test_audit_of_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="Name"):
            audit(folder)
