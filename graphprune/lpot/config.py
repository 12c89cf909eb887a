"""LPOT's configuration file: what its keys mean here, and what of it makes no sense."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from graphprune.config import closest
from graphprune.config_file import read_config_file
from graphprune.errors import ConfigError
from graphprune.schedule import grown, linear

PruneType = Literal["basic_magnitude"]

ELSEWHERE = (
    "version", "model", "device", "framework", "quantization", "graph_optimization", "mixed_precision",
    "model_conversion", "use_bf16", "tuning", "evaluation",
)  # fmt: skip
"""Keys beside ``pruning`` in files of LPOT that are about something else; they are left alone."""


class Section(BaseModel):
    """A mapping in the file that has some keys and no others, each once under one of its names."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, values: Any) -> Any:
        names = [_names(name, one.validation_alias) for name, one in cls.model_fields.items()]
        known = [name for several in names for name in several]
        if not isinstance(values, Mapping):
            raise ValueError(f"is {values!r:.60}. Give it some of {', '.join(known)}")
        for key in values:
            if key not in known:
                raise ValueError(
                    f"{key!r:.60} is no key of it{closest(str(key), known)}. Use some of {', '.join(known)}"
                )
        for several in names:
            if len(both := [name for name in several if name in values]) > 1:
                raise ValueError(f"has both {' and '.join(both)}, which are the same. Give one of them")
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Call:
    """Something to be made by its name.

    Attributes:
        name: Of a class.
        arguments: By name.
        single: A single argument without a name, as in ``Resize: 256``; empty if there is none.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    single: tuple[Any, ...] = ()

    @classmethod
    def of(cls, name: Any, value: Any) -> "Call":
        """Returns the call that a key and what stands behind it mean. The word ``None`` means: as if left out."""
        if not isinstance(name, str):
            raise ValueError(f"{name!r:.60} is no name. Give the name of a class")
        if isinstance(value, Mapping):
            return cls(name, {str(key): one for key, one in value.items() if one not in (None, "None")})
        return cls(name, single=() if value in (None, "None") else (value,))


class Dataloader(Section):
    """Where batches come from.

    Attributes:
        batch_size: Examples in a batch.
        dataset: A class of ``torchvision.datasets`` and its arguments.
        transform: Classes of ``torchvision.transforms`` and their arguments, in their order.
        shuffle: Whether the order is drawn anew in every epoch. It is unless told otherwise; in LPOT it was not, so
            that the folders of an ``ImageFolder`` came one after the other.
        drop_last: Whether a last batch that is smaller is left out.
        num_workers: Processes that load.
    """

    batch_size: int = Field(default=1, ge=1)
    dataset: Call
    transform: tuple[Call, ...] = ()
    shuffle: bool = True
    drop_last: bool = False
    num_workers: int = Field(default=0, ge=0)

    @field_validator("dataset", mode="before")
    @classmethod
    def _dataset_is_one(cls, value: Any) -> Call:
        return _one(value, "ImageFolder")

    @field_validator("transform", mode="before")
    @classmethod
    def _transforms_are_named(cls, value: Any) -> tuple[Call, ...]:
        if not isinstance(value, Mapping):
            raise ValueError(f"is {value!r:.60}. Give names of transforms with their arguments, such as ToTensor:")
        return tuple(Call.of(name, arguments) for name, arguments in value.items())


class Train(Section):
    """How the model is trained where no function is given that does.

    Attributes:
        start_epoch: The number of the first epoch.
        end_epoch: The number of the first epoch that is not trained: ``range(start_epoch, end_epoch)``.
        iteration: Batches of an epoch at most; all of them if it is left out.
        frequency: What :class:`PrunerSection` says of it, if nothing nearer does.
        dataloader: Where batches come from.
        criterion: A loss of ``torch.nn`` and its arguments.
        optimizer: A class of ``torch.optim`` and its arguments.
    """

    start_epoch: int = Field(default=0, ge=0)
    end_epoch: int | None = Field(default=None, ge=1)
    iteration: int | None = Field(default=None, ge=1)
    frequency: float | None = Field(default=None, gt=0)
    dataloader: Dataloader | None = None
    criterion: Call | None = None
    optimizer: Call | None = None

    @field_validator("criterion", "optimizer", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Call:
        return _one(value, "CrossEntropyLoss or SGD")


class Schedule(Section):
    """How sparsity grows; what is left out stands one level higher.

    Attributes:
        initial_sparsity: Share of zeros in each tensor when pruning begins, in [0, 1).
        target_sparsity: Share of zeros in each tensor when it ends, in [0, 1).
        start_epoch: The epoch in which it begins.
        end_epoch: The epoch with whose beginning the target is reached.
        frequency: Epochs from one step to the next; below one there are several in an epoch.
    """

    initial_sparsity: float | None = None
    target_sparsity: float | None = None
    start_epoch: int | None = Field(default=None, ge=0)
    end_epoch: int | None = Field(default=None, ge=1)
    frequency: float | None = Field(default=None, gt=0, validation_alias=AliasChoices("frequency", "update_frequency"))

    @field_validator("initial_sparsity", "target_sparsity")
    @classmethod
    def _sparsity_is_a_share(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{value} is not in [0, 1). Use a share such as 0.5")
        return value


class PrunerSection(Schedule):
    """What is asked of some tensors.

    Attributes:
        prune_type: ``basic_magnitude``: the elements of smallest absolute value of each tensor go.
        names: Qualified names of parameters, or globs; all weights that no other pruner names if it is left out.
    """

    prune_type: PruneType = "basic_magnitude"
    names: tuple[str, ...] = ()

    @field_validator("prune_type", mode="before")
    @classmethod
    def _type_is_known(cls, value: Any) -> Any:
        if value not in get_args(PruneType):
            raise ValueError(f"{value!r:.60} is not known. Use {' or '.join(get_args(PruneType))}")
        return value

    @field_validator("names", mode="before")
    @classmethod
    def _names_are_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class WeightCompression(Schedule):
    """What all pruners have in common, and the pruners."""

    pruners: tuple[PrunerSection, ...] = Field(min_length=1)


class Approach(Section):
    """What is compressed: weights."""

    weight_compression: WeightCompression


class PruningSection(Section):
    """All that a file says of pruning."""

    train: Train = Field(default_factory=Train)
    approach: Approach


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
        raise ConfigError(f"{path}: {_told(error)}") from error
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

    def told(key: str, default: Any = None) -> Any:
        values = (getattr(one, key, None) for one in (own, common, train))
        return next((value for value in values if value is not None), default)

    target, end = told("target_sparsity"), told("end_epoch")
    for key, value in (("target_sparsity", target), ("end_epoch", end)):
        if value is None:
            raise ConfigError(f"{subject}.{key}: is missing. Give it there, or for all pruners in weight_compression.")
    initial, start = told("initial_sparsity", 0.0), told("start_epoch", 0)
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
    return Goal(subject, own.names, initial, target, start, end, told("frequency", 1.0))


def _names(name: str, alias: Any) -> list[str]:
    """The names that a field has in a file."""
    return [str(one) for one in alias.choices] if isinstance(alias, AliasChoices) else [name]


def _one(value: Any, example: str) -> Call:
    """The one thing that a mapping names."""
    if isinstance(value, str):
        return Call(value)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"is {value!r:.60}. Give one name with its arguments, such as {example}")
    return Call.of(*next(iter(value.items())))


def _told(error: ValidationError) -> str:
    """The first thing that is wrong: key: fact. Remedy."""
    first = error.errors()[0]
    where = "pruning" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}."
    if first["type"] == "missing":
        return f"{where}: is missing. Give it there."
    if first["type"] == "too_short":
        return f"{where}: is empty. Give at least one."
    wanted = first["msg"].removeprefix("Input should be ").partition(",")[0]
    return f"{where}: is {first['input']!r:.60}. Give {'' if wanted.startswith('a ') else 'a number '}{wanted}."
