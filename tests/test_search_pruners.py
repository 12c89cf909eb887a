"""The searches under their users' names: evaluators of all kinds, options, and what makes no sense."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_pruners import CONVS, X, Y, sgd, small, trainer
from torch import Tensor, nn

from graphprune import pruners
from graphprune.errors import ConfigError, TrainingError

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

SOME = {"op_types": CONVS, "sparsity": 0.3}


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return -float(F.cross_entropy(model(X), Y))


def score_on(model: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        return -float(F.cross_entropy(model(data), Y))


def test_a_search_that_takes_its_inputs_from_the_evaluator_changes_nothing() -> None:
    modes: list[bool] = []

    def notes(model: nn.Module) -> float:
        modes.append(model.training)
        torch.rand(1)
        for parameter in model.parameters():
            parameter.data *= 1.5
        return score(model.train())

    model, other = small().train(), small().train()
    model.conv2.eval()
    state, ways = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(3)
    masks = pruners.SimulatedAnnealingPruner(model, [SOME], notes, stop_temperature=95).compress()[1]
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert not any(modes) and [module.training for module in model.modules()] == ways
    now = {key: value for key, value in model.state_dict().items() if "mask_of_" not in key}
    torch.testing.assert_close(now, dict(state), rtol=0, atol=0)
    again = pruners.SimulatedAnnealingPruner(other, [SOME], notes, stop_temperature=95, dummy_input=X[:2]).compress()[1]
    assert all(torch.equal(masks[layer]["weight"], again[layer]["weight"]) for layer in masks)


def test_inputs_of_an_evaluator_that_calls_something_else() -> None:
    model = small()
    with pytest.raises(ConfigError, match="evaluator: does not call the model that it is given"):
        pruners.SimulatedAnnealingPruner(model, [SOME], lambda candidate: score(model)).compress()


def searched(evaluator: Any, **options: Any) -> pruners.SensitivityPruner:
    return pruners.SensitivityPruner(small(), [SOME], evaluator, sparsity_per_iter=0.3, dummy_input=X[:2], **options)


@pytest.mark.parametrize(
    ("evaluator", "args", "kwargs"),
    [
        (score, lambda model: [], {}),
        (score, lambda model: [model], {}),
        (score_on, lambda model: [model, X], {}),
        (score_on, lambda model: [], {"data": X}),
        (score_on, lambda model: [X], {}),  # its argument model is the only place for one
        (lambda data, model: score_on(model, data), lambda model: [X], {}),
        (lambda data, net: score_on(net, data), lambda model: [X, model], {}),
    ],
)
def test_candidates_stand_where_the_model_does(evaluator: Any, args: Any, kwargs: dict[str, Any]) -> None:
    plain, given = searched(score), searched(evaluator)
    plain.compress()
    given.compress(args(given._model), kwargs)
    assert plain.found is not None and given.found is not None and plain.found.history == given.found.history
    assert len({evaluation.score for evaluation in plain.found.history}) > 1


def test_the_model_under_a_name() -> None:
    plain, given = searched(score), searched(lambda *, net, data: score_on(net, data))
    plain.compress()
    given.compress(eval_kwargs={"net": given._model, "data": X})
    assert plain.found is not None and given.found is not None and plain.found.history == given.found.history


@pytest.mark.parametrize(
    ("evaluator", "args", "kwargs", "says"),
    [
        (score, [small()], None, "eval_args: holds a Small that is not the model, so that all candidates would be the"),
        (score, [nn.Sequential(small())], None, "eval_args: holds a Sequential that is not the model"),
        (
            lambda net, data: score_on(net, data),
            [X],
            None,
            "eval_args: does not hold the model, so that all candidates",
        ),
        (lambda *args: 0.5, [X], None, "eval_args: does not hold the model"),
        (
            score_on,
            [],
            {"model": small(), "data": X},
            "eval_args: the function cannot be called with them (multiple va",
        ),
        (
            score_on,
            [],
            None,
            "eval_args: the function cannot be called with them (missing a required argument: 'data')",
        ),
        (score, 5, None, "eval_args: is 5. Give a list, such as [model]."),
        (score, "model", None, "eval_args: is 'model'. Give a list"),
        (score, [], 5, "eval_kwargs: is 5. Give a mapping."),
    ],
)
def test_candidates_without_a_place(evaluator: Any, args: Any, kwargs: Any, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        searched(evaluator).compress(args, kwargs)
    assert str(raised.value).startswith(says) and "\n" not in str(raised.value)


def test_a_finetuner_has_to_train_in_place() -> None:
    entry = {"op_types": CONVS, "sparsity": 0.3}
    for make in (
        lambda: pruners.NetAdaptPruner(small(), [entry], copy.deepcopy, score, dummy_input=X[:2]),
        lambda: searched(score, finetuner=copy.deepcopy),
        lambda: pruners.LinearPruner(small(), [entry], "l1", 2, finetuner=copy.deepcopy),
    ):
        with pytest.raises(TrainingError, match=r"finetuner: returns another model than it was given\. Train that one"):
            make().compress()


ANY = {"op_types": CONVS}
WRONG_SEARCHES: tuple[tuple[str, tuple[Any, ...], dict[str, Any], str], ...] = (
    ("SimulatedAnnealingPruner", (score,), {"foo": 1}, "foo: is no option of a search. Use some of evaluator, "),
    ("SimulatedAnnealingPruner", (score,), {"start_temperatur": 1}, "start_temperatur: is no option of a search (did you m"),
    ("SimulatedAnnealingPruner", (score,), {"start_temperature": "hot"}, "start_temperature 'hot': input should be a valid n"),
    ("SimulatedAnnealingPruner", (score,), {"start_temperature": 5}, "annealing: from 5.0 to 20.0 by 0.9 never ends."),
    ("SimulatedAnnealingPruner", (score,), {"perturbation_magnitude": math.nan}, "perturbation_magnitude nan: is no positi"),
    ("SimulatedAnnealingPruner", (score,), {"cool_down_rate": 1}, "cool_down_rate 1: is not in (0, 1)."),
    ("SimulatedAnnealingPruner", (score,), {"keep_at_least": "some"}, "keep_at_least 'some': input should be a valid number"),
    ("SimulatedAnnealingPruner", (score,), {"keep_at_least": 2}, "keep_at_least 2: is not in [0, 1]."),
    ("SimulatedAnnealingPruner", (score,), {"base_algo": "l11"}, "base_algo 'l11': scores no channels by their weights (di"),
    ("SimulatedAnnealingPruner", (score,), {"optimize_mode": "max"}, "optimize_mode 'max': input should be 'maximize' or"),
    ("SimulatedAnnealingPruner", (score,), {"experiment_data_dir": 5}, "experiment_data_dir 5: is no folder. Make it first."),
    ("SimulatedAnnealingPruner", (score,), {"experiment_data_dir": "no/where"}, "experiment_data_dir 'no/where': is no folde"),
    ("SimulatedAnnealingPruner", (score,), {"seed": True}, "seed True: input should be a valid number."),
    ("SimulatedAnnealingPruner", (score,), {"seed": -1}, "seed -1: is not in [0, 2**63)."),
    ("SimulatedAnnealingPruner", (5,), {}, "evaluator 5: is no function. Give a function of a model."),
    ("NetAdaptPruner", (5, score), {}, "short_term_fine_tuner 5: is no function."),
    ("NetAdaptPruner", (None, score), {"sparsity_per_iteration": "much"}, "sparsity_per_iteration 'much': input should be"),
    ("NetAdaptPruner", (None, score), {"resource": "flops"}, "resource 'flops': input should be 'weights', 'params', 'macs'"),
    ("SensitivityPruner", (score, 5), {}, "finetuner 5: is no function."),
    ("SensitivityPruner", (score,), {"acc_drop_threshold": math.nan}, "acc_drop_threshold nan: is negative or no number."),
    ("SensitivityPruner", (score,), {"acc_drop_threshold": -1}, "acc_drop_threshold -1: is negative or no number."),
    ("AMCPruner", (score,), {"flops_ratio": "half"}, "flops_ratio 'half': input should be a valid number"),
    ("AMCPruner", (score,), {"channel_round": 0}, "channel_round 0: is below 1. Use 1 or more."),
    ("AMCPruner", (score,), {"channel_round": 1.5}, "channel_round 1.5: input should be a valid integer"),
    ("AMCPruner", (score,), {"lbound": -1}, "lbound -1: is not in [0, 1]."),
    ("AMCPruner", (score,), {"train_episode": "many"}, "train_episode 'many': input should be a valid integer"),
    ("AMCPruner", (score,), {"train_episode": 5}, "of 5 episodes 100 are to warm up, so that nothing is learnt. Give a"),
    ("AutoCompressPruner", (5, score), {}, "trainer 5: is no function. Give one that trains a model for an epoch."),
    ("AutoCompressPruner", (trainer, score), {"num_iterations": "many"}, "num_iterations 'many': input should be a valid int"),
    ("AutoCompressPruner", (trainer, score), {"optimizer": sgd}, "criterion: is None, so that no penalty can be added"),
    ("AutoCompressPruner", (lambda data: None, score), {}, "trainer: takes (data)."),
)  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SEARCHES, ids=[f"{one[0]}-{n}" for n, one in enumerate(WRONG_SEARCHES)])
def test_options_of_searches_that_make_no_sense(case: tuple[str, tuple[Any, ...], dict[str, Any], str]) -> None:
    name, args, options, says = case
    with pytest.raises(ConfigError) as raised:
        getattr(pruners, name)(small(), [SOME], *args, **options)
    assert str(raised.value).startswith(says) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["NetAdaptPruner", "AutoCompressPruner", "AMCPruner"])
def test_each_search_takes_its_options(name: str) -> None:
    args: tuple[Any, ...] = {"NetAdaptPruner": (None, score), "AutoCompressPruner": (trainer, score)}.get(
        name, (score,)
    )
    options = {
        "NetAdaptPruner": {"sparsity_per_iteration": 0.15, "resource": "params"},
        "AutoCompressPruner": {
            "num_iterations": 1, "stop_temperature": 95, "admm_num_iterations": 1, "admm_training_epochs": 1,
        },
        "AMCPruner": {"flops_ratio": 0.7, "train_episode": 4, "warmup": 2, "channel_round": 2},
    }[name]  # fmt: skip
    pruner = getattr(pruners, name)(
        small(), [ANY if name == "AMCPruner" else SOME], *args, dummy_input=X[:2], **options
    )
    _, masks = pruner.compress()
    assert pruner.found.score in {evaluation.score for evaluation in pruner.found.history}
    assert any((mask["weight"] == 0).any() for mask in masks.values())


def untuned(model: nn.Module, epochs: int = 1) -> None:
    """Trains nothing."""


@pytest.mark.parametrize(
    ("name", "args", "options", "others"),
    [
        ("SimulatedAnnealingPruner", (score,), {}, ((lambda model: -score(model),), {})),
        ("SimulatedAnnealingPruner", (score,), {"cool_down_rate": 0.9}, ((score,), {"cool_down_rate": 0.8})),
        ("NetAdaptPruner", (untuned, score), {}, ((partial(untuned, epochs=3), score), {})),
    ],
)
def test_a_journal_is_that_of_its_options_and_functions(
    name: str, args: Any, options: dict[str, Any], others: Any, tmp_path: Path
) -> None:
    def make(args: Any, options: dict[str, Any]) -> Any:
        given = {"dummy_input": X[:2], "experiment_data_dir": str(tmp_path), **options}
        given |= {"stop_temperature": 95} if name == "SimulatedAnnealingPruner" else {"sparsity_per_iteration": 0.3}
        return getattr(pruners, name)(small(), [SOME], *args, **given)

    first = make(args, options)
    first.compress()
    again = make(args, options)
    again.compress()
    assert again.found.history == first.found.history
    with pytest.raises(ConfigError, match="is the journal of another search"):
        make(*others).compress()


def test_a_journal_is_that_of_the_arguments_of_its_evaluator(tmp_path: Path) -> None:
    def some(model: nn.Module, limit: int) -> float:
        with torch.no_grad():
            return -float(F.cross_entropy(model(X[:limit]), Y[:limit]))

    def run(limit: int) -> Any:
        pruner = searched(some, experiment_data_dir=tmp_path)
        pruner.compress(eval_kwargs={"limit": limit})
        return pruner.found.history

    assert run(8) == run(8)
    with pytest.raises(ConfigError, match="is the journal of another search"):
        run(32)


def test_a_journal_is_that_of_the_size_of_its_inputs(tmp_path: Path) -> None:
    options = {"sparsity_per_iteration": 0.3, "experiment_data_dir": tmp_path}
    for inputs in (X[:2], torch.randn(2, 3, 6, 6)):
        pruners.NetAdaptPruner(small(), [SOME], None, score, dummy_input=inputs, **options).compress()
    with pytest.raises(ConfigError, match="is the journal of another search .its model, weights or limits are others"):
        pruners.NetAdaptPruner(small(), [SOME], None, score, dummy_input=torch.randn(2, 3, 8, 8), **options).compress()


def test_the_seed_is_that_of_training_in_autocompress() -> None:
    drawn: list[list[int]] = []

    def trains(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        drawn[-1].extend(torch.randperm(1000)[:2].tolist())
        trainer(model, optimizer, criterion, epoch)

    for seed in (0, 1, 0):
        drawn.append([])
        options = {"optimizer": sgd, "criterion": F.cross_entropy, "num_iterations": 1, "admm_num_iterations": 1}
        options |= {"admm_training_epochs": 1, "stop_temperature": 95, "seed": seed}
        pruners.AutoCompressPruner(small(), [SOME], trains, score, X[:2], **options).compress()
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0]


def test_an_evaluator_that_turns_gradients_off() -> None:
    def off(model: nn.Module) -> float:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return float(F.cross_entropy(model(X), Y))

    def tune(model: nn.Module) -> None:
        F.cross_entropy(model(X), Y).backward()

    entry = {"op_types": CONVS, "sparsity": 0.3}
    pruners.NetAdaptPruner(small(), [entry], tune, off, dummy_input=X[:2], sparsity_per_iteration=0.15).compress()
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
