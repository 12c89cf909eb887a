"""The pruning scheduler of NNI's second generation: a basic pruner and a task generator, put together by the user."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from graphprune.errors import ConfigError
from graphprune.pruners.basic import BasicPruner
from graphprune.pruners.rounds import Work
from graphprune.pruners.scheduled import ScheduledPruner
from graphprune.pruners.sparsify import Masks
from speedup.masking import attach_masks


@dataclass(frozen=True)
class TaskGenerator:
    """What each round has to reach.

    Attributes:
        total_iteration: How many rounds there are.
        origin_model: The model.
        origin_config_list: Which layers, and how much of each in the end.
        origin_masks: Masks that it has from the beginning.
    """

    schedule: ClassVar[str]

    total_iteration: int
    origin_model: nn.Module
    origin_config_list: Sequence[Mapping[str, Any]]
    origin_masks: Mapping[str, Any] = field(default_factory=dict)


class LinearTaskGenerator(TaskGenerator):
    """Sparsity grows by the same amount in each round."""

    schedule = "linear"


class AGPTaskGenerator(TaskGenerator):
    """Sparsity grows fast at first and ever more slowly (Zhu & Gupta, 2017)."""

    schedule = "agp"


class LotteryTicketTaskGenerator(TaskGenerator):
    """Each round prunes the same share of what survives (Frankle & Carbin, 2019); see ``reset_weight``."""

    schedule = "lottery_ticket"


class PruningScheduler(ScheduledPruner):
    """Prunes in the rounds of a task generator; see :class:`~graphprune.pruners.scheduled.ScheduledPruner`."""

    def __init__(
        self,
        pruner: BasicPruner,
        task_generator: TaskGenerator,
        finetuner: Work | None = None,
        speedup: bool = False,
        dummy_input: Any = None,
        evaluator: Callable[[nn.Module], float] | None = None,
        reset_weight: bool = False,
    ) -> None:
        """Checks what is asked; nothing is done yet.

        Args:
            pruner: Its algorithm and options count; the model and the config list are those of the task generator.
            task_generator: What each round has to reach.
            finetuner: ``finetuner(model)`` trains the model of a round in place.
            speedup: Whether the model becomes physically smaller after each round.
            dummy_input: Example inputs.
            evaluator: ``evaluator(model)`` returns a number, higher for better models.
            reset_weight: Whether surviving weights return to their first values after each round.

        Raises:
            ConfigError: What is asked makes no sense for this model.
        """
        for what, value, kind in (("pruner", pruner, BasicPruner), ("task_generator", task_generator, TaskGenerator)):
            if not isinstance(value, kind):
                raise ConfigError(f"{what}: is a {type(value).__name__}. Give one of graphprune.pruners.")
        self.schedule = task_generator.schedule  # type: ignore[misc]  # of this one
        self.rewind = reset_weight  # type: ignore[misc]  # of this one
        self._origin_masks = task_generator.origin_masks
        options = {name: getattr(pruner.options, name) for name in pruner.options.model_fields_set}
        example = options.pop("dummy_input", None)
        super().__init__(
            task_generator.origin_model,
            task_generator.origin_config_list,
            pruner.name,
            task_generator.total_iteration,
            finetuner=finetuner,
            speedup=speedup,
            dummy_input=example if dummy_input is None else dummy_input,
            evaluator=evaluator,
            **options,
        )

    def compress(self) -> tuple[nn.Module, Masks]:
        """Attaches the masks of the beginning to the model, prunes in rounds, and returns the best model and masks."""
        attach_masks(self._model, self._origin_masks)
        return super().compress()
