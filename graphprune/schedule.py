"""Schedules: how sparsity grows over rounds or epochs. A schedule is one function."""

import math
from collections.abc import Callable, Mapping

from graphprune.config_list import Entry, Setting
from graphprune.errors import ConfigError

Schedule = Callable[[float, float, float, float], float]
"""From the sparsities at the beginning and the end, a round and their number, to the sparsity after that round."""


def one_shot(initial: float, final: float, i: float, n: float) -> float:
    """``s``: all of it in every round."""
    return final


def linear(initial: float, final: float, i: float, n: float) -> float:
    """``s_i + (s - s_i) i / n``."""
    return initial + (final - initial) * i / n


def agp(initial: float, final: float, i: float, n: float) -> float:
    """``s + (s_i - s) (1 - i / n)^3`` (Zhu & Gupta, To prune, or not to prune, 2017, equation 1)."""
    return final + (initial - final) * (1 - i / n) ** 3


def lottery_ticket(initial: float, final: float, i: float, n: float) -> float:
    """``1 - (1 - s)^(i / n)``: each round prunes the same share of what survives (Frankle & Carbin, 2019)."""
    return float(1 - (1 - initial) * ((1 - final) / (1 - initial)) ** (i / n))


SCHEDULES: Mapping[str, Schedule] = {
    "one_shot": one_shot,
    "linear": linear,
    "agp": agp,
    "lottery_ticket": lottery_ticket,
}


def at_epoch(schedule: Schedule, entry: Entry, epoch: int) -> float:
    """Returns the sparsity that an entry asks for in an epoch.

    Nothing before ``start_epoch``, and the initial sparsity in it; a step every ``frequency`` epochs, the last of which
    reaches the final one in ``end_epoch``.

    Args:
        schedule: How it grows from the initial sparsity to the final one.
        entry: An entry with ``end_epoch``.
        epoch: The epoch that begins.
    """
    assert entry.end_epoch is not None
    initial, final = entry.initial_sparsity, entry.share or 0.0
    return grown(schedule, initial, final, entry.start_epoch, entry.end_epoch, entry.frequency, epoch)


def grown(
    schedule: Schedule, initial: float, final: float, start: float, end: float, frequency: float, time: float
) -> float:
    """Returns the sparsity at a time in epochs: nothing before ``start``, and steps from there to ``end``.

    Args:
        schedule: How it grows.
        initial: The sparsity at ``start``.
        final: The sparsity at ``end`` and later.
        start: When it begins to grow.
        end: When it is done.
        frequency: Epochs from one step to the next; any positive number.
        time: The time.
    """
    if time < start:
        return 0.0
    passed, span = min(time, end) - start, end - start
    step = passed if passed == span else math.floor(passed / frequency + 1e-9) * frequency
    return schedule(initial, final, step, span)


_OF_EPOCHS = ("start_epoch", "end_epoch", "frequency", "prune_iterations")


def check_followed(settings: Mapping[str, Setting], *, grows: bool) -> None:
    """Refuses what a config list says of the time where nothing goes by it.

    Args:
        settings: What is asked of each layer.
        grows: Whether there are rounds in which sparsity grows from the initial one.

    Raises:
        ConfigError: An entry has a key that would have no effect, or begins with more than it ends with.
    """
    for setting in settings.values():
        entry, subject = setting.entry, f"config_list[{setting.position}]"
        for key in _OF_EPOCHS:
            if key in entry.model_fields_set:
                raise ConfigError(
                    f"{subject}: {key} has no effect where no loop of epochs is followed. Leave it out, or use a "
                    "pruner of graphprune.pruners in your loop."
                )
        if "initial_sparsity" in entry.model_fields_set and not grows:
            raise ConfigError(
                f"{subject}: initial_sparsity has no effect without rounds in which sparsity grows. Leave it out, or "
                "give --schedule linear, agp or lottery_ticket."
            )
        if entry.initial_sparsity > (entry.share or 0.0) and not entry.exclude:
            raise ConfigError(
                f"{subject}: initial_sparsity {entry.initial_sparsity} is above the sparsity {entry.share}, and what "
                "is gone does not come back. Give a lower one."
            )


def at_round(
    settings: Mapping[str, Setting],
    schedule: Schedule,
    i: int,
    n: int,
    done: Callable[[str], float] = lambda layer: 0.0,
) -> dict[str, Setting]:
    """Returns what to ask of each layer in round ``i`` of ``n``.

    Args:
        settings: What is asked of each layer in the end.
        schedule: How it grows.
        i: The round, from 1 to ``n``.
        n: How many rounds there are.
        done: The share of a layer that went physically in the rounds before: of what is left then goes
            ``(target - done) / (1 - done)``.
    """

    def share(layer: str, entry: Entry) -> float:
        gone = done(layer)
        return max((schedule(entry.initial_sparsity, entry.share or 0.0, i, n) - gone) / (1 - gone), 0.0)

    return {layer: setting.asking(share(layer, setting.entry)) for layer, setting in settings.items()}
