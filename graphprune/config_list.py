"""Config lists, as pruners of NNI take them: which layers, and how much of each."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from pydantic import AliasChoices, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from graphprune.config import Typed, closest, fact_of
from graphprune.errors import ConfigError, shown
from graphprune.groups import ChannelGroup
from graphprune.targets import Target
from speedup.analysis import Analysis

DEFAULT_TYPES = (
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear", "Bilinear",
    "Embedding", "EmbeddingBag", "PReLU",
)  # fmt: skip
"""What ``default`` means among types: layers with weights that are no norms."""

_NAMES_OF_SPARSITY = ("sparsity", "sparsity_per_layer", "sparse_ratio", "final_sparsity")
_SELECTORS = ("op_types", "op_names", "op_partial_names", "op_names_re")


class Entry(Typed):
    """One entry of a config list. Of its selectors each narrows down the layers.

    Attributes:
        op_types: Class names of layers, or of what they inherit from; ``default`` means :data:`DEFAULT_TYPES`.
        op_names: Qualified names of layers.
        op_partial_names: Parts of such names.
        op_names_re: Regular expressions that match whole names.
        exclude: Whether these layers stay as they are.
        sparsity: Share of each of these layers that goes, in [0, 1); by its other names ``sparsity_per_layer``,
            ``sparse_ratio`` and ``final_sparsity``.
        total_sparsity: Share of all of their weights together, taken by one ranking, in [0, 1).
        max_sparsity_per_layer: Largest share of one of them that goes then, in (0, 1].
        initial_sparsity: Share that goes when a gradual schedule starts, in [0, 1).
        start_epoch: The epoch in which it starts.
        end_epoch: The epoch in which it ends.
        frequency: Epochs from one step of it to the next.
        prune_iterations: Rounds of a lottery ticket.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    op_types: tuple[str, ...] | None = None
    op_names: tuple[str, ...] | None = None
    op_partial_names: tuple[str, ...] | None = None
    op_names_re: tuple[str, ...] | None = None
    exclude: bool = False
    sparsity: float | None = Field(None, validation_alias=AliasChoices(*_NAMES_OF_SPARSITY))
    total_sparsity: float | None = None
    max_sparsity_per_layer: float = 1.0
    initial_sparsity: float = 0.0
    start_epoch: int = 0
    end_epoch: int | None = None
    frequency: int = 1
    prune_iterations: int | None = None

    @field_validator(*_SELECTORS, mode="before")
    @classmethod
    def _selectors_are_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("sparsity", "total_sparsity", "initial_sparsity")
    @classmethod
    def _sparsity_is_a_share(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise ValueError("is not in [0, 1). Use a share such as 0.5")
        return value

    @field_validator("max_sparsity_per_layer")
    @classmethod
    def _most_is_a_share(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError("is not in (0, 1]. Use a share such as 0.9")
        return value

    @field_validator("frequency", "prune_iterations")
    @classmethod
    def _counts_are_positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("is below 1. Use 1 or more")
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> "Entry":
        if self.sparsity is not None and self.total_sparsity is not None:
            raise ValueError("has both sparsity and total_sparsity. Give one of them")
        if (self.share or 0.0) > self.max_sparsity_per_layer:
            name = "sparsity" if self.total_sparsity is None else "total_sparsity"
            raise ValueError(
                f"asks for a {name} of {self.share} that max_sparsity_per_layer "
                f"{self.max_sparsity_per_layer} cannot reach. Raise the latter, or ask for less"
            )
        if self.exclude and (self.sparsity is not None or self.total_sparsity is not None):
            raise ValueError("both excludes layers and says how much of them goes. Give one of the two")
        if not any(getattr(self, selector) for selector in _SELECTORS):
            raise ValueError(f"selects no layers. Give it one of {', '.join(_SELECTORS)}")
        if self.end_epoch is not None and self.end_epoch <= self.start_epoch:
            raise ValueError(
                f"ends in epoch {self.end_epoch}, but starts in {self.start_epoch}, so that it never starts. "
                "Give a later end_epoch"
            )
        return self

    @property
    def share(self) -> float | None:
        """How much goes, of each layer or of all; None if it does not say."""
        return self.sparsity if self.total_sparsity is None else self.total_sparsity


@dataclass(frozen=True)
class Setting:
    """What a config list says of one layer.

    Attributes:
        position: Which of the entries says it.
        entry: That entry.
    """

    position: int
    entry: Entry

    def asking(self, share: float) -> "Setting":
        """Returns the same setting with another share; an entry that excludes layers stays as it is."""
        if self.entry.exclude:
            return self
        key = "sparsity" if self.entry.total_sparsity is None else "total_sparsity"
        return replace(self, entry=self.entry.model_copy(update={key: share}))

    def asks_like(self, other: "Setting") -> bool:
        """Whether ``other`` is of the same entry and share."""
        return (self.position, self.entry.share) == (other.position, other.entry.share)

    def at_most(self, share: float) -> "Setting":
        """Returns the same setting with no more than ``share`` of one layer going where several are ranked.

        Raises:
            ConfigError: So much cannot go then.
        """
        most = min(share, self.entry.max_sparsity_per_layer)
        if (self.entry.share or 0.0) > most:
            fact = f"with it no sparsity of {self.entry.share} can be reached"
            raise ConfigError(f"max_sparsity_per_layer {most}: {fact}. Raise it, or ask for less.")
        return replace(self, entry=self.entry.model_copy(update={"max_sparsity_per_layer": most}))


def read_config_list(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], *, shares: bool = True
) -> dict[str, Setting]:
    """Returns what is asked of each layer by its qualified name; later entries override earlier ones.

    Args:
        model: The model.
        config_list: What its user wrote.
        shares: Whether every entry has to say how much goes.

    Raises:
        ConfigError: An entry makes no sense, or selects nothing of this model.
    """
    if isinstance(config_list, Mapping | str) or not isinstance(config_list, Sequence) or not config_list:
        raise ConfigError(f"config_list {config_list!r:.60}: is no list of entries. Give a list of dictionaries.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: is {shown(model)}. Give a torch.nn.Module.")
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    settings: dict[str, Setting] = {}
    for position, values in enumerate(config_list):
        entry = _entry(position, values)
        if shares and not entry.exclude and entry.share is None:
            raise ConfigError(f"config_list[{position}]: does not say how much goes. Give it a sparsity such as 0.5.")
        for name in _selected(position, entry, layers):
            settings[name] = Setting(position, entry)
    if all(setting.entry.exclude for setting in settings.values()):
        raise ConfigError("config_list: excludes all that it selects. Leave a layer in.")
    return settings


def _entry(position: int, values: Mapping[str, Any]) -> Entry:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"config_list[{position}]: is {values!r:.60}. Give a dictionary, such as {{'sparsity': 0.5}}."
        )
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(
                f"config_list[{position}]: {key!r:.60} is no key of an entry. Use names such as 'sparsity'."
            )
    if len(given := [name for name in _NAMES_OF_SPARSITY if name in values]) > 1:
        raise ConfigError(f"config_list[{position}]: {' and '.join(given)} are names of one key. Give one of them.")
    try:
        return Entry.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        subject = f"config_list[{position}]"
        if not first["loc"]:  # about several values
            raise ConfigError(f"{subject}: {first['ctx']['error']}.") from error
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = [*Entry.model_fields, *_NAMES_OF_SPARSITY[1:]]
            raise ConfigError(
                f"{subject}: {key!r} is no key of an entry{closest(key, known)}. Use some of {', '.join(known)}."
            ) from error
        raise ConfigError(f"{subject}: {key} {values.get(key)!r:.60} {fact_of(first)}.") from error


