"""Rounds of pruning and training: a search that has nothing to choose, so that it is journalled and proven like one."""

from dataclasses import replace

from graphprune.errors import ConfigError
from graphprune.schedule import SCHEDULES
from graphprune.search.asked import asked_shares, asked_sparsity, check_something_goes
from graphprune.search.candidate import Tune
from graphprune.search.state import digest
from graphprune.search.trials import Found, Trials


def in_rounds(trials: Trials, schedule: str = "linear", rounds: int = 1, *, finetune: Tune | None = None) -> Found:
    """Returns the model after rounds in which sparsity grows by a schedule, each trained after it was shrunk.

    In the end of each group goes what was asked of it, and of those that are ranked together what was asked of all.

    With ``lottery_ticket`` what survives a round has its first values again before it is trained, and the dense model
    is trained once before the first round (Frankle & Carbin, 2019).

    Args:
        trials: How the model of each round is evaluated, and what was asked.
        schedule: A name in :data:`~graphprune.schedule.SCHEDULES`.
        rounds: How many there are.
        finetune: Trains the model of a round in place.

    Raises:
        ConfigError: A number is out of range, or there is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule {schedule!r}: is not known. Use one of {', '.join(SCHEDULES)}.")
    if rounds < 1:
        raise ConfigError(f"rounds {rounds}: is below 1. Use 1 or more.")
    rewind = schedule == "lottery_ticket"
    settings = {"sparsity": asked_sparsity(trials.space), "schedule": schedule, "rounds": rounds}
    space, grows = trials.space, SCHEDULES[schedule]
    check_something_goes(space, asked_shares(space, space.start, grows, rounds, rounds))
    with trials.begin("rounds", **settings, finetune=finetune) as run:
        first = state = space.start
        for number in range(0 if rewind else 1, rounds + 1):
            if rewind:
                state = replace(state, weights=first.weights, key=digest(state.key, "first values"))
            shares = asked_shares(space, state, grows, number, rounds)
            (chosen,) = run.evaluate([shares], state, tune=finetune, use=f"round {number}")
            state = run.trained(chosen, state, finetune, use=f"round {number}")
        return run.found(chosen, state, asked=shares)
