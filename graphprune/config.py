"""What was asked, validated before anything is done."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from graphprune.criteria import CRITERIA
from graphprune.errors import ConfigError, shown
from graphprune.kinds import KINDS, Kind

S = TypeVar("S", bound="Said")


class Typed(BaseModel):
    """Values under their names, of their types. True is no number, though Python and pydantic take it for 1."""

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        whole = cls.model_fields[str(info.field_name)].annotation
        kinds = [getattr(kind, "__origin__", kind) for kind in get_args(whole) or (whole,)]  # without what is annotated
        if isinstance(value, bool) and bool not in kinds:
            for number, name in ((int, "int"), (float, "float")):
                if number in kinds:
                    raise PydanticCustomError(f"{name}_type", "Input should be a valid number")
        return value


class Said(Typed):
    """What a user says, each value under its name and validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls: type[S], **values: Any) -> S:
        """Returns what these values say.

        Raises:
            ConfigError: A value makes no sense; one line that names it and what would.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # about several values
                raise ConfigError(f"{first['ctx']['error']}.") from error
            name = str(first["loc"][0])
            fact = fact_of(first)
            if first["type"] == "extra_forbidden":
                known = list(cls.model_fields)
                fact = f"is no option{closest(name, known)}. Use some of {', '.join(known)}"
            raise ConfigError(f"{name} {shown(values.get(name))}: {fact}.") from error


_FACTS: Mapping[str, str] = {
    "int": "is no whole number. Use one such as 8",
    "float": "is no number. Use one such as 0.5",
    "bool": "is neither true nor false. Use one of them",
    "string": "is no text. Use a name",
    "path": "is no name of a file. Use one",
    "tuple": "is no list. Give one, in brackets",
}
"""What is wrong with a value, and what would be right, by the type that it should have."""


def fact_of(error: Mapping[str, Any]) -> str:
    """Returns what is wrong with one value, and what would be right, from an error of pydantic."""
    kind = str(error["type"])
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "literal_error":
        return f"input should be {error['ctx']['expected']}. Use one of them"
    told = f"{error['msg'][0].lower()}{error['msg'][1:]}. Use another value"
    return _FACTS.get(kind.partition("_")[0], told)


class Request(Said):
    """What a user asks of :func:`graphprune.compress`.

    Attributes:
        sparsity: Share of the channels of every prunable group that goes, in [0, 1).
        criterion: What scores a channel: l1, l2, fpgm, bn_scale, apoz, mean_activation, taylor or random.
        batches: Batches at most that a criterion looks at which needs activations or gradients.
        scope: ``local`` takes the share from each group, ``global`` from all of them by one ranking.
        exclude: Modules whose output channels stay, by name or glob.
        only: If given, the only modules whose output channels may go, by name or glob.
        heads: Whether whole heads of attention may go, under grouped queries together with their keys and values. With
            any of the four named True only those may; with some False the others may.
        head_dims: Whether dimensions of heads may go, as many of each head, instead of whole heads. By default they do
            only where heads cannot go whole.
        ffn: Whether channels between two layers may go: hidden ones of feed-forward networks, bottlenecks.
        width: Whether channels may go that several layers add to: the residual stream.
        round_to: What is kept of an axis is a multiple of this; ``auto`` asks onnxruntime on this CPU.
        min_channels: Channels that every axis keeps at least.
        seed: Of everything that is random.
        strict: Whether an operator without a rule is an error instead of a pin.
        config_list: What is asked of which layers, in the form of NNI, instead of one sparsity for all; everything else
            holds beside it, and ``global`` ranks together what it selects.
    """

    sparsity: float = 0.5
    criterion: str = "l1"
    batches: int = 20
    scope: Literal["local", "global"] = "local"
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    heads: bool | None = None
    head_dims: bool | None = None
    ffn: bool | None = None
    width: bool | None = None
    round_to: int | Literal["auto"] = "auto"
    min_channels: int = 1
    seed: int = 0
    strict: bool = False
    config_list: tuple[Any, ...] | None = None

    @field_validator("sparsity")
    @classmethod
    def _sparsity_is_a_share(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError("is not in [0, 1). Use a share such as 0.5")
        return value

    @field_validator("criterion")
    @classmethod
    def _criterion_is_known(cls, value: str) -> str:
        if value not in CRITERIA:
            raise ValueError(f"is not known. Use one of {', '.join(CRITERIA)}{closest(value, list(CRITERIA))}")
        return value

    @field_validator("round_to", mode="before")
    @classmethod
    def _round_to_is_a_number(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            raise ValueError("is no number. Use one such as 8, or auto")
        return value

    @field_validator("round_to", "min_channels", "batches")
    @classmethod
    def _counts_are_positive(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("is below 1. Use 1 or more")
        return value

    @field_validator("seed")
    @classmethod
    def _seed_is_a_seed(cls, value: int) -> int:
        if not 0 <= value < 2**63:
            raise ValueError("is not in [0, 2**63). Use a number such as 0")
        return value

    @field_validator("config_list", mode="before")
    @classmethod
    def _entries_are_listed(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, list | tuple):
            raise ValueError("is no list of entries. Give a list of dictionaries")
        return value

    @field_validator("exclude", "only", mode="before")
    @classmethod
    def _names_are_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _heads_go_one_way(self) -> "Request":
        if self.heads and self.head_dims:
            raise ValueError("heads and head_dims: exclude each other. Let whole heads go, or dimensions of every head")
        if not self.kinds:
            raise ValueError("heads, ffn and width: none of them may go. Leave one of them in")
        return self

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of channels that may go. Where heads cannot go whole, dimensions of them go instead."""
        told: dict[Kind, bool | None] = {kind: getattr(self, kind) for kind in KINDS}
        if told["heads"] is False and told["head_dims"] is None:
            told["head_dims"] = False
        wanted = frozenset(kind for kind, value in told.items() if value)
        return wanted or frozenset(kind for kind, value in told.items() if value is None)


def read_request(data: Any, path: Path, *others: type[Said]) -> dict[str, Any]:
    """Returns the fields of a request that a file has: a config list, or ``config_list`` and others by their names.

    Args:
        data: What the file holds.
        path: The file.
        *others: What else it may have the fields of.

    Raises:
        ConfigError: It holds something else, or a value that makes no sense.
    """
    values = {"config_list": data} if isinstance(data, list) else data
    kinds: tuple[type[Said], ...] = (Request, *others)
    known = [name for kind in kinds for name in kind.model_fields]
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {data!r:.60}. Give a config list, or pruning in the form of LPOT.")
    for key in values:
        if key not in known:
            near = closest(str(key), ["pruning", *known])
            raise ConfigError(f"{path}: {key!r:.60} is no key of it{near}. Use pruning, or some of {', '.join(known)}.")
        if values[key] is None:
            raise ConfigError(f"{path}: {key}: holds nothing. Give it a value, or leave it out.")
    if "config_list" in values and "sparsity" in values:
        raise ConfigError(f"sparsity: is said by the config_list of {path}. Leave it out.")
    if values.get("config_list") == []:
        raise ConfigError(f"{path}: config_list []: is no list of entries. Give a list of dictionaries.")
    for kind in kinds:
        try:
            kind.of(**{name: value for name, value in values.items() if name in kind.model_fields})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return values


def closest(word: str, known: Sequence[str]) -> str:
    """Returns " (did you mean 'x'?)" for the known word nearest to ``word``, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
