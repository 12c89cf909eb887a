"""What may stand in a configuration file of LPOT: its sections, their keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import AliasChoices, ConfigDict, Field, ValidationError, field_validator, model_validator

from graphprune.config import Typed, closest

PruneType = Literal["basic_magnitude"]


class Section(Typed):
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


def told(error: ValidationError) -> str:
    """The first thing that is wrong: key: fact. Remedy."""
    first = error.errors()[0]
    where = "pruning" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}."
    if first["type"] == "missing":
        return f"{where}: is missing. Give it there."
    if first["type"] == "too_short":
        return f"{where}: is empty. Give at least one."
    wanted = first["msg"].removeprefix("Input should be ").partition(",")[0].replace("a valid tuple", "a list")
    return f"{where}: is {first['input']!r:.60}. Give {'' if wanted.startswith('a ') else 'a number '}{wanted}."


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
