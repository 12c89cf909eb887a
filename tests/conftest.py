"""What several files of tests share."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_folder import MODELS, make
from test_rules import one_thread

from graphprune.deliver import Delivery


@pytest.fixture
def quiet_and_quick() -> Iterator[None]:
    """One seed, one thread, and none of the warnings that torch gives about itself."""
    torch.manual_seed(0)
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module models/llama.py."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "models")
    import llama

    return llama


@pytest.fixture(scope="session")
def deliveries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Delivery]:
    """Every model of test_folder.py, compressed; only read."""
    parent = tmp_path_factory.mktemp("made")
    return {name: make(name, parent / name) for name in MODELS}


@pytest.fixture
def plain(deliveries: dict[str, Delivery], tmp_path: Path) -> Path:
    """The folder of the plain model, to be spoilt."""
    return Path(shutil.copytree(deliveries["plain"].folder, tmp_path / "plain"))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, each of which has a core
        torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--manuals", metavar="FOLDER", help="Manuals of other systems whose code examples should run.")
