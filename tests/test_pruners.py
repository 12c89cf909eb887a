"""The pruners under their users' names: from a config list to a smaller model, in a loop of the user's own or without."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_rules import Net, conv, image
from test_schedule import hooks
from torch import Tensor, nn

from graphprune import pruners
from graphprune.errors import ConfigError, GraphpruneError
from speedup import ModelSpeedup, attach_masks, detach_masks
from speedup.errors import SpeedupError
from speedup.masking import attached_masks, plain_state

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = X.mean((2, 3)).argmax(1)


class Small(nn.Module):
    """Two stages and a shortcut around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.short = nn.Conv2d(8, 6, 1, bias=False)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu() + self.short(x).relu()
        return self.fc(x.mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        model(X)  # statistics
    return model


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int = 0) -> None:
    model.train()
    for batch in torch.arange(32).split(8):
        optimizer.zero_grad()
        criterion(model(X[batch]), Y[batch]).backward()
        optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


LOOP = (trainer, sgd, F.cross_entropy)
COUNTED = (sgd, trainer, F.cross_entropy)
CONVS, ELEMENTS, NORMS = ["Conv2d"], ["default"], ["BatchNorm2d"]
INPUTS = {"dummy_input": X[:2]}
COARSE = {"granularity": "coarse-grained", **INPUTS}
SHORT = {"iterations": 2, "training_epochs": 1}

Case = tuple[str, list[str], tuple[Any, ...], dict[str, Any]]
CASES: tuple[Case, ...] = (
    ("LevelPruner", ELEMENTS, (), {}),
    ("L1NormPruner", CONVS, ("dependency_aware", X[:2]), {}),
    ("L2NormPruner", CONVS, (), INPUTS),
    ("FPGMPruner", CONVS, (), INPUTS),
    ("RandomPruner", CONVS, (), INPUTS),
    ("L1FilterPruner", CONVS, (True, X[:2]), {}),
    ("L2FilterPruner", CONVS, (True, X[:2]), {}),
    ("SlimPruner", NORMS, LOOP, {}),
    ("SlimPruner", NORMS, (), INPUTS),
    ("ActivationAPoZRankPruner", CONVS, LOOP, {}),
    ("ActivationAPoZRankPruner", NORMS, (*LOOP, 20), {}),
    ("ActivationMeanRankPruner", CONVS, (*LOOP, 2, "relu"), {}),
    ("TaylorFOWeightPruner", CONVS, LOOP, {}),
    ("TaylorFOWeightPruner", CONVS, LOOP, {"mode": "global", "max_sparsity_per_layer": 0.7}),
    ("ActivationAPoZRankFilterPruner", CONVS, COUNTED, {}),
    ("ActivationMeanRankFilterPruner", CONVS, COUNTED, {}),
    ("TaylorFOWeightFilterPruner", CONVS, (*COUNTED, 2), {}),
    ("ADMMPruner", ELEMENTS, LOOP, SHORT),
    ("ADMMPruner", CONVS, LOOP, {**SHORT, "granularity": "coarse-grained"}),
    ("MovementPruner", ELEMENTS, (*LOOP, 2, 1, 6), {}),
    ("MovementPruner", ELEMENTS, (*LOOP, 2, 1, 6), {"score_threshold": 0.45}),
    ("MovementPruner", CONVS, (*LOOP, 2, 1, 6), COARSE),
)
every = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1])}-{len(case[3])}")


def made(model: nn.Module, case: Case, sparsity: float = 0.5) -> Any:
    name, types, args, options = case
    entries: list[dict[str, Any]] = [{"op_types": types, "sparsity": sparsity}]
    if types is CONVS or types is NORMS:
        entries += [{"op_names": ["conv2", "short"], "sparsity": sparsity}] if types is CONVS else []
    return getattr(pruners, name)(model, entries, *args, **options)


def is_structured(case: Case) -> bool:
    return case[1] is not ELEMENTS


