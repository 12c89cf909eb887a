"""Captured models in .pt2 files: written as they are, read without running anything that a file may hold.

``torch.export.load`` trusts its file: it unpickles, loads shared libraries, evaluates expressions and imports what the
file names. All of that is looked for here, through the reader that PyTorch itself uses, before PyTorch gets the file.
"""

import ast
import io
import json
import operator
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader
from torch.utils._sympy import functions

from graphprune.errors import ModelError
from speedup.errors import first_line
from speedup.program import quiet, write_program

_DISTRUST = "Do not use this file; compress the model again."
_MEMBERS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
_SYMBOLIC = frozenset(
    {"Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Min", "Max", "And", "Or", "Not", "Eq", "Ne"}
    | {"StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan", "true", "false", *functions.__all__}
)
_SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.USub, ast.BinOp,
    ast.operator,
)  # fmt: skip


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes a captured model, weights and example inputs included.

    Raises:
        ModelError: It takes, returns or holds something that no archive can store.
    """
    try:
        write_program(program, path)
    except OSError:
        raise
    except Exception as error:  # torch.export has no common error class
        raise ModelError(
            f"{path.name}: torch.export cannot save the model ({first_line(error)}). Take and return tensors, tuples, "
            "lists and dictionaries only."
        ) from error


def read_program(path: Path) -> ExportedProgram:
    """Returns the captured model that a file holds.

    Raises:
        ModelError: The file is missing, is no such archive, or would run code when it is read.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file. Compress the model again.")
    try:
        _check_harmless(path)
        with quiet():
            program = torch.export.load(path)
    except ModelError:
        raise
    except Exception as error:  # a damaged archive leads to errors of any class
        raise ModelError(f"{path}: is not a model that torch.export saved. Compress the model again.") from error
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            if node.op == "call_function" and not _is_operator(node.target):
                raise ModelError(f"{path}: calls {node.target}, which is no operator. {_DISTRUST}")
    return program


def _check_harmless(path: Path) -> None:
    reader = PT2ArchiveReader(str(path))
    for member in reader.get_file_names():
        if not _MEMBERS.fullmatch(member):
            raise ModelError(f"{path}: holds {member}, which no captured model has. {_DISTRUST}")
    for member in _pickled(reader):
        try:
            torch.load(io.BytesIO(reader.read_bytes(member)), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ModelError(f"{path}: {member} would run code when it is read. {_DISTRUST}") from error
    for key, value in _entries(json.loads(reader.read_string("models/model.json"))):
        if key == "__enum__":
            raise ModelError(f"{path}: would import code when it is read. {_DISTRUST}")
        if key == "expr_str" and not _is_arithmetic(value):
            raise ModelError(f"{path}: would evaluate {value!r} when it is read. {_DISTRUST}")


def _pickled(reader: PT2ArchiveReader) -> Iterator[str]:
    """The members that are read as pickles."""
    yield "data/sample_inputs/model.pt"
    for kind in ("weights", "constants"):
        config = json.loads(reader.read_string(f"data/{kind}/model_{kind}_config.json"))
        for payload in config["config"].values():
            if payload["use_pickle"]:
                yield f"data/{kind}/{payload['path_name']}"


def _entries(data: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value in nested data, also in strings that are JSON themselves."""
    if isinstance(data, dict):
        yield from data.items()
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    for child in children:
        yield from _entries(child)
    if isinstance(data, str) and data[:1] in ("[", "{"):
        try:
            inner = json.loads(data)
        except ValueError:
            return
        yield from _entries(inner)


def _is_arithmetic(text: Any) -> bool:
    """Whether a symbolic size is made of numbers, symbols and the functions of symbolic sizes alone."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, TypeError, ValueError):
        return False
    return all(
        isinstance(node, _SYNTAX)
        and (not isinstance(node, ast.Name) or node.id in _SYMBOLIC or bool(re.fullmatch(r"[a-z]+\d+", node.id)))
        and (not isinstance(node, ast.Call) or isinstance(node.func, ast.Name))
        and (not isinstance(node, ast.Constant) or _is_plain(node.value))
        for node in nodes
    )


def _is_plain(value: Any) -> bool:
    return bool(re.fullmatch(r"\w*|[\d.e+-]+", value)) if isinstance(value, str) else isinstance(value, int | float)


def _is_operator(target: Any) -> bool:
    """Whether a graph may call this: operators of PyTorch, and arithmetic on sizes."""
    kinds = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
    module = getattr(target, "__module__", "")
    symbolic = str(getattr(target, "__name__", "")).startswith("sym_")
    return isinstance(target, kinds) or module in (operator.__name__, "_operator", "math") or symbolic
