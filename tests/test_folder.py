"""What a compression leaves behind: whole or not at all, and loaded without pickle."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graphprune
import graphprune.report
from graphprune import folder as files
from graphprune.audit import audit
from graphprune.blueprint import Blueprint
from graphprune.config import Request
from graphprune.deliver import Delivery, deliver
from graphprune.errors import ConfigError, GraphpruneError, ModelError
from graphprune.folder import load, replacing
from graphprune.source import Source
from speedup.errors import SpeedupError
from speedup.latency import Limits

HALF = Request(sparsity=0.5, round_to=8)


class Plain(nn.Module):
    """Convolutions with a shortcut, a buffer that is not saved, and something that the forward pass does not use."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.head = nn.Linear(width, 10)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((width, 1, 1), 2.0), persistent=False)
        self.name, self.size = "plain", (width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu() * self.scale
        return self.head((x + self.mix(x)).mean((2, 3)))


class Stubborn(nn.Module):
    """A size in the code of forward, which no attribute can change, and two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.again = nn.Linear(32, 32)
        self.more = nn.Linear(32, 32)
        self.more.weight = self.again.weight
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        x = self.more(self.again(self.up(x).relu()).relu())
        x = x.view(-1, 1, 32).squeeze(1).relu() + shift
        return {"out": self.down(x)}


class Fixed(nn.Module):
    """Works with a batch of four and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu()) * torch.arange(4.0).unsqueeze(1)
        return out


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        logits: Tensor = self.head(x + self.mlp(x))
        return logits


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "plain": (Plain, (torch.randn(2, 3, 6, 6),)),
    "stubborn": (Stubborn, {"x": torch.randn(2, 8), "shift": torch.randn(2, 1)}),
    "fixed": (Fixed, torch.randn(4, 8)),
    "tied": (Tied, torch.randint(12, (2, 5))),
}


def make(name: str, out: Path, **options: Any) -> Delivery:
    torch.manual_seed(0)
    kind, inputs = MODELS[name]
    model = perturbed(kind())
    return deliver(Source(name, name, model, inputs, None), out, HALF, limits=None, **options)


def perturbed(model: nn.Module) -> nn.Module:
    """`model` with other statistics than those of a fresh batch norm."""
    for tensor in model.buffers():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    return model


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    with torch.no_grad():
        found = model.eval()(*args, **kwargs)
    return list(found.values()) if isinstance(found, dict) else [found]


def test_a_folder_of_sources_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(graphprune.report, "version", missing)
    assert graphprune.report.versions()["graphprune"] == "not installed"


@pytest.mark.parametrize("name", MODELS)
def test_all_files_are_there(deliveries: dict[str, Delivery], name: str) -> None:
    made = deliveries[name]
    assert {path.name for path in made.folder.iterdir()} == set(files.FILES)
    assert len({path.stat().st_mode for path in made.folder.iterdir()}) == 1
    report = json.loads((made.folder / files.REPORT).read_text())
    assert name == "fixed" or report["result"]["form"] == ("graph" if name == "stubborn" else "module")
    assert report["params"]["shrunk"] < report["params"]["dense"]
    assert report["files"].keys() == set(files.FILES) - {files.REPORT}
    assert report["versions"]["torch"] == torch.__version__
    assert {"capture", "verify", "export", "write"} <= report["seconds"].keys()
    assert report["groups"] and report["layers"] and report["proof"]["nodes"] > 5


@pytest.mark.parametrize("name", MODELS)
def test_load_into_a_fresh_model(deliveries: dict[str, Delivery], name: str) -> None:
    made = deliveries[name]
    kind, inputs = MODELS[name]
    fresh = kind()
    before = copy.deepcopy(fresh.state_dict())
    loaded = load(made.folder, fresh)
    assert loaded.training
    assert isinstance(loaded, kind) == (made.report["result"]["form"] == "module")  # type: ignore[arg-type]  # a class
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in before.items())
    if name != "plain":  # whose buffer that is not saved was perturbed
        for one, other in zip(outputs(loaded, inputs), outputs(made.result.model, inputs), strict=True):
            assert torch.equal(one, other)
    loaded.train()
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    out = loaded(**inputs) if isinstance(inputs, dict) else loaded(*args)
    (out["out"] if isinstance(out, dict) else out).square().mean().backward()
    assert all(p.grad is not None for key, p in loaded.named_parameters() if "unused" not in key)


def test_ties_survive(deliveries: dict[str, Delivery]) -> None:
    loaded = load(deliveries["tied"].folder, Tied())
    assert loaded.head.weight is loaded.embed.weight  # type: ignore[union-attr]  # a module
    assert "head.weight" not in load_file(deliveries["tied"].folder / files.WEIGHTS)


def test_load_needs_the_same_model(deliveries: dict[str, Delivery]) -> None:
    folder = deliveries["plain"].folder
    for model, message in (
        (Plain(16), r"stem\.weight: has shape \(16, 3, 3, 3\), in the compressed Plain \(32, 3, 3, 3\)"),
        (Plain().half(), r"stem\.weight: is float16, in the compressed Plain float32"),
        (Tied(), r"stem\.weight: the compressed Plain has it"),
    ):
        with pytest.raises(ModelError, match=message):
            load(folder, model)
    grown = Plain()
    grown.more = nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"more\.weight: this model has it"):
        load(folder, grown)