def sizes(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@every
def test_the_life_of_a_pruned_model(case: Case, tmp_path: Path) -> None:
    model = small()
    dense, names, parameters = sizes(model), list(model.state_dict()), dict(model.named_parameters())
    types = [(type(one), list(one._buffers)) for one in model.modules()]
    before = hooks(model)
    masked, masks = made(model, case).compress()
    assert masked is model and masks and hooks(model) == before

    # Masks act, forwards and backwards.
    optimizer = sgd(model.parameters())
    trainer(model, optimizer, F.cross_entropy)
    flat = attached_masks(model)
    assert flat.keys() == {f"{layer}.{name}" for layer, own in masks.items() for name in own}
    reference = small()
    reference.load_state_dict(plain_state(model.state_dict()))
    for name, mask in flat.items():
        module, _, own = name.rpartition(".")
        assert bool((getattr(model.get_submodule(module), own)[mask == 0] == 0).all())
        grad = parameters[name].grad
        assert parameters[name] is dict(model.named_parameters())[name] and grad is not None
        assert bool((grad[mask == 0] == 0).all())
        assert bool((reference.get_parameter(name)[mask == 0] == 0).all())
    torch.testing.assert_close(reference.eval()(X), model.eval()(X))
    gone = sum(int((mask == 0).sum()) for mask in flat.values()) / sum(mask.numel() for mask in flat.values())
    assert gone == pytest.approx(0.5, abs=0.13)

    # What is stored comes back.
    path = tmp_path / "masked.safetensors"
    save_file(model.state_dict(), path)
    other = small()
    attach_masks(other, {name: torch.ones_like(mask) for name, mask in flat.items()})
    other.load_state_dict(load_file(path))
    torch.testing.assert_close(other.eval()(X), model(X), rtol=0, atol=0)

    # Physically smaller, and the same.
    speedup = ModelSpeedup(model, X[:2], masks)
    smaller: Any = speedup.speedup_model()
    assert isinstance(smaller, Small) and speedup.difference is not None and speedup.difference < 1e-5
    torch.testing.assert_close(smaller.eval()(X), model(X), rtol=1e-4, atol=1e-5)
    if is_structured(case):
        assert sizes(smaller) < 0.7 * dense and set(speedup.reconciled.values()) == {0}
        assert smaller.conv2.weight.shape[0] == smaller.short.weight.shape[0] == smaller.bn2.num_features
    trainer(smaller, sgd(smaller.parameters()), F.cross_entropy)

    # And away again.
    hidden = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    detach_masks(model, multiply=False)
    assert [(type(one), list(one._buffers)) for one in model.modules()] == types and list(model.state_dict()) == names
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    torch.testing.assert_close({name: p.detach() for name, p in model.named_parameters()}, hidden, rtol=0, atol=0)
    assert hooks(model) == before


@pytest.mark.parametrize("case", [one for one in CASES if one[2] and one[0] in ("SlimPruner", "TaylorFOWeightPruner")])
def test_the_same_seed_gives_the_same_masks(case: Case) -> None:
    found = []
    for _ in range(2):
        found.append(made(small(), case).compress()[1])
        torch.rand(3)
    for layer, own in found[0].items():
        torch.testing.assert_close(own, found[1][layer], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ActivationAPoZRankPruner", "ActivationMeanRankPruner", "TaylorFOWeightPruner"])
def test_what_is_looked_at_leaves_model_and_optimizer_as_they_were(name: str) -> None:
    model = small().eval()
    optimizer = sgd(model.parameters())
    trainer(model.eval(), optimizer, F.cross_entropy)
    model.eval()
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    entry = {"op_types": CONVS, "sparsity": 0.5}
    getattr(pruners, name)(model, [entry], trainer, optimizer, F.cross_entropy).compress()
    now = {key: value for key, value in model.state_dict().items() if "mask_of_" not in key}
    torch.testing.assert_close(now, dict(state), rtol=0, atol=0)
    assert str(optimizer.state_dict()) == str(moments) and not model.training and not model.bn1.training


def test_a_look_that_fails_leaves_nothing_behind() -> None:
    def breaks(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        trainer(model, optimizer, criterion)
        raise RuntimeError("out of paper")

    model = small()
    state, optimizer = copy.deepcopy(model.state_dict()), torch.optim.Adam(model.parameters())
    entry = {"op_types": CONVS, "sparsity": 0.5}
    with pytest.raises(RuntimeError, match="out of paper"):
        pruners.TaylorFOWeightPruner(model, [entry], breaks, optimizer, F.cross_entropy).compress()
    assert not optimizer.state
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_every_name_of_the_manuals_is_there() -> None:
    assert {case[0] for case in CASES} | {
        "AGPPruner", "AGP_Pruner", "LinearPruner", "LotteryTicketPruner", "SimulatedAnnealingPruner", "NetAdaptPruner",
        "AutoCompressPruner", "AMCPruner", "SensitivityPruner", "AGPTaskGenerator", "LinearTaskGenerator",
        "LotteryTicketTaskGenerator", "PruningScheduler",
    } == set(pruners.__all__)  # fmt: skip
    for case in CASES:
        signature = inspect.signature(getattr(pruners, case[0]))
        assert list(signature.parameters)[:2] == ["model", "config_list"] and getattr(pruners, case[0]).__doc__


# Scores, seen through a pruner ------------------------------------------------------------------------------------------


def kept(masks: Any, layer: str) -> list[int]:
    return torch.nonzero(masks[layer]["weight"].flatten(1).any(1)).flatten().tolist()


def highest(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True)[:count].tolist())


def still(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
    """A trainer that changes nothing: three batches, forwards and backwards."""
    model.eval()
    for batch in torch.arange(24).split(8):
        model.zero_grad()
        criterion(model(X[batch]), Y[batch]).backward()


@pytest.mark.parametrize("batches", [1, 2, 20])
def test_activations_are_those_of_so_many_batches(batches: int) -> None:
    model = small().eval()
    after = model.bn1(model.conv1(X[: min(8 * batches, 24)])).relu()
    entry = {"op_names": ["conv1"], "sparsity": 0.5}
    for name, scores in (("APoZ", (after != 0).double().mean((0, 2, 3))), ("Mean", after.mean((0, 2, 3)))):
        make = getattr(pruners, f"Activation{name}RankPruner")
        assert kept(make(small(), [entry], still, sgd, F.cross_entropy, batches).compress()[1], "conv1") == highest(
            scores, 4
        )


def saliency(model: nn.Module, batches: int) -> dict[str, Tensor]:
    total = {name: torch.zeros(len(p)) for name, p in model.named_parameters() if p.dim() == 4}
    for batch in torch.arange(24).split(8)[:batches]:
        model.zero_grad()
        F.cross_entropy(model(X[batch]), Y[batch]).backward()
        for name in total:
            parameter = model.get_parameter(name)
            assert parameter.grad is not None
            total[name] += (parameter.grad * parameter.detach()).square().flatten(1).sum(1) / batches
    return total


@pytest.mark.parametrize("batches", [1, 3])
def test_taylor_of_each_layer(batches: int) -> None:
    scores = saliency(small().eval(), batches)
    entry = {"op_types": CONVS, "sparsity": 0.5}
    _, masks = pruners.TaylorFOWeightPruner(small(), [entry], still, sgd, F.cross_entropy, batches).compress()
    assert kept(masks, "conv1") == highest(scores["conv1.weight"], 4)
    both = highest(scores["conv2.weight"] + scores["short.weight"], 3)
    assert kept(masks, "conv2") == kept(masks, "short") == both


def test_taylor_of_all_layers() -> None:
    """One ranking of the channels as they are; each weighs as many weights as it has."""
    scores = saliency(small().eval(), 3)
    entry = {"op_types": CONVS, "sparsity": 0.3}
    _, masks = pruners.TaylorFOWeightPruner(small(), [entry], still, sgd, F.cross_entropy, mode="global").compress()
    values = torch.cat([scores["conv1.weight"], scores["conv2.weight"] + scores["short.weight"]])
    weights = torch.tensor([27] * 8 + [80] * 6)
    order = values.argsort()
    gone = order[: int((weights[order].cumsum(0) < 0.3 * weights.sum()).sum()) + 1].tolist()
    found = [kept(masks, name) if name in masks else list(range(size)) for name, size in (("conv1", 8), ("conv2", 6))]
    assert found[0] == [one for one in range(8) if one not in gone]
    assert found[1] == [one for one in range(6) if one + 8 not in gone]


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "models")
    import digits

    return digits


def test_taylor_beats_chance_on_digits(digits: Any) -> None:
    """A tenth of the channels stays and is trained for one epoch; by chance as many of each layer stay."""
    images, labels, _, _ = digits.load_split()

    def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, number: int) -> None:
        for batch in torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(64):
            optimizer.zero_grad()
            criterion(model.train(optimizer.defaults["lr"] > 0)(images[batch]), labels[batch]).backward()
            optimizer.step()

    def look(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    model, chance = digits.build_model(), digits.build_model()
    entry = {"op_types": CONVS, "sparsity": 0.9}
    _, masks = pruners.TaylorFOWeightPruner(model, [entry], epoch, look, F.cross_entropy, 10).compress()
    generator = torch.Generator().manual_seed(0)
    for layer, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
        order = torch.randperm(len(masks[norm]["weight"]), generator=generator)
        attach_masks(chance, {name: {key: mask[order] for key, mask in masks[name].items()} for name in (layer, norm)})
    for one in (model, chance):
        epoch(one, torch.optim.Adam(one.parameters(), lr=1e-3), F.cross_entropy, 0)
    assert digits.evaluate(model) > digits.evaluate(chance) + 10


# Without example inputs, without a trainer -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["L1NormPruner", "L2NormPruner", "FPGMPruner", "L1FilterPruner", "L2FilterPruner"])
def test_layers_by_themselves(name: str) -> None:
    """What tied layers disagree on is kept in the smaller model, and told."""
    model = small()
    _, masks = getattr(pruners, name)(model, [{"op_types": CONVS, "sparsity": 0.5}]).compress()
    assert {layer: len(kept(masks, layer)) for layer in masks} == {"conv1": 4, "conv2": 3, "short": 3}
    speedup = ModelSpeedup(model, X[:2], masks)
    smaller: Any = speedup.speedup_model()
    either = len({*kept(masks, "conv2"), *kept(masks, "short")})
    assert smaller.conv1.weight.shape[0] == 4 and smaller.conv2.weight.shape[0] == either
    assert speedup.reconciled["conv2.weight"] == either - 3


def test_norms_by_themselves() -> None:
    """Channels that only a masked norm reads go."""
    model = small()
    _, masks = pruners.SlimPruner(model, [{"op_types": NORMS, "sparsity": 0.5}]).compress()
    gone = [int((masks[name]["weight"] == 0).sum()) for name in ("bn1", "bn2")]
    assert sum(gone) == 7 and masks.keys() == {"bn1", "bn2"}
    speedup = ModelSpeedup(model, X[:2], masks)
    smaller: Any = speedup.speedup_model()
    assert (
        smaller.conv1.weight.shape[0] == 8 - gone[0] and smaller.conv2.weight.shape[0] == 6
    )  # the shortcut keeps them
    assert speedup.difference is not None and speedup.difference < 1e-5


class Wrapped(nn.Module):
    """What DataParallel and its like look like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


WAITING = ["ActivationAPoZRankFilterPruner", "ActivationMeanRankFilterPruner", "TaylorFOWeightFilterPruner"]


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize(
    ("wrap", "batches", "known"),
    [
        (lambda model: model, 1, False),
        (lambda model: model, 3, True),
        (Wrapped, 3, False),
        (nn.DataParallel, 1, True),
        (nn.DataParallel, 1, False),
    ],
)
def test_masks_come_after_so_many_batches(name: str, wrap: Callable[[Any], Any], batches: int, known: bool) -> None:
    model = small()
    before = hooks(model)
    options = INPUTS if known else {}
    entry = {"op_types": CONVS, "sparsity": 0.5}
    pruner = getattr(pruners, name)(model, [entry], statistics_batch_num=batches, **options)
    masked, masks = pruner.compress()
    assert masked is model and not masks and not attached_masks(model)
    outer = wrap(model)
    optimizer = sgd(outer.parameters())
    counts = []
    for batch in torch.arange(32).split(8):
        optimizer.zero_grad()
        F.cross_entropy(outer(X[batch]), Y[batch]).backward()
        optimizer.step()
        counts.append(len(attached_masks(model)))
    assert [count > 0 for count in counts] == [number >= batches for number in range(4)]
    assert masks.keys() == {"conv1", "bn1", "conv2", "bn2", "short"} and hooks(model) == before
    smaller: Any = ModelSpeedup(model, X[:2], masks).speedup_model()
    assert smaller.conv1.weight.shape[0] == 4 and smaller.short.weight.shape[0] == 3


def test_a_wrapper_may_be_pruned_too() -> None:
    model = nn.DataParallel(small())
    entry = {"op_names": ["module.conv1"], "sparsity": 0.5}
    _, masks = pruners.TaylorFOWeightFilterPruner(model, [entry], statistics_batch_num=1).compress()
    for _ in range(2):
        trainer(model, sgd(model.parameters()), F.cross_entropy)
    assert masks.keys() == {"module.conv1", "module.bn1"}


def test_compress_again_waits_once() -> None:
    model = small()
    before = hooks(model)
    pruner = pruners.ActivationAPoZRankPruner(model, [{"op_types": CONVS, "sparsity": 0.5}], training_batches=1)
    pruner.compress()
    waiting = hooks(model)
    pruner.compress()
    assert hooks(model) == waiting
    trainer(model, sgd(model.parameters()), F.cross_entropy)
    assert hooks(model) == before and pruner.masks


def test_a_second_compress_goes_on_from_the_first() -> None:
    model = small()
    entry = {"op_types": CONVS, "sparsity": 0.25}
    first = copy.deepcopy(pruners.L1NormPruner(model, [entry], dummy_input=X[:2]).compress()[1])
    with torch.no_grad():
        dict(model.named_parameters())["conv1.weight"].mul_(
            1 + 9 * (first["conv1"]["weight"] == 0)
        )  # they would be the largest
    second = pruners.L1NormPruner(model, [{**entry, "sparsity": 0.5}], dummy_input=X[:2]).compress()[1]
    for layer, own in first.items():
        assert all(bool((second[layer][name] <= mask).all()) for name, mask in own.items())
    assert len(kept(second, "conv1")) == 4


# What makes no sense ----------------------------------------------------------------------------------------------------

HALF = {"op_types": CONVS, "sparsity": 0.5}
WRONG: tuple[tuple[str, Any, tuple[Any, ...], dict[str, Any], str], ...] = (
    ("L1NormPruner", [HALF], (), {"mode": "depencency_aware"}, "mode 'depencency_aware': "),
    ("L1NormPruner", [HALF], ("dependency_aware",), {}, "dependency_aware: needs example inputs"),
    ("L1FilterPruner", [HALF], (True,), {}, "dependency_aware: needs example inputs"),
    ("L1NormPruner", [HALF], ("normal", None, 3), {}, "L1NormPruner: takes 2 arguments after the config list, not 3"),
    ("L1NormPruner", [HALF], ("normal",), {"mode": "normal"}, "mode is given twice"),
    ("L1NormPruner", [HALF], (), {"dumy_input": X}, r"dumy_input: is no option of a pruner \(did you mean 'dummy_input'"),
    ("L1NormPruner", [{**HALF, "sparsity": 1.0}], (), {}, "sparsity 1.0 is not in"),
    ("L1NormPruner", [{"op_types": ["Conv2D"], "sparsity": 0.5}], (), {}, "no layer is of type 'Conv2D'"),
    ("L1NormPruner", [{"op_types": CONVS}], (), {}, "does not say how much goes"),
    ("L1NormPruner", {"sparsity": 0.5}, (), {}, "is no list of entries"),
    ("L1NormPruner", [{"op_names": ["fc"], "sparsity": 0.5}], (), INPUTS, "fc.weight: is an output of the model"),
    ("L1NormPruner", [{"op_names": ["short"], "sparsity": 0.5}], (), INPUTS, "tied to conv2"),
    ("L1NormPruner", [{"op_types": NORMS, "sparsity": 0.5}], (), {}, "Select such, or give example inputs"),
    ("L1NormPruner", [HALF], (), {"dummy_input": X[0, 0]}, "raises RuntimeError on the example inputs"),
    ("SlimPruner", [HALF], (), {}, "looks at norms with a scale"),
    ("SlimPruner", [HALF], (), INPUTS, None),
    ("SlimPruner", [{"op_types": NORMS, "sparsity": 0.5}], LOOP, {"scale": -1.0}, "scale -1.0: is negative"),
    ("SlimPruner", [{"op_types": NORMS, "sparsity": 0.5}], (trainer, sgd), {}, "criterion: is None"),
    ("SlimPruner", [{"op_types": NORMS, "sparsity": 0.5}], LOOP, {"training_epochs": 0}, "training_epochs 0: is below 1"),
    ("TaylorFOWeightPruner", [HALF], LOOP, {"training_batches": 0}, "training_batches 0: is below 1"),
    ("TaylorFOWeightPruner", [HALF], LOOP, {"max_sparsity_per_layer": 1.5}, "max_sparsity_per_layer 1.5: is not in"),
    ("TaylorFOWeightFilterPruner", [HALF], COUNTED, {"statistics_batch_num": "many"}, "statistics_batch_num"),
    ("TaylorFOWeightPruner", [HALF], (lambda data: None, sgd, F.cross_entropy), {}, r"trainer: takes \(data\)"),
    ("TaylorFOWeightPruner", [HALF], (lambda m, o, c: None, sgd, F.cross_entropy), {}, "received no gradients"),
    ("ActivationAPoZRankPruner", [HALF], (lambda m, o, c: None, sgd, F.cross_entropy), {}, "was not called"),
    ("ActivationAPoZRankPruner", [HALF], LOOP, {"activation": "rectifier"}, "activation 'rectifier': is not known"),
    ("ActivationAPoZRankPruner", [HALF], (trainer, "sgd", None), {}, "optimizer 'sgd': is no optimizer"),
    ("ActivationAPoZRankPruner", [HALF], (trainer, sgd(nn.Linear(2, 2).parameters()), F.cross_entropy), {}, "holds 2 parameters"),
    ("ADMMPruner", [HALF], (), {}, "trainer: is missing, and admm trains the model"),
    ("ADMMPruner", [HALF], LOOP, {"rho": float("nan")}, "rho nan: is negative or no number"),
    ("ADMMPruner", [HALF], LOOP, {"granularity": "coarse"}, "granularity 'coarse': "),
    ("MovementPruner", [HALF], (), {}, "trainer: is missing, and movement trains the model"),
    ("MovementPruner", [HALF], LOOP, {"warm_up_step": -1}, "warm_up_step -1: is negative"),
    ("MovementPruner", [HALF], LOOP, {"score_threshold": 1.0}, "score_threshold 1.0: is not in"),
    ("MovementPruner", [HALF], LOOP, {"granularity": "coarse-grained"}, "movement needs example inputs"),
    ("MovementPruner", [HALF], LOOP, {**COARSE, "score_threshold": 0.5}, "score_threshold: is one of single elements"),
    ("MovementPruner", [{"op_types": CONVS}], LOOP, {}, "does not say how much goes"),
    ("LevelPruner", [HALF], (), {"block": (0,)}, "has a size below 1"),
    ("LevelPruner", [HALF], (), {"block": (5, 1)}, "is no multiple of blocks of"),
)  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[f"{one[0]}-{number}" for number, one in enumerate(WRONG)])
def test_what_makes_no_sense_is_told_in_a_line(case: Any) -> None:
    name, entries, args, options, fact = case
    model = small()
    before, state, mode = hooks(model), copy.deepcopy(model.state_dict()), model.training
    if fact is None:
        assert getattr(pruners, name)(model, entries, *args, **options).compress()[1]
        return
    with pytest.raises(SpeedupError, match=fact) as raised:
        getattr(pruners, name)(model, entries, *args, **options).compress()
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    assert not attached_masks(model) and hooks(model) == before and model.training is mode
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_what_is_frozen_has_no_gradients_to_look_at() -> None:
    model = small().requires_grad_(False)
    before = hooks(model)
    for args in (LOOP, ()):
        with pytest.raises(ConfigError, match=r"model: .*no parameter.*requires? gradients|has no parameter"):
            pruners.TaylorFOWeightPruner(model, [HALF], *args).compress()
        assert hooks(model) == before and not attached_masks(model)
    with torch.no_grad(), pytest.raises(ConfigError, match="model: gradients are off, so that it cannot be trained"):
        pruners.TaylorFOWeightPruner(small(), [HALF], *LOOP).compress()


def test_a_model_of_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(SpeedupError, match=r"Small: was made under torch.inference_mode\(\)"):
        pruners.L1NormPruner(Small(), [HALF], **INPUTS).compress()


def test_values_are_shown_in_a_line() -> None:
    for make, fact in (
        (lambda: pruners.L1NormPruner(small(), [HALF], X), r"mode tensor\(\["),
        (lambda: pruners.TaylorFOWeightPruner(small(), [HALF], *LOOP, small()), r"training_batches Small\( \(conv1"),
    ):
        with pytest.raises(ConfigError, match=fact) as raised:
            make()
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 160


def test_one_option_under_two_names() -> None:
    for two in ({"optimizer": sgd, "traced_optimizer": sgd}, {"training_batches": 3, "statistics_batch_num": 3}):
        with pytest.raises(ConfigError, match=f"{' and '.join(two)}: are names of one option. Give one of them."):
            pruners.TaylorFOWeightPruner(small(), [HALF], trainer, **two)
    with pytest.raises(
        ConfigError, match=r"traced_optimiser: is no option of a pruner \(did you mean 'traced_optimizer'"
    ):
        pruners.TaylorFOWeightPruner(small(), [HALF], trainer, traced_optimiser=sgd)


def test_errors_of_pruners_are_errors_of_the_package() -> None:
    assert issubclass(ConfigError, GraphpruneError) and issubclass(GraphpruneError, SpeedupError)


def test_groups_without_example_inputs_and_with() -> None:
    def build() -> Net:
        torch.manual_seed(0)
        return Net(lambda n, x: n.o(n.b(n.a(x).relu()).relu()), a=conv(3, 8), b=conv(8, 8, groups=2), o=conv(8, 2))

    for options in ({}, {"dummy_input": image()}):
        model = build()
        _, masks = pruners.L1NormPruner(model, [{"op_names": ["b"], "sparsity": 0.5}], **options).compress()
        stays = kept(masks, "b")
        assert len([one for one in stays if one < 4]) == len([one for one in stays if one >= 4]) == 2
        speedup = ModelSpeedup(model, image(), masks)
        assert dict(speedup.speedup_model().named_parameters())["b.weight"].shape[0] == 4
        assert set(speedup.reconciled.values()) == {0}


@pytest.mark.parametrize(("sparsity", "gone"), [(0.1, 0), (0.3, 8), (0.5, 8)])
def test_groups_by_themselves_lose_what_is_nearest(sparsity: float, gone: int) -> None:
    """Eight groups of two outputs: 0, 8 or 16 of them are as many of each."""
    model = nn.Sequential(conv(3, 16), conv(16, 16, groups=8), conv(16, 2))
    _, masks = pruners.L1NormPruner(model, [{"op_names": ["1"], "sparsity": sparsity}]).compress()
    assert 16 - len(kept(masks, "1")) == gone


class Tied(nn.Module):
    """An embedding whose weight the last layer has too."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x))


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize(
    ("entry", "gone"),
    [({"exclude": True}, 0), ({"sparsity": 0.25}, 20), ({"sparsity": 0.9}, 40), ({"sparsity": 0.5}, 40)],
)
def test_a_tied_weight_loses_the_least_that_is_asked(entry: dict[str, Any], gone: int) -> None:
    model = Tied()
    pruners.LevelPruner(model, [{"op_types": ELEMENTS, "sparsity": 0.5}, {"op_names": ["out"], **entry}]).compress()
    assert zeros(model.out.weight) == zeros(model.into.weight) == gone


@pytest.mark.parametrize(
    ("entry", "gone"),
    [({"exclude": True}, 0), ({"sparsity": 0.25}, 8), ({"sparsity": 0.9}, 16), ({"sparsity": 0.5}, 16)],
)
def test_channels_of_a_tied_weight_by_themselves(entry: dict[str, Any], gone: int) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model[4].weight = model[0].weight
    pruners.L1NormPruner(model, [{"op_names": ["0"], "sparsity": 0.5}, {"op_names": ["4"], **entry}]).compress()
    assert zeros(model[0].weight) == zeros(model[4].weight) == gone
    assert all(bool((model[4].weight[model[4].bias == 0] == 0).all()) for _ in attached_masks(model))


def test_channels_of_a_weight_that_is_tied_the_other_way_round() -> None:
    """Columns of an embedding are its channels, and rows are those of the linear layer: one of them decides."""
    model = Tied()
    _, masks = pruners.L1NormPruner(model, [{"op_types": ["Embedding", "Linear"], "sparsity": 0.5}]).compress()
    assert zeros(model.into.weight) == zeros(model.out.weight) == model.out.weight.numel() // 2
    assert set(masks) == {"into"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_normalised_by_a_hook_loses_what_is_asked() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)))
    pruners.LevelPruner(model, [{"op_types": ["Linear"], "sparsity": 0.5}]).compress()
    model(torch.randn(1, 8))
    assert zeros(model[0].weight) == 32 and list(attached_masks(model)) == ["0.weight_v"]


