"""Pruning in rounds: what is asked of each, what goes on into the next, and which one is the best."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image
from torch import Tensor, nn

from graphprune.errors import ConfigError, TrainingError
from graphprune.pruners import AGPPruner, L1NormPruner, LinearPruner, LotteryTicketPruner
from graphprune.schedule import SCHEDULES
from speedup import ModelSpeedup
from speedup.cut import ShrunkGraph
from speedup.masking import attached_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

X = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = X.mean((2, 3)).argmax(1)
CONVS = {"op_types": ["Conv2d"], "sparsity": 0.6}


def chain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 20), nn.BatchNorm2d(20), nn.ReLU(), conv(20, 10), nn.ReLU(), nn.Flatten(), nn.Linear(360, 3)
    )


def residual() -> Any:
    torch.manual_seed(0)
    return Net(
        lambda n, x: n.o((y := n.n(n.a(x)).relu() + n.b(x)).mean((2, 3)) + y.amax((2, 3))),
        a=conv(3, 20), n=nn.BatchNorm2d(20), b=conv(3, 20, 1), o=nn.Linear(20, 3),
    )  # fmt: skip


def shuffled() -> Any:
    """A size in the code that no attribute holds: what is left of it is a graph."""
    torch.manual_seed(0)
    return Net(
        lambda n, x: n.o(n.a(x).relu().reshape(-1, 2, 10, 36).transpose(1, 2).flatten(1)),
        a=conv(3, 20), o=nn.Linear(720, 3),
    )  # fmt: skip


def train(model: nn.Module, epochs: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for batch in torch.arange(24).split(8):
            optimizer.zero_grad()
            F.cross_entropy(model(X[batch]), Y[batch]).backward()
            optimizer.step()


def width(model: Any, name: str) -> int:
    found: int = dict(model.named_parameters())[name].shape[0]
    return found


@pytest.mark.parametrize("schedule", ["linear", "agp", "lottery_ticket"])
@pytest.mark.parametrize("speedup", [True, False])
def test_every_round_reaches_its_share(schedule: str, speedup: bool) -> None:
    """Of 20 channels as many are left as one shot leaves, with the rounding up of a round or two."""
    make: Any = {"linear": LinearPruner, "agp": AGPPruner, "lottery_ticket": LotteryTicketPruner}[schedule]
    model = chain()
    state = copy.deepcopy(model.state_dict())
    seen: list[tuple[int, ...]] = []

    def finetune(trained: Any) -> None:
        masks = attached_masks(trained)
        seen.append(tuple(
            int(masks[f"{n}.bias"].sum()) if f"{n}.bias" in masks else width(trained, f"{n}.bias") for n in (0, 3)
        ))  # fmt: skip
        train(trained)

    pruner = make(model, [CONVS], "l1", total_iteration=4, finetuner=finetune, speedup=speedup, dummy_input=image())
    best, masks = pruner.compress()
    shares = [SCHEDULES[schedule](0, 0.6, i, 4) for i in range(1, 5)]
    if schedule == "lottery_ticket":
        assert seen.pop(0) == (20, 10)
    for counts, share in zip(seen, shares, strict=True):
        for count, size in zip(counts, (20, 10), strict=True):
            assert 0 <= math.floor(size * (1 - share) + 1e-9) - count <= int(speedup)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert not attached_masks(model) and not attached_masks(best)
    small = best if speedup else ModelSpeedup(best, image(), masks).speedup_model()
    assert (width(small, "0.weight"), width(small, "3.weight")) == seen[-1]
    assert bool(masks) is not speedup
    torch.testing.assert_close(small.eval()(X), best.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("speedup", [True, False])
def test_without_training_rounds_leave_what_one_shot_leaves(speedup: bool) -> None:
    """Twenty channels at 0.6 in four steps of 0.15: no rounding."""
    model = chain()
    entry = [{"op_names": ["0"], "sparsity": 0.6}]
    best, masks = LinearPruner(model, entry, "l1", 4, speedup=speedup, dummy_input=image()).compress()
    one, shot = L1NormPruner(chain(), entry, dummy_input=image()).compress()
    expected = ModelSpeedup(one, image(), shot).speedup_model()
    small = ModelSpeedup(best, image(), masks).speedup_model()
    assert width(small, "0.weight") == 8
    torch.testing.assert_close(small.state_dict(), expected.state_dict())


@pytest.mark.parametrize("build", [residual, shuffled])
def test_what_is_left_goes_on_shrinking(build: Callable[[], Any]) -> None:
    model = build()
    state = copy.deepcopy(model.state_dict())
    entry = [{"op_types": ["Conv2d"], "sparsity": 0.6}]
    widths = []

    def finetune(trained: Any) -> None:
        widths.append(width(trained, "a.weight"))
        train(trained)

    pruner = LinearPruner(model, entry, "l1", 3, finetuner=finetune, speedup=True, dummy_input=image())
    best, _ = pruner.compress()
    assert widths == [16, 12, 8]
    assert isinstance(best, ShrunkGraph) is (build is shuffled)
    assert best(X).shape == (24, 3)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_single_weights_stay_zero_after_a_shrink() -> None:
    """A channel of which all weights go is cut; the other zeros stay zeros while the rest is trained."""
    model = chain()
    with torch.no_grad():
        model[0].weight[:4] *= 1e-4
        model[0].bias[:4] = 0
    seen = []

    def finetune(trained: Any) -> None:
        train(trained)
        masks = attached_masks(trained)
        zeros = {name: int((masks[name] == 0).sum()) if name in masks else 0 for name in ("0.weight", "3.weight")}
        sizes = {name: dict(trained.named_parameters())[name].numel() for name in zeros}
        dense = {"0.weight": 540, "3.weight": 1800}
        seen.append([1 - (sizes[name] - zeros[name]) / dense[name] for name in zeros])

    entry = [{"op_types": ["Conv2d"], "sparsity": 0.6}]
    pruner = LinearPruner(model, entry, "level", 3, finetuner=finetune, speedup=True, dummy_input=image())
    best, masks = pruner.compress()
    assert width(best, "0.weight") == 16
    for shares, target in zip(seen, (0.2, 0.4, 0.6), strict=True):
        assert shares[0] == pytest.approx(target, abs=2 / 540)
        assert shares[1] >= target - 2 / 1800
    assert all(
        bool((dict(best.named_parameters())[f"{layer}.weight"][masks[layer]["weight"] == 0] == 0).all())
        for layer in masks
    )
    assert masks["0"]["weight"].shape == (16, 3, 3, 3)


def test_the_best_round_has_the_highest_score_and_of_equal_ones_the_last() -> None:
    scores = iter([1.0, 3.0, 3.0, 2.0])
    modes = []

    def evaluate(model: nn.Module) -> Tensor:
        modes.append((model.training, torch.is_grad_enabled()))
        return torch.tensor(next(scores))

    pruner = LinearPruner(chain().train(), [CONVS], "l1", 4, evaluator=evaluate, speedup=True, dummy_input=image())
    assert pruner.get_best_result() is None
    pruner.compress()
    result = pruner.get_best_result()
    assert result is not None
    number, model, masks, score, config_list = result
    assert (number, score, masks) == (3, 3.0, {}) and modes == [(False, False)] * 4
    assert width(model, "0.weight") == math.floor(20 * 0.55)
    (entry,) = config_list
    assert entry["op_names"] == ["0", "3"] or len(config_list) == 2
    assert [task.score for task in pruner.tasks] == [1.0, 3.0, 3.0, 2.0]


def test_what_is_asked_in_a_round_is_a_config_list() -> None:
    """Of what is left of 20 channels after 0.3 went, 0.6 is reached by 3/7."""
    model = chain()
    pruner = LinearPruner(model, [{"op_names": ["0"], "sparsity": 0.6}], "l1", 2, speedup=True, dummy_input=image())
    pruner.compress()
    assert [task.id for task in pruner.tasks] == [1, 2]
    shares = [task.config_list[0]["sparsity"] for task in pruner.tasks]
    assert shares == pytest.approx([0.3, 3 / 7])
    again, masks = L1NormPruner(pruner.tasks[0].model, pruner.tasks[1].config_list, dummy_input=image()).compress()
    small = ModelSpeedup(again, image(), masks).speedup_model()
    torch.testing.assert_close(small.state_dict(), pruner.tasks[1].model.state_dict())


def test_slim_in_rounds_counts_all_norms_together() -> None:
    model = chain()
    model = nn.Sequential(*model[:4], nn.BatchNorm2d(10), *model[4:])
    for norm, low in ((model[1], 0.1), (model[4], 0.5)):
        norm.weight.data = torch.linspace(low, 1, len(norm.weight))
    entry = [{"op_types": ["BatchNorm2d"], "sparsity": 0.5}]
    best, _ = LinearPruner(model, entry, "slim", 3, speedup=True, dummy_input=image()).compress()
    scales = torch.cat([model[1].weight, model[4].weight]).detach().sort().values
    assert width(best, "1.weight") + width(best, "4.weight") == 15
    assert min(float(best[place].weight.detach().min()) for place in (1, 4)) == float(scales[15])


@pytest.mark.parametrize("algorithm", ["taylorfo", "apoz", "admm", "movement", "slim"])
@pytest.mark.parametrize("bound", [True, False])
def test_what_trains_is_trained_in_each_round(algorithm: str, bound: bool) -> None:
    """The optimizer may be one of the user's model: it follows; and is itself left as it is."""
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seen = []

    def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        seen.append(optimizer)
        for batch in torch.arange(24).split(8):
            optimizer.zero_grad()
            criterion(model(X[batch]), Y[batch]).backward()
            optimizer.step()

    params: dict[str, Any] = {"trainer": trainer, "criterion": F.cross_entropy, "training_epochs": 1, "iterations": 1}
    params["traced_optimizer"] = optimizer if bound else lambda p: torch.optim.SGD(p, lr=0.01)
    kind = "BatchNorm2d" if algorithm == "slim" else "Conv2d"
    pruner = AGPPruner(
        model,
        [{"op_types": [kind], "sparsity": 0.5}],
        algorithm,
        2,
        speedup=True,
        dummy_input=image(),
        pruning_params=params,
    )
    state = copy.deepcopy(model.state_dict())
    best, _ = pruner.compress()
    assert len(seen) == 2 and optimizer not in seen and not optimizer.state
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    if algorithm not in ("admm", "movement"):
        assert width(best, "0.weight") == 10


