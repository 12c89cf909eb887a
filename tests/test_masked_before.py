"""What is masked when a pruner comes goes first, and stays masked."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.errors import ConfigError
from graphprune.pruners import (
    ActivationMeanRankPruner,
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    NetAdaptPruner,
    RandomPruner,
    SensitivityPruner,
)
from speedup import ModelSpeedup, attach_masks
from speedup.masking import attached_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(1))
HALF = [{"op_names": ["0"], "sparsity": 0.5}]
GONE = {0, 1, 2}


def net() -> nn.Sequential:
    """Its first layer has weights of a mean of one, so that zeros are far from their median."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight += 1
    return model


def masked(model: nn.Sequential) -> nn.Sequential:
    weight, bias = torch.ones(8, 8), torch.ones(8)
    weight[:3], bias[:3] = 0, 0
    attach_masks(model, {"0.weight": weight, "0.bias": bias})
    return model


def gone(model: nn.Module) -> set[int]:
    return {place for place, row in enumerate(attached_masks(model)["0.weight"]) if not row.any()}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int = 0) -> None:
    for _ in range(10):
        optimizer.zero_grad()
        criterion(model(X), Y).backward()
        optimizer.step()


LOOP = (train, sgd, F.cross_entropy)


@pytest.mark.parametrize(
    ("pruner", "loop", "options"),
    [
        (FPGMPruner, (), {}),
        (FPGMPruner, (), {"dummy_input": X}),
        (L1NormPruner, (), {"mode": "global", "dummy_input": X}),
        (RandomPruner, (), {"dummy_input": X}),
        (ActivationMeanRankPruner, LOOP, {"dummy_input": X}),
        (
            MovementPruner,
            LOOP,
            {"dummy_input": X, "granularity": "coarse-grained", "training_epochs": 4, "cool_down_beginning_step": 9},
        ),
    ],
)
def test_channels_that_are_masked_are_among_those_that_go(pruner: Any, loop: Any, options: dict[str, Any]) -> None:
    model = masked(net())
    pruner(model, HALF, *loop, **options).compress()
    assert gone(model) > GONE and len(gone(model)) == 4


@pytest.mark.parametrize("options", [{}, {"dummy_input": X}])
def test_what_goes_in_a_round_is_gone_in_all_that_follow(options: dict[str, Any]) -> None:
    pruner = LinearPruner(net(), HALF, "fpgm", 4, **options)
    pruner.compress()
    rounds = [{row for row in range(8) if not task.masks["0"]["weight"][row].any()} for task in pruner.tasks]
    assert [len(one) for one in rounds] == [1, 2, 3, 4]
    assert all(one < other for one, other in itertools.pairwise(rounds))


def test_what_goes_in_an_epoch_of_a_users_loop_stays_gone() -> None:
    model = net()
    entry = {"start_epoch": 0, "end_epoch": 3, "frequency": 1, "initial_sparsity": 0.0, "final_sparsity": 0.5}
    pruner = AGPPruner(model, [{"op_names": ["0"], **entry}], sgd(model.parameters()), pruning_algorithm="fpgm")
    pruner.compress()
    seen = []
    for epoch in range(4):
        pruner.update_epoch(epoch)
        seen.append(gone(model))
    assert all(one <= other for one, other in itertools.pairwise(seen)) and len(seen[-1]) == 4


def test_a_block_is_gone_where_all_of_it_is() -> None:
    """Rows of 8, 7, ... 1, each with one masked element and the last with none left."""
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data.copy_(torch.arange(8.0, 0, -1)[:, None].expand(8, 8))
    mask = torch.ones(8, 8)
    mask[:, 0], mask[1] = 0, 0
    attach_masks(model, {"0.weight": mask})
    LevelPruner(model, HALF, block=(1, 8)).compress()
    assert gone(model) == {1, 5, 6, 7}


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return -float(F.cross_entropy(model(X), Y))


def noise() -> Tensor:
    return (torch.rand(8, 8, generator=torch.Generator().manual_seed(5)) > 0.5).float()


@pytest.mark.parametrize(
    "pruner", [SensitivityPruner, lambda *args, **options: NetAdaptPruner(*args[:2], None, args[2], **options)]
)
def test_a_search_scores_what_it_hands_back(pruner: Any) -> None:
    model = net()
    attach_masks(model, {"0.weight": noise()})
    search = pruner(model, HALF, score, dummy_input=X)
    _, masks = search.compress()
    now = attached_masks(model)["0.weight"]
    assert search.found.score == pytest.approx(score(model), rel=1e-5)
    assert not now[noise() == 0].any() and torch.equal(masks["0"]["weight"], now) and 0 < now.sum() < noise().sum()
    assert ModelSpeedup(model, X, masks).speedup_model()[0].weight.shape == (4, 8)


def test_a_search_that_trains_refuses_masks() -> None:
    model = net()
    attach_masks(model, {"0.weight": noise()})
    with pytest.raises(
        ConfigError, match="^model: has masks, and the models that the search trains have none. Take them"
    ):
        SensitivityPruner(model, HALF, score, lambda model: None, dummy_input=X)
