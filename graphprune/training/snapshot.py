"""A training run between two epochs in a folder, so that another process goes on as if nothing had happened.

``epoch-00003/`` holds ``weights.safetensors`` (the model), ``state.safetensors`` and ``state.json`` (everything else),
and ``best.safetensors`` if the best weights are kept too; nothing is pickled. A snapshot gets its name when it is
whole, and the one before it goes after that.
"""

import json
import random
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graphprune.errors import ConfigError, ModelError
from graphprune.weights import load_weights, read_weights, save_tensors, save_weights

WEIGHTS, BEST, TENSORS, STATE = "weights.safetensors", "best.safetensors", "state.safetensors", "state.json"
_NAME = re.compile(r"epoch-(\d{5,})")


def save_snapshot(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    generators: Sequence[torch.Generator],
    facts: Any,
    best: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes what a run has come to, and removes what was written of it before.

    Args:
        folder: The folder of the run.
        model: Its weights and all its buffers.
        optimizer: Its state and its groups.
        schedule: Its state.
        generators: Further sources of random numbers than those of torch, numpy and Python.
        facts: Plain data: one for each epoch that is done.
        best: The state dict of an earlier epoch, to be kept beside.

    Raises:
        ConfigError: The folder cannot be written.
        ModelError: The state holds something that only a pickle could.
    """
    tensors: dict[str, Tensor] = {}
    state = {
        "optimizer": _kind(optimizer),
        "options": _plain(_options(optimizer), tensors, "options"),
        "optimizer_state": _plain(optimizer.state_dict(), tensors, "optimizer"),
        "schedule": _kind(schedule),
        "schedule_state": _plain(schedule.state_dict() if schedule else None, tensors, "schedule"),
        "buffers": _plain(dict(_unsaved_buffers(model)), tensors, "buffers"),
        "random": _plain(random_state(generators), tensors, "random"),
        "facts": facts,
    }
    draft = folder / f".epoch-{secrets.token_hex(4)}"
    try:
        draft.mkdir(parents=True)
        save_weights(model, draft / WEIGHTS)
        save_tensors(tensors, draft / TENSORS)
        if best is not None:
            save_tensors({name: tensor.clone() for name, tensor in best.items()}, draft / BEST)
        (draft / STATE).write_text(json.dumps(state), encoding="utf-8")
        draft.rename(folder / f"epoch-{len(facts):05d}")
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}). Use another folder.") from error
    for path in folder.iterdir():
        if path.name.startswith(".epoch-") or (
            _NAME.fullmatch(path.name) and path != folder / f"epoch-{len(facts):05d}"
        ):
            shutil.rmtree(path, ignore_errors=True)


def newest_snapshot(folder: Path) -> Path | None:
    """Returns the last whole snapshot in a folder; None if there is none."""
    if not folder.is_dir():
        return None
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return found[max(found)] if found else None


def load_snapshot(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    generators: Sequence[torch.Generator],
) -> Any:
    """Puts everything back as it was, in all arguments and the random numbers of the process, and returns the facts.

    Raises:
        ModelError: The snapshot is that of another model, optimizer, schedule or loader, or cannot be read.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, own in (("optimizer", optimizer), ("schedule", schedule)):
            if state[name] != _kind(own):
                raise ModelError(f"{path}: was written with {name} {state[name]}, not {_kind(own)}. Use the same one.")
        tensors = read_weights(path / TENSORS)
        options, saved, planned, buffers, numbers = (
            _back(state[name], tensors, device)
            for name in ("options", "optimizer_state", "schedule_state", "buffers", "random")
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelError(
            f"{path}: is no snapshot of a training run ({error!r}). Begin again in another folder."
        ) from error
    if (count := len(numbers["generators"])) != len(generators):
        raise ModelError(
            f"{path}: was written with {count} generators of a loader, not {len(generators)}. Use the same loader."
        )
    for name, value in _options(optimizer).items():
        if name not in options or options[name] != value:
            was = options.get(name)
            raise ModelError(f"{path}: was written with an optimizer of {name} {was}, not {value}. Use the same one.")
    load_weights(model, path / WEIGHTS)
    with torch.no_grad():
        for name, buffer in _unsaved_buffers(model):
            buffer.copy_(buffers[name])
    _load_optimizer(optimizer, saved, path)
    if schedule is not None:
        schedule.load_state_dict(planned)
    set_random_state(numbers, generators)
    return state["facts"]


def load_best(path: Path) -> dict[str, Tensor]:
    """Returns the best weights that a snapshot keeps.

    Raises:
        ModelError: It keeps none.
    """
    if not (path / BEST).is_file():
        raise ModelError(f"{path}: was written without the best weights. Resume it with keep='last'.")
    return read_weights(path / BEST)


def _options(optimizer: Optimizer) -> dict[str, Any]:
    """The numbers and words that an optimizer was made with; a tensor among them may be what a schedule changes."""
    single = bool | int | float | str | None
    return {
        name: value
        for name, value in optimizer.defaults.items()
        if isinstance(value, single) or (isinstance(value, tuple) and all(isinstance(one, single) for one in value))
    }


def _load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], path: Path) -> None:
    sizes, own = (
        [len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)
    )
    if sizes != own:
        raise ModelError(f"{path}: has groups of {sizes} parameters, the optimizer of {own}. Use the same one.")
    optimizer.load_state_dict(dict(saved))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):  # loading gives it the type of the parameter
        if parameter in optimizer.state and number in saved["state"]:
            optimizer.state[parameter] = saved["state"][number]


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Returns where all sources of random numbers are: Python, numpy, torch, its devices, and ``generators``."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Puts all sources of random numbers where :func:`random_state` found them."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    for generator, one in zip(generators, state["generators"], strict=True):
        generator.set_state(one)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python, numpy and torch inside, and puts them back where they were afterwards."""
    before = random_state()
    try:
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)
        yield
    finally:
        set_random_state(before)


def _kind(one: object) -> str | None:
    return None if one is None else type(one).__name__


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict leaves out."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in saved)


def _plain(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """``value`` as JSON, its tensors taken out into ``tensors``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        name = f"{where}.{len(tensors)}"
        tensors[name] = value.detach().clone()  # which no other tensor shares its memory with
        return {"tensor": name, "near": value.device.type == "cpu"}
    if isinstance(value, list):
        return [_plain(item, tensors, where) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, tensors, where) for item in value]}
    if isinstance(value, Mapping):
        pairs = [[_plain(key, tensors, where), _plain(item, tensors, where)] for key, item in value.items()]
        return {"counter" if isinstance(value, Counter) else "mapping": pairs}
    raise ModelError(
        f"{where}: its state holds a {type(value).__name__}, which only a pickle could. Do without a folder."
    )


def _back(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """What :func:`_plain` was given; tensors that were not on the CPU are now on ``device``."""
    if isinstance(value, list):
        return [_back(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor if value["near"] else tensor.to(device)
    if "tuple" in value:
        return tuple(_back(item, tensors, device) for item in value["tuple"])
    kind = Counter if "counter" in value else dict
    (pairs,) = value.values()
    return kind({_back(key, tensors, device): _back(item, tensors, device) for key, item in pairs})
