"""The code in the documentation runs as it stands there, block after block."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rules import one_thread

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", ["algorithms.md"])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "models")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = (DOCS / name).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    names: dict[str, Any] = {}
    with one_thread():
        for block in blocks:
            line = text[: block.start()].count("\n") + 1
            exec(compile("\n" * line + block[1], str(DOCS / name), "exec"), names)
    assert len(blocks) > 5
