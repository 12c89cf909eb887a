"""onnxruntime: files as sessions and runners, what to feed them, and the environment that times depend on."""

import functools
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from speedup.errors import SpeedupError

ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
"""What onnxruntime raises for a model or an input that it does not take."""

NoKernel: type[Exception] = ort_state.NotImplemented
"""Raised on loading where the provider has no kernel for an operator, or none for the type it works on."""

NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class Runner(Protocol):
    """Runs a model once, to the end, when called."""

    def __call__(self) -> object:
        """The outputs, which a benchmark does not look at."""


class DeclaredInput(Protocol):
    """An input as an onnxruntime session declares it."""

    @property
    def name(self) -> str:
        """The key under which its array is given."""

    @property
    def type(self) -> str:
        """What onnxruntime calls its type, such as «tensor(float)»."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """Its sizes; those that are open are names or None."""


@dataclass(frozen=True)
class Environment:
    """What the times depend on besides the models.

    `threads` None is onnxruntime's own choice. `others_cores` is how many cores other programs kept busy on average
    while the models ran, None where the system does not tell.
    """

    cpu: str
    logical_cores: int
    others_cores: float | None
    threads: int | None
    provider: str
    batch: int
    seed: int
    onnxruntime: str
    onnx: str
    numpy: str
    python: str
    system: str


@dataclass(frozen=True)
class CpuUse:
    """A moment, in seconds, and the processor seconds that other programs had used by then; None where not known."""

    wall_s: float
    others_s: float | None

    def others_cores(self, later: "CpuUse") -> float | None:
        """Cores that other programs kept busy, on average, between this moment and a later one."""
        if self.others_s is None or later.others_s is None:
            return None
        return max(0.0, later.others_s - self.others_s) / (later.wall_s - self.wall_s)


def load(
    path: Path | str,
    *,
    threads: int | None = None,
    batch: int = 1,
    provider: str = "CPUExecutionProvider",
    inputs: Mapping[str, NDArray[Any]] | None = None,
    seed: int = 0,
) -> Runner:
    """A runner of the ONNX file, which has run once already; arguments and errors are those of `latency.benchmark`."""
    session = open_session(path, threads=threads, provider=provider)
    return bind_inputs(session, path, batch=batch, inputs=inputs, seed=seed)


def open_session(
    model: Path | str | bytes, *, threads: int | None, provider: str, profile_prefix: Path | None = None
) -> ort.InferenceSession:
    """A session of an ONNX file, or of a serialised model, that runs its operators one after the other."""
    if threads is not None and threads < 1:
        raise SpeedupError(f"threads: {threads} is less than one. Use 1 or more.")
    if provider not in ort.get_available_providers():
        known = ", ".join(ort.get_available_providers())
        raise SpeedupError(f"provider: {provider!r} is not available here. Use one of: {known}.")
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise SpeedupError(f"{model}: no such file. Name an ONNX file.")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: onnxruntime's own choice
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what goes wrong is raised; onnxruntime would print it as well
    # Between runs only: within a run threads spin as usual.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=[provider])
    except ORT_ERRORS as error:
        subject = "model" if isinstance(model, bytes) else model
        raise SpeedupError(
            f"{subject}: onnxruntime cannot load it: {one_line(error)} Check that it is an ONNX file, "
            "with the external data next to it if there is any."
        ) from error
    if provider not in session.get_providers():  # onnxruntime goes on with the CPU by itself
        raise SpeedupError(f"provider: {provider} could not be started. Install its libraries, or use another.")
    return session


def bind_inputs(
    session: ort.InferenceSession, path: Path | str, *, batch: int, inputs: Mapping[str, NDArray[Any]] | None, seed: int
) -> Runner:
    """A runner of the session with fixed inputs, tried once; `path` names the model in errors."""
    declared = session.get_inputs()
    feeds = make_inputs(declared, path, batch=batch, given=inputs or {}, seed=seed)
    runner: Runner = functools.partial(session.run, None, feeds)
    try:
        runner()
    except ORT_ERRORS as error:
        raise SpeedupError(
            f"{path}: onnxruntime cannot run it with batch {batch}: {one_line(error)} Use another --batch or "
            "inputs that fit, or export the model with a dynamic batch."
        ) from error
    return runner


def make_inputs(
    declared: Sequence[DeclaredInput],
    path: Path | str,
    *,
    batch: int,
    given: Mapping[str, NDArray[Any]],
    seed: int,
) -> dict[str, NDArray[Any]]:
    """An array for each declared input: the given one, else normal numbers, integers 0 and 1, or True throughout.

    Raises:
        SpeedupError: A given name that is not declared, a size other than the first that is open, another batch than
            the only one that is possible, a type that numpy does not have.
    """
    names = [one.name for one in declared]
    for name in given:
        if name not in names:
            raise SpeedupError(f"{path}: has no input {name!r}. Name one of: {', '.join(names)}.")
    missing = [one for one in declared if one.name not in given]
    firsts = [one.shape[0] for one in missing if one.shape]
    if batch < 1:
        raise SpeedupError(f"batch: {batch} is less than one. Use 1 or more.")
    if firsts and batch not in firsts and all(isinstance(first, int) for first in firsts):
        raise SpeedupError(
            f"{path}: takes batch {firsts[0]} only, not {batch}. Use --batch {firsts[0]}, or export it with a dynamic "
            "batch."
        )
    generator = np.random.default_rng(seed)
    return {**given, **{one.name: _random_array(one, path, batch, generator) for one in missing}}


def _random_array(one: DeclaredInput, path: Path | str, batch: int, generator: np.random.Generator) -> NDArray[Any]:
    if one.type not in NUMPY_TYPES:
        raise SpeedupError(f"{path}: input {one.name!r} is a {one.type}, which cannot be made up. Give its array.")
    shape = [size if isinstance(size, int) else batch if axis == 0 else None for axis, size in enumerate(one.shape)]
    sizes = [size for size in shape if size is not None]
    if len(sizes) < len(shape):
        raise SpeedupError(f"{path}: dimension {shape.index(None)} of input {one.name!r} is open. Give its array.")
    dtype = np.dtype(NUMPY_TYPES[one.type])
    if dtype.kind == "f":
        return generator.standard_normal(sizes).astype(dtype)
    if dtype.kind == "b":
        return np.ones(sizes, dtype)  # a mask that hides nothing
    return generator.integers(0, 2, sizes).astype(dtype)  # 0 and 1 are ids in any vocabulary


def describe_environment(since: CpuUse, *, threads: int | None, batch: int, provider: str, seed: int) -> Environment:
    """This machine and these libraries, together with the given settings; the models ran from `since` until now."""
    return Environment(
        cpu=_cpu_model(),
        logical_cores=os.cpu_count() or 1,
        others_cores=since.others_cores(cpu_use()),
        threads=threads,
        provider=provider,
        batch=batch,
        seed=seed,
        onnxruntime=ort.__version__,
        onnx=version("onnx"),
        numpy=np.__version__,
        python=platform.python_version(),
        system=platform.platform(),
    )


def cpu_use() -> CpuUse:
    """The time now and the processor time that others have used until now, hypervisor included."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return CpuUse(time.perf_counter(), None)
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return CpuUse(time.perf_counter(), busy_s - time.process_time())


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def one_line(error: Exception) -> str:
    """What onnxruntime says, without its prefix «[ONNXRuntimeError] : 2 : CODE :» and line breaks, as a sentence."""
    text = " ".join(str(error).split())
    return text.rpartition("[ONNXRuntimeError]")[2].split(" : ", 3)[-1].rstrip(". ") + "."
