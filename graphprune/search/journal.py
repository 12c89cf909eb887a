"""The journal of a search: one line of JSON for each thing that was found out, on disk before it is used."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import ConfigError, ModelError
from graphprune.search.state import Weights
from graphprune.weights import read_weights, save_tensors

Entry = dict[str, Any]


class Journal:
    """What a search has found out, by key; without a path it is only remembered.

    The first line says which search of which model it is. Weights that a later step needs lie in files beside it,
    written whole before the line that speaks of them. A line that was torn when the process ended does not count.
    """

    def __init__(self, path: Path | str | None, header: Mapping[str, Any]) -> None:
        """Opens the journal at ``path``, which is made if it does not exist.

        Raises:
            ConfigError: It is that of another search or model, or no journal, or cannot be written.
        """
        self.path = None if path is None else Path(path)
        self._entries: dict[str, Entry] = {}
        self._weights: dict[str, Weights] = {}
        self._needed: set[str] = set()
        if self.path is None:
            return
        header = json.loads(json.dumps({"journal": 1, **header}))
        try:
            lines = _whole_lines(self.path)
            if not lines:
                self.tidy()  # a journal that was here before was that of another search
                self._append(header)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written ({error.strerror or error}). Use another journal."
            ) from error
        for line in lines:
            if not ("journal" in line if line is lines[0] and isinstance(line, dict) else _is_entry(line)):
                raise ConfigError(f"{self.path}: is no journal of a search. Use another file.")
        if lines and lines[0] != header:
            names = [name for name in header if lines[0].get(name) != header[name]]
            what = names[0] if names else "header"
            raise ConfigError(
                f"{self.path}: is the journal of another search ({_difference(what, lines[0], header)}). "
                "Use another file, or delete this one."
            )
        self._entries = {line["key"]: line for line in lines[1:]}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def record(self, key: str, **found: Any) -> Entry:
        """Writes down what was found out under ``key``; when this returns it is on disk."""
        entry = json.loads(json.dumps({"key": key, **found}, allow_nan=False))
        if self.path is not None:
            self._append(entry)
        self._entries[key] = entry
        return self._entries[key]

    def keep(self, key: str, weights: Weights) -> None:
        """Keeps the weights that belong to ``key``."""
        file = self._file(key)
        if file is None:
            self._weights[key] = weights
            return
        self._needed.add(file.name)
        draft = file.with_name(f"{file.name}.{os.getpid()}.new")
        try:
            save_tensors(weights, draft)
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)

    def weights(self, key: str) -> Weights | None:
        """The weights that were kept for ``key``; None if there are none."""
        file = self._file(key)
        if file is None:
            return self._weights.get(key)
        self._needed.add(file.name)
        try:
            return read_weights(file) if file.is_file() else None
        except ModelError:  # a part of a file, which is made again
            return None

    def drop(self, key: str) -> None:
        """Forgets the weights of ``key``, which nothing needs any more."""
        file = self._file(key)
        if file is None:
            self._weights.pop(key, None)
        else:
            self._needed.discard(file.name)
            file.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes the weights beside the journal that a finished search did not use, such as those of killed runs."""
        if self.path is None:
            return
        ours = re.compile(rf"{re.escape(self.path.name)}\.[0-9a-f]{{16}}\.safetensors(\.\d+\.new)?")
        for file in self.path.parent.iterdir():
            if ours.fullmatch(file.name) and file.name not in self._needed:
                file.unlink(missing_ok=True)

    def _file(self, key: str) -> Path | None:
        return None if self.path is None else self.path.with_name(f"{self.path.name}.{key[:16]}.safetensors")

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[Any]:
    """The lines of a journal; what was torn at its end is cut off.

    Raises:
        ConfigError: It is no journal.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        if not data.startswith(b'{"journal"'[: len(data)]):
            raise ConfigError(f"{path}: is no journal of a search. Use another file.")
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ConfigError(f"{path}: is no journal of a search ({error}). Use another file.") from error


def _is_entry(line: Any) -> bool:
    """Whether a line says what was found out: a score or a time, which are finite numbers."""
    if not isinstance(line, dict) or not isinstance(line.get("key"), str):
        return False
    found = [line[name] for name in ("score", "ms") if name in line]
    return bool(found) and all(type(value) in (int, float) and math.isfinite(value) for value in found)


def _difference(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs, in words that fit into a line."""
    if name == "settings" and isinstance(found.get(name), dict):
        inner = {key for key in (*found[name], *wanted[name]) if found[name].get(key) != wanted[name].get(key)}
        name, found, wanted = sorted(inner)[0], found["settings"], wanted["settings"]
    if name in ("finetune", "regularise"):
        return f"its {name} was another"
    if name == "code":
        return "the code of its model, its training or its evaluation was another"
    if name == "model":
        return "its model, weights or limits are others"
    return f"{name} {found.get(name)!r}, not {wanted.get(name)!r}"
