"""What several files of tests share."""

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lpot_file import FILE
from test_folder import MODELS, make
from test_rules import one_thread
from torch import Tensor

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


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Ray keeps the token of its clusters, which a process reads only once."""
    return tmp_path_factory.mktemp("ray_home")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, each of which has a core
        torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--manuals", metavar="FOLDER", help="Manuals of other systems whose code examples should run.")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the file with something in it replaced."""

    def written(*changes: tuple[str, str], text: str = FILE) -> Path:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "conf.yaml").write_text(text)
        return tmp_path / "conf.yaml"

    return written


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something like torchvision: images of noise that are not in any folder."""

    class ImageFolder(torch.utils.data.Dataset[Any]):
        def __init__(self, root: str, transform: Callable[[Any], Tensor] | None = None) -> None:
            if root != "ROOT":
                raise FileNotFoundError(f"there is no {root}.")
            self.images = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
            self.transform = transform or (lambda image: image)

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.transform(self.images[index]), index % 4

    class Compose:
        def __init__(self, transforms: list[Callable[[Any], Any]]) -> None:
            self.transforms = transforms

        def __call__(self, image: Any) -> Any:
            for one in self.transforms:
                image = one(image)
            return image

    class Normalize:
        def __init__(self, mean: list[float], std: list[float]) -> None:
            self.mean, self.std = (torch.tensor(one).reshape(3, 1, 1) for one in (mean, std))

        def __call__(self, image: Tensor) -> Tensor:
            return (image - self.mean) / self.std

    for name, classes in (("datasets", [ImageFolder]), ("transforms", [Compose, Normalize])):
        module = ModuleType(f"torchvision.{name}")
        vars(module).update({one.__name__: one for one in classes})
        monkeypatch.setitem(sys.modules, module.__name__, module)
