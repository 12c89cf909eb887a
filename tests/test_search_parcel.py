"""Workers get what is sent to them, with the code of files that they cannot import."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from test_rules import one_thread

from graphprune.errors import ConfigError
from graphprune.search.parcel import opened, packed
from graphprune.source import load_source
from graphprune.training import fit

ROOT = Path(__file__).parent.parent
OWN = {"_source_net", "blocks_beside", "scored_beside", "ways", "ways.across"}

NET = """
from functools import cached_property, lru_cache

import torch
from torch import nn

import scored_beside
from blocks_beside import Block, Kind
from graphprune.training import Training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.kind = Kind.RELU
        self.stem = Block(3, 16)
        self.body = Block(16, 16)
        self.head = nn.Linear(16, 4)

    @cached_property
    def parts(self):
        return self.stem, self.body

    def forward(self, x):
        assert self.kind is Kind.RELU
        for part in self.parts:
            x = part(x)
        return self.head(x.mean((2, 3)))


@lru_cache(maxsize=None)
def data(count):
    x = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return x, x.mean((2, 3)).argmax(1)


def build_model():
    return Net()


def example_inputs():
    return data(32)[0][:2]


def evaluate(model):
    with torch.no_grad():
        return scored_beside.score(model(data(32)[0]), data(32)[1]) + 1e-3 * float(torch.rand(()))


