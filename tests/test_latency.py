"""Latency: the loop, the statistics and the warnings with a fake clock; one tiny model through onnxruntime."""

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, save_model

from speedup import probe, session
from speedup.errors import SpeedupError
from speedup.latency import DEFAULT_LIMITS, Benchmark, Limits, benchmark, measure, summarise, to_csv, warm_up
from speedup.session import CpuUse, Environment

QUIET = Environment(
    cpu="fake",
    logical_cores=4,
    others_cores=0.0,
    threads=1,
    provider="fake",
    batch=1,
    seed=0,
    onnxruntime="0",
    onnx="0",
    numpy="0",
    python="0",
    system="fake",
)
QUICK = Limits(min_rounds=10, min_seconds=0.0, warmup_runs=0)


@dataclass
class FakeClock:
    """Time that passes only when a fake runner runs."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeRunner:
    """A runner whose every run takes the next of some durations; runs are noted in a log that runners share."""

    clock: FakeClock
    durations_s: Iterator[float]
    name: str = "model"
    log: list[str] = field(default_factory=list)

    def __call__(self) -> None:
        self.clock.now_s += next(self.durations_s)
        self.log.append(self.name)


def summary(*columns_s: Sequence[float] | NDArray[np.float64], environment: Environment = QUIET) -> Benchmark:
    """The result for the seconds of some models, of which the last is the control."""
    names = [f"model{index}" for index in range(len(columns_s) - 1)]
    return summarise(names, np.array(columns_s, dtype=np.float64).T, environment, DEFAULT_LIMITS)


# The loop


def test_a_round_runs_every_model_twice_in_a_row_in_shuffled_order() -> None:
    def log_of(seed: int) -> list[str]:
        clock, log = FakeClock(), list[str]()
        measure([FakeRunner(clock, repeat(1.0), name, log) for name in "abc"], limits=QUICK, seed=seed, clock=clock)
        return log

    log = log_of(seed=0)
    rounds = ["".join(log[start : start + 6]) for start in range(0, len(log), 6)]
    assert len(rounds) == 10
    assert all(sorted(one[::2]) == ["a", "b", "c"] and one[::2] == one[1::2] for one in rounds)
    assert len(set(rounds)) > 1
    assert log == log_of(seed=0) != log_of(seed=1)


def test_only_the_second_run_of_a_turn_is_timed() -> None:
    clock = FakeClock()
    slow_then_fast = chain.from_iterable(repeat((9.0, 2.0)))
    seconds = measure(
        [FakeRunner(clock, slow_then_fast), FakeRunner(clock, repeat(1.0))],
        limits=replace(QUICK, max_seconds=1e9),
        clock=clock,
    )
    assert seconds.tolist() == [[2.0, 1.0]] * 10


@pytest.mark.parametrize(
    ("limits", "rounds"),
    [
        (QUICK, 10),
        (replace(QUICK, min_seconds=50.0), 25),
        (replace(QUICK, min_seconds=50.0, max_rounds=20), 20),
        (replace(QUICK, max_seconds=8.0), 4),
        (replace(QUICK, max_seconds=0.0), 2),
    ],
)
def test_rounds_stop_at_the_limits(limits: Limits, rounds: int) -> None:
    clock = FakeClock()
    assert measure([FakeRunner(clock, repeat(1.0))], limits=limits, clock=clock).shape == (rounds, 1)


@pytest.mark.parametrize("limits", [{"min_rounds": 1}, {"min_rounds": 20, "max_rounds": 10}])
def test_impossible_rounds_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(SpeedupError, match="rounds"):
        Limits(**limits)


def test_warm_up_stops_when_times_no_longer_fall() -> None:
    clock = FakeClock()
    falling = [2.0 - 0.1 * step for step in range(10)]
    seconds = warm_up(FakeRunner(clock, chain(falling, repeat(1.0))), Limits(warmup_seconds=1e9), clock)
    assert seconds[:10] == pytest.approx(falling)
    assert 15 <= len(seconds) <= 20


def test_warm_up_is_bounded_by_runs_and_by_time() -> None:
    clock = FakeClock()

    def faster_and_faster() -> FakeRunner:
        return FakeRunner(clock, (0.9**step for step in range(1000)))

    assert len(warm_up(faster_and_faster(), Limits(warmup_runs=30, warmup_seconds=1e9), clock)) == 30
    assert len(warm_up(faster_and_faster(), Limits(warmup_seconds=2.5), clock)) == 3


# The statistics


def test_the_ratio_is_of_times_of_the_same_round() -> None:
    busy = np.random.default_rng(0).uniform(1.0, 5.0, 50)  # the machine slows all models of a round alike
    result = summary(4.0 * busy, 2.0 * busy, 8.0 * busy, 4.0 * busy)
    assert [model.speedup.median for model in result.models] == pytest.approx([1.0, 2.0, 0.5])
    assert [model.role for model in (*result.models, result.control)] == [
        "baseline",
        "candidate",
        "candidate",
        "control",
    ]
    assert result.models[1].speedup.low == pytest.approx(2.0) == result.models[1].speedup.high


def test_the_interval_covers_the_true_ratio() -> None:
    covered = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).lognormal(0.0, 0.05, (3, 60))
        result = summary(3.0 * noise[0], 2.0 * noise[1], 3.0 * noise[2], environment=replace(QUIET, seed=seed))
        ratio = result.models[1].speedup
        assert ratio.low <= ratio.median <= ratio.high
        covered += ratio.low <= 1.5 <= ratio.high
    assert covered >= 52  # 57 are expected


def test_quantiles_are_in_milliseconds() -> None:
    model = summary(np.arange(1, 12) / 1e3, np.arange(1, 12) / 1e3).models[0]
    assert (model.p50_ms, model.p90_ms, model.min_ms, model.mean_ms) == pytest.approx((6.0, 10.0, 1.0, 6.0))
    assert model.times_ms == pytest.approx(range(1, 12))


def test_results_are_plain_data() -> None:
    result = summary([2.0] * 40, [1.0] * 40, [2.0] * 40)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["models"][1]["times_ms"] == [1000.0] * 40
    assert data["environment"]["cpu"] == "fake"
    lines = list(csv.DictReader(to_csv(result).splitlines()))
    assert [line["role"] for line in lines] == ["baseline", "candidate", "control"]
    assert [float(line["speedup"]) for line in lines] == [1.0, 2.0, 1.0]
    assert lines == [{key: str(value) for key, value in row.items()} for row in result.rows()]


# The warnings


def test_a_quiet_machine_gives_no_warning() -> None:
    steady = 1.0 + 0.005 * np.random.default_rng(0).standard_normal((3, 100))
    assert summary(*steady).warnings == ()


@pytest.mark.parametrize(
    ("result", "begins"),
    [
        (summary([1.0, 2.0] * 18, [2.0, 1.0] * 18), "machine is noisy"),
        (summary([1.0] * 40, [1.04] * 40), "machine is noisy"),
        (summary([1.0] * 40, [1.0] * 40, environment=replace(QUIET, others_cores=1.2)), "machine is busy"),
        (summary([1.0] * 10, [1.0] * 10), "only 10 rounds"),
        (summary([1.0] * 40, [1.0] * 40, environment=replace(QUIET, threads=8)), "8 threads share 4 cores"),
        (summary(np.linspace(2, 1, 40), np.linspace(2, 1, 40)), "model0: still drifting"),
        (summary([1e-5] * 40, [1e-5] * 40), "model0: takes 0.010 ms"),
    ],
)
def test_a_warning_says_what_is_wrong_and_ends_in_advice(result: Benchmark, begins: str) -> None:
    (warning,) = result.warnings
    assert warning.startswith(begins)
    assert "\n" not in warning
    assert warning.endswith(".")


def test_use_by_others_is_a_mean_over_the_time_between() -> None:
    assert CpuUse(10.0, 3.0).others_cores(CpuUse(14.0, 9.0)) == 1.5
    assert CpuUse(10.0, None).others_cores(CpuUse(14.0, None)) is None


# The inputs


@dataclass(frozen=True)
class Declared:
    name: str
    shape: Sequence[int | str | None]
    type: str = "tensor(float)"


def arrays(*declared: Declared, batch: int = 1, **given: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
    return session.make_inputs(declared, "m.onnx", batch=batch, given=given, seed=0)


def test_inputs_follow_the_declaration() -> None:
    made = arrays(
        Declared("image", ["batch", 3, 4, 4]),
        Declared("ids", [None, 7], "tensor(int64)"),
        Declared("mask", [7, 7], "tensor(bool)"),
        Declared("scale", [], "tensor(double)"),
        batch=5,
    )
    assert {name: (array.shape, array.dtype.name) for name, array in made.items()} == {
        "image": ((5, 3, 4, 4), "float32"),
        "ids": ((5, 7), "int64"),
        "mask": ((7, 7), "bool"),
        "scale": ((), "float64"),
    }
    assert set(made["ids"].flat) == {0, 1}
    assert made["mask"].all()


def test_given_inputs_are_taken_as_they_are() -> None:
    ids = np.array([[4, 5, 6]])
    made = arrays(Declared("ids", ["batch", "length"], "tensor(int64)"), Declared("x", ["batch", 2]), ids=ids)
    assert made["ids"] is ids
    assert made["x"].shape == (1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arrays(Declared("x", [2, 3])), "m.onnx: takes batch 2 only, not 1. Use --batch 2"),
        (lambda: arrays(Declared("x", ["batch", "length"])), "m.onnx: dimension 1 of input 'x' is open"),
        (lambda: arrays(Declared("x", ["batch"], "tensor(string)")), "m.onnx: input 'x' is a tensor(string)"),
        (lambda: arrays(Declared("x", ["batch"]), y=np.ones(1)), "m.onnx: has no input 'y'. Name one of: x."),
        (lambda: arrays(Declared("x", ["batch"]), batch=0), "batch: 0 is less than one"),
    ],
)
def test_inputs_that_cannot_be_made_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpeedupError) as caught:
        make()
    assert str(caught.value).startswith(message)


# onnxruntime


def tiny_model(path: Path, batch: int | str = "batch", *, reshape: bool = False) -> Path:
    """Writes a model of three nodes; with `reshape` it works for a batch of one only, which nothing declares."""
    value_info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "weight"], ["conv"]),
            helper.make_node("Reshape", ["conv", "shape"], ["mid"])
            if reshape
            else helper.make_node("Relu", ["conv"], ["mid"]),
            helper.make_node("GlobalAveragePool", ["mid"], ["y"]),
        ],
        "tiny",
        [value_info("x", TensorProto.FLOAT, [batch, 2, 5, 5])],
        [value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [4, 2, 3, 3], np.ones(72)),
            helper.make_tensor("shape", TensorProto.INT64, [4], [1, 4, 3, 3]),
        ],
    )
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
    return path


def test_models_are_measured_and_profiled_by_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, shrunk = tiny_model(tmp_path / "dense.onnx"), tiny_model(tmp_path / "shrunk.onnx")
    limits = Limits(min_rounds=5, min_seconds=0.0, max_seconds=5.0, warmup_runs=3)
    result = benchmark([dense, str(shrunk)], threads=1, batch=3, limits=limits)
    assert [model.model for model in result.models] == [str(dense), str(shrunk)]
    assert result.control.runs == len(result.control.times_ms) == 5
    assert all(time_ms > 0 for model in result.models for time_ms in model.times_ms)
    assert result.environment.batch == 3
    json.dumps(result.to_dict())

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    times = probe.profile(dense, threads=1, runs=2)
    assert "GlobalAveragePool" in {time.operator for time in times}
    assert sum(time.share for time in times) == pytest.approx(1.0)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "benchmark: no model to measure."),
        ({"models": ["missing.onnx"]}, "missing.onnx: no such file."),
        ({"models": ["text.onnx"]}, "text.onnx: onnxruntime cannot load it: "),
        ({"models": ["fixed.onnx"], "batch": 2}, "fixed.onnx: takes batch 1 only, not 2."),
        ({"models": ["reshape.onnx"], "batch": 2}, "reshape.onnx: onnxruntime cannot run it with batch 2: "),
        ({"inputs": {"x": np.ones((1, 9, 5, 5), np.float32)}}, "tiny.onnx: onnxruntime cannot run it with batch 1: "),
        ({"inputs": {"z": np.ones(1)}}, "tiny.onnx: has no input 'z'."),
        ({"provider": "AbacusExecutionProvider"}, "provider: 'AbacusExecutionProvider' is not available here."),
        ({"threads": 0}, "threads: 0 is less than one."),
    ],
)
def test_a_mistake_ends_in_one_line(
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(Path("tiny.onnx"))
    tiny_model(Path("fixed.onnx"), batch=1)
    tiny_model(Path("reshape.onnx"), reshape=True)
    Path("text.onnx").write_text("not a model")
    with pytest.raises(SpeedupError) as caught:
        benchmark(**{"models": ["tiny.onnx"], **settings})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["AbacusExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="AbacusExecutionProvider"),  # onnxruntime's own
        pytest.raises(SpeedupError, match=r"^provider: AbacusExecutionProvider could not be started"),
    ):
        benchmark([tiny_model(tmp_path / "tiny.onnx")], provider="AbacusExecutionProvider")