def test_norms_of_tied_layers_are_added() -> None:
    """2, 1.5, 10 and 10 are the sums of norms; the norms of both slices together would be lowest for the first."""
    net = Net(lambda n, x: n.o((n.a(x) + n.b(x)).relu().mean((2, 3))), a=conv(3, 4), b=conv(3, 4), o=nn.Linear(4, 2))
    with torch.no_grad():
        for layer, sizes_ in ((net.a, (1, 0, 5, 5)), (net.b, (1, 1.5, 5, 5))):
            layer.weight.zero_()
            layer.weight[:, 0, 0, 0] = torch.tensor(sizes_)
    _, masks = pruners.L2NormPruner(net, [{"op_types": CONVS, "sparsity": 0.25}], dummy_input=image()).compress()
    assert kept(masks, "a") == kept(masks, "b") == [0, 2, 3]


def test_single_elements_stay_masked_when_channels_go() -> None:
    model = small()
    pruners.LevelPruner(model, [{"op_types": CONVS, "sparsity": 0.5}]).compress()
    before = {name: mask == 0 for name, mask in attached_masks(model).items()}
    pruners.L1NormPruner(model, [{"op_types": CONVS, "sparsity": 0.25}], dummy_input=X[:2]).compress()
    assert before and all(bool((model.get_submodule(n[:-7]).weight[gone] == 0).all()) for n, gone in before.items())


class Twice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.inner(self.first(x).relu()).relu()).mean((2, 3)))


@pytest.mark.parametrize("names", [["first", "inner"], ["first", "again"], ["first", "inner", "again"]])
def test_a_layer_under_two_names(names: list[str]) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    _, masks = pruners.L1NormPruner(model, [{"op_names": names, "sparsity": 0.5}], dummy_input=X[:2]).compress()
    shrunk = ModelSpeedup(model, X[:2], masks).speedup_model()
    assert shrunk.inner.weight.shape == (4, 4, 3, 3)
    torch.testing.assert_close(shrunk(X), model(X))


def test_masks_of_a_layer_under_its_other_name() -> None:
    model = Twice().eval()
    _, masks = pruners.LevelPruner(model, [{"op_names": ["inner"], "sparsity": 0.5}]).compress()
    assert list(masks) in (["inner"], ["again"])
    torch.testing.assert_close(ModelSpeedup(model, X[:2], masks).speedup_model()(X), model(X))
