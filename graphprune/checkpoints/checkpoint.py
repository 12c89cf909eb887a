"""Checkpoints in the layout of the Hugging Face hub: one safetensors file, or several with an index.

They are read and written tensor by tensor, so that the largest tensor and not the model is what memory has to hold.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graphprune.config import closest
from graphprune.errors import ConfigError, ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AGAIN = "Download the checkpoint again."


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        file: Name of the file that holds it.
        dtype: Its type as safetensors calls it.
        shape: Its shape.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the weights of a model; nothing of them is in memory.

    Attributes:
        folder: The folder.
        entries: What is known of each tensor by name.
        metadata: What each file says of itself, by file name.
    """

    folder: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Mapping[str, str]]

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Returns the checkpoint in ``folder``: ``model.safetensors``, or the files that an index names.

        Raises:
            ConfigError: There is no such folder.
            ModelError: It holds no such files, or they are not what the index says; pickles are not read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder. Name one with {SINGLE}, or with {INDEX}.")
        claimed = _index(folder)
        entries: dict[str, Entry] = {}
        metadata: dict[str, Mapping[str, str]] = {}
        for file in dict.fromkeys(claimed.values()) if claimed is not None else (SINGLE,):
            if not (folder / file).is_file():
                raise ModelError(f"{folder / file}: {INDEX} names it, but there is no such file. {_AGAIN}")
            with _opened(folder / file) as opened:
                metadata[file] = opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    piece = opened.get_slice(name)
                    if name in entries:
                        raise ModelError(f"{name}: {entries[name].file} and {file} both hold it. {_AGAIN}")
                    entries[name] = Entry(file, piece.get_dtype(), tuple(piece.get_shape()))
        for name, file in (claimed or {}).items():
            if name not in entries or entries[name].file != file:
                raise ModelError(f"{name}: {INDEX} says that {file} holds it, which it does not. {_AGAIN}")
        return cls(folder, entries, metadata)

    @property
    def files(self) -> Mapping[str, list[str]]:
        """The names of the tensors in each file."""
        found: dict[str, list[str]] = {file: [] for file in self.metadata}
        for name, entry in self.entries.items():
            found[entry.file].append(name)
        return found

    @property
    def bytes(self) -> int:
        """Size of all tensors together."""
        return sum(_size(entry) for entry in self.entries.values())

    def tensor(self, name: str) -> Tensor:
        """Returns one tensor, read now; it is in memory only as long as the caller keeps it."""
        path = self.folder / self.entries[name].file
        with _opened(path) as opened:
            try:
                tensor: Tensor = opened.get_tensor(name)
            except (SafetensorError, KeyError, AttributeError) as error:  # a type that PyTorch does not have
                raise ModelError(f"{path}: {name} cannot be read ({error}). {_AGAIN}") from error
        return tensor


