"""What is learned with the weights, against the same steps in numpy."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from test_rules import conv, image
from torch import Tensor, nn

from graphprune.errors import ConfigError, TrainingError
from graphprune.pruners import ADMMPruner, MovementPruner, SlimPruner, learned
from graphprune.pruners.learned import Movement, Weights, admm, movement, slim
from graphprune.training import Training
from speedup.masking import attach_masks, attached_masks, detach_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

Numbers = NDArray[np.float64]

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LR = 0.1


def step(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
    """An epoch of one batch."""
    optimizer.zero_grad()
    criterion(model(X), Y).backward()
    optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


TRAINING = Training(step, sgd, F.mse_loss)


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4, bias=False)).double()


def array(tensor: Tensor) -> Numbers:
    return tensor.detach().double().numpy().copy()


def hidden(model: nn.Module) -> Numbers:
    """The weight of the first layer without its mask."""
    return array(dict(model.named_parameters())["0.weight"])


def gradient(weight: Numbers) -> Numbers:
    """Of the mean squared error of ``X W^T`` with respect to W."""
    x, y = array(X), array(Y)
    return 2 / y.size * (x @ weight.T - y).T @ x


def without_smallest(weight: Numbers, count: int) -> Numbers:
    mask = np.ones(weight.size)
    mask[np.argsort(np.abs(weight).ravel(), kind="stable")[:count]] = 0
    return mask.reshape(weight.shape)


# Slim -----------------------------------------------------------------------------------------------------------------


def test_slim_adds_the_sign_of_the_scale_to_its_gradient() -> None:
    def build() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)).double()
        model[1].weight.data = torch.tensor([0.5, -0.25, 1.0, -2.0], dtype=torch.float64)
        return model

    plain, slimmed = build(), build()
    step(plain, sgd(plain.parameters()), F.mse_loss, 0)
    slim(slimmed, TRAINING, {"1.weight": slimmed[1].weight}, scale=1e-2, epochs=1)
    signs = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)
    torch.testing.assert_close(slimmed[1].weight, plain[1].weight - LR * 1e-2 * signs, rtol=0, atol=1e-12)
    torch.testing.assert_close(slimmed[1].bias, plain[1].bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(slimmed[0].weight, plain[0].weight, rtol=0, atol=1e-12)


def test_slim_trains_for_its_epochs_and_ranks_all_norms_together() -> None:
    epochs = []

    def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        epochs.append(epoch)
        optimizer.zero_grad()
        criterion(model(image()), torch.zeros(2, 2, 6, 6)).backward()
        optimizer.step()

    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2))
    model[1].weight.data.uniform_(0.1, 0.2)
    model[3].weight.data.uniform_(0.8, 0.9)
    entry = {"op_types": ["BatchNorm2d"], "sparsity": 0.375}
    pruner = SlimPruner(model, [entry], trainer, sgd, F.mse_loss, 2, 1e-3, max_sparsity_per_layer=0.75)
    _, masks = pruner.compress()
    assert epochs == [0, 1] and masks["1"]["weight"].sum() == masks["0"]["bias"].sum() == 1
    assert masks.keys() == {"0", "1"}


# ADMM -----------------------------------------------------------------------------------------------------------------


def admm_by_hand(
    weight: Numbers, project: Callable[[Numbers], Numbers], rho: float, turns: int, epochs: int
) -> Numbers:
    """W, Z and U of Zhang et al., one step of gradient descent in an epoch."""
    sparse, dual = project(weight), np.zeros_like(weight)
    for _ in range(turns):
        for _ in range(epochs):
            weight = weight - LR * (gradient(weight) + rho * (weight - sparse + dual))
        sparse = project(weight + dual)
        dual = dual + weight - sparse
    return weight


@pytest.mark.parametrize(("turns", "epochs"), [(1, 1), (1, 3), (3, 2)])
def test_admm_of_single_elements(turns: int, epochs: int) -> None:
    model = linear()
    expected = admm_by_hand(array(model[0].weight), lambda w: w * without_smallest(w, 12), 2.0, turns, epochs)
    entry = {"op_types": ["Linear"], "sparsity": 0.5}
    pruner = ADMMPruner(model, [entry], step, sgd, F.mse_loss, turns, epochs, rho=2.0)
    _, masks = pruner.compress()
    np.testing.assert_allclose(hidden(model), expected, rtol=1e-9)
    np.testing.assert_array_equal(array(masks["0"]["weight"]), without_smallest(expected, 12))


def test_admm_of_channels() -> None:
    """Channels are projected by their norm."""
    model = nn.Sequential(*linear(), nn.Identity(), nn.Linear(4, 4, bias=False).double())
    nn.init.eye_(model[2].weight)
    model[2].weight.requires_grad_(False)

    def rows(weight: Numbers) -> Numbers:
        return (np.linalg.norm(weight, axis=1) > np.sort(np.linalg.norm(weight, axis=1))[1])[:, None] * np.ones((1, 6))

    expected = admm_by_hand(array(model[0].weight), lambda w: w * rows(w), 2.0, 2, 1)
    options = {"granularity": "coarse-grained", "dummy_input": X[:2], "rho": 2.0}
    entry = {"op_names": ["0"], "sparsity": 0.5}
    pruner = ADMMPruner(
        model, [entry], step, lambda p: sgd([one for one in p if one.requires_grad]), F.mse_loss, 2, 1, **options
    )
    _, masks = pruner.compress()
    np.testing.assert_allclose(hidden(model), expected, rtol=1e-9)
    np.testing.assert_array_equal(array(masks["0"]["weight"]), rows(expected))


def test_admm_pulls_towards_sparse_weights() -> None:
    """What the projection takes away is nearly nothing after enough turns; without, it is a third of the norm."""
    torch.manual_seed(0)
    dense, model = linear(), linear()
    model.load_state_dict(dense.state_dict())
    for _ in range(60):
        step(dense, sgd(dense.parameters()), F.mse_loss, 0)

    def project(values: Weights) -> Weights:
        return {name: torch.from_numpy(without_smallest(array(value), 12)) for name, value in values.items()}

    admm(model, TRAINING, {"0.weight": model[0].weight}, project, rho=5.0, iterations=60, epochs=1)

    def lost(weight: Numbers) -> float:
        return float(np.linalg.norm(weight * (1 - without_smallest(weight, 12))) / np.linalg.norm(weight))

    assert lost(array(model[0].weight)) < 0.1 * lost(array(dense[0].weight))


def test_a_penalty_needs_a_criterion() -> None:
    entry = {"op_types": ["Linear"], "sparsity": 0.5}
    model = linear()
    with pytest.raises(ConfigError, match="criterion: is None"):
        ADMMPruner(model, [entry], step, sgd)

    def deaf(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        step(model, optimizer, F.mse_loss, epoch)

    with pytest.raises(TrainingError, match="did not call the criterion"):
        ADMMPruner(model, [entry], deaf, sgd, F.mse_loss, 1, 1).compress()
    assert not attached_masks(model)


# Movement -------------------------------------------------------------------------------------------------------------


class ByHand:
    """Movement pruning of one weight in numpy: SGD for W, Adam (lr 0.01) for S."""

    def __init__(self, weight: Numbers, mask: Callable[[Numbers, int], Numbers]) -> None:
        self.weight, self.mask = weight, mask
        self.scores, self.first, self.second = (np.zeros_like(weight) for _ in range(3))

    def run(self, steps: int, extra: Callable[[Numbers, int], Numbers] = lambda scores, t: np.zeros(1)) -> None:
        """dL/dS = dL/d(W M) * W, of masked elements too; W receives dL/d(W M) * M."""
        for t in range(1, steps + 1):
            mask = self.mask(self.scores, t - 1)
            outer = gradient(self.weight * mask)
            slope = outer * self.weight + extra(self.scores, t)
            self.weight = self.weight - LR * outer * mask
            self.first = 0.9 * self.first + 0.1 * slope
            self.second = 0.999 * self.second + 0.001 * slope**2
            unbiased = np.sqrt(self.second / (1 - 0.999**t)) + 1e-8
            self.scores = self.scores - 0.01 * self.first / (1 - 0.9**t) / unbiased


def cubic(t: int, begin: int, end: int) -> float:
    return float(1 - (1 - np.clip((t - begin) / (end - begin), 0, 1)) ** 3)


def highest(scores: Numbers, share: float) -> Numbers:
    mask = np.ones(scores.size)
    mask[np.argsort(scores.ravel(), kind="stable")[: int(np.ceil(scores.size * share - 1e-9))]] = 0
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_hard_movement(steps: int) -> None:
    model = linear()
    hand = ByHand(array(model[0].weight), lambda scores, t: highest(scores, 0.5 * cubic(t, 2, 10)))
    hand.run(steps)
    entry = {"op_types": ["Linear"], "sparsity": 0.5}
    pruner = MovementPruner(model, [entry], step, sgd, F.mse_loss, steps, 2, 10)
    _, masks = pruner.compress()
    np.testing.assert_allclose(hidden(model), hand.weight, rtol=1e-9)
    np.testing.assert_array_equal(array(masks["0"]["weight"]), highest(hand.scores, 0.5))


def test_masked_elements_learn_too() -> None:
    """The scores of a row that is masked from the beginning move against dL/d(W M) * W as the others do."""
    model = linear()
    weight = array(model[0].weight)
    scores = Movement(
        model, {"0.weight": model[0].weight}, lambda s, *_: {n: (v > -1).to(v) for n, v in s.items()}, begin=0, end=1
    )
    scores.scores["0.weight"].data[0] = -2
    before = array(scores.scores["0.weight"])
    movement(model, TRAINING, scores, 1)
    change = array(scores.scores["0.weight"]) - before
    slope = gradient(weight * (before > -1)) * weight
    np.testing.assert_allclose(change, -0.01 * np.sign(slope), rtol=1e-3)  # the first step of Adam
    np.testing.assert_array_equal(array(model[0].weight)[0], weight[0])


@pytest.mark.parametrize("steps", [1, 6])
def test_soft_movement(steps: int) -> None:
    """M = sigmoid(S) > threshold; the penalty grows as the share of the hard one does, and pulls scores down."""
    model = linear()

    def sigmoid(scores: Numbers) -> Numbers:
        return 1 / (1 + np.exp(-scores))

    hand = ByHand(array(model[0].weight), lambda scores, t: (sigmoid(scores) > 0.497).astype(float))
    hand.run(steps, lambda s, t: 3.0 * cubic(t, 1, 4) * sigmoid(s) * (1 - sigmoid(s)) / s.size)
    pruner = MovementPruner(
        model, [{"op_types": ["Linear"]}], step, sgd, F.mse_loss, steps, 1, 4, score_threshold=0.497, regular_scale=3.0
    )
    _, masks = pruner.compress()
    np.testing.assert_allclose(hidden(model), hand.weight, rtol=1e-9)
    expected = (sigmoid(hand.scores) > 0.497).astype(float)
    np.testing.assert_array_equal(array(masks["0"]["weight"]), expected)
    if steps == 6:
        assert 0 < expected.sum() < 24


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_soft_movement_leaves_something_of_every_weight(threshold: float) -> None:
    """As in the authors' code: scores begin at zero, sigmoid(0) is no more than the threshold, 0.5 % + 1 stay."""
    model = nn.Sequential(nn.Linear(6, 40, bias=False).double(), nn.Linear(40, 4, bias=False).double())
    options = {"score_threshold": threshold, "regular_scale": 1000.0}
    _, masks = MovementPruner(model, [{"op_types": ["Linear"]}], step, sgd, F.mse_loss, 3, **options).compress()
    assert [int(masks[name]["weight"].sum()) for name in "01"] == [2, 1]  # of 240 and 160
    detach_masks(model)
    kept = Movement(model, {"0.weight": model[0].weight}, lambda s, *_: s, begin=0, end=1, threshold=threshold)
    kept.scores["0.weight"].data[3, 2] = 0.1
    kept.scores["0.weight"].data[5, 1] = 0.2 if threshold > 0.6 else -1.0
    masks_now = kept.masks()["0.weight"]
    assert masks_now[3, 2] and masks_now.sum() == 2 and bool(masks_now[5, 1]) is (threshold > 0.6)


