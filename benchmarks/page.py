"""Tables of a page: read back what a benchmark wrote before, and write whole or not at all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], keys: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a table; the first column is the name of the row."""
    lines = [_line(head), "|" + " --- |" * len(head)]
    for name, values in rows.items():
        lines.append(_line([name, *(str(values.get(key, "")).replace("|", "/") for key in keys)]))
    return lines


def read(path: Path, head: Sequence[str], keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """The rows of a page with one table."""
    lines = path.read_text().splitlines()
    start = lines.index(_line(head)) + 2
    found = {}
    for line in lines[start:]:
        if not line.startswith("| "):
            break
        name, *values = (cell.strip() for cell in line.strip("|").split(" | "))
        found[name] = {key: value for key, value in zip(keys, values, strict=False) if value}
    return found


def write(path: Path, text: str) -> None:
    """Puts a file in the place of what is there once it is written."""
    draft = path.with_name(f".{path.name}-new-{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
