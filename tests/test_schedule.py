"""Schedules: their formulas, and the loops of the manuals that they are driven by."""

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rules import conv, image
from torch import Tensor, nn

from graphprune.config_list import Entry, read_config_list
from graphprune.errors import ConfigError
from graphprune.pruners import AGP_Pruner, AGPPruner, LevelPruner, LotteryTicketPruner
from graphprune.schedule import SCHEDULES, at_epoch, at_round
from speedup.masking import attached_masks, detach_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


@pytest.mark.parametrize(
    ("name", "initial", "final", "expected"),
    [
        ("one_shot", 0.0, 0.8, [0.8, 0.8, 0.8, 0.8]),
        ("linear", 0.0, 0.8, [0.2, 0.4, 0.6, 0.8]),
        ("linear", 0.4, 0.8, [0.5, 0.6, 0.7, 0.8]),
        ("agp", 0.0, 0.8, [0.8 * (1 - 27 / 64), 0.8 * (1 - 1 / 8), 0.8 * (1 - 1 / 64), 0.8]),
        ("agp", 0.4, 0.8, [0.8 - 0.4 * 27 / 64, 0.8 - 0.4 / 8, 0.8 - 0.4 / 64, 0.8]),
        ("lottery_ticket", 0.0, 0.9375, [0.5, 0.75, 0.875, 0.9375]),  # half of what survives each time
    ],
)
def test_formulas(name: str, initial: float, final: float, expected: list[float]) -> None:
    assert [SCHEDULES[name](initial, final, i, 4) for i in range(1, 5)] == pytest.approx(expected)
    if name != "one_shot":
        assert SCHEDULES[name](initial, final, 0, 4) == pytest.approx(initial)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", [0.0, 0.3, 0.8, 0.99])
def test_the_last_round_reaches_the_target(name: str, final: float) -> None:
    for n in (1, 3, 7):
        assert SCHEDULES[name](0.0, final, n, n) == pytest.approx(final, abs=1e-12)


def entry(**values: Any) -> Entry:
    return Entry.model_validate({"op_types": ["Linear"], "final_sparsity": 0.8, **values})


def test_agp_by_epoch() -> None:
    """Epochs 2 to 10 in steps of three: they end in 2, 5, 8 and, because that is the end, in 10."""
    one = entry(initial_sparsity=0.2, start_epoch=2, end_epoch=10, frequency=3)
    at = {step: 0.8 - 0.6 * (1 - step / 8) ** 3 for step in (0, 3, 6, 8)}
    expected = [0, 0, at[0], at[0], at[0], at[3], at[3], at[3], at[6], at[6], at[8], at[8], at[8]]
    assert [at_epoch(SCHEDULES["agp"], one, epoch) for epoch in range(13)] == pytest.approx(expected)


def test_what_is_done_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    settings = read_config_list(model, [{"op_types": ["Linear"], "sparsity": 0.6}])
    (asked,) = at_round(settings, SCHEDULES["linear"], 2, 3, lambda layer: 0.2).values()
    assert asked.entry.sparsity == pytest.approx((0.4 - 0.2) / (1 - 0.2))
    (asked,) = at_round(settings, SCHEDULES["linear"], 1, 3, lambda layer: 0.5).values()
    assert asked.entry.sparsity == 0


# Loops ----------------------------------------------------------------------------------------------------------------

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = X.mean((2, 3)).argmax(1)


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for batch in torch.arange(32).split(8):
        optimizer.zero_grad()
        F.cross_entropy(model(X[batch]), Y[batch]).backward()
        optimizer.step()


def sparsity(model: nn.Module, name: str = "3.weight") -> float:
    masks = attached_masks(model)
    return float((masks[name] == 0).float().mean()) if name in masks else 0.0


def hooks(model: nn.Module) -> int:
    """How many hooks there are, in a model and on its parameters."""
    own = sum(len(one._forward_pre_hooks) + len(one._forward_hooks) for one in model.modules())
    return own + sum(len(one._backward_hooks or {}) for one in model.parameters())


