"""What the searches take beside a model, a config list and what evaluates."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, model_validator

from graphprune.config import closest
from graphprune.pruners.algorithms import ALGORITHMS
from graphprune.pruners.options import Checked, Count, Function, NotNegative, Options, Positive, asking
from graphprune.search import Episodes, Schedule
from graphprune.search.annealing import MANUAL

_WEIGHED = ("l1", "l2", "fpgm", "slim")


def _by_weights(name: str) -> str:
    if name not in _WEIGHED:
        raise ValueError(
            f"scores no channels by their weights{closest(name, _WEIGHED)}. Use one of {', '.join(_WEIGHED)}"
        )
    return name


Share = Annotated[float, asking(lambda share: 0 <= share <= 1, "is not in [0, 1]. Use a share such as 0.2")]
Step = Annotated[float, asking(lambda step: 0 < step < 1, "is not in (0, 1). Use one such as 0.1")]
Ratio = Annotated[float, asking(lambda ratio: 0 < ratio <= 1, "is not in (0, 1]. Use one such as 0.5")]
Seed = Annotated[int, asking(lambda seed: 0 <= seed < 2**63, "is not in [0, 2**63). Use a number such as 0")]


Folder = Annotated[
    Any, asking(lambda path: isinstance(path, str | Path) and Path(path).is_dir(), "is no folder. Make it first")
]


class SearchOptions(Checked):
    """What every search takes.

    Attributes:
        evaluator: ``evaluator(model)`` returns a number; the model is in eval mode.
        optimize_mode: ``maximize`` or ``minimize`` it.
        base_algo: What scores a channel: l1, l2, fpgm or slim.
        dummy_input: Example inputs; those of the evaluator's first call if they are left out.
        experiment_data_dir: Folder for the journal from which a search that was stopped goes on; None for none. With
            other options, or where a function is another, it is refused; what functions read elsewhere, such as
            globals, does not count, so give that another folder.
        workers: Where candidates are evaluated; None for this process, or see :class:`~graphprune.search.Trials`.
        seed: Of everything that is random.
        keep_at_least: Share of the channels of every group that stays.
    """

    of_what = "a search"
    trained_by: ClassVar[str] = ""

    evaluator: Function
    optimize_mode: Literal["maximize", "minimize"] = "maximize"
    base_algo: Annotated[str, AfterValidator(_by_weights)] = "l1"
    dummy_input: Any = None
    experiment_data_dir: Folder | None = None
    workers: Any = None
    seed: Seed = 0
    keep_at_least: Share = 0.0

    @property
    def trains(self) -> bool:
        """Whether candidates are trained."""
        return bool(self.trained_by) and getattr(self, self.trained_by) is not None

    @property
    def scores_by(self) -> str:
        """The criterion of ``base_algo``."""
        return ALGORITHMS[self.base_algo].criterion or self.base_algo


class AnnealingOptions(SearchOptions):
    """What simulated annealing takes beside: see :class:`~graphprune.search.Schedule`.

    Attributes:
        start_temperature: First temperature.
        stop_temperature: It ends when the temperature is below this.
        cool_down_rate: The next temperature is this times the last, in (0, 1).
        perturbation_magnitude: Largest change of a share at the first temperature.
    """

    start_temperature: Positive = MANUAL.start
    stop_temperature: Positive = MANUAL.stop
    cool_down_rate: Step = MANUAL.cool
    perturbation_magnitude: Positive = MANUAL.perturbation

    @property
    def schedule(self) -> Schedule:
        """How it cools."""
        return Schedule(self.start_temperature, self.stop_temperature, self.cool_down_rate, self.perturbation_magnitude)

    @model_validator(mode="after")
    def _it_ends(self) -> "AnnealingOptions":
        """Raises what the schedule raises."""
        _ = self.schedule
        return self


class NetAdaptOptions(SearchOptions):
    """What NetAdapt takes beside.

    Attributes:
        short_term_fine_tuner: ``short_term_fine_tuner(model)`` trains a candidate in place; None if nothing does.
        sparsity_per_iteration: What the resource falls by in a step, as a share of the dense model's.
        resource: What is counted: weights, params, macs or latency.
    """

    trained_by = "short_term_fine_tuner"

    short_term_fine_tuner: Function | None = None
    sparsity_per_iteration: Step = 0.05
    resource: Literal["weights", "params", "macs", "latency"] = "weights"


class SensitivityOptions(SearchOptions):
    """What pruning by sensitivity takes beside.

    Attributes:
        finetuner: ``finetuner(model)`` trains the model of a round in place; None if nothing does.
        sparsity_per_iter: What goes in a round.
        acc_drop_threshold: How far the score may fall, in the units of the evaluator.
    """

    trained_by = "finetuner"

    finetuner: Function | None = None
    sparsity_per_iter: Ratio = 0.1
    acc_drop_threshold: NotNegative = 0.05


class AutoCompressOptions(AnnealingOptions):
    """What AutoCompress takes beside the annealing of each round.

    Attributes:
        trainer: As in :class:`~graphprune.training.Training`.
        optimizer: A function of parameters that makes one, because the model of each round is another one.
        criterion: The loss that the trainer is given.
        num_iterations: Rounds.
        admm_num_iterations: Turns of ADMM in each.
        admm_training_epochs: How long a turn trains.
        row: Weight of ADMM's penalty.
    """

    trained_by = "trainer"

    trainer: Annotated[Any, asking(callable, "is no function. Give one that trains a model for an epoch")]
    optimizer: Any = None
    criterion: Any = None
    num_iterations: Count = 3
    admm_num_iterations: Count = 30
    admm_training_epochs: Count = 5
    row: NotNegative = 1e-4

    @property
    def admm(self) -> dict[str, Any]:
        """The values of :class:`~graphprune.pruners.options.Options` of a round's ADMM."""
        return {
            "trainer": self.trainer,
            "optimizer": self.optimizer,
            "criterion": self.criterion,
            "iterations": self.admm_num_iterations,
            "training_epochs": self.admm_training_epochs,
            "rho": self.row,
            "seed": self.seed,
        }

    @model_validator(mode="after")
    def _it_trains(self) -> "AutoCompressOptions":
        """Raises now what ADMM would raise after the first annealing."""
        if (training := Options.of(self.admm).training) is not None:
            training.regularised(lambda: torch.zeros(()))
        return self


class AMCOptions(SearchOptions):
    """What AMC takes beside.

    Attributes:
        val_loader: If given, the evaluator takes ``(val_loader, model)``.
        flops_ratio: Share of the multiply-accumulates that may be left.
        lbound: Share of the channels of every group that stays.
        channel_round: What is kept of an axis is a multiple of this.
        train_episode: Episodes in all.
        warmup: Those in which nothing is learnt.
    """

    val_loader: Any = None
    flops_ratio: Ratio = 0.5
    lbound: Share = 0.2
    channel_round: Count = 8
    train_episode: Count = 800
    warmup: Annotated[int, asking(lambda count: count >= 0, "is negative. Use 0 or more")] = 100

    @property
    def episodes(self) -> Episodes:
        """How long the agent explores."""
        return Episodes(self.train_episode, self.warmup)

    @model_validator(mode="after")
    def _it_learns(self) -> "AMCOptions":
        """Some episodes come after the warm-up."""
        if self.warmup >= self.train_episode:
            raise ValueError(
                f"of {self.train_episode} episodes {self.warmup} are to warm up, so that nothing is learnt. "
                "Give a smaller warmup, or a larger train_episode"
            )
        return self