def training():
    x, y = data(32)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    return Training.on(batches, nn.functional.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
"""

BLOCKS = """
import enum

from torch import nn

Kind = enum.Enum("Kind", "RELU GELU", module=__name__)


class Block(nn.Sequential):
    def __init__(self, channels, width):
        super().__init__(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
"""

SCORED = "import ways.across\n\ndef score(found, wanted):\n    return -ways.across.entropy(found, wanted)\n"
ACROSS = "from torch.nn.functional import cross_entropy\n\ndef entropy(*of):\n    return cross_entropy(*of).item()\n"

OPEN = """
import pickle, sys
from pathlib import Path

import torch

from graphprune.search.parcel import opened
from graphprune.training import fit

torch.set_num_threads(1)
torch.manual_seed(5)
model, evaluate, training = opened(pickle.loads(Path(sys.argv[1]).read_bytes()))
fit(model, training, 1)
print(evaluate(model))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model that imports from beside it and from a folder without a file; the folder to work in is another."""
    texts = {"net.py": NET, "blocks_beside.py": BLOCKS, "scored_beside.py": SCORED, "ways/across.py": ACROSS}
    for name, text in texts.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "mine" / "net.py"
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.fixture
def cloudpickle() -> Any:
    return pytest.importorskip("ray").cloudpickle


def test_a_process_without_the_files_computes_the_same(net: Path, cloudpickle: Any) -> None:
    source = load_source(str(net))
    assert {module.__name__ for module in source.modules} == OWN
    evaluate, training = source.evaluate, source.training
    assert evaluate is not None and training is not None
    Path("parcel").write_bytes(pickle.dumps(packed((source.model, evaluate, training), source.modules, cloudpickle)))
    assert not cloudpickle.list_registry_pickle_by_value()
    torch.manual_seed(5)
    fit(source.model, training, 1)
    score = evaluate(source.model)
    shutil.rmtree(net.parent)
    words = [sys.executable, "-c", OPEN, str(Path("parcel").resolve())]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd="/", env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == score


def test_what_is_importable_goes_by_its_name(cloudpickle: Any) -> None:
    assert opened(packed((parsed, load_source), (), cloudpickle)) == (parsed, load_source)
    parcel = packed(parsed, (), cloudpickle)
    assert opened(parcel) is opened(packed(parsed, (), cloudpickle)) and len(parcel.content) < 100


@lru_cache
def parsed(text: str) -> Any:
    return json.loads(text)


def test_nothing_stays_registered(net: Path, cloudpickle: Any) -> None:
    source = load_source(str(net))
    beside = sys.modules["blocks_beside"]
    cloudpickle.register_pickle_by_value(beside)
    try:
        packed(source.model, source.modules, cloudpickle)
        with pytest.raises(
            ConfigError, match=r"^workers: something cannot go there \(cannot pickle '_thread.lock' object\)"
        ):
            packed((source.model, threading.Lock()), source.modules, cloudpickle)
        assert cloudpickle.list_registry_pickle_by_value() == {"blocks_beside"}
    finally:
        cloudpickle.unregister_pickle_by_value(beside)


def test_what_a_worker_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloudpickle: Any) -> None:
    (tmp_path / "not_there.py").write_text("def evaluate(model):\n    return 0.5\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        here = importlib.import_module("not_there")
        parcel = packed(here.evaluate, (), cloudpickle)
    del sys.modules["not_there"]
    with pytest.raises(ConfigError) as caught:
        opened(parcel)
    assert str(caught.value) == (
        "workers: one cannot read what is sent to it (No module named 'not_there'). "
        "Have the code of model and evaluator there."
    )


@pytest.fixture
def cluster(ray_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two workers that find this program, but nothing that a test writes."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(ray_home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def report(*words: Any) -> dict[str, Any]:
    """What was found; what depends on time is left out, and so is accuracy, which is measured without a seed."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    made: dict[str, Any] = json.loads(result.stdout)
    return {name: made[name] for name in ("files", "groups", "dense", "scores") if name in made}


@pytest.mark.slow
def test_a_cluster_runs_the_file_of_a_command(net: Path, cluster: Any) -> None:
    for words in (
        ("compress", net, "--search", "annealing", "--sparsity", 0.3),
        ("compress", net, "--search", "netadapt", "--sparsity", 0.3, "--epochs", 1),
        ("sensitivity", net, "--share", 0.5),
    ):
        options = ("--no-bench", "--round-to", 1, "--force") if words[0] == "compress" else ()
        here = report(*words, *options, "--journal", f"{words[3]}.here")
        there = report(*words, *options, "--journal", f"{words[3]}.there", "--workers", "ray")
        assert there == here
        lines = Path(f"{words[3]}.there").read_text()
        assert sorted(lines.splitlines()) == sorted(Path(f"{words[3]}.here").read_text().splitlines())
        assert report(*words, *options, "--journal", f"{words[3]}.there", "--workers", "ray") == here
        assert Path(f"{words[3]}.there").read_text() == lines
    only_dense = "    assert model.stem[0].out_channels == 16, 'too narrow'\n    with torch.no_grad()"
    net.write_text(NET.replace("    with torch.no_grad()", only_dense))
    result = run("sensitivity", net, "--share", 0.5, "--workers", "ray")
    line = net.read_text().splitlines().index("    assert model.stem[0].out_channels == 16, 'too narrow'") + 1
    says = f"{net}: raises in evaluate() at {net}:{line} (AssertionError: too narrow). Fix it there."
    assert result.exit_code == 2 and result.stderr.strip().splitlines()[-1] == says
    assert not cluster.cloudpickle.list_registry_pickle_by_value()
    assert cluster.is_initialized()  # it was when we came


SCRIPT = """
from functools import lru_cache

import ray
import torch
from blocks_beside import Block
from torch import nn

from graphprune.search import Space, Trials, netadapt


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Block(3, 8), Block(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@lru_cache
def data():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def evaluate(model):
    with torch.no_grad():
        return float(model(data()).square().sum()) + float(torch.rand(()))


def tune(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(data()).square().mean().backward()
    optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    space = Space.of(Net(), data()[:2], round_to=1)
    here = netadapt(Trials(space, evaluate, seed=3), 0.7, step=0.2, finetune=tune)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    there = netadapt(Trials(space, evaluate, workers="ray", seed=3), 0.7, step=0.2, finetune=tune)
    assert ray.is_initialized()
    assert here.history == there.history and here.shares == there.shares
    pairs = zip(here.result.model.state_dict().values(), there.result.model.state_dict().values(), strict=True)
    print(len(here.history), all(torch.equal(one, other) for one, other in pairs))
"""


@pytest.mark.slow
def test_a_cluster_runs_what_a_script_defines(net: Path, ray_home: Path) -> None:
    pytest.importorskip("ray")
    (net.parent / "script.py").write_text(SCRIPT)
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(ray_home)}
    words = [sys.executable, str(net.parent / "script.py")]
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    count, same = done.stdout.split()
    assert int(count) > 2 and same == "True"
