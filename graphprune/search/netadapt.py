"""NetAdapt: step by step the one cut that costs the least accuracy, until a resource is within its budget."""

import math
from collections.abc import Callable
from typing import Literal

from graphprune.errors import ConfigError
from graphprune.search.candidate import Tune
from graphprune.search.reach import out_of_reach
from graphprune.search.space import Measure, Shares
from graphprune.search.state import State
from graphprune.search.trials import Found, Run, Trials

Resource = Measure | Literal["latency"]

_SMALLEST = 1 / 64
"""A step that no group can meet alone is halved down to this part of it."""


def netadapt(
    trials: Trials,
    budget: float,
    *,
    resource: Resource = "macs",
    step: float = 0.05,
    decay: float = 1.0,
    finetune: Tune | None = None,
) -> Found:
    """Returns a model within a budget, found by the algorithm of NetAdapt.

    Yang et al., NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications, 2018, algorithm 1: in
    step i the resource has to fall to R_i = R_{i-1} - dR_i. For each group alone the smallest cut is found that does
    it; each of these candidates is trained for a short time and evaluated, and the best one, as it was trained, is
    where the next step starts. Training for long at the end is left to the caller. The paper's own resource is
    latency: it is measured with onnxruntime on this machine, one example on one thread, for the very candidates
    instead of from a table.

    Args:
        trials: How candidates are evaluated.
        budget: Share of the dense model's resource that may be left, in (0, 1).
        resource: Weights, parameters, multiply-accumulates or measured latency.
        step: What the resource falls by in the first step, as a share of the dense model's, in (0, 1).
        decay: The fall of each step is this times that of the one before, in (0, 1].
        finetune: Trains a candidate for a short time, in place.

    Raises:
        ConfigError: A number is out of range, or so much cannot go.
    """
    for name, value in (("budget", budget), ("step", step), ("decay", decay)):
        if not 0 < value < 1 and not (name == "decay" and value == 1):
            raise ConfigError(f"{name} {value}: is not in (0, 1). Use one such as 0.5.")
    settings = {"sparsity": round(1 - budget, 12), "resource": resource, "step": step, "decay": decay}
    with trials.begin("netadapt", **settings, finetune=finetune) as run:
        state = trials.space.start
        measured = _meter(run, resource)
        left, fall = measured(trials.space.shares(state.live), state), step
        least = measured({name: trials.space.most(name) for name in trials.space.groups}, state)
        if least > budget + 1e-9:
            raise out_of_reach(budget, resource, least)
        chosen, note = None, None
        while left > budget + 1e-9:
            part = 1.0
            candidates: list[Shares] = []
            while not candidates and part >= _SMALLEST:
                candidates = _candidates(run, state, max(left - part * fall, budget), measured)
                part /= 2
            if not candidates:
                note = f"{left:.3f} of the {resource} are left, not {budget:g}: no group can give more"
                break
            chosen = run.best(run.evaluate(candidates, state, tune=finetune))
            left = measured(chosen.shares, state)
            state = run.trained(chosen, state, finetune)
            fall *= decay
        if chosen is None:
            (chosen,) = run.evaluate([trials.space.shares(state.live)], state)
        return run.found(chosen, state, note)


Meter = Callable[[Shares, State], float]


def _meter(run: Run, resource: Resource) -> Meter:
    """Says which share of the dense model's resource some shares leave."""
    space = run.space
    if resource != "latency":
        return lambda shares, state: space.left(space.live(shares, state), resource)
    dense = run.latency_ms(space.start.live)
    return lambda shares, state: run.latency_ms(space.live(shares, state)) / dense


def _candidates(run: Run, state: State, limit: float, measured: Meter) -> list[Shares]:
    """For each group the shares with its smallest cut that leaves no more than ``limit``, where there is one."""
    space = run.space
    found: list[Shares] = []
    now = space.shares(state.live)
    for name, group in space.groups.items():

        def cut(units: int, name: str = name, size: int = group.size) -> Shares:
            return {**now, name: min(units / size, space.most(name))}

        low, high = space.gone(name, state.live), math.floor(space.most(name) * group.size + 1e-9)
        if low >= high or measured(cut(high), state) > limit + 1e-9:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if measured(cut(middle), state) <= limit + 1e-9 else (middle, high)
        found.append(cut(high))
    return found
