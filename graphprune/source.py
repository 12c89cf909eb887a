"""A model from where its user keeps it: a file or a package, weights beside it, and example inputs."""

import ast
import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.checkpoints.skeleton import Skeleton, parameters_on_meta
from graphprune.config import closest
from graphprune.errors import ConfigError, ModelError
from graphprune.search.candidate import number_in
from graphprune.training import Training
from graphprune.weights import load_weights
from speedup.errors import SpeedupError
from speedup.inputs import ExampleInputs

Evaluate = Callable[[nn.Module], float]

_NOT_OWN = (Path(__file__).parent, *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")))
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>[1-9]\d*(?:x[1-9]\d*)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class Source:
    """A model with what is needed to work on it.

    Attributes:
        name: What to call it, in file names as well.
        text: How the user named it.
        model: A fresh instance, weights loaded.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        evaluate: Says how good a model is, in the unit of its author; None if there is no such function.
        training: How such a model is trained; None if there is no such function.
        modules: Its module, and those imported from the same folder or from others that its code puts on ``sys.path``:
            other processes cannot import them.
        code: Digest of the code of the file that all of this comes from, and of what that has imported from its folder;
            comments and blanks do not count.
        folder: Where its code finds what it imports.
    """

    name: str
    text: str
    model: nn.Module
    example_inputs: ExampleInputs
    evaluate: Evaluate | None
    training: Training | None = None
    modules: tuple[ModuleType, ...] = ()
    code: str = ""
    folder: Path = Path()

    def in_training(self, work: Callable[..., Any]) -> "InTraining":
        """Returns the same work, where mistakes of ``training()`` are named."""
        return InTraining(self.text, self.folder, work)


@dataclass(frozen=True)
class InTraining:
    """Work that runs a user's training; a value, so that it can go to a worker.

    Attributes:
        text: What says how to train: a model's file, or one that describes it.
        folder: Where its code finds what it imports.
        work: The work.
        fact: What to say of it where something goes wrong.
    """

    text: str
    folder: Path
    work: Callable[..., Any]
    fact: str = "raises while it trains as training() says"

    def __call__(self, *args: Any) -> Any:
        """What the work returns.

        Raises:
            ModelError: Something goes wrong in the user's code or data; one line that names the place.
        """
        with _importing_from(self.folder), _blaming(self.text, self.fact, but=SpeedupError):
            return self.work(*args)


def load_source(
    text: str, *, inputs: Sequence[str] = (), weights: Path | None = None, seed: int = 0, device: str = "cpu"
) -> Source:
    """Returns the model that ``text`` names, made with random numbers that start at ``seed``.

    Args:
        text: ``file.py`` with ``build_model()`` or with one ``nn.Module`` class that takes no arguments,
            ``file.py:name``, or ``package.module:name``; a name is a class, a function or a module instance.
        inputs: Example inputs instead of those that the file offers: ``1x3x224x224``, ``2x128:int64``,
            ``ids=2x128:int64``.
        weights: A safetensors file, or a state dict that ``torch.load`` reads without running code from it.
        seed: For weights and inputs that are drawn at random.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: There is no such file or name, an input or a device makes no sense.
        ModelError: What is there is no model, its code raises, or the weights do not fit it.
    """
    path, name = _split(text)
    folder = path.parent.resolve() if path else Path.cwd()
    _check_device(device)
    with torch.random.fork_rng(devices=[]), _importing_from(folder):
        torch.manual_seed(seed)
        before = set(sys.path)
        module = _import_file(path, text) if path else _import_package(text.rpartition(":")[0], text)
        model = _build(module, name, text)
        homes = [folder, *(Path(place).absolute() for place in sys.path if place not in before)]
        if weights is not None:
            load_weights(model, weights)
        model = model.to(device)
        example = _drawn(inputs, model) if inputs else _offered(module, text)
    example = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), example)
    evaluate = getattr(module, "evaluate", None)
    training = _training(module, folder, text)
    modules = (*((module,) if path else ()), *_modules_from(homes))
    return Source(
        name=name.rpartition(".")[2] or Path(str(module.__file__)).stem,
        text=text,
        model=model,
        example_inputs=example,
        evaluate=_guarded(evaluate, folder, text) if callable(evaluate) else None,
        training=training,
        modules=modules,
        code=_digest(module, [other for other in modules if other is not module]),
        folder=folder,
    )


