"""Models from files and packages, weights, inputs; and what is said when there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphprune.errors import ConfigError, ModelError
from graphprune.source import load_source
from graphprune.weights import load_weights, read_weights, save_weights

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a = nn.Linear(4, width)
        self.b = nn.Linear(width, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())
"""
EXAMPLE = """
def example_inputs():
    return torch.randn(2, 4)
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return write(tmp_path / "net.py", NET)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_build_model_with_what_stands_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "sibling_of_source.py", NET)
    path = write(
        tmp_path / "wide.py",
        "import torch\nfrom sibling_of_source import Net\n"
        "def build_model():\n    return Net(16)\n"
        "def example_inputs():\n    return {'x': torch.randn(5, 4)}\n"
        "def evaluate(model):\n    import sibling_of_source\n    return torch.tensor(float(model.training))\n",
    )
    source = load_source(str(path))
    assert source.name == "wide" and source.model.a.out_features == 16
    assert isinstance(source.example_inputs, dict) and source.example_inputs["x"].shape == (5, 4)
    assert source.evaluate is not None and source.evaluate(source.model) == 0.0
    assert source.model.training and str(tmp_path) not in sys.path


def test_the_only_class(net: Path) -> None:
    source = load_source(str(net), inputs=["1x4"])
    assert type(source.model).__name__ == "Net" and source.name == "net"
    assert isinstance(source.example_inputs, tuple) and source.example_inputs[0].shape == (1, 4)
    assert source.evaluate is None


@pytest.mark.parametrize("name", ["Net", "make", "MADE", "Place.make"])
def test_a_name_in_a_file(tmp_path: Path, name: str) -> None:
    more = "\ndef make():\n    return Net(6)\nMADE = Net(6)\nclass Place:\n    make = staticmethod(make)\n"
    path = write(tmp_path / "names.py", NET + EXAMPLE + more)
    source = load_source(f"{path}:{name}")
    assert source.name == name.rpartition(".")[2]
    assert source.model.a.out_features == (8 if name == "Net" else 6)


def test_a_name_in_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "module_in_cwd.py", NET)
    monkeypatch.chdir(tmp_path)
    assert load_source("module_in_cwd:Net", inputs=["2x4"]).name == "Net"
    assert isinstance(load_source("torch.nn:Identity", inputs=["2x4"]).model, nn.Identity)


def test_modules_that_only_its_file_can_import(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    elsewhere = write(tmp_path / "elsewhere_of_source.py", NET)
    (tmp_path / "nets" / "pack_of_source").mkdir(parents=True)
    write(tmp_path / "nets" / "pack_of_source" / "__init__.py", "from pack_of_source.inner import Net")
    write(tmp_path / "nets" / "pack_of_source" / "inner.py", "from elsewhere_of_source import Net")
    path = write(
        tmp_path / "nets" / "outer.py",
        f"import sys\nsys.path.append({str(elsewhere.parent)!r})\nimport torch\nfrom pack_of_source import Net\n"
        "def build_model():\n    return Net()\n",
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = {"elsewhere_of_source", "pack_of_source", "pack_of_source.inner"}
    request.addfinalizer(lambda: [sys.modules.pop(name) for name in own])
    modules = load_source(str(path), inputs=["1x4"]).modules
    assert sorted(module.__name__ for module in modules) == ["_source_outer", *sorted(own)]
    monkeypatch.chdir(path.parent)
    modules = load_source("pack_of_source.inner:Net", inputs=["1x4"]).modules
    assert sorted(module.__name__ for module in modules) == ["pack_of_source", "pack_of_source.inner"]
    monkeypatch.chdir(tmp_path)
    names = {module.__name__ for module in load_source("torch.nn:Identity", inputs=["1x4"]).modules}
    assert not {name for name in names if name.startswith(("torch", "graphprune", "speedup"))}


def test_the_same_seed_makes_the_same_model(net: Path) -> None:
    state = torch.get_rng_state()
    one, same, other = (load_source(str(net), inputs=["1x4"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.model.a.weight, same.model.a.weight)
    assert torch.equal(one.example_inputs[0], same.example_inputs[0])  # type: ignore[index]  # a tuple
    assert not torch.equal(one.model.a.weight, other.model.a.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_inputs_by_shape_name_and_type(tmp_path: Path) -> None:
    path = write(tmp_path / "half.py", NET + "\ndef build_model():\n    return Net().half()\n")
    source = load_source(str(path), inputs=["x=2x3", "ids=2x128:int64", "mask=7:bool"])
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in source.example_inputs.items()}  # type: ignore[union-attr]  # a dictionary
    assert kinds == {"x": ((2, 3), torch.half), "ids": ((2, 128), torch.int64), "mask": ((7,), torch.bool)}


@pytest.mark.parametrize("text", ["1y4", "", "0x4", "1x4:floaty", "1x4:nn", "x=", "-1x4"])
def test_inputs_that_are_none(net: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is no shape"):
        load_source(str(net), inputs=[text])


def test_inputs_half_named(net: Path) -> None:
    with pytest.raises(ConfigError, match="Name all of them"):
        load_source(str(net), inputs=["1x4", "x=1x4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "holds no model"),
        ("from torch import nn\nclass A(nn.Module):\n    pass\nclass B(nn.Module):\n    pass", "A, B"),
        ("from torch import nn\nclass A(nn.Module):\n    def __init__(self, width): pass", "A needs width"),
        ("def build_model(): return 3", "gives int"),
        ("def build_model(size): return 3", "needs size"),
        ("build_model = 3", "is of type int"),
        ("def build_model():\n    raise ValueError('no\\nluck')", r"broken\.py:2 \(ValueError: no\)"),
        ("1 +", r"broken\.py:1 \(SyntaxError"),
        ("import no_such_module_anywhere", r"broken\.py:1 \(ModuleNotFoundError"),
        ("import sys\nsys.exit(3)", r"broken\.py:2 \(SystemExit: 3\)"),
        (NET + "def example_inputs(): return 5", r"example_inputs\(\) gives int"),
        (NET + "def example_inputs(): 1 / 0", r"raises in example_inputs\(\) at .*broken\.py:\d+ \(ZeroDivisionError"),
    ],
)
def test_files_without_a_model(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "broken.py", text)
    with pytest.raises(ModelError, match=message) as caught:
        load_source(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.py", "no such file"),
        ("missing.py:Net", "no such file"),
        ("resnet18", "names no model"),
        ("torch.nn:Lineer", r"did you mean 'Linear'\?"),
        ("no_such_package.deep:Net", "no module no_such_package.deep"),
        ("torch.nn:", "names no model"),
    ],
)
def test_names_of_nothing(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_source(text)


def test_no_example(net: Path) -> None:
    with pytest.raises(ConfigError, match="--input"):
        load_source(str(net))


def test_devices(net: Path) -> None:
    with pytest.raises(ConfigError, match="Use cpu or cuda"):
        load_source(str(net), inputs=["1x4"], device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="Use --device cpu"):
            load_source(str(net), inputs=["1x4"], device="cuda")


def test_evaluate_that_fails(tmp_path: Path) -> None:
    fails = NET + EXAMPLE + "\ndef evaluate(model):\n    import no_such_module_anywhere\n"
    source = load_source(str(write(tmp_path / "fails.py", fails)))
    assert source.evaluate is not None
    with pytest.raises(ModelError, match=r"raises in evaluate\(\) at .*fails\.py:\d+ \(ModuleNotFoundError"):
        source.evaluate(source.model)
    nothing = NET + EXAMPLE + "\ndef evaluate(model):\n    return 'good'\n"
    source = load_source(str(write(tmp_path / "nothing.py", nothing)))
    assert source.evaluate is not None
    with pytest.raises(ModelError, match="Return one number"):
        source.evaluate(source.model)


@pytest.mark.parametrize("value", ["float('inf')", "-float('inf')", "float('nan')", "torch.tensor(float('inf'))"])
def test_evaluate_gives_no_finite_number(tmp_path: Path, value: str) -> None:
    code = NET + EXAMPLE + f"\ndef evaluate(model):\n    return {value}\n"
    source = load_source(str(write(tmp_path / "endless.py", code)))
    assert source.evaluate is not None
    with pytest.raises(ModelError, match=r"evaluate\(\) gives -?(inf|nan). Return a finite number\."):
        source.evaluate(source.model)


@pytest.mark.parametrize("value", ["np.float32(0.5)", "np.array([0.5])", "torch.tensor([0.5], dtype=torch.bfloat16)"])
def test_evaluate_gives_a_number_of_another_kind(tmp_path: Path, value: str) -> None:
    code = NET + EXAMPLE + f"\ndef evaluate(model):\n    import numpy as np\n    return {value}\n"
    source = load_source(str(write(tmp_path / "kinds.py", code)))
    assert source.evaluate is not None and source.evaluate(source.model) == 0.5


def test_evaluate_gets_a_copy(tmp_path: Path) -> None:
    code = NET + EXAMPLE + "\ndef evaluate(model):\n    model.a.weight.data.zero_()\n    model.train()\n    return 1\n"
    source = load_source(str(write(tmp_path / "rude.py", code)))
    assert source.evaluate is not None and source.evaluate(source.model.eval()) == 1.0
    assert source.model.a.weight.any() and not source.model.training


@pytest.mark.parametrize("wrap", ["plain", "safetensors", "checkpoint", "prefix"])
def test_weights(net: Path, tmp_path: Path, wrap: str) -> None:
    state = {
        name: torch.randn_like(tensor)
        for name, tensor in load_source(str(net), inputs=["1x4"]).model.state_dict().items()
    }
    path = tmp_path / "weights"
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "checkpoint":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"module.{n}": t for n, t in state.items()} if wrap == "prefix" else state, path)
    model = load_source(str(net), inputs=["1x4"], weights=path).model
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_model(net: Path, tmp_path: Path) -> None:
    state = load_source(str(net), inputs=["1x4"]).model.state_dict()
    path = tmp_path / "weights.pt"
    for change, message in (
        ({"a.weight": torch.zeros(5, 4)}, r"a\.weight has shape \(5, 4\), in the model \(8, 4\)"),
        ({"a.wight": torch.zeros(5)}, r"holds a\.wight \(did you mean 'a\.weight'\?\), unknown"),
    ):
        torch.save(state | change, path)
        with pytest.raises(ModelError, match=message):
            load_source(str(net), inputs=["1x4"], weights=path)
    torch.save({"a.weight": state["a.weight"]}, path)
    with pytest.raises(ModelError, match=r"lacks a\.bias and 2 more"):
        load_source(str(net), inputs=["1x4"], weights=path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04\x95\x10\x00", b"\xff" * 100])
def test_weights_that_are_none(tmp_path: Path, content: bytes) -> None:
    for name in ("weights.pt", "weights.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelError, match="no weights"):
            read_weights(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_weights(tmp_path / "missing")


def test_weights_never_run_code(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(Trap(tmp_path / "sprung"), path)
    with pytest.raises(ModelError, match="without running code"):
        read_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="no state dict"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    one, other = Tied(), Tied()
    path = tmp_path / "tied.safetensors"
    save_weights(one, path)
    assert path.stat().st_size < 4 * (16 + 8) + 600
    load_weights(other, path)
    assert torch.equal(other.b.weight, one.a.weight) and other.a.weight is other.b.weight
    del other.b.weight
    other.b.weight = nn.Parameter(torch.zeros(4, 4))
    load_weights(other, path)  # a model that does not tie them finds both
    assert torch.equal(other.b.weight, one.a.weight)


def test_weights_of_any_type_and_layout(tmp_path: Path) -> None:
    model = nn.Module()
    for name, dtype in (("h", torch.half), ("b", torch.bfloat16), ("d", torch.double)):
        model.register_parameter(name, nn.Parameter(torch.randn(4, 5, dtype=dtype).t()))
    model.register_buffer("count", torch.tensor(3))
    save_weights(model, tmp_path / "weights")
    found = read_weights(tmp_path / "weights")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert found["h"].dtype is torch.half


def test_an_input_larger_than_the_memory(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self): super().__init__(3, 3)\n"
    )
    with pytest.raises(ConfigError, match="'99999999x99999999': is larger than the memory"):
        load_source(str(tmp_path / "net.py"), inputs=("99999999x99999999",))
