"""A model that cannot be captured whole: its largest submodules that can, side by side in one graph.

Where ``torch.export`` refuses a model (control flow that depends on data, operators that it cannot follow), most of it
is mostly harmless all the same. The submodules are tried from the outside in, each with the inputs that it really
receives when the model runs on the example. What can be captured becomes a part; :class:`InParts` runs all of them, and
is captured in the place of the model. Everything that crosses a border is input or output of that graph, so it stays.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from speedup.errors import CaptureError, first_line
from speedup.program import evaluating, to_program

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MOST_SIZES = 8
"""Calls of a part that are captured and differ in nothing but sizes."""
MOST_WAYS = 16
"""Calls of a part that differ in more than sizes; what is called in more ways is no part."""


@dataclass(frozen=True)
class Parts:
    """How a model is captured that cannot be whole.

    Attributes:
        paths: The submodule of each call, by qualified name; a submodule that is called in several ways comes again.
        calls: The inputs of each call.
        shared: Tensors of the parts that other code of the model uses as well: they stay as they are.
        stopped: Why each submodule that was tried is no part, in one line; the model itself is "".
        example: The inputs of the model itself.
    """

    paths: tuple[str, ...]
    calls: tuple[Inputs, ...]
    shared: tuple[str, ...]
    stopped: Mapping[str, str]
    example: Inputs

    def entry(self, model: nn.Module) -> nn.Module:
        """Returns the module that runs these parts of ``model``."""
        return InParts(model, self.paths, self.shared)

    def outside(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Returns the parameters of ``model`` that are in no part, by name."""
        inside = _inside(model, self.paths)
        return {name: parameter for name, parameter in model.named_parameters() if not inside(name)}


class InParts(nn.Module):
    """Runs parts of a model one after another, each on inputs of its own; its tensors are those of the model."""

    def __init__(self, model: nn.Module, paths: Sequence[str], shared: Sequence[str]) -> None:
        super().__init__()
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(self)[kind] = vars(model)[kind]
        self.training = model.training
        self._paths, self._shared = tuple(paths), tuple(shared)

    def forward(self, *calls: Inputs) -> tuple[list[Any], list[Tensor]]:
        """What each part returns, and the tensors that are used outside of the parts."""
        results = [
            self.get_submodule(path)(*args, **kwargs) for path, (args, kwargs) in zip(self._paths, calls, strict=True)
        ]
        held = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers(remove_duplicate=False))
        return results, [held[name].clone() for name in self._shared]


def find_parts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], refusal: str) -> Parts | None:
    """Returns the largest submodules of ``model`` that can be captured; None where there are none.

    Args:
        model: A model that cannot be captured whole, in the mode in which it is wanted.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        refusal: Why the model cannot be captured whole.
    """
    found: dict[str, list[Inputs]] = {}
    stopped = {"": refusal}
    level = _children(model, [""])
    while level:
        received = _received(model, args, kwargs, level)
        refused = []
        for path in level:
            module = model.get_submodule(path)
            if next(module.parameters(), None) is None:
                continue
            calls, strange = received[path]
            full = [call for call in calls if not _is_empty(call)]
            reason = strange or (_EMPTY if calls and not full else _refusal(module, full))
            if reason is None:
                found[path] = full
                continue
            refused.append(path)
            stopped[path] = reason
        level = _children(model, refused)
    if not found:
        return None
    pairs = [(path, call) for path, inputs in found.items() for call in inputs]
    paths, every = zip(*pairs, strict=True)
    shared = _shared(model, args, kwargs, tuple(found))
    return Parts(paths, every, shared, {path: why for path, why in stopped.items() if why}, (args, kwargs))


def _inside(model: nn.Module, paths: Iterable[str]) -> Callable[[str], bool]:
    """Returns whether a tensor of that name is in one of the parts, whatever the part is called there."""
    parts = {id(model.get_submodule(path)) for path in paths}
    named = model.named_modules(remove_duplicate=False)
    prefixes = tuple(f"{name}." for name, module in named if id(module) in parts)
    return lambda name: name.startswith(prefixes)


_EMPTY = "receives empty tensors on the example inputs, so that nothing could be compared"


def _is_empty(inputs: Inputs) -> bool:
    return any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in pytree.tree_leaves(inputs))


def _children(model: nn.Module, paths: Iterable[str]) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for path in paths for name, _ in model.get_submodule(path).named_children()]


def _refusal(module: nn.Module, calls: Sequence[Inputs]) -> str | None:
    """Why a submodule cannot be captured with what it receives: empty if that is never called, None if it can be."""
    if not calls:
        return ""
    try:
        for args, kwargs in calls:
            to_program(module, args, kwargs, dynamic=False)
    except CaptureError as error:
        return str(error)
    return None


