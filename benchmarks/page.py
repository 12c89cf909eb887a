"""Tables of a page: read back what a benchmark wrote before, and write whole or not at all."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def fill(
    path: Path | None,
    head: Sequence[str],
    keys: Sequence[str],
    markdown: Callable[[Mapping[str, Mapping[str, Any]]], str],
    found: Iterable[tuple[str, Mapping[str, Mapping[str, Any]] | str]],
) -> None:
    """Puts what runs have found in the place of what a page said of them, as soon as it is known.

    Args:
        path: The page; None if they are printed only.
        head: Of its table.
        keys: Of its columns behind the first.
        markdown: Its text, by its rows.
        found: The name of each run with its rows, or in words why there are none. Their names are that of the run, or
            begin with it and a space.

    Raises:
        SystemExit: Some have no rows.
    """
    rows = read(path, head, keys) if path and path.is_file() else {}
    failed = []
    for run, its_rows in found:
        print(run, its_rows, flush=True)
        if isinstance(its_rows, str):
            failed.append(run)
            continue
        rows = {name: row for name, row in rows.items() if name.partition(" ")[0] != run} | dict(its_rows)
        if path:
            write(path, markdown(rows))
    if failed:
        raise SystemExit(f"{', '.join(failed)}: without a result; what the page said of them before stays.")


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
