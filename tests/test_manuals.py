"""The code examples of other systems' manuals run with nothing but the import lines changed.

The manuals are not part of this project: ``pytest tests/test_manuals.py --manuals FOLDER`` takes them from a folder.
"""

import copy
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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


def test_the_file_and_the_loop_of_lpot_run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are parts of a program: the loop is the body of a function, the other one calls it."""
    folder = request.config.getoption("--manuals")
    if not folder:
        pytest.skip("needs --manuals FOLDER")
    (path,) = (one for one in Path(folder).iterdir() if "```yaml\npruning:" in one.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "conf.yaml").write_text(written.replace("layer1.0.conv1.weight", "layer1.weight"))
    loop, call = (Example(path.name, 1, code) for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL))

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer2 = nn.Linear(4, 64), nn.Linear(64, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor]:
            outputs = self.layer2(self.layer1(input_ids * attention_mask).relu())
            return (nn.functional.cross_entropy(outputs, labels),)

    torch.manual_seed(0)
    model = Bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = {"num_train_epochs": 3, "device": "cpu", "n_gpu": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    rows = torch.randn(20, 6, 4)
    names: dict[str, Any] = {
        "torch": torch,
        "args": SimpleNamespace(config=tmp_path / "conf.yaml", **args),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "train_dataloader": [(one, torch.ones(4), one, one[:, :3].argmax(1)) for one in rows],
        "ProgressBar": lambda **_: None,
        "eval_func": lambda model: 1.0,
    }
    body = re.sub(r"^\.\.\.$", "", loop.code, flags=re.MULTILINE)
    exec(compile(f"def train_func(model):\n{body}", f"{loop.file}:{loop.line}", "exec"), names)
    exec(compile(call.code, f"{call.file}:{call.line}", "exec"), names)
    assert names["model"] is model and not attached_masks(model)
    assert (model.layer1.weight == 0).sum() == 249 and not (model.layer2.weight == 0).any()  # 0.97 of 256


def test_the_folder_holds_examples(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--manuals")
    if not folder:
        pytest.skip("needs --manuals FOLDER")
    assert len(examples(Path(folder))) > 20
