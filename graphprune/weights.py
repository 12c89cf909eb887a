"""Weights between models and files, without pickle: a state dict in, a state dict out."""

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graphprune.config import closest
from graphprune.errors import ConfigError, ModelError
from speedup.errors import first_line

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the state dict of ``model`` as safetensors; tied tensors once, their other names in the metadata.

    Raises:
        ModelError: The state dict holds something that is no tensor.
    """
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ModelError(f"{name}: the state dict holds a {kind} there. Leave it out: only tensors can be saved.")
    ties = tied_names(state)
    save_tensors({name: tensor for name, tensor in state.items() if name not in ties}, path, ties)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes tensors as safetensors; no two of them may share memory.

    Raises:
        OSError: The file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(first_line(error)) from error
    path.chmod(mode)  # safetensors makes files that nobody else may read


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns for every name that is not the first of its tensor that first name."""
    first: dict[int, str] = {}
    return {name: kept for name, tensor in state.items() if (kept := first.setdefault(id(tensor), name)) != name}


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts the weights of a file into ``model``, which is changed.

    Raises:
        ConfigError: There is no such file.
        ModelError: It holds no weights, or those of another model.
    """
    own = model.state_dict(keep_vars=True)
    found = _completed(read_weights(path), own)
    for name in own:
        if name in found and found[name].shape != own[name].shape:
            raise ModelError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, in the model {tuple(own[name].shape)}. "
                "Load weights of this model."
            )
    if missing := own.keys() - found.keys():
        raise ModelError(f"{path}: lacks {_some(missing, found)}. Load weights of this model.")
    if surplus := found.keys() - own.keys():
        raise ModelError(f"{path}: holds {_some(surplus, own)}, unknown to the model. Load weights of this model.")
    model.load_state_dict(found)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the tensors in a file by name: safetensors, or a state dict that ``torch.save`` wrote.

    A checkpoint that holds the state dict under a name of its own is looked into, and the prefixes that wrappers put
    before every name are taken off.

    Raises:
        ConfigError: There is no such file.
        ModelError: It holds no weights, or cannot be read without running code from it.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Name a safetensors file or a saved state dict.")
    try:
        return _read_safetensors(path)
    except SafetensorError:
        pass  # then it is a file of torch.save, or nothing of use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on the age of a pickle
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ModelError(
            f"{path}: holds no weights that can be read without running code from it. Save model.state_dict()."
        ) from error
    return _unwrapped(found, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        ties = {name: kept for name, kept in (file.metadata() or {}).items() if kept in tensors}
    return tensors | {name: tensors[kept] for name, kept in ties.items()}


def _unwrapped(found: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelError(f"{path}: holds no state dict. Save model.state_dict().")
    weights = dict(found)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _completed(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``found`` with what files may leave out: further names of tied tensors, and the counters of batch norms."""
    by_tensor = {id(own[name]): tensor for name, tensor in found.items() if name in own}
    tied = {name: by_tensor[id(tensor)] for name, tensor in own.items() if id(tensor) in by_tensor}
    counters = {name: tensor for name, tensor in own.items() if name.endswith(".num_batches_tracked")}
    return {**counters, **tied, **found}


def _some(names: Iterable[str], others: Iterable[str]) -> str:
    """The first of ``names``, how many more there are, and what it may be called among ``others``."""
    first, *rest = sorted(names)
    return first + closest(first, list(others)) + (f" and {len(rest)} more" if rest else "")
