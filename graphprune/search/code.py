"""Which code functions are: a digest that is the same in every process, so that a journal knows whose it is."""

import inspect
from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from graphprune.search.state import bytes_of, digest, tensors_of
from speedup.masking import closed_over


def code_of(value: Any) -> str:
    """Returns a digest of what a function does and knows, or an object that is called like one.

    Known are its defaults, what it closes over, what a partial holds, and the attributes of an object: numbers, texts,
    collections and functions in them, the state of modules, and the shapes of other tensors. Of anything else only the
    type counts, and what it reads elsewhere, such as globals, does not.
    """
    return _said(value, frozenset())


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None, or a sequence of such."""
    if isinstance(value, tuple | list):
        return all(is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _said(value: Any, around: frozenset[int]) -> str:
    """The digest of a value; ``around`` are those that hold it."""
    if is_plain(value):
        return digest(repr(value))
    if id(value) in around:
        return ""
    words, held = _made_of(value)
    return digest(*words, *(_said(one, around | {id(value)}) for one in held))


def _made_of(value: Any) -> tuple[list[bytes | str], list[Any]]:
    """What a value says itself, and what it holds."""
    words: list[bytes | str] = [_name(value)]
    held: list[Any] = []
    match value:
        case Mapping():
            held = [one for pair in value.items() for one in pair]
        case tuple() | list():
            held = list(value)
        case Tensor():
            words = [f"{tuple(value.shape)} {value.dtype}"]
        case partial():
            held = [value.func, value.args, value.keywords]
        case MethodType():
            held = [value.__self__, value.__func__]
        case FunctionType():
            words.append(_code(value.__code__))
            held = [value.__defaults__, value.__kwdefaults__, list(closed_over(value))]
        case _ if callable(value) and not isinstance(value, type | BuiltinFunctionType):
            runs = [getattr(type(value), method, None) for method in ("__call__", "forward")]
            words += [_code(one.__code__) for one in runs if isinstance(one, FunctionType)]
            held = [{key: one for key, one in getattr(value, "__dict__", {}).items() if key != "training"}]
            if isinstance(value, nn.Module):
                words += [bytes_of(tensor) for tensor in tensors_of(value).values()]
                held += [dict(value.named_children())]
    return words, held


def _name(value: Any) -> str:
    named = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"


def _code(code: CodeType) -> str:
    constants = [_code(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return digest(code.co_code, repr(code.co_names), *constants)


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
