"""The code examples of other systems' manuals run with nothing but the import lines changed.

The manuals are not part of this project: ``pytest tests/test_manuals.py --manuals FOLDER`` takes them from a folder.
"""

import copy
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speedup.masking import attached_masks

IMPORTS = (
    (
        r"^from nni\.[\w.]+ import .*",
        "from graphprune.pruners import *",
    ),  # one example imports another name than it uses
    (r"^from lpot\.experimental import ", "from graphprune.lpot import "),
)
FOREIGN = re.compile(r"tensorflow|\btf\.|\bsess\b")
"""Examples for another framework."""

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = X.mean((2, 3)).argmax(1)


class Small(nn.Module):
    """Two convolutions, batch norms and a linear layer, under the names that the manuals use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


@dataclass(frozen=True)
class Example:
    """A block of code of a manual: its file, line and text."""

    file: str
    line: int
    text: str

    @property
    def code(self) -> str:
        """The text with other import lines."""
        code = self.text
        for theirs, ours in IMPORTS:
            code = re.sub(theirs, ours, code, flags=re.MULTILINE)
        return code


def blocks(path: Path) -> Iterator[Example]:
    """The blocks of Python in a file, as Markdown and reStructuredText mark them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.strip() in ("```", "```python"):
            end = next(n for n in range(number, len(lines)) if lines[n].strip() == "```")
            inside = lines[number:end]
        elif line.strip() == ".. code-block:: python":
            end = next(
                (n for n in range(number, len(lines)) if lines[n].strip() and not lines[n].startswith(" ")), len(lines)
            )
            inside = lines[number:end]
        else:
            continue
        yield Example(path.name, number + 1, textwrap.dedent("\n".join(inside)).strip("\n") + "\n")
        number = end + 1


def examples(folder: Path) -> list[list[Example]]:
    """The examples that belong together: what follows a block that makes a pruner goes on with it."""
    found: list[list[Example]] = []
    for path in sorted(folder.iterdir()):
        last: list[Example] | None = None
        for block in blocks(path):
            if FOREIGN.search(block.text) or "lpot" in block.text or "prune." in block.text:
                last = None
            elif "import" in block.text:
                found.append(last := [block])
            elif last is not None:
                last.append(block)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("--manuals")
    if "example" in metafunc.fixturenames:
        found = examples(Path(folder)) if folder else []
        metafunc.parametrize("example", found, ids=[f"{one[0].file}:{one[0].line}" for one in found])


def surroundings() -> dict[str, Any]:
    """What the manuals take for granted."""
    torch.manual_seed(0)
    model = Small()
    model(X)  # statistics of the batch norms

    def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int = 0) -> None:
        model.train()
        for batch in torch.arange(len(X)).split(8):
            optimizer.zero_grad()
            criterion(model(X[batch]), Y[batch]).backward()
            optimizer.step()

    def evaluator(*given: Any) -> float:
        (model,) = (one for one in given if isinstance(one, nn.Module))
        with torch.no_grad():
            return (model.eval()(X).argmax(1) == Y).float().mean().item()

    def fine_tuner(model: nn.Module) -> None:
        trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.functional.cross_entropy)

    return {
        "torch": torch,
        "model": model,
        "trainer": trainer,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "criterion": nn.functional.cross_entropy,
        "evaluator": evaluator,
        "fine_tuner": fine_tuner,
        "short_term_fine_tuner": fine_tuner,
        "val_loader": [(X, Y)],
        "dummy_input": X[:2],
        "epoch": 5,
        "epoch_num": 1,
    }


def test_an_example_runs(example: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = surroundings()
    before = copy.deepcopy(names["model"])
    for block in example:
        exec(compile(block.code, f"{block.file}:{block.line}", "exec"), names)
    shrunk = names.get("masked_model", names["model"])
    for _ in range(2):  # what waits for the user's own loop
        names["trainer"](shrunk, torch.optim.SGD(shrunk.parameters(), lr=0.01), names["criterion"])
    sizes = [sum(p.numel() for p in model.parameters()) for model in (before, shrunk)]
    assert attached_masks(shrunk) or sizes[1] < sizes[0]


def test_the_folder_holds_examples(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--manuals")
    if not folder:
        pytest.skip("needs --manuals FOLDER")
    assert len(examples(Path(folder))) > 20
