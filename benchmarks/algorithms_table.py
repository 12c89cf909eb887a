"""Every algorithm at work on one network: pruned, trained again, and what it comes to. `RUNS` is the table of them."""

import copy
import functools
import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from training_setup import BATCHES, Setup

from graphprune.budget import cost
from graphprune.pruners import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    ADMMPruner,
    AGPPruner,
    AMCPruner,
    AutoCompressPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    LotteryTicketPruner,
    MovementPruner,
    NetAdaptPruner,
    RandomPruner,
    SensitivityPruner,
    SimulatedAnnealingPruner,
    SlimPruner,
    TaylorFOWeightPruner,
)
from graphprune.pruners.basic import BasicPruner
from graphprune.pruners.scheduled import ScheduledPruner
from graphprune.pruners.searched import SearchPruner
from graphprune.training import Training
from graphprune.training.fit import evaluated
from speedup import ModelSpeedup
from speedup.capture import capture
from speedup.masking import attached_masks, without_masks

SPARSITY = 0.5

Way = Callable[[nn.Module, Setup], tuple[nn.Module, nn.Module]]
"""From a dense model, which it may change, to the pruned one before and after it was trained again."""

Values = Mapping[str, Any]
Options = Callable[[Setup], dict[str, Any]]


def at_once(pruner: type[BasicPruner], entry: Values, options: Options = lambda setup: {}) -> Way:
    """Masks, then a physical shrink, then training."""

    def way(model: nn.Module, setup: Setup) -> tuple[nn.Module, nn.Module]:
        _, masks = _pruner(pruner, model, entry, options, setup).compress()
        before = ModelSpeedup(model, setup.example_inputs, masks).speedup_model()
        after = copy.deepcopy(before)
        setup.tune(after, setup.epochs)
        return before, after

    return way


def elementwise(pruner: type[BasicPruner], entry: Values, options: Options = lambda setup: {}) -> Way:
    """Masks of single weights, which stay attached while the model trains: its shapes stay as they are."""

    def way(model: nn.Module, setup: Setup) -> tuple[nn.Module, nn.Module]:
        before, _ = _pruner(pruner, model, entry, options, setup).compress()
        after = copy.deepcopy(before)
        setup.tune(after, setup.epochs)
        return before, after

    return way


def in_rounds(pruner: type[ScheduledPruner], algorithm: str, entry: Values) -> Way:
    """A schedule: each round prunes, shrinks and trains; before is what the last one has pruned.

    Where weights return to their first values, the last training begins from these, and is as long as everybody's.
    """

    def way(model: nn.Module, setup: Setup) -> tuple[nn.Module, nn.Module]:
        pruned: list[nn.Module] = []
        trainings = setup.rounds + pruner.rewind  # the dense model is trained before it is rewound

        def finetune(small: nn.Module) -> None:
            pruned.append(copy.deepcopy(small))
            whole = pruner.rewind and len(pruned) == trainings
            setup.tune(small, setup.epochs if whole else setup.round)

        after, _ = pruner(
            model,
            [entry],
            pruning_algorithm=algorithm,
            total_iteration=setup.rounds,
            finetuner=finetune,
            speedup=True,
            dummy_input=setup.example_inputs,
            seed=setup.seed,
        ).compress()
        return pruned[-1], after

    return way


def searched(pruner: type[SearchPruner], entry: Values, options: Options = lambda setup: {}) -> Way:
    """A search for widths, then training of what it has found."""

    def way(model: nn.Module, setup: Setup) -> tuple[nn.Module, nn.Module]:
        made = pruner(
            model,
            [entry],
            evaluator=functools.partial(evaluated, setup.score),
            dummy_input=setup.example_inputs,
            seed=setup.seed,
            **options(setup),
        )
        made.compress()
        before = made.found.result.model
        after = copy.deepcopy(before)
        setup.tune(after, setup.epochs)
        return before, after

    return way


def _pruner(pruner: type[BasicPruner], model: nn.Module, entry: Values, options: Options, setup: Setup) -> BasicPruner:
    return pruner(model, [entry], dummy_input=setup.example_inputs, seed=setup.seed, **options(setup))


