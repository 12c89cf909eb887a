"""LPOT's configuration file: what is asked of which tensors, and what of it makes no sense."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from graphprune.config import closest
from graphprune.config_file import read_config_file
from graphprune.errors import ConfigError
from graphprune.lpot.sections import PrunerSection, PruningSection, Train, WeightCompression, told
from graphprune.schedule import grown, linear

ELSEWHERE = (
    "version", "model", "device", "framework", "quantization", "graph_optimization", "mixed_precision",
    "model_conversion", "use_bf16", "tuning", "evaluation",
)  # fmt: skip
"""Keys beside ``pruning`` in files of LPOT that are about something else; they are left alone."""


@dataclass(frozen=True)
class Goal:
    """What is asked of a tensor, or of several.

    Attributes:
        subject: Where the file says so.
        names: As in :class:`PrunerSection`.
        initial: Share of zeros when pruning begins.
        target: Share of zeros when it ends.
        start: The epoch in which it begins.
        end: The epoch with whose beginning the target is reached.
        frequency: Epochs from one step to the next.
    """

    subject: str
    names: tuple[str, ...]
    initial: float
    target: float
    start: int
    end: int
    frequency: float

    def at(self, time: float) -> float:
        """Returns the share of zeros at a time in epochs: 2.5 is in the middle of the third one."""
        return grown(linear, self.initial, self.target, self.start, self.end, self.frequency, time)


@dataclass(frozen=True)
class Config:
    """What a file asks for.

    Attributes:
        path: The file.
        train: How the model is trained.
        goals: What is asked of which tensors.
    """

    path: Path
    train: Train
    goals: tuple[Goal, ...]

    def missing(self, key: str, remedy: str) -> ConfigError:
        """Returns the error that a key of the training is not there."""
        return ConfigError(f"{self.path}: pruning.train.{key}: is missing. {remedy}.")


def is_lpot(data: Any) -> bool:
    """Returns whether what a file holds is meant as a configuration of LPOT."""
    return isinstance(data, Mapping) and "pruning" in data


def read_lpot(path: Path | str) -> Config:
    """Returns what a configuration file of LPOT asks for.

    Of a pruner's schedule, what it does not say is said by ``weight_compression``, and the epochs and the frequency, if
    that does not either, by ``train``.

    Raises:
        ConfigError: It is no such file, or something in it makes no sense: one line with the file and the key.
    """
    data = read_config_file(path)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: holds {data!r:.60}, which is no configuration. Give it the key pruning.")
    for key in data:
        if key != "pruning" and key not in ELSEWHERE:
            raise ConfigError(
                f"{path}: {key!r:.60} is no key of it{closest(str(key), ['pruning', *ELSEWHERE])}. Use pruning."
            )
    if "pruning" not in data:
        raise ConfigError(f"{path}: pruning: is missing. Say there what to prune.")
    try:
        section = PruningSection.model_validate(data["pruning"])
    except ValidationError as error:
        raise ConfigError(f"{path}: {told(error)}") from error
    common = section.approach.weight_compression
    return Config(
        Path(path),
        section.train,
        tuple(
            _goal(f"{path}: pruning.approach.weight_compression.pruners[{index}]", one, common, section.train)
            for index, one in enumerate(common.pruners)
        ),
    )


def goals_of(model: nn.Module, config: Config) -> dict[str, Goal]:
    """Returns what is asked of each parameter of a model, by its name.

    Weights are parameters with two dimensions or more: biases and norms stay as they are unless they are named. Of a
    tied one any of its names may be given.

    Raises:
        ConfigError: A name means no parameter, or one is asked for twice.
    """
    named = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }
    found: dict[int, tuple[str, Goal]] = {}
    for goal in sorted(config.goals, key=lambda goal: not goal.names):  # what has no names takes the rest
        names = _matching(goal, list(named)) if goal.names else _rest(goal, named, found)
        own = {id(named[name]): name for name in reversed(names)}
        for key, name in reversed(own.items()):
            if key in found:
                other = found[key][1].subject.rpartition(".")[2]
                raise ConfigError(f"{goal.subject}.names: {name!r} is asked for in {other} too. Name it once.")
            found[key] = name, goal
    return dict(found.values())


def _matching(goal: Goal, known: Sequence[str]) -> list[str]:
    """The parameters that the names of a goal mean."""
    found: list[str] = []
    for pattern in goal.names:
        hits = [pattern] if pattern in known else [name for name in known if fnmatchcase(name, pattern)]
        if not hits:
            raise ConfigError(
                f"{goal.subject}.names: the model has no parameter {pattern!r}{closest(pattern, known)}. "
                "Use names of named_parameters(), or globs."
            )
        if twice := [name for name in hits if name in found]:
            raise ConfigError(f"{goal.subject}.names: {twice[0]!r} is there twice. Name it once.")
        found += hits
    return found


def _rest(goal: Goal, named: Mapping[str, nn.Parameter], found: Mapping[int, tuple[str, Goal]]) -> list[str]:
    """The weights that nothing else names."""
    if other := next((one for _, one in found.values() if not one.names), None):
        raise ConfigError(
            f"{goal.subject}: asks for all weights, as {other.subject.rpartition('.')[2]} does. Give one of them names."
        )
    rest = [name for name, parameter in named.items() if parameter.dim() > 1 and id(parameter) not in found]
    if not rest:
        raise ConfigError(f"{goal.subject}: no weights are left that nothing else names. Leave it out.")
    return rest


def _goal(subject: str, own: PrunerSection, common: WeightCompression, train: Train) -> Goal:
    """What a pruner asks for, with what stands above it."""

    def said(key: str, default: Any = None) -> Any:
        values = (getattr(one, key, None) for one in (own, common, train))
        return next((value for value in values if value is not None), default)

    target, end = said("target_sparsity"), said("end_epoch")
    for key, value in (("target_sparsity", target), ("end_epoch", end)):
        if value is None:
            raise ConfigError(f"{subject}.{key}: is missing. Give it there, or for all pruners in weight_compression.")
    initial, start = said("initial_sparsity", 0.0), said("start_epoch", 0)
    if target < initial:
        raise ConfigError(
            f"{subject}.target_sparsity: {target} is below the initial_sparsity {initial}, but zeros stay. "
            "Give a lower initial_sparsity."
        )
    if end <= start:
        raise ConfigError(
            f"{subject}.end_epoch: {end} is no later than the start_epoch {start}, so that it never starts. "
            "Give a later end_epoch."
        )
    return Goal(subject, own.names, initial, target, start, end, said("frequency", 1.0))
