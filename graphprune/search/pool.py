"""Where candidates are tried: here, in an executor that the caller gives, or on a Ray cluster. The results are one."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from graphprune.errors import ConfigError
from graphprune.search.candidate import Job, Origin, Outcome, Tune, try_candidate
from graphprune.search.parcel import Parcel, opened, packed
from graphprune.search.state import Weights
from speedup.analysis import Analysis


@runtime_checkable
class Executor(Protocol):
    """What runs functions elsewhere, as the executors of ``concurrent.futures`` do."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> "Future[Any]":
        """The future result of ``function(*args)``."""


def outcomes(
    executor: Executor | None,
    origin: Origin,
    weights: Weights | None,
    tune: Tune | None,
    jobs: Sequence[Job],
    analysis: Analysis,
) -> Iterator[tuple[int, Outcome]]:
    """Yields the place of each job and what came of it, in the order in which they end.

    Raises:
        Exception: Whatever the caller's own functions raise, as they raised it.
    """
    if executor is None:
        for place, job in enumerate(jobs):
            yield place, try_candidate(origin, weights, tune, job, analysis)
        return
    places = {executor.submit(try_candidate, origin, weights, tune, job): place for place, job in enumerate(jobs)}
    try:
        for future in as_completed(places):
            yield places[future], _own_error(future)
    finally:
        for future in places:
            future.cancel()


def _own_error(future: "Future[Any]") -> Outcome:
    """The result of a future; an error of a worker is raised as it was there."""
    try:
        found: Outcome = future.result()
    except Exception as error:
        cause = getattr(error, "cause", None)  # where Ray wraps it
        if isinstance(cause, Exception) and isinstance(error, type(cause)):
            raise cause from error
        raise
    return found


class _OnRay:
    """Runs functions on a Ray cluster; what is the same from call to call goes there once."""

    def __init__(self, ray: Any, modules: Sequence[ModuleType]) -> None:
        self._ray, self._modules = ray, modules
        self._call = ray.remote(_call)
        self._sent: dict[int, tuple[Any, Any]] = {}

    def submit(self, function: Callable[..., Any], /, *args: Any) -> "Future[Any]":
        """The future result of ``function(*args)``."""
        parcels = [self._reference(place, value) for place, value in enumerate(args)]
        future: Future[Any] = self._call.remote(function, *parcels).future()
        return future

    def _reference(self, place: int, value: Any) -> Any:
        """A reference to the parcel, in the object store, with the argument at a place."""
        known, reference = self._sent.get(place, (None, None))
        if known is not value or reference is None:
            reference = self._ray.put(packed(value, self._modules, self._ray.cloudpickle))
            self._sent[place] = value, reference
        return reference


def _call(function: Callable[..., Any], *parcels: Parcel) -> Any:
    """Calls a function on what is in the parcels, in a worker."""
    return function(*map(opened, parcels))


@contextmanager
def executor_of(workers: Any, modules: Sequence[ModuleType] = ()) -> Iterator[Executor | None]:
    """Yields what runs the candidates.

    Args:
        workers: None for this process; «ray» for the cluster that is connected, else one on this machine; an address
            such as «ray://head:10001»; or an executor such as those of ``concurrent.futures``.
        modules: Modules that workers of Ray do not have, whose code goes there with what needs it.

    Raises:
        ConfigError: It is none of these, or Ray is missing or cannot be reached.
    """
    if workers is None:
        yield None
    elif isinstance(workers, str):
        with _connected(workers) as ray:
            yield _OnRay(ray, modules)
    elif isinstance(workers, ThreadPoolExecutor):
        raise ConfigError(
            "workers: threads share one generator of random numbers, so that results would depend on their timing. "
            "Use a ProcessPoolExecutor, or Ray."
        )
    elif isinstance(workers, Executor):
        yield workers
    else:
        raise ConfigError(
            f"workers {workers!r:.80}: has no submit(). Give None, 'ray', an address such as 'ray://head:10001', or an "
            "executor of concurrent.futures."
        )


def is_address(workers: str) -> bool:
    """Returns whether these workers are those of Ray, here or somewhere else."""
    return workers == "ray" or workers.startswith("ray://")


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Yields Ray, connected; what was connected before stays so afterwards."""
    if not is_address(address):
        raise ConfigError(f"workers {address!r}: is no address. Use 'ray', or one such as 'ray://head:10001'.")
    try:
        import ray  # noqa: PLC0415 - it takes its time, and few need it
    except ImportError as error:
        raise ConfigError(f"workers {address!r}: Ray is not installed. Use pip install 'graphprune[ray]'.") from error
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(
                **({"include_dashboard": False} if address == "ray" else {"address": address}), log_to_driver=False
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            line = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ConfigError(
                f"workers {address!r}: cannot be reached ({line[0]}). Check that Ray runs there."
            ) from error
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
