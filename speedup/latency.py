"""Latency of models measured side by side, as ratios with confidence.

`benchmark` is the whole story: load, warm up, time in interleaved rounds, summarise. `session` turns ONNX files into
runners; the loop here takes any `Runner` and a clock. Results are plain frozen data that keep every raw time; printing
is somebody else's work.

Two things distort models that take turns in one process. Both were measured before they were dealt with:

* A session's threads go on spinning after its run and take the cores from the next model: with 2 threads on 2 cores
  MobileNetV2 showed 6.5 ms instead of 2.1 ms. `session.open_session` ends the spinning with the run.
* The model before has emptied the caches: 10 to 20 % on MobileNetV2, nothing on ResNet-50, so that small models are
  wronged. Each timed run therefore comes right after an untimed run of the same model.
"""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from speedup.errors import SpeedupError
from speedup.session import Environment, Runner, cpu_use, describe_environment, load

Clock = Callable[[], float]
"""Says what time it is, in seconds from any fixed moment."""

Role = Literal["baseline", "candidate", "control"]


@dataclass(frozen=True)
class Limits:
    """How long to measure. Rounds go on until `min_rounds` and `min_seconds` are both reached or a maximum is."""

    min_rounds: int = 30
    min_seconds: float = 3.0
    max_rounds: int = 1000
    max_seconds: float = 60.0
    warmup_runs: int = 100
    warmup_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not 2 <= self.min_rounds <= self.max_rounds:
            raise SpeedupError(
                f"rounds: from {self.min_rounds} to {self.max_rounds} cannot be done. Use 2 or more, and no more at "
                "least than at most."
            )

    def reached(self, rounds: int, seconds: float) -> bool:
        """Whether to stop after so many rounds; never before two, below which there is nothing to resample."""
        if rounds >= 2 and (rounds >= self.max_rounds or seconds >= self.max_seconds):
            return True
        return rounds >= self.min_rounds and seconds >= self.min_seconds


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of baseline time / own time (more than 1 is faster), with its 95 % bootstrap interval.

    The bootstrap (percentile method) takes rounds as independent; the control shows how far that holds.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """The times of one model in milliseconds, in the order of the rounds, and its speed relative to the baseline."""

    model: str
    role: Role
    runs: int
    p50_ms: float
    p90_ms: float
    min_ms: float
    mean_ms: float
    speedup: Ratio
    times_ms: tuple[float, ...]


@dataclass(frozen=True)
class Benchmark:
    """Models measured side by side; the first is the baseline.

    `control` is the A/A control: the baseline's file in a second session. Its speedup says how far from 1 a ratio can
    be without meaning anything.
    """

    models: tuple[Latency, ...]
    control: Latency
    environment: Environment
    limits: Limits
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, raw times included, as data that `json.dumps` takes."""
        return asdict(self)

    def rows(self) -> list[dict[str, str | int | float]]:
        """One row for each model and one for the control, without raw times; units are in the keys."""
        return [
            {
                "model": latency.model,
                "role": latency.role,
                "runs": latency.runs,
                "p50_ms": latency.p50_ms,
                "p90_ms": latency.p90_ms,
                "min_ms": latency.min_ms,
                "mean_ms": latency.mean_ms,
                "speedup": latency.speedup.median,
                "speedup_low": latency.speedup.low,
                "speedup_high": latency.speedup.high,
            }
            for latency in (*self.models, self.control)
        ]


def benchmark(
    models: Sequence[Path | str],
    *,
    threads: int | None = None,
    batch: int = 1,
    provider: str = "CPUExecutionProvider",
    inputs: Mapping[str, NDArray[Any]] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    seed: int = 0,
) -> Benchmark:
    """Times of ONNX files that take turns, each relative to the first.

    Args:
        models: ONNX files; the first is the baseline.
        threads: Threads within an operator; None leaves it to onnxruntime (one for each physical core).
        batch: Size of the first dimension of inputs that leave it open.
        provider: Execution provider; with one that is not the CPU the times include the copies there and back.
        inputs: Arrays by input name, instead of random ones; the same for all models.
        limits: How long to warm up and to measure.
        seed: For the inputs, the order within rounds and the bootstrap.

    Raises:
        SpeedupError: No model, a file that cannot be loaded or run with this batch, an unknown provider, no thread.
    """
    if not models:
        raise SpeedupError("benchmark: no model to measure. Name one or more ONNX files.")
    runners = [
        load(path, threads=threads, batch=batch, provider=provider, inputs=inputs, seed=seed)
        for path in (*models, models[0])
    ]
    start = cpu_use()
    seconds = measure(runners, limits=limits, seed=seed)
    environment = describe_environment(start, threads=threads, batch=batch, provider=provider, seed=seed)
    return summarise([str(path) for path in models], seconds, environment, limits)


def measure(
    runners: Sequence[Runner], *, limits: Limits = DEFAULT_LIMITS, seed: int = 0, clock: Clock = time.perf_counter
) -> NDArray[np.float64]:
    """Seconds of each run, of shape (rounds, runners), after a warm-up; the order within a round is shuffled."""
    for runner in runners:
        warm_up(runner, limits, clock)
    order = np.random.default_rng(seed)
    rounds: list[list[float]] = []
    start = clock()
    while not limits.reached(len(rounds), clock() - start):
        seconds = [0.0] * len(runners)
        for index in order.permutation(len(runners)):
            runners[index]()  # untimed: takes the caches back
            seconds[index] = _timed(runners[index], clock)
        rounds.append(seconds)
    return np.array(rounds)


def warm_up(runner: Runner, limits: Limits, clock: Clock, window: int = 5) -> list[float]:
    """Seconds of the runs made until the median of the last `window` is no longer 2 % below that of the ones before."""
    seconds: list[float] = []
    while len(seconds) < limits.warmup_runs and sum(seconds) < limits.warmup_seconds:
        seconds.append(_timed(runner, clock))
        before, last = seconds[-2 * window : -window], seconds[-window:]
        if len(before) == window and np.median(last) >= 0.98 * np.median(before):
            break
    return seconds


def summarise(
    names: Sequence[str], seconds: NDArray[np.float64], environment: Environment, limits: Limits
) -> Benchmark:
    """The result for times of shape (rounds, models + 1), whose last column is the baseline's second session."""
    baseline, *candidates, again = seconds.T
    models = (
        _latency(names[0], "baseline", baseline, baseline, environment.seed),
        *(
            _latency(name, "candidate", times, baseline, environment.seed)
            for name, times in zip(names[1:], candidates, strict=True)
        ),
    )
    control = _latency(names[0], "control", again, baseline, environment.seed)
    return Benchmark(models, control, environment, limits, tuple(_warnings(models, control, environment, limits)))