def looking(setup: Setup) -> dict[str, Any]:
    """Some batches with a learning rate of zero: what is looked at is the dense model."""
    return {**_loop(setup.training(1, rate=0.0, steps=BATCHES)), "training_batches": BATCHES}


def ranked_together(setup: Setup) -> dict[str, Any]:
    return {**looking(setup), "mode": "global"}


def shrinking_scales(setup: Setup) -> dict[str, Any]:
    """A penalty that is felt within an epoch: with 390 steps ten times the usual one, of 160 epochs."""
    scale = 0.4 / len(setup.data)
    return {**_loop(setup.training(setup.learning)), "training_epochs": setup.learning, "scale": scale}


def alternating(setup: Setup) -> dict[str, Any]:
    """As many turns as epochs, and a penalty that is felt within one of them."""
    turns = {"iterations": setup.learning, "training_epochs": 1, "rho": 4 / len(setup.data)}
    return {**_loop(setup.training(setup.learning)), **turns, "granularity": "coarse-grained"}


def moving(setup: Setup) -> dict[str, Any]:
    """Nothing goes in the first tenth of the steps, and everything is gone after seven of them."""
    steps = setup.learning * len(setup.data)
    warm_up = {"warm_up_step": steps // 10, "cool_down_beginning_step": steps * 7 // 10}
    return {**_loop(setup.training(setup.learning)), "training_epochs": setup.learning, **warm_up}


def in_two_rounds(setup: Setup) -> dict[str, Any]:
    return {"finetuner": setup.touch, "sparsity_per_iter": SPARSITY / 2, "acc_drop_threshold": 5.0}


def step_by_step(setup: Setup) -> dict[str, Any]:
    return {"short_term_fine_tuner": setup.touch, "sparsity_per_iteration": SPARSITY / 5, "resource": "macs"}


def cooled_early(setup: Setup) -> dict[str, Any]:
    """Rounds of annealing and ADMM, which train in all for as long as others that learn."""
    rounds = 1 if setup.learning % 2 else 2
    epochs = setup.learning // rounds
    admm = {"admm_num_iterations": 1, "admm_training_epochs": epochs, "row": 4 / len(setup.data)}
    return {**_loop(setup.training(epochs)), "num_iterations": rounds, "stop_temperature": 50, **admm}


def by_an_agent(setup: Setup) -> dict[str, Any]:
    """Fewer episodes than the paper's 800, and multiples that suit layers of 16 channels."""
    return {"flops_ratio": SPARSITY, "train_episode": 60, "warmup": 15, "channel_round": 4}


def _loop(training: Training) -> dict[str, Any]:
    return {"trainer": training.trainer, "optimizer": training.optimizer, "criterion": training.criterion}


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Attributes:
        way: What is done.
        how: The same in words.
        learns: How many epochs are spent on what is to go, and not kept as training of what stays.
        kind: ``channels`` if half of each layer's channels go, ``ranked`` if layers are ranked together, ``elements``, or
            ``searched``.
    """

    way: Way
    how: str
    learns: Callable[[Setup], int] = lambda setup: 0
    kind: str = "channels"


LEARNING = operator.attrgetter("learning")
ALL_ROUNDS = operator.attrgetter("epochs")
CHANNELS = {"op_types": ["Conv2d"], "sparsity": SPARSITY}
RANKED: Values = {"op_types": ["Conv2d"], "total_sparsity": SPARSITY, "max_sparsity_per_layer": 0.8}
SCALES: Values = {"op_types": ["BatchNorm2d"], "total_sparsity": SPARSITY, "max_sparsity_per_layer": 0.8}

AT_ONCE: Mapping[str, Run] = {
    "random": Run(at_once(RandomPruner, CHANNELS), "channels by lot: the control"),
    "l1": Run(at_once(L1NormPruner, CHANNELS), "smallest L1 norm"),
    "l2": Run(at_once(L2NormPruner, CHANNELS), "smallest L2 norm"),
    "fpgm": Run(at_once(FPGMPruner, CHANNELS), "nearest to the geometric median"),
    "apoz": Run(at_once(ActivationAPoZRankPruner, CHANNELS, looking), "most often zero"),
    "mean": Run(at_once(ActivationMeanRankPruner, CHANNELS, looking), "smallest mean activation"),
    "taylor-local": Run(at_once(TaylorFOWeightPruner, CHANNELS, looking), "first-order Taylor, each layer by itself"),
    "taylor-global": Run(
        at_once(TaylorFOWeightPruner, RANKED, ranked_together),
        "first-order Taylor, layers ranked together",
        kind="ranked",
    ),
    "level": Run(elementwise(LevelPruner, CHANNELS), "smallest single weights", kind="elements"),
}

LEARNED: Mapping[str, Run] = {
    "slim": Run(
        at_once(SlimPruner, SCALES, shrinking_scales), "smallest batch norm scales", learns=LEARNING, kind="ranked"
    ),
    "admm": Run(at_once(ADMMPruner, CHANNELS, alternating), "ADMM towards sparse channels", learns=LEARNING),
    "movement": Run(
        elementwise(MovementPruner, CHANNELS, moving),
        "single weights that move to zero",
        learns=LEARNING,
        kind="elements",
    ),
}

SCHEDULED: Mapping[str, Run] = {
    "linear-l1": Run(in_rounds(LinearPruner, "l1", CHANNELS), "L1, sparsity grows evenly"),
    "agp-l1": Run(in_rounds(AGPPruner, "l1", CHANNELS), "L1, sparsity grows as a cubic"),
    "lottery-l1": Run(
        in_rounds(LotteryTicketPruner, "l1", CHANNELS), "L1, weights rewound after each round", learns=ALL_ROUNDS
    ),
}

SEARCHED: Mapping[str, Run] = {
    "sensitivity": Run(
        searched(SensitivityPruner, CHANNELS, in_two_rounds), "more of layers that bear it, two rounds", kind="searched"
    ),
    "annealing": Run(searched(SimulatedAnnealingPruner, CHANNELS), "widths by annealing", kind="searched"),
    "netadapt": Run(
        searched(NetAdaptPruner, CHANNELS, step_by_step), "the layer that bears it best, step by step", kind="searched"
    ),
    "autocompress": Run(
        searched(AutoCompressPruner, CHANNELS, cooled_early),
        "rounds of annealing and ADMM",
        learns=LEARNING,
        kind="searched",
    ),
    "amc": Run(searched(AMCPruner, {"op_types": ["Conv2d"]}, by_an_agent), "an agent, 60 episodes", kind="searched"),
}

RUNS: Mapping[str, Run] = {**AT_ONCE, **LEARNED, **SCHEDULED, **SEARCHED}


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        macs: Multiply-accumulates of one example, before and after.
        params: Parameters that are not masked, before and after.
        dense: Accuracy of the dense model in percent.
        pruned: Right after pruning.
        tuned: After training.
        epochs: To learn what goes, and to train what stays.
        seconds: All but the evaluations.
        model: The trained model.
    """

    macs: tuple[int, int]
    params: tuple[int, int]
    dense: float
    pruned: float
    tuned: float
    epochs: tuple[int, int]
    seconds: float
    model: nn.Module = field(repr=False)


def result(name: str, model: nn.Module, setup: Setup) -> Result:
    """Runs a row of the table; the model stays as it is."""
    run = RUNS[name]
    start = time.perf_counter()
    before, after = run.way(copy.deepcopy(model).to(memory_format=setup.layout), setup)
    seconds = time.perf_counter() - start
    dense, pruned, tuned = (evaluated(setup.evaluate, one) for one in (model, before, after))
    (dense_macs, dense_params), (macs, params) = (size(one, setup.example_inputs) for one in (model, after))
    return Result(
        macs=(dense_macs, macs),
        params=(dense_params, params),
        dense=dense,
        pruned=pruned,
        tuned=tuned,
        epochs=(run.learns(setup), setup.epochs),
        seconds=seconds,
        model=after,
    )


def size(model: nn.Module, example_inputs: Tensor) -> tuple[int, int]:
    """Multiply-accumulates of one example, and the parameters that are not masked."""
    captured = capture(without_masks(model), example_inputs)
    masked = sum(int((mask == 0).sum()) for mask in attached_masks(model).values())
    found = cost(captured.graph_module, captured)
    return found.macs, found.params - masked
