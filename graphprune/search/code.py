"""Which code functions are: a digest that is the same in every process, so that a journal knows whose it is."""

from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

from graphprune.search.state import digest


def code_of(function: Callable[..., Any]) -> str:
    """Returns a digest of what a function does, of a partial with its plain arguments.

    What it calls, closes over or reads elsewhere does not count, nor do objects in arguments.
    """
    if isinstance(function, partial):
        arguments = [*function.args, *sorted(function.keywords.items())]
        return digest(code_of(function.func), *(repr(one) for one in arguments if is_plain(one)))
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None) or getattr(type(plain).__call__, "__code__", None)
    defaults = [repr(one) for one in getattr(plain, "__defaults__", None) or () if is_plain(one)]
    name = f"{getattr(plain, '__module__', '')}.{getattr(plain, '__qualname__', type(plain).__qualname__)}"
    return digest(name if code is None else _of(code), *defaults)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None, or a sequence of such."""
    if isinstance(value, tuple | list):
        return all(is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _of(code: CodeType) -> str:
    constants = [_of(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return digest(code.co_code, repr(code.co_names), *constants)


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