def write_checkpoint(
    folder: Path, like: Checkpoint, shapes: Mapping[str, Sequence[int]], tensor: Callable[[str], Tensor]
) -> None:
    """Writes a checkpoint with the tensors of another, in files of the same names, one tensor after the other.

    Args:
        folder: Where to.
        like: Says which file holds which tensor, and of which type.
        shapes: The shape of every tensor.
        tensor: Gives each of them when it is its turn.
    """
    for file, names in like.files.items():
        entries = {name: Entry(file, like.entries[name].dtype, tuple(shapes[name])) for name in names}
        ordered = dict(sorted(entries.items(), key=lambda item: (-_width(item[1].dtype), item[0])))
        _write_file(folder / file, ordered, like.metadata[file], tensor)
    if (like.folder / INDEX).is_file():
        told = json.loads((like.folder / INDEX).read_text(encoding="utf-8"))
        numbers = {name: math.prod(shapes[name]) for name in like.entries}
        known = {
            "total_size": sum(count * _width(like.entries[name].dtype) for name, count in numbers.items()),
            "total_parameters": sum(numbers.values()),
        }
        said = told.get("metadata")
        said = said if isinstance(said, dict) else {}
        told["metadata"] = {
            **said,
            **{key: value for key, value in known.items() if key in said or key == "total_size"},
        }
        (folder / INDEX).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], tensor: Callable[[str], Tensor]
) -> None:
    """Writes one safetensors file: the length of a header, the header, and the tensors in its order.

    The library itself writes only what is in memory as a whole.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + _size(entry)
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            value = tensor(name).detach().cpu().contiguous()
            if tuple(value.shape) != entry.shape or value.numel() * value.element_size() != _size(entry):
                raise ModelError(
                    f"{name}: is cut to {tuple(value.shape)}, not {entry.shape}. Compress the model again."
                )
            if value.numel():
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def check_fits(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]], owners: Mapping[str, str]) -> None:
    """Refuses a checkpoint that is not that of a model.

    Args:
        checkpoint: The checkpoint.
        shapes: Shape of each tensor of the model by name, every name of a tied one, and of those that are never saved.
        owners: For each name that has to be there one name for the tensor: of tied ones a single name will do.

    Raises:
        ModelError: A tensor is missing, unknown to the model, or has another shape.
    """
    for name, entry in checkpoint.entries.items():
        if name not in shapes:
            raise ModelError(
                f"{checkpoint.folder}: holds {name}, unknown to the model{closest(name, list(shapes))}. "
                "Build the model of this checkpoint."
            )
        if entry.shape != tuple(shapes[name]):
            raise ModelError(
                f"{checkpoint.folder}: {name} has shape {entry.shape}, in the model {tuple(shapes[name])}. "
                "Build the model of this checkpoint."
            )
    present = {owners[name] for name in checkpoint.entries if name in owners}
    for name, owner in owners.items():
        if owner not in present:
            raise ModelError(
                f"{checkpoint.folder}: lacks {name}{closest(name, list(checkpoint.entries))}. "
                "Build the model of this checkpoint."
            )


def fill(model: nn.Module, checkpoint: Checkpoint, known: Collection[str], tied: Mapping[str, str]) -> None:
    """Puts a checkpoint into ``model``, which is changed, tensor by tensor.

    Args:
        model: The model.
        checkpoint: Its weights; of tied ones a single name will do.
        known: The names that a checkpoint of the model may hold; a graph uses some of them, and makes others itself.
        tied: For every further name of a tensor the one that a graph has for it.

    Raises:
        ModelError: A tensor is missing, not among the known ones, or has another shape.
    """
    state = model.state_dict(keep_vars=True)
    shapes = {name: checkpoint.entries[name].shape for name in checkpoint.entries if name in known}
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    needed = {name: owner for name, owner in owners.items() if name in known and not is_counter(name)}
    places = {name: name if name in state else tied.get(name, name) for name in checkpoint.entries}
    needed |= {name: owners[place] for name, place in places.items() if place in state}
    check_fits(checkpoint, {**shapes, **{name: tensor.shape for name, tensor in state.items()}}, needed)
    with torch.no_grad():
        for name, place in places.items():
            if place in state:
                state[place].copy_(checkpoint.tensor(name))


def is_counter(name: str) -> bool:
    """Whether a tensor counts the batches of a norm, which checkpoints may leave out."""
    return name.endswith(".num_batches_tracked")


def _index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor as the index has it; None without an index."""
    if (folder / INDEX).is_file():
        try:
            told = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            named = {str(name): str(file) for name, file in told.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder / INDEX}: is no index of a checkpoint. {_AGAIN}") from error
        for file in named.values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(f"{folder / INDEX}: names {file}, which is no safetensors file beside it. {_AGAIN}")
        if not named:
            raise ModelError(f"{folder / INDEX}: names no tensors. {_AGAIN}")
        return named
    if (folder / SINGLE).is_file():
        return None
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise ModelError(f"{folder / pickled[0]}: is a pickle, and nothing is unpickled. Save it as safetensors.")
    others = [name for name in names if name.endswith(".safetensors")]
    held = f"holds {others[0]} and no {INDEX}" if others else "holds no safetensors files"
    raise ModelError(f"{folder}: {held}. Name a folder with {SINGLE}, or with {INDEX}.")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is no safetensors file that can be read ({error}). {_AGAIN}") from error


_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def _width(dtype: str) -> int:
    """Bytes of one element of a type of safetensors."""
    if dtype not in _BITS:
        raise ModelError(f"{dtype}: tensors of this type are not handled. Use a checkpoint of whole bytes.")
    return _BITS[dtype] // 8


def _size(entry: Entry) -> int:
    return math.prod(entry.shape) * _width(entry.dtype)