def _received(
    model: nn.Module, args: Any, kwargs: Any, paths: Sequence[str]
) -> dict[str, tuple[list[Inputs], str | None]]:
    """The inputs of the submodules ``paths`` while the model runs, of like calls the first, and why they do not do."""
    received: dict[str, dict[str, dict[str, Inputs]]] = {path: {} for path in paths}
    states: dict[str, set[tuple[Any, ...]]] = {path: set() for path in paths}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            states[path].add(_state(module))
            way, sizes = _signature((inputs, named))
            if len(received[path]) <= MOST_WAYS:
                alike = received[path].setdefault(way, {})
                if len(alike) < MOST_SIZES and sizes not in alike:
                    alike[sizes] = _copied((inputs, named))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True, prepend=True)
        for path in paths
    ]
    with _released(handles):
        _run(model, args, kwargs)
    found: dict[str, tuple[list[Inputs], str | None]] = {}
    for path, ways in received.items():
        strange = "is called in too many ways" if len(ways) > MOST_WAYS else None
        if states[path] - {_state(model.get_submodule(path))}:
            strange = "is in another mode when it is called than before and after"
        found[path] = [call for alike in ways.values() for call in alike.values()], strange
    return found


def _run(model: nn.Module, args: Any, kwargs: Any) -> None:
    try:
        with torch.no_grad():
            model(*_copied(args), **_copied(kwargs))
    except Exception as error:  # whatever the user's code raises is the user's to read
        raise CaptureError(
            f"{type(model).__name__}: raises {type(error).__name__} when it runs again ({first_line(error)}). "
            "Let what it does not depend on earlier runs."
        ) from error


def _state(module: nn.Module) -> tuple[Any, ...]:
    """The switches of a module and of all inside it: ``training``, and what else is true, false or a word."""
    return tuple(
        (path, name, value)
        for path, inner in module.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, bool | str)
    )


def _signature(inputs: Any) -> tuple[str, str]:
    """What a call gives, as text: all but the sizes, and the sizes."""
    leaves, structure = pytree.tree_flatten(inputs)
    told = [f"{leaf.dtype}{leaf.dim()}" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
    return f"{structure}{told}", str([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)])


def _copied(inputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)


@contextmanager
def _released(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Watch(TorchFunctionMode):
    """Notes which tensors are used where the part that they belong to does not run.

    Attributes:
        names: The name of each tensor of the parts, by identity.
        owners: The parts that each of these is in.
        running: The parts that run, the outer ones first.
        seen: The names of those that were used elsewhere.
    """

    names: Mapping[int, str]
    owners: Mapping[int, Container[int]]
    running: list[int] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) not in _ABOUT:
            for leaf in pytree.tree_leaves((args, kwargs or {})):
                if id(leaf) in self.names and (not self.running or self.running[0] not in self.owners[id(leaf)]):
                    self.seen.add(self.names[id(leaf)])
        return func(*args, **(kwargs or {}))


_ABOUT = (Tensor.dtype, Tensor.device, Tensor.is_cuda, Tensor.requires_grad, Tensor.layout)
"""What may be asked of a tensor that becomes smaller."""


def _shared(model: nn.Module, args: Any, kwargs: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """The tensors that the model, in either mode, uses where no part runs that they are in, or holds elsewhere too."""
    inside = _inside(model, paths)
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {id(tensor): name for name, tensor in held if inside(name)}
    tied = {names[id(tensor)] for name, tensor in held if id(tensor) in names and not inside(name)}
    parts = {id(part): part for part in map(model.get_submodule, dict.fromkeys(paths))}
    owners: dict[int, set[int]] = {tensor: set() for tensor in names}
    for part in parts.values():
        for tensor in (*part.parameters(), *part.buffers()):
            owners[id(tensor)].add(id(part))
    watch = _Watch(names, owners)

    def enter(part: nn.Module, *_: Any) -> None:
        watch.running.append(id(part))

    def leave(*_: Any) -> None:
        watch.running.pop()

    handles = []
    for part in parts.values():
        handles += [
            part.register_forward_pre_hook(enter, prepend=True),
            part.register_forward_hook(leave, always_call=True),
        ]
    with _released(handles):
        with watch:
            _run(model, args, kwargs)
        with evaluating(model), torch.random.fork_rng(devices=[]), suppress(CaptureError):
            model.train()  # code around the parts may do more then; what needs other inputs for that is not seen
            with watch:
                _run(model, args, kwargs)
    return tuple(sorted(watch.seen | tied))
