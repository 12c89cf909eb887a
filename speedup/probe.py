"""All that touches onnxruntime to learn how fast it is: files as runners, time by operator, the block it prefers.

`load` makes an ONNX file something that can be called; the timing itself is in `latency`. `profile` and
`preferred_block` answer why a model is as fast as it is.
"""

import functools
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]  # onnxruntime ships no types
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]  # as above

from speedup.errors import SpeedupError

_ORT_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
_NUMPY_TYPES: Mapping[str, type[np.generic]] = {
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

    def __call__(self) -> object: ...


class DeclaredInput(Protocol):
    """An input as an onnxruntime session declares it; dimensions of open size are names or None."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | str | None]: ...


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator type in one run of a model: how many, their milliseconds, their share of the sum."""

    operator: str
    nodes: int
    ms: float
    share: float


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
    except _ORT_ERRORS as error:
        subject = "model" if isinstance(model, bytes) else model
        raise SpeedupError(
            f"{subject}: onnxruntime cannot load it: {_one_line(error)} Check that it is an ONNX file, "
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
    except _ORT_ERRORS as error:
        raise SpeedupError(
            f"{path}: onnxruntime cannot run it with batch {batch}: {_one_line(error)} Use another --batch or "
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
    if one.type not in _NUMPY_TYPES:
        raise SpeedupError(f"{path}: input {one.name!r} is a {one.type}, which cannot be made up. Give its array.")
    shape = [size if isinstance(size, int) else batch if axis == 0 else None for axis, size in enumerate(one.shape)]
    sizes = [size for size in shape if size is not None]
    if len(sizes) < len(shape):
        raise SpeedupError(f"{path}: dimension {shape.index(None)} of input {one.name!r} is open. Give its array.")
    dtype = np.dtype(_NUMPY_TYPES[one.type])
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


def _one_line(error: Exception) -> str:
    """What onnxruntime says, without its prefix «[ONNXRuntimeError] : 2 : CODE :» and line breaks, as a sentence."""
    text = " ".join(str(error).split())
    return text.rpartition("[ONNXRuntimeError]")[2].split(" : ", 3)[-1].rstrip(". ") + "."


def profile(
    model: Path | str,
    *,
    threads: int | None = None,
    batch: int = 1,
    provider: str = "CPUExecutionProvider",
    inputs: Mapping[str, NDArray[Any]] | None = None,
    runs: int = 20,
    seed: int = 0,
) -> tuple[OperatorTime, ...]:
    """Time by operator type, slowest first, from onnxruntime's profiler, which slows runs down: no latency in itself.

    The operators are those of the optimised graph, so that fused ones show, and the layout changes (ReorderInput,
    ReorderOutput) that widths off the `preferred_block` cost. Arguments and errors are those of `latency.benchmark`.
    """
    if runs < 1:
        raise SpeedupError(f"runs: {runs} is less than one. Use 1 or more.")
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(model, threads=threads, provider=provider, profile_prefix=Path(folder) / "profile")
        runner = bind_inputs(session, model, batch=batch, inputs=inputs, seed=seed)
        for _ in range(5 + runs):
            runner()
        events = json.loads(Path(session.end_profiling()).read_text())
    return operator_times(events, runs)


def operator_times(events: Sequence[Mapping[str, Any]], runs: int) -> tuple[OperatorTime, ...]:
    """Time by operator type over the last `runs` runs in the events of an onnxruntime profile."""
    start = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs]
    microseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= start:
            microseconds[event["args"]["op_name"]] += event["dur"]
            calls[event["args"]["op_name"]] += 1
    total = microseconds.total() or 1  # every duration can round to 0 us
    return tuple(
        OperatorTime(operator, calls[operator] // runs, time_us / runs / 1e3, time_us / total)
        for operator, time_us in microseconds.most_common()
    )


@functools.cache
def preferred_block(threads: int = 1) -> int:
    """The channel block that onnxruntime's kernels prefer on this CPU: 32, 16, 8, 4, or 1 if widths do not matter.

    Found by timing (about half a second, once per process), so that it holds for this CPU and this onnxruntime. On x86
    convolutions run in a layout of blocks of 16 (AVX-512) or 8 channels (AVX2): a width that is no multiple of the
    block is padded to the next one, and one that is no multiple of 4 leaves the layout.
    """
    return find_block(functools.partial(chain_seconds, threads=threads))


def find_block(seconds: Callable[[Sequence[int]], Sequence[float]]) -> int:
    """The largest block whose half steps are markedly dear, where `seconds` gives the times of networks by width.

    A cost that grows smoothly is convex: halfway between two multiples of b it is at most the mean of its neighbours.
    If kernels work on blocks of b, halfway costs as much as the next multiple: 1.14 to 1.38 times that mean. It has to
    be so at two places, of which a block of 2 b or a noisy moment brings about one only.
    """
    for block in (32, 16, 8, 4):
        whole2, half2, whole3, half3, whole4 = seconds([block * n // 2 for n in (4, 5, 6, 7, 8)])
        if min(2 * half2 / (whole2 + whole3), 2 * half3 / (whole3 + whole4)) > 1.1:
            return block
    return 1


def chain_seconds(widths: Sequence[int], *, threads: int, rounds: int = 20) -> list[float]:
    """The least seconds of a run of `conv_chain` for each width; the chains take turns, in shuffled order."""
    image = np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32)
    order = np.random.default_rng(0)
    sessions = [open_session(conv_chain(width), threads=threads, provider="CPUExecutionProvider") for width in widths]
    least = [float("inf")] * len(widths)
    for _ in range(rounds):
        for index in order.permutation(len(widths)):
            sessions[index].run(None, {"x": image})  # untimed: takes the caches back
            start = time.perf_counter()
            sessions[index].run(None, {"x": image})
            least[index] = min(least[index], time.perf_counter() - start)
    return least


def conv_chain(width: int) -> bytes:
    """A serialised network in small: a stem, then twice a 3x3, a depthwise 3x3 and a 1x1 convolution, all `width` wide.

    A chain shows what a single convolution hides: between two of them the blocked layout is kept or has to be left.
    """
    generator = np.random.default_rng(0)
    nodes, weights, value, channels = [], [], "x", 3
    for index, (kernel, depthwise) in enumerate([(3, False), *[(3, False), (3, True), (1, False)] * 2]):
        groups = width if depthwise else 1
        weight = generator.standard_normal((width, channels // groups, kernel, kernel)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight / weight[0].size ** 0.5, f"weight{index}"))
        nodes.append(
            helper.make_node(
                "Conv",
                [value, f"weight{index}"],
                [f"conv{index}"],
                kernel_shape=[kernel, kernel],
                pads=[kernel // 2] * 4,
                group=groups,
            )
        )
        nodes.append(helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"]))
        value, channels = f"relu{index}", width
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 28, 28])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, width, 28, 28])],
        weights,
    )
    opset = helper.make_opsetid("", 13)  # old enough for any onnxruntime, as is the version of the format below
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=7).SerializeToString()
    return model