def test_load_needs_the_files(plain: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load(plain / "nowhere", Plain())
    data = json.loads((plain / files.PLAN).read_text())
    for change, message in (
        ({"format": 99}, "has format 99, not 1"),
        ({"form": "statue"}, "not the plan"),
        ({"keep": 3}, "not the plan"),
        ({"inputs": None, "tied": 3}, "not the plan"),
    ):
        (plain / files.PLAN).write_text(json.dumps({**data, **change}))
        with pytest.raises(SpeedupError, match=message):
            load(plain, Plain())
    (plain / files.PLAN).write_text("nothing")
    with pytest.raises(ModelError, match="not the plan"):
        load(plain, Plain())


def test_a_blueprint_survives_its_file(deliveries: dict[str, Delivery], tmp_path: Path) -> None:
    for made in deliveries.values():
        blueprint = Blueprint.read(made.folder / files.PLAN)
        blueprint.write(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == json.loads((made.folder / files.PLAN).read_text())
        args, kwargs = blueprint.example_inputs()
        batch = 4 if blueprint.model == "Fixed" else 2
        assert all(tensor.shape[0] == batch for tensor in (*args, *kwargs.values()))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyError), replacing(target) as draft:
        (draft / "half").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with replacing(target) as draft:
        assert draft.parent == tmp_path and not target.exists()
        (draft / files.PLAN).touch()
        (draft / files.REPORT).touch()
    assert {path.name for path in target.iterdir()} == {files.PLAN, files.REPORT}


def test_what_was_there_before_is_only_replaced_by_something_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name in (files.PLAN, files.REPORT):
        (target / name).write_text("old")
    with pytest.raises(ConfigError, match="Use --force"), replacing(target):
        pass
    with pytest.raises(KeyError), replacing(target, force=True):
        raise KeyError
    assert (target / files.PLAN).read_text() == "old"
    with replacing(target, force=True) as draft:
        (draft / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_compression_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    (tmp_path / "file").touch()
    for name, message in (("mine", "something else"), ("file", "is a file"), ("no/where", "Make that first")):
        with pytest.raises(ConfigError, match=message), replacing(tmp_path / name, force=True):
            pass
    assert (tmp_path / "mine" / "thesis").exists()


def test_nothing_remains_of_a_delivery_that_fails(tmp_path: Path) -> None:
    kind, inputs = MODELS["plain"]
    source = Source("plain", "plain", kind(), inputs, None)
    for wrong in ({"opset": 3}, {"limits": Limits(2, 0.0, 2, 0.0), "threads": 0}):
        with pytest.raises(SpeedupError):
            deliver(source, tmp_path / "out", HALF, **wrong)  # type: ignore[arg-type]  # of several types
        assert not list(tmp_path.iterdir())


def test_latency_and_accuracy_are_reported(tmp_path: Path) -> None:
    kind, inputs = MODELS["plain"]
    source = Source("plain", "plain", kind(), inputs, lambda model: float(sum(p.numel() for p in model.parameters())))
    made = deliver(source, tmp_path / "out", HALF, limits=Limits(2, 0.0, 2, 0.0, 2, 0.1), command=("graphprune", "x"))
    assert made.report["accuracy"]["dense"] > made.report["accuracy"]["shrunk"] > 0
    assert [one["model"] for one in made.report["latency"]["models"]] == [files.DENSE_ONNX, files.ONNX]
    assert not any(str(tmp_path) in warning for warning in made.report["latency"]["warnings"])
    assert made.report["command"] == ["graphprune", "x"]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_other_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Plain().to(dtype).eval()
    inputs = (torch.randn(2, 3, 6, 6, dtype=dtype),)
    made = deliver(Source("plain", "plain", model, inputs, None), tmp_path / "out", HALF, limits=None)
    assert {p.dtype for p in made.result.model.parameters()} == {dtype}
    assert outputs(made.result.model, inputs)[0].dtype is dtype
    assert outputs(load(made.folder, Plain().to(dtype)), inputs)[0].dtype is dtype
    assert audit(made.folder)


@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_is_never_changed(tmp_path: Path, training: bool) -> None:
    model = Plain().train(training)
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model)
    tensors = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    made = deliver(Source("plain", "plain", model, MODELS["plain"][1], None), tmp_path / "out", HALF, limits=None)
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == tensors
    for (name, one), (_, other) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert one.training == other.training, name
        hidden = {"_parameters", "_buffers", "_modules"}
        assert {k: v for k, v in vars(one).items() if k not in hidden} == {
            k: v for k, v in vars(other).items() if k not in hidden
        }
    for name, parameter in before.named_parameters():
        own = model.get_parameter(name)
        assert torch.equal(own, parameter) and own.requires_grad == parameter.requires_grad
        assert (own.grad is not None) == (name == "head.weight")
    shrunk = made.result.model
    assert shrunk.training == training
    assert not shrunk.get_parameter("stem.weight").requires_grad and shrunk.get_parameter("head.weight").requires_grad


def test_public_names() -> None:
    assert graphprune.load is load
    assert issubclass(ConfigError, GraphpruneError)


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from graphprune.folder import replacing\n"
        "with replacing(Path(sys.argv[1])) as draft:\n    (draft / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "out"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out-new-") and (left / "half").exists()
    (tmp_path / ".out-new-0123abcd").mkdir()  # of whom nobody knows whether it runs
    with replacing(target), pytest.raises(KeyError), replacing(target):
        raise KeyError  # one at the same time, which runs
    assert left.exists() is False and {path.name for path in tmp_path.iterdir()} == {"out", ".out-new-0123abcd"}
