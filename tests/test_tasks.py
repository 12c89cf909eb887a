"""The pruning scheduler that is put together by hand does what the scheduled pruners do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rules import conv, image
from torch import nn

from graphprune.errors import ConfigError
from graphprune.pruners import (
    AGPPruner,
    AGPTaskGenerator,
    L1NormPruner,
    LinearPruner,
    LinearTaskGenerator,
    LotteryTicketPruner,
    LotteryTicketTaskGenerator,
    PruningScheduler,
    TaylorFOWeightPruner,
)
from graphprune.training import Training
from speedup.masking import attached_masks

HALF = [{"op_types": ["Conv2d"], "sparsity": 0.5}]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.ReLU(), conv(12, 2)).eval()


def nudge(model: nn.Module) -> None:
    """A training that is the same each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def size(model: nn.Module) -> float:
    return float(sum(parameter.abs().sum() for parameter in model.parameters()))


@pytest.mark.parametrize("speedup", [False, True])
@pytest.mark.parametrize(
    ("generator", "pruner", "reset"),
    [
        (LinearTaskGenerator, LinearPruner, False),
        (AGPTaskGenerator, AGPPruner, False),
        (LotteryTicketTaskGenerator, LotteryTicketPruner, True),
    ],
)
def test_it_comes_to_the_same(generator: Any, pruner: Any, reset: bool, speedup: bool) -> None:
    x, how = image(), {"finetuner": nudge, "speedup": speedup, "evaluator": size}
    model = net()
    tasks = generator(2, model, HALF)
    scheduler = PruningScheduler(
        L1NormPruner(model, HALF, dummy_input=x), tasks, dummy_input=x, reset_weight=reset, **how
    )
    scheduler.compress()
    named = pruner(net(), HALF, "l1", 2, dummy_input=x, **how)
    named.compress()
    ours, theirs = scheduler.get_best_result(), named.get_best_result()
    assert ours is not None and theirs is not None
    assert ours[0] == theirs[0] and ours[3] == theirs[3] and ours[4] == theirs[4]
    assert all(torch.equal(one, other) for one, other in zip(ours[1].parameters(), theirs[1].parameters(), strict=True))
    assert len(scheduler.tasks) == 2 and not attached_masks(model)


def test_masks_from_the_beginning_stay() -> None:
    model, x = net(), image()
    mask = torch.ones_like(model[3].weight)
    mask[5] = 0
    tasks = LinearTaskGenerator(1, model, [{"op_names": ["0"], "sparsity": 0.5}], {"3.weight": mask})
    scheduler = PruningScheduler(L1NormPruner(model, HALF, dummy_input=x), tasks, dummy_input=x)
    small, _ = scheduler.compress()
    assert not small[3].weight[5].any() and not small[0].weight[:, 0].any(dim=(1, 2)).all()


@pytest.mark.parametrize(
    ("pruner", "tasks", "message"),
    [
        ("l1", LinearTaskGenerator(1, net(), HALF), "^pruner: is a str. Give one of graphprune.pruners.$"),
        (None, "agp", "^pruner: is a NoneType. Give one"),
        (L1NormPruner(net(), HALF), "agp", "^task_generator: is a str. Give one of graphprune.pruners.$"),
        (L1NormPruner(net(), HALF), LinearTaskGenerator(0, net(), HALF), "^total_iteration 0: is no number of rounds"),
    ],
)
def test_mistakes(pruner: Any, tasks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningScheduler(pruner, tasks)


def test_masks_of_the_beginning_act_in_the_end() -> None:
    model = net()
    kept = (torch.rand(model[0].weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    generator = AGPTaskGenerator(2, model, HALF, {"0.weight": kept})
    scheduler = PruningScheduler(L1NormPruner(model, HALF, dummy_input=image()), generator, dummy_input=image())
    assert not attached_masks(model)  # nothing is done yet
    best, _ = scheduler.compress()
    assert bool((best[0].weight[kept == 0] == 0).all()) and int((best[0].weight == 0).sum()) > int((kept == 0).sum())


def test_options_of_the_pruner_stay_what_they_are() -> None:
    model, loop = net(), Training.on([(image(), torch.zeros(2, 6, 6).long())], F.cross_entropy)
    pruner = TaylorFOWeightPruner(model, HALF, loop.trainer, torch.optim.Adam, F.cross_entropy)
    best, _ = PruningScheduler(pruner, LinearTaskGenerator(2, model, HALF)).compress()
    assert any(bool((parameter == 0).any()) for parameter in best.parameters())


def test_a_rewritten_graph_keeps_all_names_of_tied_weights() -> None:
    class Tied(nn.Module):
        """Its own code does not fit smaller tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.c, self.d, self.e = conv(3, 8, 1), conv(8, 8, 1), conv(8, 8, 1)
            self.e.weight = self.d.weight
            self.f = nn.Linear(128, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.e(self.d(self.c(x).relu()).relu()).relu()
            return self.f(x.view(-1, 8 * 16))

    torch.manual_seed(0)
    pruner = LinearPruner(Tied(), HALF, "l1", 2, speedup=True, dummy_input=torch.randn(2, 3, 4, 4))
    small, _ = pruner.compress()
    named = dict(small.named_parameters(remove_duplicate=False))
    assert named["e.weight"] is named["d.weight"] and named["c.weight"].shape == (4, 3, 1, 1)


def test_state_that_is_no_tensor_is_no_first_value() -> None:
    class Named(nn.Conv2d):
        def get_extra_state(self) -> dict[str, str]:
            return {"name": "first"}

        def set_extra_state(self, state: dict[str, str]) -> None:
            assert state == self.get_extra_state()

    model = net()
    model[0] = Named(3, 8, 3, padding=1)
    pruner = LinearPruner(model, HALF, "l1", 2)
    pruner.compress()
    assert len(pruner.tasks) == 2