@pytest.mark.parametrize(("make", "types"), [(AGPPruner, ["Conv2d"]), (AGP_Pruner, "Conv2d")])
def test_the_manuals_loop_of_agp(make: Any, types: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    values = {"initial_sparsity": 0.25, "final_sparsity": 0.75, "start_epoch": 1, "end_epoch": 4, "op_types": types}
    pruner = make(model, [values, {"op_names": ["0"], "exclude": True}], optimizer)
    assert pruner.compress()[0] is model and sparsity(model) == 0
    seen, masks = [], []
    for epoch in range(6):
        pruner.update_epoch(epoch)
        train(model, optimizer)
        seen.append(sparsity(model))
        masks.append(attached_masks(model)["3.weight"])
        assert bool((model[3].weight == 0)[masks[-1] == 0].all())
    expected = [0, *(0.75 - 0.5 * (1 - i / 3) ** 3 for i in range(4)), 0.75]
    assert seen == pytest.approx(expected, abs=1 / 576)
    assert all(bool((later <= sooner).all()) for sooner, later in itertools.pairwise(masks))
    assert "0.weight" not in attached_masks(model)
    torch.testing.assert_close(masks[-1], masks[-2])


@pytest.mark.parametrize("algorithm", ["l1", "fpgm", "slim", "apoz", "mean_activation", "taylorfo"])
def test_agp_of_channels(algorithm: str) -> None:
    """A pruner that looks at activations or gradients takes those of the user's loop, and lets go of the model in the end."""
    model = net()
    before = hooks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kind = {"slim": "BatchNorm2d"}.get(algorithm, "Conv2d")
    values = {"final_sparsity": 0.5, "end_epoch": 2, "op_types": [kind]}
    given = {} if algorithm in ("apoz", "mean_activation", "taylorfo") else {"dummy_input": X[:2]}
    pruner = AGPPruner(model, [values], optimizer, pruning_algorithm=algorithm, **given)
    pruner.compress()
    seen = []
    for epoch in range(4):
        pruner.update_epoch(epoch)
        train(model, optimizer)
        seen.append(int((attached_masks(model)["0.bias"] == 0).sum()) if "0.bias" in attached_masks(model) else 0)
    assert seen == [0, 4, 4, 4]  # ceil(8 * 0.5 * 7 / 8)
    assert hooks(model) == before


def manual(model: nn.Module, n: int, target: float, **options: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    entries = [{"prune_iterations": n, "sparsity": target, "op_types": ["default"]}]
    return LotteryTicketPruner(model, entries, optimizer, schedule, **options), optimizer, schedule


def test_the_manuals_loop_of_the_lottery_ticket() -> None:
    model = net()
    first = copy.deepcopy(model.state_dict())
    pruner, optimizer, schedule = manual(model, 3, 0.875)
    assert pruner.compress()[0] is model
    seen, trained = [], {}
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        masks = attached_masks(model)
        seen.append(sparsity(model))
        for name, value in plain(model).items():  # survivors, statistics, and what is hidden
            torch.testing.assert_close(value, first[name], rtol=0, atol=0)
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1 and schedule.last_epoch == 0
        if trained:  # the smallest of what the last round has trained went
            before, weight = trained["mask"], trained["weight"].abs()
            gone, stays = (before != 0) & (masks["3.weight"] == 0), masks["3.weight"] != 0
            assert weight[gone].max() <= weight[stays].min() and bool((masks["3.weight"] <= before).all())
        for _ in range(2):
            train(model, optimizer)
            schedule.step()
        assert optimizer.state and schedule.last_epoch == 2
        trained = {"mask": masks.get("3.weight", torch.ones(8, 8, 3, 3)), "weight": plain(model)["3.weight"].clone()}
    assert seen == pytest.approx([0, 0.5, 0.75, 0.875], abs=1 / 576)
    with pytest.raises(ConfigError, match="all 3 rounds are over"):
        pruner.prune_iteration_start()


def plain(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without its masks."""
    return {name: value for name, value in model.state_dict().items() if "mask_of_" not in name}


def test_weights_may_stay_while_the_optimizer_returns() -> None:
    model = net()
    pruner, optimizer, _ = manual(model, 1, 0.5, reset_weights=False)
    pruner.compress()
    pruner.prune_iteration_start()
    train(model, optimizer)
    trained = copy.deepcopy(model.state_dict())
    pruner.prune_iteration_start()
    assert not optimizer.state and sparsity(model) == 0.5
    torch.testing.assert_close(plain(model), trained)


def test_a_winning_ticket_by_activations() -> None:
    """The first round, which trains the dense model, is looked at already."""
    model = net()
    before = hooks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    entries = [{"prune_iterations": 2, "sparsity": 0.75, "op_types": ["Conv2d"]}]
    pruner = LotteryTicketPruner(model, entries, optimizer, pruning_algorithm="apoz", dummy_input=image())
    pruner.compress()
    seen = []
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        masks = attached_masks(model)
        seen.append(int((masks["0.bias"] == 0).sum()) if masks else 0)
        train(model, optimizer)
    assert seen == [0, 4, 6] and hooks(model) == before


def test_masks_leave_cleanly() -> None:
    model = net()
    modules = [(type(one), list(one._buffers)) for one in model.modules()]
    pruner = AGPPruner(model, [{"sparsity": 0.5, "end_epoch": 1, "op_types": ["default"]}])
    pruner.compress()
    pruner.update_epoch(1)
    detach_masks(model)
    assert [(type(one), list(one._buffers)) for one in model.modules()] == modules
    assert float((model[3].weight == 0).float().mean()) == 0.5


# What makes no sense --------------------------------------------------------------------------------------------------

HALF = {"op_types": ["Conv2d"], "sparsity": 0.5}


@pytest.mark.parametrize(
    ("make", "entries", "options", "fact"),
    [
        (AGPPruner, [HALF], {}, "does not know when to end"),
        (AGPPruner, [{**HALF, "end_epoch": 0}], {}, "ends in epoch 0, but starts in 0"),
        (AGPPruner, [{**HALF, "end_epoch": 2, "frequency": 0}], {}, "frequency 0 is below 1"),
        (AGPPruner, [{**HALF, "end_epoch": 2}], {"pruning_algorithm": "l3"}, "'l3': is no basic pruner"),
        (AGPPruner, [{**HALF, "end_epoch": 2}], {"pruning_algorithm": "movement"}, "trainer: is missing"),
        (
            AGPPruner,
            [{**HALF, "end_epoch": 2}],
            {"pruning_algorithm": "movement", "trainer": train, "optimizer": None},
            "movement trains the model by itself",
        ),
        (
            AGPPruner,
            [{**HALF, "end_epoch": 2}],
            {"pruning_algorithm": "admm", "trainer": lambda model, optimizer, criterion, epoch: None},
            "admm trains the model by itself",
        ),
        (LotteryTicketPruner, [HALF], {}, "entries have prune_iterations None"),
        (
            LotteryTicketPruner,
            [{**HALF, "prune_iterations": 2}, {"op_types": ["Linear"], "sparsity": 0.5, "prune_iterations": 3}],
            {},
            "Give all of them the same number",
        ),
        (LotteryTicketPruner, [{**HALF, "prune_iterations": 0}], {}, "prune_iterations 0 is below 1"),
        (LotteryTicketPruner, [{**HALF, "prune_iterations": 2}], {"optimizer": 3}, "optimizer 3: is no optimizer"),
    ],
)
def test_wrong_configurations(make: Any, entries: list[dict[str, Any]], options: dict[str, Any], fact: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=fact) as raised:
        make(model, entries, **options)
    assert "\n" not in str(raised.value) and not attached_masks(model) and not hooks(model)


def test_a_round_needs_a_beginning() -> None:
    with pytest.raises(ConfigError, match=r"compress\(\) was not called"):
        manual(net(), 2, 0.5)[0].prune_iteration_start()


def test_lottery_tickets_of_a_model_with_masks() -> None:
    """First values are those of weights: the masks of the beginning do not come back with them."""
    for rounds in (None, 2):
        model = net()
        LevelPruner(model, [{"op_names": ["3"], "sparsity": 0.2}]).compress()
        entry = {"op_types": ["Conv2d"], "sparsity": 0.8, "prune_iterations": 2}
        pruner = LotteryTicketPruner(model, [entry], pruning_algorithm="level", total_iteration=rounds)
        done, masks = pruner.compress()
        if rounds is None:
            for _ in pruner.get_prune_iterations():
                pruner.prune_iteration_start()
        for layer in ("0", "3"):
            weight = done.get_submodule(layer).weight
            assert float((weight == 0).float().mean()) == pytest.approx(0.8, abs=1 / 100)
            assert bool((weight[masks[layer]["weight"] == 0] == 0).all())


@pytest.mark.parametrize("words", [("slim", 1), ()])
def test_agp_takes_an_optimizer_in_either_form(words: tuple[Any, ...]) -> None:
    seen = []

    def trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        seen.append((type(optimizer), optimizer.param_groups[0]["lr"]))
        criterion(model(X[:4]).flatten(1), torch.zeros(4).long()).backward()
        optimizer.step()

    given = {"optimizer": partial(torch.optim.SGD, lr=0.123), "trainer": trainer, "criterion": F.cross_entropy}
    given |= {} if words else {"pruning_algorithm": "slim", "total_iteration": 1}
    AGPPruner(net(), [{"op_types": ["BatchNorm2d"], "sparsity": 0.5}], *words, dummy_input=X[:2], **given).compress()
    assert seen and set(seen) == {(torch.optim.SGD, 0.123)}


@pytest.mark.parametrize("make", [AGPPruner, LotteryTicketPruner])
def test_what_is_no_optimizer_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="^optimizer 5: is no optimizer. Give one, or a function"):
        make(net(), [{**HALF, "prune_iterations": 2, "end_epoch": 2}], 5)
    with pytest.raises(ConfigError, match="pruning_algorithm is given twice"):
        make(net(), [HALF], "l1", 2, pruning_algorithm="l2")
