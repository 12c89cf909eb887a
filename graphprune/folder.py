"""The folder that a compression leaves: what its files are called, how it comes to be at once, and how to load it."""

import hashlib
import json
import operator
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.blueprint import Blueprint
from graphprune.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, fill
from graphprune.errors import ConfigError, ModelError
from graphprune.weights import load_weights
from speedup.capture import Captured, capture
from speedup.cut import shrink_graph
from speedup.inputs import ExampleInputs
from speedup.repair import repaired

PLAN = "plan.json"
WEIGHTS = "weights.safetensors"
REPORT = "report.json"
PROGRAM, DENSE_PROGRAM = "model.pt2", "dense.pt2"
ONNX, DENSE_ONNX = "model.onnx", "dense.onnx"
FILES = (ONNX, DENSE_ONNX, PROGRAM, DENSE_PROGRAM, PLAN, WEIGHTS, REPORT)


def fingerprint(path: Path) -> dict[str, Any]:
    """Returns the size and the SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(partial(file.read, 1 << 20), b""):
            sha256.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": sha256.hexdigest()}


def digest(report: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of what a report says, its own left out."""
    said = {key: value for key, value in report.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@contextmanager
def replacing(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``folder`` when everything in it is written, and only then.

    Raises:
        ConfigError: ``folder`` exists and ``force`` is not given, or holds something else than a compression, or cannot
            be written.
    """
    check_free(folder, force=force)
    target = folder.absolute()
    whose = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    draft, former = (target.with_name(f".{target.name}-{kind}-{whose}") for kind in ("new", "old"))
    with writing(folder):
        draft.mkdir()
    try:
        yield draft
        with writing(folder):
            if target.exists():
                target.rename(former)
            try:
                draft.rename(target)
            except OSError:
                if former.exists():
                    former.rename(target)
                raise
        _remove_abandoned(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Removes what runs for the same folder have left that were killed on this machine."""
    name = re.compile(rf"\.{re.escape(target.name)}-(?:new|old)-{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if match is not None and not _is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    """This machine, in the names of drafts: other machines that share a disk have other processes."""
    return re.sub(r"\W", "_", platform.node())


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # there is no asking without harm
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what cannot be written into ``folder``, because a disk is full or forbidden, into one line.

    Raises:
        ConfigError: Something cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}). Use another --out.") from error


def check_free(folder: Path, *, force: bool) -> None:
    """Refuses a folder that a compression may not take the place of.

    Raises:
        ConfigError: It exists and ``force`` is not given, or holds something else, or its parent does not exist.
    """
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{folder}: there is no folder {folder.absolute().parent} to make it in. Make that first.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file. Use another --out.")
    if not force:
        raise ConfigError(f"{folder}: exists. Use --force to replace it, or another --out.")
    if not any(folder.iterdir()):
        return
    if not all((folder / name).is_file() for name in (PLAN, REPORT)):
        raise ConfigError(f"{folder}: holds something else than a compressed model. Use another --out.")
    own = {*FILES, *_said_to_hold(folder / REPORT)}
    for path in sorted(folder.iterdir()):
        if path.name not in own:
            raise ConfigError(
                f"{path}: is no part of the compressed model and would be lost. Remove it, or use another --out."
            )


def _said_to_hold(report: Path) -> list[str]:
    """The files of which a report speaks; none if it cannot be read."""
    try:
        return list(json.loads(report.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def load(folder: Path | str, model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """Returns the shrunk model from a folder that ``graphprune compress`` wrote, ready to train; no pickle is read.

    From a checkpoint the weights are read one by one into tensors of the types that ``model`` has.

    Args:
        folder: The folder.
        model: A fresh instance of the class that was compressed, with any weights; it is not changed.
        example_inputs: Only needed where the result is a graph and an input of the model is no tensor, number, tuple,
            list or dictionary.

    Raises:
        ModelError: The folder holds no compressed model, or that of another model.
    """
    folder = Path(folder)
    blueprint = Blueprint.read(folder / PLAN)
    blueprint.check(model)
    if blueprint.form == "module":
        shrunk = _as_module(model, blueprint)
    else:
        shrunk = _as_graph(model, blueprint, example_inputs)
    if (folder / WEIGHTS).is_file() or not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        load_weights(shrunk, folder / WEIGHTS)
    else:
        fill(shrunk, Checkpoint.open(folder), blueprint.dense.keys(), blueprint.tied)
    return shrunk.train(model.training)


def _as_module(model: nn.Module, blueprint: Blueprint) -> nn.Module:
    """A copy of ``model`` with its tensors cut and its attributes repaired."""
    swaps: dict[int, Tensor] = {}
    for name in blueprint.plan.tensors:
        try:
            dense = operator.attrgetter(name)(model)
        except AttributeError:
            continue  # what forward makes once and keeps; the state dict was compared
        if isinstance(dense, Tensor):
            swaps[id(dense)] = blueprint.plan.cut_copy(name, dense)
    return repaired(model, swaps, blueprint.repairs)


def _as_graph(model: nn.Module, blueprint: Blueprint, example_inputs: ExampleInputs | None) -> nn.Module:
    """The graph of ``model``, captured again, with its tensors cut and its literals rewritten."""
    captured = _captured(model, blueprint, example_inputs)
    nodes = {node.name for node in captured.nodes}
    if missing := sorted(blueprint.plan.literals.keys() - nodes):
        raise ModelError(f"{missing[0]}: the graph of this model has no such node. Use the model that was compressed.")
    return shrink_graph(captured, blueprint.plan)


def _captured(model: nn.Module, blueprint: Blueprint, example_inputs: ExampleInputs | None) -> Captured:
    if example_inputs is not None:
        return capture(model, example_inputs)
    args, kwargs = blueprint.example_inputs()
    if args and kwargs:
        raise ModelError("plan.json: some inputs have names and some have none. Give example_inputs to load().")
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return capture(model, torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), kwargs or args))