def test_soft_movement_with_a_sparsity_reaches_it() -> None:
    model = linear()
    entry = {"op_types": ["Linear"], "sparsity": 0.25}
    _, masks = MovementPruner(model, [entry], step, sgd, F.mse_loss, 4, score_threshold=0.4).compress()
    assert masks["0"]["weight"].sum() == 18


def test_movement_of_channels_adds_up_their_scores() -> None:
    model = nn.Sequential(*linear(), nn.ReLU(), nn.Linear(4, 4, bias=False).double())
    entry = {"op_names": ["0"], "sparsity": 0.5}
    options = {"granularity": "coarse-grained", "dummy_input": X[:2]}
    pruner = MovementPruner(model, [entry], step, sgd, F.mse_loss, 5, 0, 3, **options)
    _, masks = pruner.compress()
    mask = array(masks["0"]["weight"])
    assert mask.all(1).sum() == 2 and mask.any(1).sum() == 2
    learned = pruner._scores
    assert learned is not None
    rows = array(learned["0.weight"]).sum(1)
    np.testing.assert_array_equal(mask[:, 0], rows > np.sort(rows)[1])


def test_other_masks_stay_while_movement_learns() -> None:
    model = nn.Sequential(*linear(), nn.Linear(4, 4, bias=False).double())
    mask = torch.ones(4, 4, dtype=torch.float64)
    mask[1] = 0
    attach_masks(model, {"1.weight": mask})
    MovementPruner(model, [{"op_names": ["0"], "sparsity": 0.5}], step, sgd, F.mse_loss, 2).compress()
    torch.testing.assert_close(attached_masks(model)["1.weight"], mask)


