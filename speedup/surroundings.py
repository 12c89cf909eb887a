"""What a model does around its parts: whether that stays what it was when the parts become smaller.

A part is proven; the code around it is not in any graph. It is run instead, once around the dense parts and once around
the small ones, whose results are exchanged for those of the dense parts: then it has to hand on and return the same.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from speedup.errors import first_line
from speedup.parts import Parts
from speedup.program import evaluating, quiet


@dataclass(frozen=True)
class _Call:
    """One call of a part: which it was, its inputs before and after, its result and the state of the random numbers."""

    path: str
    inputs: Any
    after: Any
    result: Any
    random: Tensor


class _Other(Exception):  # noqa: N818  # it is caught here
    """The code around the parts does something else."""


def surroundings_differ(parts: Parts, dense: nn.Module, small: nn.Module) -> str | None:
    """Returns where ``small`` does something else around its parts than ``dense`` on the example; None if nowhere.

    Args:
        parts: The parts of both.
        dense: The model.
        small: The model with smaller parts.
    """
    paths = tuple(dict.fromkeys(parts.paths))
    with evaluating(dense, small), torch.no_grad(), quiet(), torch.random.fork_rng(devices=[]):
        calls: list[_Call] = []
        expected = _run(dense, parts, _recording(dense, paths, calls))
        found = _difference(small, parts, paths, calls, expected)
        if found is not None and _difference(dense, parts, paths, calls, expected) is not None:
            return None  # it does not do the same twice
        return found


def _difference(model: nn.Module, parts: Parts, paths: Sequence[str], calls: list[_Call], expected: Any) -> str | None:
    left = deque(calls)
    try:
        found = _run(model, parts, _replaying(model, paths, left))
    except _Other as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        return f"the code around the parts raises {type(error).__name__} ({first_line(error)})"
    if left:
        return f"the code around the parts no longer calls {left[0].path}"
    return None if _equal(expected, found) else "the code around the parts returns something else"


def _run(model: nn.Module, parts: Parts, hooked: Any) -> Any:
    torch.manual_seed(0)
    args, kwargs = _copied(parts.example)
    with hooked:
        return model(*args, **kwargs)


def _recording(model: nn.Module, paths: Sequence[str], calls: list[_Call]) -> Any:
    given: list[Any] = []

    def enter(path: str, inputs: Any) -> None:
        given.append(_copied(inputs))

    def leave(path: str, inputs: Any, result: Any) -> Any:
        call = _Call(path, given.pop(), _copied(inputs), _copied(result), torch.get_rng_state())
        calls.append(call)
        return result

    return _hooked(model, paths, enter, leave)


def _replaying(model: nn.Module, paths: Sequence[str], calls: deque[_Call]) -> Any:
    def enter(path: str, inputs: Any) -> None:
        if not calls or calls[0].path != path or not _equal(calls[0].inputs, inputs):
            raise _Other(f"the code around the parts gives {path} something else")

    def leave(path: str, inputs: Any, result: Any) -> Any:
        call = calls.popleft()
        if not _alike(call.result, result):
            raise _Other(f"{path} returns something of another size")
        for now, later in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(call.after), strict=True):
            if isinstance(now, Tensor) and not _same(now, later):
                now.copy_(later)
        torch.set_rng_state(call.random)
        leaves, structure = pytree.tree_flatten(result)
        then = pytree.tree_leaves(_copied(call.result))
        return structure.unflatten(x if isinstance(x, Tensor) else leaf for x, leaf in zip(then, leaves, strict=True))

    return _hooked(model, paths, enter, leave)


@contextmanager
def _hooked(
    model: nn.Module, paths: Sequence[str], enter: Callable[[str, Any], None], leave: Callable[[str, Any, Any], Any]
) -> Iterator[None]:
    """Calls ``enter`` and ``leave`` around each call of a part that is not inside another's."""
    depth = 0

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                enter(path, (inputs, named))

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], result: Any) -> Any:
            nonlocal depth
            depth -= 1
            return result if depth else leave(path, (inputs, named), result)

        return hook

    handles: list[Any] = []
    named = {id(model.get_submodule(path)): path for path in paths}  # a part that has two names once
    for path in named.values():
        part = model.get_submodule(path)
        handles.append(part.register_forward_pre_hook(before(path), with_kwargs=True, prepend=True))
        handles.append(part.register_forward_hook(after(path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(values: Any) -> Any:
    """The same with copies of the tensors, of those that are one a single copy."""
    memo: dict[int, Tensor] = {}
    return pytree.tree_map_only(Tensor, lambda x: memo.setdefault(id(x), x.detach().clone()), values)


def _alike(one: Any, other: Any) -> bool:
    """Whether two values have the same tensors up to what these hold."""
    firsts, seconds = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(firsts) == len(seconds) and all(
        not isinstance(first, Tensor)
        or (isinstance(second, Tensor) and first.shape == second.shape and first.dtype == second.dtype)
        for first, second in zip(firsts, seconds, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    """Whether two values have the same tensors and numbers in them."""
    firsts, seconds = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return _alike(one, other) and all(map(_same, firsts, seconds))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    return not isinstance(first, int | float | str) or first == second or first != first  # noqa: PLR0124  # nan
