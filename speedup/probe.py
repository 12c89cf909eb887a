"""Why a model is as fast as it is: time by operator type, and the channel block that onnxruntime prefers here."""

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from speedup.errors import SpeedupError
from speedup.latency import Limits, measure
from speedup.session import bind_inputs, open_session


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator type in one run of a model: how many, their milliseconds, their share of the sum."""

    operator: str
    nodes: int
    ms: float
    share: float


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
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32)}
    sessions = [open_session(conv_chain(width), threads=threads, provider="CPUExecutionProvider") for width in widths]
    limits = Limits(min_rounds=rounds, max_rounds=rounds, warmup_runs=0)  # the least time needs no warm-up
    seconds = measure([functools.partial(session.run, None, feeds) for session in sessions], limits=limits)
    return [float(least) for least in seconds.min(axis=0)]


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
