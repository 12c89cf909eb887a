"""What goes to a worker elsewhere: bytes that it can read although the user's modules are not there."""

import io
import pickle
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import _lru_cache_wrapper, cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphprune.errors import ConfigError
from graphprune.search.state import digest
from speedup.errors import first_line


@dataclass(frozen=True, eq=False)
class Parcel:
    """A value on its way.

    Attributes:
        content: Its pickle, as an array, which workers on one machine share.
        key: Says which it is; a worker opens each only once.
    """

    content: NDArray[np.uint8]
    key: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parcel) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def packed(value: Any, modules: Sequence[ModuleType], cloudpickle: Any) -> Parcel:
    """Returns ``value`` with the code of ``modules`` that it needs; of other modules it names what it needs.

    Args:
        value: What a worker is to have.
        modules: Modules that are not there.
        cloudpickle: That library, or Ray's copy of it.

    Raises:
        ConfigError: Something in it cannot be pickled.
    """
    file = io.BytesIO()
    with _by_value(modules, cloudpickle) as names:
        table = ChainMap(_reductions(names), cloudpickle.CloudPickler.dispatch_table)
        pickler = type("Pickler", (cloudpickle.CloudPickler,), {"dispatch_table": table})
        try:
            pickler(file).dump(value)
        except Exception as error:  # whatever the user's objects raise
            raise ConfigError(
                f"workers: something cannot go there ({first_line(error)}). Make it in the function that uses it."
            ) from error
    content = file.getvalue()
    return Parcel(np.frombuffer(content, np.uint8), digest(content))


@lru_cache(maxsize=4)  # as many as a candidate has arguments
def opened(parcel: Parcel) -> Any:
    """Returns what is in a parcel.

    Raises:
        ConfigError: This process lacks something of it.
    """
    try:
        return pickle.loads(parcel.content.data)  # the other end is this program
    except Exception as error:  # whatever the user's objects raise
        raise ConfigError(
            f"workers: one cannot read what is sent to it ({first_line(error)}). "
            "Have the code of model and evaluator there."
        ) from error


@contextmanager
def _by_value(modules: Sequence[ModuleType], cloudpickle: Any) -> Iterator[frozenset[str]]:
    """Has what the modules define pickled with its code for a while; yields the names of all of which that is so."""
    with ExitStack() as stack:
        for module in modules:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                stack.callback(cloudpickle.unregister_pickle_by_value, module)
        yield frozenset(cloudpickle.list_registry_pickle_by_value()) | {"__main__"}


def _reductions(names: frozenset[str]) -> dict[type, Callable[[Any], Any]]:
    """How to pickle what cloudpickle knows by its name alone, or not at all, where modules of ``names`` define it."""

    def cached(function: Any) -> Any:
        if function.__module__ not in names:
            return function.__reduce__()
        return _with_cache, (function.__wrapped__, function.cache_parameters())

    def cached_value(descriptor: Any) -> Any:
        return cached_property, (descriptor.func,), {"attrname": descriptor.attrname}

    return {_lru_cache_wrapper: cached, cached_property: cached_value}


def _with_cache(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return lru_cache(**parameters)(function)
