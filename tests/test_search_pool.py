"""Candidates come out the same wherever they are tried; what goes wrong there is said here."""

import importlib
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from searching import chain_space, fit, jiggle, weigh
from test_rules import one_thread
from torch import nn

from graphprune.errors import ConfigError
from graphprune.search import Episodes, Found, Schedule, Space, Trials, amc, annealing, netadapt, sensitivity
from graphprune.search.candidate import checked_score


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def space() -> Space:
    return chain_space(6, 8)


def all_searches(space: Space, workers: Any) -> list[Found]:
    trials = Trials(space, weigh, workers=workers, seed=3)
    return [
        netadapt(trials, 0.7, step=0.2, finetune=jiggle),
        annealing(trials, 0.4, schedule=Schedule(start=30, cool=0.8, tries=1, batch=3)),
        amc(trials, 0.6, round_to=1, episodes=Episodes(6, 2, batch=3)),
    ]


def same(one: Found, other: Found) -> bool:
    tensors = zip(one.result.model.state_dict().values(), other.result.model.state_dict().values(), strict=True)
    return one.history == other.history and one.shares == other.shares and all(torch.equal(a, b) for a, b in tensors)


class Backwards(threading.Thread):
    """An executor that ends what it was given last first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.given: queue.LifoQueue[Any] = queue.LifoQueue()

    def submit(self, function: Any, /, *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.given.put((future, function, args))
        return future

    def run(self) -> None:
        while True:
            future, function, args = self.given.get()
            time.sleep(0.05)  # what comes at the same time is here by then
            if future.set_running_or_notify_cancel():
                future.set_result(function(*args))


def test_the_order_in_which_candidates_end_does_not_matter(space: Space) -> None:
    backwards = Backwards()
    backwards.start()
    assert all(map(same, all_searches(space, backwards), all_searches(space, None)))


@pytest.mark.slow
def test_other_processes_give_the_same(space: Space) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        found = all_searches(space, workers)
        assert all(map(same, found, all_searches(space, None)))
        with pytest.raises(ZeroDivisionError, match="mine"):
            sensitivity(Trials(space, fails, workers=workers), (0.5,))


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same(
    space: Space, tmp_path: Path, ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(ray_home))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the workers import this file
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = all_searches(space, "ray")
        assert all(map(same, found, all_searches(space, None)))
        with pytest.raises(ZeroDivisionError, match=r"^mine$"):
            sensitivity(Trials(space, fails, workers="ray"), (0.5,))
        with pytest.raises(ConfigError, match="evaluate: returned None, no number"):
            sensitivity(Trials(space, lambda model: None, workers="ray"), (0.5,))
        (tmp_path / "only_here.py").write_text("def evaluate(model):\n    return 0.5\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        here = importlib.import_module("only_here")
        with pytest.raises(
            ConfigError, match=r"workers: one cannot read .*No module named 'only_here'\). Have the code"
        ):
            sensitivity(Trials(space, here.evaluate, workers="ray"), (0.5,))
        assert ray.is_initialized()  # it was when we came
    finally:
        ray.shutdown()


def fails(model: nn.Module) -> float:
    raise ZeroDivisionError("mine")


def test_errors_of_the_users_code_stay_theirs(space: Space) -> None:
    with pytest.raises(ZeroDivisionError, match="mine"):
        sensitivity(Trials(space, fails), (0.5,))
    with pytest.raises(ZeroDivisionError, match="mine"):
        netadapt(Trials(space, fit), 0.5, finetune=fails)


def test_a_candidate_sees_the_same_random_numbers_alone_or_among_others(space: Space) -> None:
    many = sensitivity(Trials(space, weigh), (0.25, 0.5, 0.75))
    one = sensitivity(Trials(space, weigh), (0.5,))
    assert all(many.scores[name][0.5] == row[0.5] for name, row in one.scores.items())
    other = sensitivity(Trials(space, weigh, seed=1), (0.5,))
    assert one.dense != other.dense


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1, 1.0),
        (0.5, 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([2]), 2.0),
        (np.float32(0.25), 0.25),
        (np.ones(1), 1.0),
    ],
)
def test_numbers_of_all_kinds(value: Any, score: float) -> None:
    assert checked_score(value) == score and type(checked_score(value)) is float


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "evaluate: returned None, no number. Let it return one, such as an accuracy."),
        ((0.5, 0.6), "evaluate: returned a tuple, no number."),
        (torch.ones(2), "evaluate: returned a Tensor, no number."),
        (True, "evaluate: returned a bool, no number."),
        ("0.5", "evaluate: returned a str, no number."),
        (float("nan"), "evaluate: returned nan. Let it return a finite number for every model."),
        (torch.tensor(float("inf")), "evaluate: returned inf."),
        (1j, "evaluate: returned a complex, no number."),
    ],
)
def test_what_is_no_score(value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_score(value)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        ("dask", "workers 'dask': is no address. Use 'ray', or one such as 'ray://head:10001'."),
        (4, "workers 4: has no submit()."),
        (ThreadPoolExecutor(1), "workers: threads share one generator of random numbers"),
    ],
)
def test_workers_that_are_none(space: Space, workers: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sensitivity(Trials(space, fit, workers=workers), (0.5,))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_without_ray_it_says_what_to_install(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed. Use pip install 'graphprune\[ray\]'."):
        sensitivity(Trials(space, fit, workers="ray"), (0.5,))