def load_skeleton(text: str, *, inputs: Sequence[str] = (), seed: int = 0) -> tuple[str, Skeleton, ExampleInputs]:
    """Returns what to call the model that ``text`` names, the model without its weights, and example inputs.

    Arguments and errors are those of :func:`load_source`.
    """
    path, name = _split(text)
    folder = path.parent.resolve() if path else Path.cwd()
    with torch.random.fork_rng(devices=[]), _importing_from(folder):
        torch.manual_seed(seed)
        with parameters_on_meta():
            module = _import_file(path, text) if path else _import_package(text.rpartition(":")[0], text)
        skeleton = Skeleton.of(lambda: _build(module, name, text))
        example = _drawn(inputs, skeleton.model) if inputs else _offered(module, text)
    return name.rpartition(".")[2] or Path(str(module.__file__)).stem, skeleton, example


def _digest(main: ModuleType, others: Sequence[ModuleType]) -> str:
    """Returns the SHA-256 of what the code of modules means, where it is there; the main one may have any name."""
    found = {}
    for name, module in (("", main), *((other.__name__, other) for other in others)):
        with suppress(OSError, TypeError):
            found[name] = ast.dump(ast.parse(inspect.getsource(module)))
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def file_of(text: str) -> Path | None:
    """Returns the file that the name of a model means; None for ``package.module:name``."""
    stem, _, _ = text.rpartition(":")
    return next((Path(name) for name in (text, stem) if name.endswith(".py")), None)


def _split(text: str) -> tuple[Path | None, str]:
    """The file and the name in it that ``text`` means; no file for ``package.module:name``."""
    stem, colon, name = text.rpartition(":")
    if colon and stem.endswith(".py"):
        return _existing(Path(stem), text), name
    if text.endswith(".py"):
        return _existing(Path(text), text), ""
    if colon and stem and name and not set(stem) & {"/", "\\"}:
        return None, name
    raise ConfigError(f"{text}: names no model. Use file.py, file.py:name or package.module:name.")


def _existing(path: Path, text: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{text}: no such file. Name a Python file, or package.module:name.")
    return path


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r}: is not known. Use cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': PyTorch finds none here. Use --device cpu.")


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Lets modules be imported from ``folder`` for a while."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _import_file(path: Path, text: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_source_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for what it defines
    with _blaming(text, "cannot be imported"):
        spec.loader.exec_module(module)
    return module


def _import_package(name: str, text: str) -> ModuleType:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(f"{text}: there is no module {name} to import. Install it, or name a file.")
    with _blaming(text, "cannot be imported"):
        return importlib.import_module(name)


def _build(module: ModuleType, name: str, text: str) -> nn.Module:
    """The model under ``name``, or the one that the module is about."""
    maker: Any = module
    if name:
        for part in name.split("."):
            if not hasattr(maker, part):
                known = closest(part, [key for key in vars(maker) if not key.startswith("_")])
                raise ConfigError(f"{text}: there is no {part} in it{known}. Name a class, a function or a module.")
            maker = getattr(maker, part)
    elif hasattr(module, "build_model"):
        maker = module.build_model
    else:
        maker = _only_class(module, text)
    if isinstance(maker, nn.Module):
        return maker
    if not callable(maker):
        raise ModelError(f"{text}: is of type {type(maker).__name__}. Name a class, a function or a module.")
    if needed := _required(maker):
        raise ModelError(f"{text}: needs {', '.join(needed)}. Write a build_model() that gives what it needs.")
    with _blaming(text, "raises while the model is built"):
        model = maker()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{text}: gives {type(model).__name__}. Return a torch.nn.Module.")
    return model


def _only_class(module: ModuleType, text: str) -> type[nn.Module]:
    """The one class of modules defined there that takes no arguments."""
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]
    free = [found for found in classes if not _required(found)]
    if len(free) == 1:
        return free[0]
    if free:
        names = ", ".join(found.__name__ for found in free)
        raise ModelError(f"{text}: holds several models: {names}. Choose one, as in {text}:{free[-1].__name__}.")
    held = "".join(f"; {found.__name__} needs {', '.join(_required(found))}" for found in classes)
    raise ModelError(f"{text}: holds no model{held}. Write a build_model() that returns one.")