def to_csv(result: Benchmark) -> str:
    """`Benchmark.rows` as CSV with a header line."""
    rows = result.rows()
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _timed(runner: Runner, clock: Clock) -> float:
    start = clock()
    runner()
    return clock() - start


def _latency(name: str, role: Role, seconds: NDArray[np.float64], baseline: NDArray[np.float64], seed: int) -> Latency:
    ms = 1e3 * seconds
    return Latency(
        model=name,
        role=role,
        runs=len(ms),
        p50_ms=float(np.median(ms)),
        p90_ms=float(np.quantile(ms, 0.9)),
        min_ms=float(ms.min()),
        mean_ms=float(ms.mean()),
        speedup=_median_ratio(baseline / seconds, seed),
        times_ms=tuple(ms.tolist()),
    )


def _median_ratio(ratios: NDArray[np.float64], seed: int) -> Ratio:
    drawn = stats.bootstrap(
        (ratios,), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    )
    low, high = drawn.confidence_interval
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _warnings(models: Sequence[Latency], control: Latency, environment: Environment, limits: Limits) -> Iterator[str]:
    """What makes the result less trustworthy than it looks, each with what to do about it.

    Two sessions of one file differ by half a per cent on a quiet machine, by where their memory lies. So the control's
    interval may miss 1 by one per cent.
    """
    ratio, rounds = control.speedup, control.runs
    if ratio.high - ratio.low > 0.05 or not ratio.low - 0.01 <= 1 <= ratio.high + 0.01:
        yield (
            f"machine is noisy: the baseline against itself gives {ratio.median:.3f} ({ratio.low:.3f} to "
            f"{ratio.high:.3f}), not 1. Take no difference of that size for real; close other programs and measure "
            "again."
        )
    if environment.others_cores is not None and environment.others_cores > 0.2:
        yield (
            f"machine is busy: other programs kept {environment.others_cores:.1f} of {environment.logical_cores} cores "
            "busy meanwhile, which the ratios may not show but the times do. Close them and measure again."
        )
    if rounds < limits.min_rounds:
        yield f"only {rounds} rounds fitted into {limits.max_seconds:g} s. Allow more time for narrower intervals."
    if environment.threads is not None and environment.threads > environment.logical_cores:
        yield (
            f"{environment.threads} threads share {environment.logical_cores} cores. "
            f"Use --threads {environment.logical_cores} or fewer."
        )
    for latency in models:
        third = max(1, rounds // 3)
        first, last = np.median(latency.times_ms[:third]), np.median(latency.times_ms[-third:])
        if rounds >= 9 and not 1 / 1.05 < first / last < 1.05:
            yield (
                f"{latency.model}: still drifting, from {first:.3f} ms in the first third of the rounds to {last:.3f} "
                "ms in the last. Let the machine settle, and measure again."
            )
        if latency.p50_ms < 0.1:
            yield (
                f"{latency.model}: takes {latency.p50_ms:.3f} ms, of which calling onnxruntime is a large part. "
                "Use a larger batch."
            )
