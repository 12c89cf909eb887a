"""The commands: what they print and write; every mistake ends in one line, status 2 and nothing half-written."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from test_stream import saved
from typer.testing import CliRunner, Result

import graphprune
from graphprune import folder as files
from graphprune.cli import app
from speedup.errors import ProofError

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.body(x).relu()).mean((2, 3)))
"""
COMPLETE = (
    NET
    + """
def build_model():
    return Net()

def example_inputs():
    return torch.randn(2, 3, 6, 6)

def evaluate(model):
    return 97.5
"""
)
NOISY = COMPLETE.replace("return Net()", "print('noise'); return Net()").replace(
    "return 97", "print('noise'); return 97"
)
UNKNOWN = COMPLETE.replace("mean((2, 3))", "mean((2, 3)) * x.mean((2, 3)).cummax(1).values.sum(1, keepdim=True)")
NAN = COMPLETE.replace("return Net()", "net = Net(); net.body.weight.data[0, 0] = float('nan'); return net")
NOTHING = COMPLETE.replace("return Net()", "return nn.Conv2d(3, 3, 1)")
RAISES = COMPLETE.replace("return Net()", "raise ValueError('no luck')")
FAILS = COMPLETE.replace("x = self.norm", "if x.sum() > 0: x = -x\n        x = self.norm")
QUICK = ("--no-bench", "--round-to", "8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in that holds nothing but net.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(COMPLETE)
    return tmp_path


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder that compress wrote, and what it printed."""
    parent = tmp_path_factory.mktemp("compressed")
    (parent / "net.py").write_text(NOISY)
    result = run("compress", parent / "net.py", "--out", parent / "out", *QUICK, "--json", "--seed", 3)
    return parent / "out", result


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def complaint(result: Result) -> str:
    """The line that a mistake ends in, after the stages that were shown until then."""
    assert isinstance(result.exception, SystemExit), result.exception
    shown = result.stderr.splitlines()
    while shown and (shown[0].rstrip().endswith(" s") or not shown[0].strip()):
        del shown[0]
    (line,) = shown
    assert not result.stdout
    return line


def test_compress_writes_everything(compressed: tuple[Path, Result]) -> None:
    folder, result = compressed
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == set(files.FILES)
    report = json.loads(result.stdout)
    assert report == json.loads((folder / files.REPORT).read_text())
    assert report["command"][:2] == ["graphprune", "compress"] and "--seed" in report["command"]
    assert report["request"]["seed"] == 3 and report["round_to"] == 8
    assert report["accuracy"] == {"dense": 97.5, "shrunk": 97.5} and report["latency"] is None
    assert report["params"]["dense"] == 10340 and report["params"]["shrunk"] < 10340 / 3
    assert "capture" in result.stderr and "export" in result.stderr
    session = onnxruntime.InferenceSession(folder / files.ONNX)
    assert session.run(None, {"x": torch.randn(5, 3, 6, 6).numpy()})[0].shape == (5, 4)


def test_compress_prints_what_changed(place: Path) -> None:
    result = run("compress", "net.py", "--sparsity", 0.25, *QUICK)
    assert result.exit_code == 0, result.output
    for text in (
        "stem.weight",
        "parameters",
        "MACs",
        "ONNX file",
        "97.50",
        "an instance of Net",
        "Proven",
        "net-pruned/",
    ):
        assert text in result.stdout, text
    assert "latency" not in result.stdout and (place / "net-pruned" / files.PLAN).is_file()
    again = run("compress", "net.py", "--sparsity", 0.5, *QUICK)
    assert again.exit_code == 2 and "Use --force" in complaint(again)
    report = json.loads((place / "net-pruned" / files.REPORT).read_text())
    assert report["request"]["sparsity"] == 0.25
    assert run("compress", "net.py", "--sparsity", 0.5, *QUICK, "--force").exit_code == 0
    report = json.loads((place / "net-pruned" / files.REPORT).read_text())
    assert report["request"]["sparsity"] == 0.5
    assert {path.name for path in place.iterdir()} - {"__pycache__"} == {"net.py", "net-pruned"}


def test_names_choose_what_may_go(place: Path) -> None:
    result = run("compress", "net.py", *QUICK, "--only", "stem", "--exclude", "bo*", "--json")
    assert result.exit_code == 2 and "nothing can be pruned" in complaint(result)
    result = run("compress", "net.py", *QUICK, "--only", "nor*", "--only", "stem", "--min-channels", 24, "--json")
    assert result.exit_code == 0, result.output
    assert [group["kept"] for group in json.loads(result.stdout)["groups"]] == [24]


def test_a_true_process(place: Path) -> None:
    command = [sys.executable, "-m", "graphprune", "compress"]
    words = ["net.py:Net", "--input", "1x3x5x5", "--out", "small", "--no-bench", "--round-to", "8", "--json"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"]["inputs"] == {
        "tuple": [{"tensor": {"shape": [1, 3, 5, 5], "dtype": "float32"}}]
    }
    done = subprocess.run([*command, "missing.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("missing.py: no such file.")
    assert "Traceback" not in done.stderr


MISTAKES = {
    "missing file": (["missing.py"], "missing.py: no such file. Name a Python file, or package.module:name."),
    "no name": (["resnet18"], "resnet18: names no model."),
    "no such module": (["nothing.here:Net"], "nothing.here:Net: there is no module nothing.here to import."),
    "no such name": (["net.py:Nett"], "net.py:Nett: there is no Nett in it (did you mean 'Net'?)."),
    "sparsity 1": (["net.py", "--sparsity", "1"], "sparsity 1.0: is not in [0, 1). Use a share such as 0.5."),
    "sparsity -1": (["net.py", "--sparsity", "-0.1"], "sparsity -0.1: is not in [0, 1)."),
    "sparsity nan": (["net.py", "--sparsity", "nan"], "sparsity nan: is not in [0, 1)."),
    "sparsity word": (["net.py", "--sparsity", "half"], "Invalid value for '--sparsity'"),
    "criterion": (["net.py", "--criterion", "l11"], "criterion 'l11': is not known. Use one of l1, l2,"),
    "scope": (["net.py", "--scope", "here"], "scope 'here': input should be 'local' or 'global'."),
    "round-to word": (["net.py", "--round-to", "x"], "round_to 'x': is no number. Use one such as 8, or auto."),
    "round-to 0": (["net.py", "--round-to", "0"], "round_to 0: is below 1. Use 1 or more."),
    "round-to -8": (["net.py", "--round-to", "-8"], "round_to -8: is below 1. Use 1 or more."),
    "min-channels": (["net.py", "--min-channels", "0"], "min_channels 0: is below 1."),
    "exclude": (["net.py", "--exclude", "stam"], "'stam': no module has that name (did you mean 'stem'?)."),
    "only": (["net.py", "--only", "nothing.*"], "'nothing.*': no module has that name."),
    "input shape": (["net.py", "--input", "1x4x6x6"], "Net: raises RuntimeError on the example inputs"),
    "input count": (["net.py", "--input", "1x3x6x6", "--input", "1"], "Net: raises TypeError on the example inputs"),
    "input name": (["net.py", "--input", "y=1x3x6x6"], "Net: raises TypeError on the example inputs"),
    "input text": (["net.py", "--input", "1,3,6,6"], "input '1,3,6,6': is no shape."),
    "weights": (["net.py", "--weights", "missing.pt"], "missing.pt: no such file."),
    "opset": (["net.py", "--opset", "3"], "opset 3: is not supported. Use one from 18"),
    "device": (["net.py", "--device", "abacus"], "device 'abacus': is not known. Use cpu or cuda."),
    "threads": (["net.py", "--threads", "0"], "Invalid value for '--threads'"),
    "no parent": (["net.py", "--out", "no/where"], "no/where: there is no folder"),
    "a file": (["net.py", "--out", "net.py"], "net.py: is a file. Use another --out."),
    "not ours": (["net.py", "--out", ".", "--force"], ".: holds something else than a compressed model."),
    "no model": ([], "Missing argument 'MODEL'. See graphprune compress --help."),
    "unknown option": (["net.py", "--sparsty", "0.5"], "No such option: --sparsty"),
    "two models": (["net.py", "net.py"], "Got unexpected extra argument"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(place: Path, name: str) -> None:
    words, message = MISTAKES[name]
    result = run("compress", *words)
    assert result.exit_code == 2
    line = complaint(result)
    assert line.startswith(message), line
    assert {path.name for path in place.iterdir()} <= {"net.py", "__pycache__"}


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        ("x = 1", [], "net.py: holds no model. Write a build_model() that returns one."),
        (NET, [], "net.py: offers no example_inputs(). Give shapes, as in --input 1x3x224x224."),
        (RAISES, [], "net.py: raises while the model is built at "),
        (
            FAILS,
            [],
            "model: nothing can be pruned in what can be captured of it (stem, norm, body, head). Net: torch.export cannot",
        ),
        (NAN, [], "body.weight: holds values that are not finite."),
        (NOTHING, [], "model: nothing can be pruned"),
        (UNKNOWN, ["--strict"], "cummax: operator aten.cummax.default has no rule. Leave out --strict"),
        (COMPLETE.replace("97.5", "'good'"), [], "net.py: evaluate() gives str. Return one number."),
    ],
    ids=["no model", "no example", "raises", "branches", "nan", "nothing to prune", "strict", "evaluate"],
)
def test_models_that_cannot_be_compressed(place: Path, code: str, words: list[str], message: str) -> None:
    (place / "net.py").write_text(code)
    result = run("compress", "net.py", *QUICK, *words)
    assert result.exit_code == 2 and complaint(result).startswith(message)
    assert {path.name for path in place.iterdir()} <= {"net.py", "__pycache__"}


def test_bad_weights(place: Path) -> None:
    (place / "text.pt").write_text("nothing")
    save_file({"stem.weight": torch.zeros(3)}, place / "other.safetensors")
    for name, message in (("text.pt", "holds no weights that can be read"), ("other.safetensors", "has shape (3,)")):
        result = run("compress", "net.py", "--weights", name)
        assert result.exit_code == 2 and complaint(result).startswith(name) and message in result.stderr


def test_a_folder_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *rest: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = run("compress", "net.py", *QUICK)
    assert result.exit_code == 2
    assert complaint(result) == "net-pruned: cannot be written (Permission denied). Use another --out."


@pytest.mark.parametrize("call", ["Path.write_bytes", "Path.write_text"])
def test_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(self: Path, *rest: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, call.partition(".")[2], full)
    result = run("compress", "net.py", *QUICK)
    assert result.exit_code == 2
    assert complaint(result) == "net-pruned: cannot be written (No space left on device). Use another --out."
    assert {path.name for path in place.iterdir()} <= {"net.py", "__pycache__"}


def test_a_bug_keeps_its_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*words: Any, **more: Any) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr("graphprune.deliver.compress", bug)
    result = run("compress", "net.py")
    assert isinstance(result.exception, IndexError) and not (place / "net-pruned").exists()


def test_a_failed_proof_is_no_mistake_of_the_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: Any, **more: Any) -> None:
        raise ProofError("relu: differs.")

    monkeypatch.setattr("graphprune.deliver.compress", fail)
    result = run("compress", "net.py")
    assert result.exit_code == 1 and complaint(result) == "relu: differs."


@pytest.mark.usefixtures("quiet_and_quick")
def test_compress_from_checkpoint_to_checkpoint(llama: Any, tmp_path: Path) -> None:
    model, dense, out = llama.__file__, tmp_path / "dense", tmp_path / "small"
    saved(llama.build_model(), dense)
    common = ("compress", model, "--checkpoint", dense, "--out", out, "--round-to", 1)
    result = run(*common)
    assert result.exit_code == 0 and "Proven: all" in result.stdout
    assert graphprune.load(out, llama.build_model()).model.layers[0].self_attn.num_heads == 4
    result = run(*common, "--force", "--no-proof")
    assert result.exit_code == 0 and "Not proven" in result.stdout
    result = run("verify", out)
    assert result.exit_code == 2 and "shrunk checkpoint" in result.stderr
    for wrong in ((*common, "--opset", 18), ("compress", model, "--no-proof"), common):
        result = run(*wrong)
        assert result.exit_code == 2
        assert complaint(result).endswith(("Leave it out.", "another --out."))


def test_verify(compressed: tuple[Path, Result], tmp_path: Path) -> None:
    result = run("verify", compressed[0])
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in (*files.FILES, "proof"))
    copied = Path(shutil.copytree(compressed[0], tmp_path / "copied"))
    shutil.copy(copied / files.DENSE_ONNX, copied / files.ONNX)
    result = run("verify", copied)
    assert result.exit_code == 1 and files.ONNX in complaint(result)
    for name in (copied / files.PLAN, tmp_path / "missing", tmp_path):
        result = run("verify", name)
        assert result.exit_code == 2 and complaint(result).startswith(str(name))


def test_inspect(place: Path) -> None:
    result = run("inspect", "net.py")
    assert result.exit_code == 0 and "stem.weight" in result.stdout and "1 of which can shrink" in result.stdout
    groups = json.loads(run("inspect", "net.py", "--json").stdout)
    group = groups[0]
    assert (group["name"], group["units"], group["pin"]) == ("stem.weight", 32, None)
    assert group["ties"]["convolution"] == 2 and group["ties"]["add"] == 1
    assert {"body.weight", "norm.running_var"} <= {member["tensor"] for member in group["members"]}
    assert "output of the model" in groups[-1]["pin"]


def test_inspect_writes_graphs(place: Path) -> None:
    for suffix in ("dot", "graphml", "json", "svg"):
        result = run("inspect", "net.py", "--graph", f"graph.{suffix}")
        assert result.exit_code == 0, result.output
    data = json.loads((place / "graph.json").read_text())
    nodes = {node["id"]: node for node in data["nodes"]}
    ties = [(nodes[tie["source"]]["tensor"], nodes[tie["target"]]["tensor"], tie["kind"]) for tie in data["edges"]]
    assert any("body.weight" in tie and "convolution" in tie for tie in ties)
    assert all(nodes[tie["source"]]["group"] == nodes[tie["target"]]["group"] for tie in data["edges"])
    xml = ET.parse(place / "graph.graphml").getroot()
    names = "{http://graphml.graphdrawing.org/xmlns}"
    assert len(xml.findall(f".//{names}node")) == len(nodes) and len(xml.findall(f".//{names}edge")) == len(ties)
    dot = (place / "graph.dot").read_text()
    assert dot.count("{") == dot.count("}") and 'label="stem.weight: 32 units"' in dot
    assert ET.parse(place / "graph.svg").getroot().tag.endswith("svg")


def test_inspect_mistakes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("graph.png", "no format has the suffix '.png'"), ("no/graph.dot", "there is no folder")):
        result = run("inspect", "net.py", "--graph", name)
        assert result.exit_code == 2 and complaint(result).startswith(f"{name}: {message}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", "net.py", "--graph", "graph.svg")
    assert result.exit_code == 2 and "pip install 'graphprune[plot]'" in complaint(result)
    assert not (place / "graph.svg").exists()


def test_bench(compressed: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speedup.latency.Limits.reached", lambda self, rounds, seconds: rounds >= 3)
    models = [compressed[0] / files.DENSE_ONNX, compressed[0] / files.ONNX]
    table = tmp_path / "rows.csv"
    result = run("bench", *models, "--threads", 1, "--batch", 2, "--csv", table, "--profile")
    assert result.exit_code == 0, result.output
    assert "candidate" in result.stdout and "control" in result.stdout and "Conv" in result.stdout
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["role"] for row in rows] == ["baseline", "candidate", "control"] and float(rows[1]["p50_ms"]) > 0
    data = json.loads(run("bench", models[0], "--json").stdout)
    assert data["models"][0]["runs"] == 3 and data["profiles"] == {}


def test_bench_mistakes(place: Path, compressed: tuple[Path, Result]) -> None:
    (place / "text.onnx").write_text("nothing")
    good = compressed[0] / files.ONNX
    for words, message in (
        (["missing.onnx"], "missing.onnx: no such file."),
        (["text.onnx"], "text.onnx: onnxruntime cannot load it"),
        ([good, "--provider", "abacus"], "provider: 'abacus' is not available here."),
        ([good, "--batch", 0], "Invalid value for '--batch'"),
        ([], "Missing argument 'ONNX...'. See graphprune bench --help."),
    ):
        result = run("bench", *words)
        assert result.exit_code == 2 and complaint(result).startswith(message)


def test_the_root() -> None:
    assert run("--version").stdout == f"graphprune {graphprune.__version__}\n"
    helped = run("--help")
    assert helped.exit_code == 0 and all(name in helped.stdout for name in ("compress", "inspect", "verify", "bench"))
    result = run("compres", "net.py")
    assert result.exit_code == 2 and "Did you mean 'compress'?" in complaint(result)
