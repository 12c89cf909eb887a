"""What the constructors of NNI's pruners take beside a model and a config list, under all its names.

Values are checked in one place: names, types and ranges are those of the fields of :class:`Checked`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import AfterValidator, AliasChoices, ConfigDict, Field, ValidationError, field_validator
from torch import nn
from torch.optim import Optimizer

from graphprune.config import Typed, closest
from graphprune.errors import ConfigError, shown
from graphprune.evidence import ACTIVATIONS
from graphprune.training import Training


def asking(holds: Callable[[Any], bool], what: str) -> AfterValidator:
    """Returns what checks a value: it holds, or the error says what it is and what to use."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(what)
        return value

    return AfterValidator(check)


Count = Annotated[int, asking(lambda count: count >= 1, "is below 1. Use 1 or more")]
NotNegative = Annotated[float, asking(lambda number: 0 <= number < math.inf, "is negative or no number. Use 0 or more")]
Positive = Annotated[float, asking(lambda number: 0 < number < math.inf, "is no positive number. Use one above 0")]
Optimising = Annotated[
    Any,
    asking(
        lambda one: one is None or isinstance(one, Optimizer) or callable(one),
        "is no optimizer. Give one, or a function of parameters that makes one",
    ),
]
Function = Annotated[Any, asking(callable, "is no function. Give a function of a model")]


CheckedT = TypeVar("CheckedT", bound="Checked")


class Checked(Typed):
    """Options of which names, types and ranges are checked.

    Attributes:
        of_what: What takes them, for errors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    of_what: ClassVar[str]

    @classmethod
    def of(cls: type[CheckedT], values: Mapping[str, Any]) -> CheckedT:
        """Returns the options with these values.

        Raises:
            ConfigError: There is no such option, a value makes no sense, or one is given under two names.
        """
        for names in cls._names():
            if len(given := [name for name in names if name in values]) > 1:
                raise ConfigError(f"{' and '.join(given)}: are names of one option. Give one of them.")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # about several values
                raise ConfigError(f"{first['ctx']['error']}.") from error
            name = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                near = closest(name, [one for names in cls._names() for one in names])
                raise ConfigError(
                    f"{name}: is no option of {cls.of_what}{near}. Use some of {', '.join(cls.model_fields)}."
                ) from error
            why = first["ctx"]["error"] if first["type"] == "value_error" else first["msg"].lower()
            raise ConfigError(f"{name} {shown(values.get(name))}: {why}.") from error

    @classmethod
    def _names(cls) -> list[list[str]]:
        """The names of each option."""
        found = []
        for name, field in cls.model_fields.items():
            alias = field.validation_alias
            found.append([str(one) for one in alias.choices] if isinstance(alias, AliasChoices) else [name])
        return found


class Options(Checked):
    """What the constructors of NNI's pruners take beside a model and a config list.

    Attributes:
        trainer: ``trainer(model, optimizer, criterion, epoch)``: trains for one epoch.
        optimizer: Of the model, also called ``traced_optimizer``; or a function of parameters that makes one.
        criterion: The loss that the trainer is given.
        training_batches: Batches of which activations or gradients are looked at; also ``statistics_batch_num``.
        training_epochs: How long slim and movement train, and each turn of ADMM (5 unless told); also ``epochs``.
        scale: Weight of slim's penalty on the scales of norms.
        iterations: Turns of ADMM; also ``num_iterations``.
        rho: Weight of ADMM's penalty on the distance from sparse weights.
        granularity: Whether ADMM and movement take single elements, or channels.
        mode: ``global`` ranks all selected layers together. Of the others, ``dependency_aware`` is what is done
            wherever example inputs are known, with ``normal`` as well.
        dependency_aware: The same, as the second generation of NNI has it.
        dummy_input: Example inputs, also called ``example_inputs``: by them is known which layers depend on each other.
            Those of the first batch are taken if there is a trainer.
        activation: After which function activations are looked at; all of them unless told.
        max_sparsity_per_layer: Largest share of one layer that goes where all are ranked together.
        block: Sizes of the blocks that go whole where single elements would go.
        warm_up_step: Steps of movement before anything goes.
        cool_down_beginning_step: The step of movement after which its sparsity stays.
        score_threshold: Of the sigmoid of movement's scores, which makes it soft; None for hard. Layers of which the
            config list does not say how much goes lose what is below it in the end.
        regular_scale: Weight of movement's penalty on soft scores.
        seed: Of everything that is random.
    """

    of_what = "a pruner"

    trainer: Any = None
    optimizer: Optimising = Field(None, validation_alias=AliasChoices("optimizer", "traced_optimizer"))
    criterion: Any = None
    training_batches: Count = Field(20, validation_alias=AliasChoices("training_batches", "statistics_batch_num"))
    training_epochs: Count | None = Field(None, validation_alias=AliasChoices("training_epochs", "epochs"))
    scale: NotNegative = 1e-4
    iterations: Count = Field(30, validation_alias=AliasChoices("iterations", "num_iterations"))
    rho: NotNegative = 1e-4
    granularity: Literal["fine-grained", "coarse-grained"] = "fine-grained"
    mode: Literal["normal", "dependency_aware", "global"] = "normal"
    dependency_aware: bool = False
    dummy_input: Any = Field(None, validation_alias=AliasChoices("dummy_input", "example_inputs"))
    activation: str | None = None
    max_sparsity_per_layer: float = 1.0
    block: tuple[int, ...] = ()
    warm_up_step: int = 0
    cool_down_beginning_step: int = 1
    score_threshold: float | None = None
    regular_scale: NotNegative = 1.0
    seed: int = 0

    @field_validator("warm_up_step", "cool_down_beginning_step", "seed")
    @classmethod
    def _steps_are_not_negative(cls, value: int) -> int:
        if value < 0:
            raise ValueError("is negative or no number. Use 0 or more")
        return value

    @field_validator("max_sparsity_per_layer")
    @classmethod
    def _most_is_a_share(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError("is not in (0, 1]. Use a share such as 0.9")
        return value

    @field_validator("score_threshold")
    @classmethod
    def _threshold_is_one_of_a_sigmoid(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError("is not in (0, 1), as a sigmoid is. Use a threshold such as 0.1")
        return value

    @field_validator("block")
    @classmethod
    def _blocks_have_sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in value):
            raise ValueError("has a size below 1. Use sizes such as (4, 1)")
        return value

    @field_validator("activation")
    @classmethod
    def _activation_is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in ACTIVATIONS:
            raise ValueError(f"is not known. Use one of {', '.join(ACTIVATIONS)}")
        return value

    @property
    def training(self) -> Training | None:
        """How the model is trained; None if nobody said.

        Given nothing but a trainer, it is that of the first generation of NNI: Adam and the cross entropy.
        """
        if self.trainer is None:
            return None
        if self.optimizer is None:
            return Training(self.trainer, torch.optim.Adam, self.criterion or nn.CrossEntropyLoss())
        return Training(self.trainer, self.optimizer, self.criterion)