def _required(maker: Any) -> list[str]:
    """Names of the arguments that a class or function cannot be called without."""
    try:
        parameters = inspect.signature(maker).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return []
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in positional]


def _offered(module: ModuleType, text: str) -> ExampleInputs:
    """What ``example_inputs()`` of the module returns."""
    offer = getattr(module, "example_inputs", None)
    if not callable(offer):
        raise ConfigError(f"{text}: offers no example_inputs(). Give shapes, as in --input 1x3x224x224.")
    with _blaming(text, "raises in example_inputs()"):
        example = offer()
    if not isinstance(example, Tensor | tuple | list | Mapping):
        kind = type(example).__name__
        raise ModelError(f"{text}: example_inputs() gives {kind}. Return a tensor, a tuple or a mapping of tensors.")
    return example


def _drawn(inputs: Sequence[str], model: nn.Module) -> ExampleInputs:
    """Random inputs of the given shapes: normal numbers of the model's type, whole numbers 0 and 1."""
    own = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    named: dict[str, Tensor] = {}
    plain: list[Tensor] = []
    for text in inputs:
        match = _INPUT.fullmatch(text)
        dtype = getattr(torch, match["dtype"], None) if match and match["dtype"] else own
        if match is None or not isinstance(dtype, torch.dtype):
            raise ConfigError(f"input {text!r}: is no shape. Use one such as 1x3x224x224 or ids=2x128:int64.")
        shape = [int(size) for size in match["shape"].split("x")]
        try:
            if dtype.is_floating_point or dtype.is_complex:
                value = torch.randn(shape, dtype=dtype)
            else:
                value = torch.randint(2, shape).to(dtype)  # 0 and 1 are ids in any vocabulary
        except (RuntimeError, OverflowError) as error:
            raise ConfigError(f"input {text!r}: is larger than the memory. Use the size of one example.") from error
        if match["name"]:
            named[match["name"]] = value
        else:
            plain.append(value)
    if named and plain:
        raise ConfigError(f"input {inputs[0]!r}: some inputs have names and some have none. Name all of them, or none.")
    return named or tuple(plain)


def _guarded(evaluate: Callable[[nn.Module], Any], folder: Path, text: str) -> Evaluate:
    """``evaluate`` on a copy of the model in eval mode, with one number as its result."""

    def guarded(model: nn.Module) -> float:
        with _importing_from(folder), _blaming(text, "raises in evaluate()"):
            value = evaluate(copy.deepcopy(model).eval())
        number = number_in(value)
        if number is None:
            raise ModelError(f"{text}: evaluate() gives {type(value).__name__}. Return one number.")
        if not math.isfinite(number):
            raise ModelError(f"{text}: evaluate() gives {number}. Return a finite number.")
        return number

    return guarded


def _training(module: ModuleType, folder: Path, text: str) -> Training | None:
    """What ``training()`` of the file gives, with mistakes of its trainer named."""
    make = getattr(module, "training", None)
    if not callable(make):
        return None
    with _importing_from(folder), _blaming(text, "raises in training()"):
        given = make()
    if not isinstance(given, Training):
        raise ModelError(f"{text}: training() gives {type(given).__name__}. Return a graphprune.training.Training.")
    return given


@contextmanager
def _blaming(text: str, fact: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turns whatever the user's code raises into one line that names the place, ``but`` what is one line already."""
    try:
        yield
    except but:
        raise
    except (Exception, SystemExit) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
        raise ModelError(f"{text}: {fact}{_place(error)} ({told}). Fix it there.") from error


def _place(error: BaseException) -> str:
    """The last line of the user's own code in a traceback, as " at file:line"."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _modules_from(homes: Sequence[Path]) -> Iterator[ModuleType]:
    """Modules of Python code that were imported from one of the folders."""
    for name, module in sys.modules.items():
        spec = getattr(module, "__spec__", None)
        if not isinstance(spec, ModuleSpec) or name.partition(".")[0] in ("graphprune", "speedup"):
            continue
        places = [str(spec.origin)] if spec.has_location else list(spec.submodule_search_locations or ())
        stems = {place.removesuffix(".py").removesuffix(f"{os.sep}__init__") for place in places}
        if any(str(home.joinpath(*name.split("."))) in stems for home in homes):
            yield module


def _is_own(filename: str) -> bool:
    return not filename.startswith("<frozen") and not any(Path(filename).is_relative_to(home) for home in _NOT_OWN)
