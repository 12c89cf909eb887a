"""Which code functions are: a digest that is the same in every process, so that a journal knows whose it is."""

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.search.state import bytes_of, digest
from speedup.masking import closed_over


def code_of(value: Any) -> str:
    """Returns a digest of what a function does and knows, or an object that is called like one.

    Known are its defaults, what it closes over, what a partial holds, and the attributes of its object: numbers, texts,
    paths, collections, data classes and functions in them, the state of modules, and the shapes of other tensors. Of
    anything else only the type counts, and what it reads elsewhere, such as globals, does not.
    """
    return _said(value, {})


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None, or a sequence of such."""
    if isinstance(value, tuple | list):
        return all(is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _said(value: Any, known: dict[int, tuple[Any, str]]) -> str:
    """The digest of a value; ``known`` are those of others by their identities, empty while one is being made."""
    if is_plain(value):
        return digest(repr(value))
    if id(value) not in known:
        known[id(value)] = value, ""
        words, held = _made_of(value)
        known[id(value)] = value, digest(*words, *(_said(one, known) for one in held))
    return known[id(value)][1]


def _made_of(value: Any) -> tuple[list[bytes | str], list[Any]]:
    """What a value says itself, and what it holds."""
    words: list[bytes | str] = [_name(value)]
    held: list[Any] = []
    match value:
        case Mapping():
            held = [one for pair in value.items() for one in pair]
        case tuple() | list():
            held = list(value)
        case set() | frozenset():
            words += sorted(code_of(one) for one in value)
        case bytes() | range() | complex() | PurePath() | torch.dtype() | torch.device():
            words.append(repr(value))
        case Tensor():
            words.append(f"{tuple(value.shape)} {value.dtype}")
        case partial():
            held = [value.func, value.args, value.keywords]
        case MethodType():
            held = [type(value.__self__), _attributes(value.__self__), value.__func__]
        case FunctionType():
            words.append(_code(value.__code__))
            held = [value.__defaults__, value.__kwdefaults__, list(closed_over(value))]
        case nn.Module():
            module = getattr(value, "_orig_mod", value)  # what torch.compile was given
            own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            words = [_name(module), *_calls(module), *(word for name, one in own for word in (name, bytes_of(one)))]
            held = [_attributes(module), dict(module.named_children())]
        case _ if is_dataclass(value) or (callable(value) and not isinstance(value, type | BuiltinFunctionType)):
            words += _calls(value)
            held = [_attributes(value)]
    return words, held


def _attributes(value: Any) -> Any:
    """The attributes of an object; of a module those that its user gave it, and not whether it is in training."""
    own = getattr(value, "__dict__", {})
    if not isinstance(value, nn.Module):
        return own
    return {key: one for key, one in own.items() if not key.startswith("_") and key != "training"}


def _calls(value: Any) -> list[str]:
    """The code that runs when an object is called."""
    runs = [getattr(type(value), method, None) for method in ("__call__", "forward")]
    return [_code(one.__code__) for one in runs if isinstance(one, FunctionType)]


def _name(value: Any) -> str:
    named = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"


def _code(code: CodeType) -> str:
    constants = [_code(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return digest(code.co_code, repr(code.co_names), *constants)


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