def test_nothing_is_attached_when_training_fails() -> None:
    def broken(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        criterion(model(X), Y).backward()
        raise RuntimeError("out of paper")

    model = linear()
    for pruner in (
        MovementPruner(model, [{"op_names": ["0"], "sparsity": 0.5}], broken, sgd, F.mse_loss),
        ADMMPruner(model, [{"op_names": ["0"], "sparsity": 0.5}], broken, sgd, F.mse_loss),
    ):
        with pytest.raises(RuntimeError, match="out of paper"):
            pruner.compress()
        assert not attached_masks(model) and type(model[0]) is nn.Linear and not model[0]._buffers


@pytest.mark.parametrize("make", [ADMMPruner, MovementPruner])
def test_the_same_seed_learns_the_same(make: Any) -> None:
    def shuffled(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        for batch in torch.randperm(16).split(4):
            optimizer.zero_grad()
            criterion(model(X[batch]), Y[batch]).backward()
            optimizer.step()

    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = linear()
        torch.rand(len(found))
        masks = make(
            model, [{"op_names": ["0"], "sparsity": 0.5}], shuffled, sgd, F.mse_loss, training_epochs=2
        ).compress()[1]
        found.append((model[0].weight.detach().clone(), masks["0"]["weight"]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["conv", "lstm"])
def test_structured_admm_begins_with_the_inputs_of_the_first_batch(kind: str) -> None:
    """Also its first projection is one of what goes together: the same weights as with example inputs."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x[:, None])[0].mean(1))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x).relu() + self.b(x).relu())

    found = []
    for inputs in ({}, {"dummy_input": X[:2]}):
        torch.manual_seed(0)
        model = (Recurrent() if kind == "lstm" else Residual()).double()
        entry = {"op_types": ["LSTM"], "sparsity": 0.5} if kind == "lstm" else {"op_names": ["a", "b"], "sparsity": 0.5}
        options = {"iterations": 2, "training_epochs": 1, "rho": 1.0, "granularity": "coarse-grained", **inputs}
        _, masks = ADMMPruner(model, [entry], step, sgd, F.mse_loss, **options).compress()
        found.append((dict(model.state_dict()), masks))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_trainer_that_never_calls_the_model_shows_no_inputs() -> None:
    def past_it(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        criterion(model[2](model[1](model[0](X))), Y).backward()

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    options = {"iterations": 1, "training_epochs": 1, "granularity": "coarse-grained"}
    with pytest.raises(ConfigError, match="trainer: does not call the model before the criterion"):
        ADMMPruner(model, [{"op_names": ["0"], "sparsity": 0.5}], past_it, sgd, F.mse_loss, **options).compress()


class Head(nn.Module):
    """The weight of an embedding is that of the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.out.weight = self.into.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.into(tokens))


def test_movement_of_a_tied_weight_is_that_of_all_its_uses() -> None:
    model, tokens = Head(), torch.arange(7)
    weight = model.into.weight.detach().clone().requires_grad_()
    loss = F.cross_entropy(weight[tokens] @ weight.T, (tokens + 1) % 7)
    expected = torch.autograd.grad(loss, weight)[0] * weight

    def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any) -> None:
        optimizer.zero_grad()
        criterion(model(tokens), (tokens + 1) % 7).backward()
        optimizer.step()

    weights = {"out.weight": model.out.weight}
    scores = Movement(
        model, weights, lambda values, *_: {n: torch.ones_like(v) for n, v in values.items()}, begin=0, end=1
    )
    seen = []
    scores._optimizer.register_step_pre_hook(lambda *_: seen.append(scores.scores["out.weight"].grad.clone()))
    movement(model, Training(epoch, sgd, F.cross_entropy), scores, epochs=1)
    torch.testing.assert_close(seen, [expected.detach()])


@pytest.mark.parametrize("make", [MovementPruner, ADMMPruner])
def test_what_was_masked_before_stays_so_while_it_learns(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what is hidden beneath is large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    with torch.no_grad():
        model[0].weight[:2] *= 100
    mask = torch.ones(4, 6)
    mask[:2] = 0
    attach_masks(model, {"0.weight": mask})
    seen, projected = [], []
    project = learned._projected
    monkeypatch.setattr(learned, "_projected", lambda *args: projected.append(project(*args)) or projected[-1])

    def watched(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int) -> None:
        seen.append(int((model[0].weight == 0).sum()))
        step(model, optimizer, criterion, epoch)

    options = (
        {"iterations": 2, "training_epochs": 2} if make is ADMMPruner else {"training_epochs": 5, "warm_up_step": 2}
    )
    options |= {} if make is ADMMPruner else {"cool_down_beginning_step": 4}
    make(model, [{"op_types": ["default"], "sparsity": 0.75}], watched, sgd, F.mse_loss, **options).compress()
    assert min(seen) == 12 and int((model[0].weight == 0).sum()) == 18
    assert all(not found["0.weight"][:2].any() and int((found["0.weight"] != 0).sum()) == 6 for found in projected)
    assert bool(projected) == (make is ADMMPruner)


def test_movement_of_a_trainer_with_an_optimizer_of_its_own_is_refused() -> None:
    def own(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        step(model, sgd(model.parameters()), criterion, epoch)

    entry = {"op_types": ["Linear"], "sparsity": 0.5}
    with pytest.raises(TrainingError, match="^trainer: does not step the optimizer that it is given, so that movement"):
        MovementPruner(linear(), [entry], own, sgd, F.mse_loss).compress()


def test_movement_of_half_weights_is_that_of_single_ones() -> None:
    """An input that is always zero has no gradients, and Adam's eps is zero in half."""

    def kept(kind: torch.dtype) -> Tensor:
        x, y = X.to(kind), Y.to(kind)
        x[:, 0] = 0

        def train(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
            for _ in range(20):
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()

        torch.manual_seed(0)
        model, entry = linear().to(kind), {"op_types": ["Linear"], "sparsity": 0.5}
        options = {"training_epochs": 2, "cool_down_beginning_step": 30}
        MovementPruner(model, [entry], train, sgd, F.mse_loss, **options).compress()
        return attached_masks(model)["0.weight"].float()

    half, single = kept(torch.half), kept(torch.float32)
    assert half.sum() == single.sum() == 12 and (half == single).sum() >= 22


def test_gradients_that_are_thrown_away_do_not_move_scores() -> None:
    def probing(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        (1000 * criterion(model(X.flip(1)), Y)).backward()
        optimizer.zero_grad()
        assert pickle.loads(pickle.dumps(model.state_dict())) and copy.deepcopy(optimizer).zero_grad() is None
        step(model, optimizer, criterion, epoch)

    found = []
    for trainer in (step, probing):
        torch.manual_seed(0)
        model = linear()
        weights = {"0.weight": dict(model.named_parameters())["0.weight"]}
        scores = Movement(
            model, weights, lambda values, *_: {n: torch.ones_like(v) for n, v in values.items()}, begin=0, end=1
        )
        movement(model, Training(trainer, sgd, F.mse_loss), scores, 3)
        found.append(array(scores.scores["0.weight"]))
    assert np.array_equal(*found) and found[0].any()