@pytest.mark.parametrize("speedup", [True, False])
def test_a_winning_ticket(speedup: bool) -> None:
    """The dense model is trained first; then survivors have their first values, batch norm statistics too."""
    model = chain()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states: list[dict[str, Tensor]] = []

    def finetune(trained: nn.Module) -> None:
        states.append({name: t.clone() for name, t in trained.state_dict().items() if "mask_of_" not in name})
        train(trained)

    pruner = LotteryTicketPruner(
        model,
        [{"op_names": ["0"], "sparsity": 0.75}],
        "l1",
        2,
        finetuner=finetune,
        speedup=speedup,
        dummy_input=image(),
    )
    pruner.compress()
    dense, *rounds = states
    assert len(rounds) == 2
    torch.testing.assert_close(dense, first, rtol=0, atol=0)
    for state, count in zip(rounds, (10, 5), strict=True):
        if not speedup:
            torch.testing.assert_close(state, first, rtol=0, atol=0)
            continue
        rows = [row for row in range(20) if (first["0.weight"][row] == state["0.weight"]).flatten(1).all(1).any()]
        assert len(rows) == count
        torch.testing.assert_close(state["0.weight"], first["0.weight"][rows], rtol=0, atol=0)
        torch.testing.assert_close(state["3.weight"], first["3.weight"][:, rows], rtol=0, atol=0)
        for name in ("1.weight", "1.running_mean", "1.running_var"):
            torch.testing.assert_close(state[name], first[name][rows], rtol=0, atol=0)
    assert pruner.tasks[-1].model is not model


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"total_iteration": 0}, "total_iteration 0"),
        ({"total_iteration": "three"}, "total_iteration 'three'"),
        ({"total_iteration": 2, "speedup": True}, "speedup: needs example inputs"),
        ({"total_iteration": 2, "finetuner": 3}, "finetuner: is a int"),
        ({"total_iteration": 2, "evaluator": "accuracy"}, "evaluator: is a str"),
        ({"total_iteration": 2, "pruning_algorithm": "l4"}, "'l4': is no basic pruner"),
        ({"total_iteration": 2, "pruning_params": {"trainning_batches": 2}}, "did you mean 'training_batches'"),
        ({"total_iteration": 2, "pruning_params": {"rho": -1.0}}, "rho -1.0: is negative"),
    ],
)
def test_wrong_configurations(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact) as raised:
        LinearPruner(chain(), [CONVS], **{"pruning_algorithm": "l1", **options})
    assert "\n" not in str(raised.value)


def test_rounds_have_to_be_counted() -> None:
    with pytest.raises(ConfigError, match="total_iteration is missing"):
        LinearPruner(chain(), [CONVS], "l1").compress()


def test_an_evaluator_that_gives_no_number() -> None:
    model = chain()
    with pytest.raises(TrainingError, match="evaluator: returns NoneType"):
        LinearPruner(model, [CONVS], "l1", 2, evaluator=lambda model: None).compress()
    assert not attached_masks(model)


def test_layers_of_which_different_shares_have_gone() -> None:
    """What a round asks of each layer is asked of each by itself, though one entry selects them all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():  # in the first round channels go whole
        model[2].weight[:6] *= 1e-4
        model[2].bias[:6] = 0
    entry = {"op_types": ["Linear"], "sparsity": 0.8}
    pruner = LinearPruner(model, [entry], "level", 2, speedup=True, dummy_input=torch.randn(2, 8))
    small, _ = pruner.compress()
    assert small[2].out_features < 16
    for place in (0, 2, 4):
        gone = 1 - int((small[place].weight != 0).sum()) / model[place].weight.numel()
        assert gone == pytest.approx(0.8, abs=0.06), place