def _selected(position: int, entry: Entry, layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of the layers that an entry means."""
    subject = f"config_list[{position}]"
    types = {name: _types(module) for name, module in layers.items()}
    wanted = {kind for one in entry.op_types or () for kind in (DEFAULT_TYPES if one == "default" else (one,))}
    present = sorted({kind for kinds in types.values() for kind in kinds if hasattr(nn, kind)} - {"Module"})
    for kind in entry.op_types or ():
        if kind != "default" and not hasattr(nn, kind) and not any(kind in kinds for kinds in types.values()):
            raise ConfigError(
                f"{subject}: no layer is of type {kind!r}{closest(kind, present)}. Use some of {', '.join(present)}."
            )
    for name in entry.op_names or ():
        if name not in layers:
            raise ConfigError(
                f"{subject}: no layer is called {name!r}{closest(name, list(layers))}. Use names of named_modules()."
            )
    try:
        patterns = [re.compile(pattern) for pattern in entry.op_names_re or ()]
    except re.error as error:
        raise ConfigError(f"{subject}: op_names_re {error.pattern!r} is no regular expression ({error}).") from error
    found = [
        name
        for name in layers
        if (entry.op_types is None or wanted & types[name])
        and (entry.op_names is None or name in entry.op_names)
        and (entry.op_partial_names is None or any(part in name for part in entry.op_partial_names))
        and (entry.op_names_re is None or any(pattern.fullmatch(name) for pattern in patterns))
        and any(True for _ in layers[name].parameters(recurse=False))
    ]
    if not found:
        has = f"has some of {', '.join(present)}" if layers else "is one layer without a name: put it into Sequential"
        raise ConfigError(f"{subject}: selects no layer with weights. The model {has}.")
    return found


def _types(module: nn.Module) -> frozenset[str]:
    """The names of the classes that a layer is an instance of."""
    return frozenset(kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module))


def target_of(
    analysis: Analysis, settings: Mapping[str, Setting], *, together: bool = False, relative: bool = True
) -> Callable[[ChannelGroup], Target | str]:
    """Returns the function that says what a config list asks of a channel group, or why the group is left alone.

    Layers that are tied lose the same channels: the share is the smallest that any of them is asked for. A layer that
    the list does not select keeps what is tied to it, unless a norm that is selected speaks for the channels.

    Args:
        analysis: The model, whose layers the settings name.
        settings: What is asked of each layer.
        together: Whether a share is one of all selected layers together, even where the list does not say so.
        relative: Whether a ranking of several groups compares scores divided by their mean in the group.
    """
    owners: dict[str, list[str]] = {}  # a tied weight has several
    for name, canonical in analysis.aliases.items():
        owners.setdefault(canonical, []).append(name.rpartition(".")[0])

    def target(group: ChannelGroup) -> Target | str:
        tensors: dict[str, list[str]] = {}  # of each layer whose operators produce the channels
        for member in group.members:
            for layer in owners[member.tensor] if member.role == "out" else ():
                tensors.setdefault(layer, []).append(member.tensor)
        asked = {layer: settings[layer] for layer in tensors if layer in settings}
        if hit := next((layer for layer, setting in asked.items() if setting.entry.exclude), None):
            return f"excluded by the config list ({hit})"
        if not asked:
            return "not selected by the config list"
        matrices = {name for names in tensors.values() for name in names if len(analysis.parameters[name].shape) > 1}
        chosen = {name for layer in asked for name in tensors[layer]} & matrices
        norms = [layer for layer in asked if matrices.isdisjoint(tensors[layer])]
        if not norms and chosen != matrices:
            left = min(matrices - chosen)
            return f"tied to {owners[left][0] or left}, which the config list does not select"
        elements = sum(prod(analysis.parameters[name].shape) for name in chosen) or len(norms) * group.units
        first, *others = asked.values()
        if all(one == first for one in others) and (together or first.entry.total_sparsity is not None):
            return Target(
                first.entry.share or 0.0,
                ranking=f"config_list[{first.position}]",
                most=first.entry.max_sparsity_per_layer,
                weight=elements / group.units,
                relative=relative,
                initial=first.entry.initial_sparsity,
            )
        least = min((one.entry for one in asked.values()), key=lambda entry: entry.share or 0.0)
        most = min(one.entry.max_sparsity_per_layer for one in asked.values())
        return Target(least.share or 0.0, most=most, initial=least.initial_sparsity)

    return target
