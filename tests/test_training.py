"""Training in the user's own loop or in a plain one; stopped and resumed, with hooks, penalties and early ends."""

from __future__ import annotations

import copy
import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune.errors import ConfigError, ModelError, TrainingError
from graphprune.training import Training
from graphprune.training.fit import Epoch, evaluated, fit
from graphprune.training.loss import proximity, regularised, shrinkage

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


def net() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(40, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def loader(**options) -> DataLoader:
    return DataLoader(dataset(), 8, shuffle=True, **options)


def loop(model, optimizer, criterion, epoch) -> None:
    for inputs, targets in loader():
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_the_plain_loop_is_that_of_a_user() -> None:
    mine, theirs, again = net(), net(), net()
    fitted = fit(mine, Training.on(loader(), nn.CrossEntropyLoss(), optimizer=sgd), 3)
    fit(theirs, Training(loop, sgd, nn.CrossEntropyLoss()), 3)
    assert same(mine, theirs)
    losses = [epoch.loss for epoch in fitted.epochs]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3 and fitted.best == 2
    torch.manual_seed(0)
    optimizer = sgd(again.parameters())
    for epoch in range(3):
        loop(again.train(), optimizer, nn.CrossEntropyLoss(), epoch)
    assert same(mine, again)


def test_the_seed_decides_and_the_random_numbers_of_the_process_stay() -> None:
    models = [net() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for model, seed in zip(models, (7, 7, 8), strict=True):
        fit(model, Training.on(loader(), nn.CrossEntropyLoss()), 1, seed=seed)
    assert same(models[0], models[1]) and not same(models[0], models[2])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_modes_of_all_modules_stay() -> None:
    model = net().eval()
    model[1].train()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    fit(model, Training.on(loader(), nn.CrossEntropyLoss()), 1)
    assert all(seen) and [module.training for module in model] == [False, True, False, False, False]


class Scaled(nn.Module):
    """Takes two inputs, one of them by name, and returns its loss if it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None, labels: Tensor | None = None):
        out = self.layer(x if scale is None else x * scale)
        return out if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


X, Y = torch.ones(4, 6), torch.zeros(4, dtype=torch.long)
ONE = torch.tensor(1.0)
FORMS = {
    "pair": ((X, Y), True),
    "list": ([X, Y], True),
    "positional": (((X, ONE), Y), True),
    "keywords": (({"x": X, "scale": ONE}, Y), True),
    "labels": ({"x": X, "labels": Y}, True),
    "targets": ({"x": X, "targets": Y}, True),
    "own": ({"x": X, "labels": Y}, False),
    "own positional": ((X, ONE, Y), False),
}


@pytest.mark.parametrize(("batch", "given"), FORMS.values(), ids=FORMS)
def test_the_forms_of_a_batch(batch, given: bool) -> None:
    torch.manual_seed(0)
    model = Scaled()
    expected = nn.functional.cross_entropy(model(X), Y).item()
    fitted = fit(model, Training.on([batch], nn.functional.cross_entropy if given else None, optimizer=sgd), 2)
    assert fitted.epochs[0].loss == pytest.approx(expected) and fitted.epochs[1].loss < expected


def test_a_model_of_transformers_brings_its_loss() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 12,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    tokens = torch.arange(40).reshape(5, 8) % 12
    batch = transformers.BatchEncoding({"input_ids": tokens, "labels": torch.tensor([0, 1, 0, 1, 1])})
    fitted = fit(model, Training.on([batch], optimizer=sgd), 20)
    assert fitted.epochs[-1].loss < fitted.epochs[0].loss / 2


class Pairs(Scaled):
    def forward(self, x, labels):
        out = self.layer(x)
        return out, nn.functional.cross_entropy(out, labels)


def test_a_loss_in_a_tuple() -> None:
    assert fit(Pairs(), Training.on([(X, Y)]), 1).epochs[0].loss > 0


def test_gradients_are_clipped() -> None:
    model, norms = net(), []
    optimizer = sgd(model.parameters())

    def note(*_) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))

    optimizer.register_step_pre_hook(note)
    fit(model, Training.on(loader(), nn.CrossEntropyLoss(), optimizer=optimizer, clip=0.1), 1)
    assert len(norms) == 5 and max(norms) == pytest.approx(0.1, rel=1e-4)


class Calls:
    def __init__(self) -> None:
        self.calls: list[object] = []

    def on_epoch_begin(self, epoch: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def on_batch_begin(self, step: int) -> None:
        self.calls.append(step)

    def on_batch_end(self) -> None:
        self.calls.append("end")

    def on_epoch_end(self) -> None:
        self.calls.append("done")


def test_hooks_are_called() -> None:
    hooks, own = Calls(), Calls()
    fit(net(), Training.on(loader(), nn.CrossEntropyLoss()), 2, hooks=hooks)
    batches = [word for step in range(5) for word in (step, "end")]
    assert hooks.calls == ["epoch 0", *batches, "done", "epoch 1", *batches, "done"]

    def trainer(model, optimizer, criterion, epoch, hooks) -> None:
        hooks.on_batch_begin(9)

    fit(net(), Training(trainer, sgd), 1, hooks=own)
    assert own.calls == ["epoch 0", 9, "done"]
    with pytest.raises(ConfigError, match="trainer: takes no hooks"):
        fit(net(), Training(loop, sgd, nn.CrossEntropyLoss()), 1, hooks=own)


# --- what a trainer takes ---------------------------------------------------------------------------------------------


def by_names(model, criterion, optimizer, epoch, callback):
    callback()
    return model, optimizer, criterion, epoch


TRAINERS = {
    "four": lambda net, opt, loss, number: (net, opt, loss, number),
    "three": lambda net, opt, loss: (net, opt, loss, 4),
    "names in another order": by_names,
    "options": lambda model, optimizer, criterion, epoch=0, verbose=False: (model, optimizer, criterion, epoch),
    "by position only": eval("lambda a, b, c, d, /: (a, b, c, d)"),
    "anything": lambda *values: values,
}


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_a_trainer_is_given_what_it_takes(trainer) -> None:
    model, seen = net(), []
    optimizer = sgd(model.parameters())
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    @functools.wraps(trainer)  # its signature is that of the trainer
    def record(*args, **kwargs) -> None:
        seen.append(trainer(*args, **kwargs))

    Training(record, optimizer, criterion).epoch(model, optimizer, 4)
    ((got, its, loss, epoch),) = seen
    assert got is model and its is optimizer and epoch == 4
    assert loss.label_smoothing == 0.1  # the attributes of the criterion can be read
    assert loss(torch.ones(2, 3), torch.zeros(2, dtype=torch.long)) == criterion(
        torch.ones(2, 3), torch.zeros(2).long()
    )


@pytest.mark.parametrize(
    "trainer", [lambda: None, lambda model, data: None, lambda a, criterion, b, c: None, lambda a, b, c, d, e: None]
)
def test_a_trainer_of_another_form_is_refused(trainer) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer: takes \(.*\)\. Let it take \(model, optimizer, criterion, epoch\)"
    ):
        Training(trainer, sgd)


def replaces(model, optimizer, criterion, epoch) -> None:
    model[0].weight = nn.Parameter(torch.zeros(8, 6))


def returns(model, optimizer, criterion, epoch) -> nn.Module:
    return copy.deepcopy(model)


def spoils(model, optimizer, criterion, epoch) -> None:
    with torch.no_grad():
        model[4].bias.fill_(torch.inf)


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        (replaces, "trainer: replaced parameter 0.weight of the model"),
        (returns, "trainer: returns another model"),
        (spoils, "4.bias: holds values that are not finite after epoch 0"),
    ],
)
def test_a_trainer_that_trains_something_else_is_refused(trainer, text: str) -> None:
    with pytest.raises(TrainingError, match=text):
        fit(net(), Training(trainer, sgd), 1)


@pytest.mark.parametrize("plain", [True, False])
def test_a_loss_that_is_no_number_is_refused(plain: bool) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets) * torch.nan

    training = Training.on(loader(), loss) if plain else Training(loop, sgd, loss)
    with pytest.raises(TrainingError, match="loss: is nan in epoch 0 after 0 batches. Lower the learning rate"):
        fit(net(), training, 2)


@pytest.mark.parametrize("said", [float("nan"), None, "0.9", True, {"acc": 1}, torch.ones(2), torch.tensor(torch.nan)])
def test_an_evaluator_that_returns_no_number_is_refused(said) -> None:
    with pytest.raises(TrainingError, match="evaluator: returns .*, not a number"):
        fit(net(), Training.on(loader(), nn.CrossEntropyLoss()), 1, evaluator=lambda model: said)


@pytest.mark.parametrize("said", [0.5, 1, torch.tensor([0.5]), np.float32(0.5)])
def test_an_evaluator_sees_the_model_in_eval_mode(said) -> None:
    model, seen = net(), []
    score = evaluated(lambda one: seen.append((one.training, torch.is_grad_enabled())) or said, model)
    assert score == float(said) and seen == [(False, False)] and model.training


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Training.on(iter([(X, Y)])), "data: is a list_iterator, which cannot be gone through twice"),
        (lambda: Training.on(3), "data: is a int"),
        (lambda: Training.on([(X, Y)], clip=0), "clip: is 0"),
        (lambda: Training(3, sgd), "trainer: is a int"),
        (lambda: Training(loop, sgd, 3), "criterion: is a int"),
        (lambda: Training(loop, 3), "optimizer: is a int"),
        (lambda: fit(net(), Training.on([]), 1), "data: holds no batches in epoch 0"),
        (lambda: fit(net(), Training.on([X], nn.functional.mse_loss), 1), "data: a batch is a Tensor"),
        (lambda: fit(net(), Training.on([(X, X, Y)], nn.functional.mse_loss), 1), "data: a batch is a tuple of 3"),
        (lambda: fit(net(), Training.on([{"x": X}], nn.functional.mse_loss), 1), "data: a batch holds x. Name its"),
        (lambda: fit(net(), Training.on([X]), 1), "loss: the model returns a Tensor without one"),
        (lambda: fit(net(), Training.on([(X, Y)], lambda a, b: a), 1), r"loss: is a tensor of shape \(4, 3\)"),
        (lambda: fit(net(), Training.on([(X, Y)], lambda a, b: torch.ones(())), 1), "loss: does not depend"),
        (lambda: fit(net(), Training(loop, sgd(net().parameters())), 1), "optimizer: holds 6 parameters that the"),
        (lambda: fit(net(), Training(loop, lambda parameters: None), 1), "optimizer: the function makes a NoneType"),
        (lambda: fit(net(), Training.on([X]), -1), "epochs: is -1"),
        (lambda: fit(net(), Training.on([X]), 1, patience=0), "patience: is 0"),
        (lambda: fit(net(), Training.on([X]), 1, optimize_mode="max"), "optimize_mode: is 'max'"),
        (lambda: fit(net(), Training.on([X]), 1, keep="first"), "keep: is 'first'. Give last or best"),
        (lambda: fit(net(), Training(lambda *a: None, sgd), 1, keep="best"), "keep: needs a loss or a score"),
        (lambda: fit(net(), Training.on([X]), 1, resume=True), "resume: there is no folder"),
        (lambda: fit(net(), Training.on([X]), 1, folder="/nowhere/at/all"), "there is no folder /nowhere/at to make"),
        (lambda: fit(net(), Training(lambda *a: None, sgd), 1, patience=1), "patience: needs a loss or a score"),
        (lambda: Training(loop, sgd).regularised(lambda: ONE), "criterion: is None"),
        (lambda: fit(net(), loop, 1), r"training: is <function loop at \w+>\. Give a Training"),
        (lambda: fit(None, Training.on([X]), 1), "model: is None. Give a module."),
        (lambda: fit(nn.ReLU(), Training.on([X]), 1), "model: ReLU has no parameter that can be trained"),
        (lambda: fit(net().requires_grad_(False), Training(loop, sgd), 1), "model: Sequential has no parameter that"),
        (lambda: torch.no_grad()(fit)(net(), Training(loop, sgd), 1), "model: gradients are off, so that it cannot be"),
        (lambda: fit(net(), Training.on([X]), 1, seed=None), "seed: is None. Give a whole number in"),
        (lambda: fit(net(), Training.on([X]), 1, seed=1.5), "seed: is 1.5"),
        (lambda: fit(net(), Training.on([X]), 1, seed="a"), "seed: is 'a'"),
        (lambda: fit(net(), Training.on([X]), 1, seed=-1), "seed: is -1"),
        (lambda: fit(net(), Training.on([X]), True), "epochs: is True"),
        (lambda: fit(net(), Training.on([X]), 1, evaluator=5), "evaluator: is 5. Give a function of a model."),
        (lambda: fit(net(), Training.on([X]), 1, progress=5), "progress: is 5. Give a function of an Epoch."),
        (lambda: fit(net(), Training.on([X]), 1, folder=5), "folder: is 5. Give a path."),
        (lambda: fit(net(), Training.on([X]), 1, hooks=5), "hooks: 5 has no on_epoch_begin. Give an object with"),
        (lambda: fit(net(), X.expand(9, 4, 6), 1), r"training: is tensor\(\[.{49}\.\.\.\. Give a Training"),
        (lambda: Training(loop, sgd, None, "step"), "schedule: is a str. Give one, or a function of an optimizer"),
        (
            lambda: Training(loop, sgd, None, StepLR),
            r"schedule: .*StepLR.* \(missing a required argument: 'step_size'\)",
        ),
        (lambda: Training(loop, lambda: None), r"optimizer: .* cannot be called with parameters alone"),
        (lambda: fit(net(), Training(loop, sgd, None, lambda one: None), 1), "schedule: the function makes a NoneType"),
        (lambda: Training.on([(X, Y)], clip="1"), "clip: is '1'. Give a positive number."),
        (
            lambda: Training.on([(X, Y)], nn.CrossEntropyLoss),
            r"criterion: is the class CrossEntropyLoss. Give an insta",
        ),
    ],
)
def test_mistakes_end_in_one_line(make, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_schedule_of_another_optimizer_is_refused() -> None:
    one, other = sgd(net().parameters()), sgd(net().parameters())
    with pytest.raises(ConfigError, match="schedule: belongs to another optimizer"):
        Training(loop, one, None, torch.optim.lr_scheduler.StepLR(other, 1))


# --- penalties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
def test_a_penalty_acts_in_both_loops(plain: bool) -> None:
    """One step of SGD on a loss and scale * sum |gamma| is one step on the loss less rate * scale * sign(gamma)."""
    free, bound = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    for norm in (free, bound):
        norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.25, -1.0, 3.0])
    targets = torch.randn(8, 6)
    data = [(torch.randn(8, 6), targets)]
    rate, scale = 0.1, 0.01

    def once(model, optimizer, criterion, epoch) -> None:
        optimizer.zero_grad()
        criterion(model(data[0][0]), data[0][1]).backward()
        optimizer.step()

    def make(parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=rate)

    training = Training.on(data, nn.MSELoss(), optimizer=make) if plain else Training(once, make, nn.MSELoss())
    losses = [fit(free, training, 1), fit(bound, training.regularised(shrinkage([bound.weight], scale)), 1)]
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1])
    torch.testing.assert_close(bound.weight, free.weight - rate * scale * signs)
    assert losses[1].epochs[0].loss == pytest.approx(losses[0].epochs[0].loss + scale * 7.75)


def test_the_penalty_of_admm() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    z, u = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25])
    penalty = proximity(lambda: [(weight, z - u)], rho=0.1)
    penalty().backward()
    assert penalty().item() == pytest.approx(0.05 * (0.5**2 + 1.75**2))
    torch.testing.assert_close(weight.grad, 0.1 * torch.tensor([0.5, -1.75]))


def test_an_evaluation_has_no_penalty() -> None:
    criterion = regularised(nn.L1Loss(), lambda: torch.tensor(5.0))
    one, two = torch.tensor([1.0]), torch.tensor([3.0])
    assert float(criterion(one, two)) == 7.0
    with torch.no_grad():
        assert float(criterion(one, two)) == 2.0
    assert criterion.reduction == "mean" and criterion.to("cpu") is criterion


def test_a_penalty_that_has_no_effect_is_refused() -> None:
    def ignores(model, optimizer, criterion, epoch) -> None:
        loop(model, optimizer, nn.functional.cross_entropy, epoch)

    training = Training(ignores, sgd, nn.CrossEntropyLoss())
    assert fit(net(), training, 1).epochs[0].loss is None
    with pytest.raises(TrainingError, match="trainer: did not call the criterion"):
        fit(net(), training.regularised(lambda: ONE), 1)


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "best", "number"), [("maximize", 1, 4), ("minimize", 3, 6)])
def test_training_ends_when_nothing_gets_better(mode, best: int, number: int) -> None:
    scores = iter([2.0, 3.0, 1.5, 1.0, 3.0, 1.0, 9.0])
    training = Training.on(loader(), nn.CrossEntropyLoss())
    fitted = fit(net(), training, 9, evaluator=lambda model: next(scores), optimize_mode=mode, patience=2)
    assert (fitted.best, len(fitted.epochs), fitted.stopped) == (best, number, True)


def test_training_ends_when_the_loss_gets_no_lower() -> None:
    training = Training.on(loader(), nn.CrossEntropyLoss(), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
    model = net()
    model[3].p = 0.0
    model[1].momentum = 0.0
    fitted = fit(model, Training.on(list(loader()), nn.CrossEntropyLoss(), optimizer=training.optimizer), 9, patience=3)
    assert fitted.stopped and fitted.best == 0 and len(fitted.epochs) == 4


@pytest.mark.parametrize("killed", [False, True])
def test_the_best_weights_are_kept(tmp_path: Path, killed: bool) -> None:
    training, seen = Training.on(loader(), nn.CrossEntropyLoss(), optimizer=sgd), []

    def evaluator(model: nn.Module) -> float:
        seen.append(copy.deepcopy(model))
        return [2.0, 3.0, 1.5, 1.0, 2.5][len(seen) - 1]

    def die(epoch: Epoch) -> None:
        if killed and epoch.epoch == 2:
            raise Killed

    model, options = net(), {"evaluator": evaluator, "keep": "best", "folder": tmp_path / "run"}
    if killed:
        with pytest.raises(Killed):
            fit(model, training, 5, progress=die, **options)
        model = net()
    fitted = fit(model, training, 5, resume=killed, **options)
    assert fitted.best == 1 and len(seen) == 5 and same(model, seen[1]) and not same(model, seen[4])
    last = net()
    fit(last, training, 5, evaluator=evaluator, folder=tmp_path / "run", resume=True)
    assert same(last, seen[4])
    fit(last, training, 6, evaluator=lambda model: 0.0, folder=tmp_path / "run", resume=True)
    with pytest.raises(ModelError, match="was written without the best weights"):
        fit(net(), training, 7, resume=True, **options)


# --- stopped and resumed ----------------------------------------------------------------------------------------------

schedules = torch.optim.lr_scheduler
RUNS = {
    "SGD": (sgd, None),
    "AdamW": (torch.optim.AdamW, None),
    "schedule": (sgd, lambda optimizer: schedules.StepLR(optimizer, 2, 0.1)),
    "milestones": (sgd, lambda optimizer: schedules.MultiStepLR(optimizer, [1, 2, 2])),
    "plateau": (sgd, lambda optimizer: schedules.ReduceLROnPlateau(optimizer, patience=0)),
    "cosine": (torch.optim.AdamW, lambda optimizer: schedules.CosineAnnealingLR(optimizer, 5)),
    "one cycle": (torch.optim.AdamW, lambda optimizer: schedules.OneCycleLR(optimizer, 0.1, 6)),
    "cyclic": (sgd, lambda optimizer: schedules.CyclicLR(optimizer, 0.01, 0.1, 2)),
    "lambda": (sgd, lambda optimizer: schedules.LambdaLR(optimizer, lambda epoch: 0.5**epoch)),
    "sequence": (
        torch.optim.RMSprop,
        lambda optimizer: schedules.SequentialLR(
            optimizer, [schedules.LinearLR(optimizer, 0.1), schedules.ExponentialLR(optimizer, 0.5)], [2]
        ),
    ),
}


class Killed(Exception):
    pass


def killed_in(epoch: int, batch: int, form):
    """A loop that dies in the middle of an epoch."""

    def trainer(model, optimizer, criterion, epoch_now) -> None:
        for step, (inputs, targets) in enumerate(form):
            if (epoch_now, step) == (epoch, batch):
                raise Killed
            optimizer.zero_grad()
            noise = random.random() + np.random.rand()  # further sources of random numbers
            criterion(model(inputs + noise * 1e-2), targets).backward()
            optimizer.step()

    return trainer


@pytest.mark.parametrize(("make", "schedule"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("own", [False, True])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, make, schedule, own: bool) -> None:
    def run(model: nn.Module, dies: int, **options):
        data = loader(generator=torch.Generator().manual_seed(2)) if own else loader()
        training = Training(killed_in(dies, 2, data), make, nn.CrossEntropyLoss(), schedule)
        if own:  # a loader with a generator of its own is known to the plain loop
            training = Training.on(data, nn.CrossEntropyLoss(), optimizer=make, schedule=schedule)

        def die(epoch: Epoch) -> None:
            if own and epoch.epoch == dies - 1:
                raise Killed

        return fit(model, training, 5, seed=4, progress=die, **options)

    whole, killed, resumed = net(), net(), net()
    run_whole = run(whole, -1)
    with pytest.raises(Killed):
        run(killed, 3, folder=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["epoch-00003"]
    torch.manual_seed(99)  # another process
    run_resumed = run(resumed, -1, folder=tmp_path / "run", resume=True)
    assert same(whole, resumed) and not same(whole, killed)
    assert run_whole.epochs == run_resumed.epochs and len(run_whole.epochs) == 5
    one, other = run_whole.optimizer.state_dict(), run_resumed.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index, entry in one["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other["state"][index][k])) for k, v in entry.items())


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    model, again = net(), net()
    training = Training.on(loader(), nn.CrossEntropyLoss())
    first = fit(model, training, 2, folder=tmp_path / "run", evaluator=lambda model: 1.0, patience=1)
    second = fit(again, training, 9, folder=tmp_path / "run", resume=True, evaluator=lambda model: 1.0, patience=1)
    assert same(model, again) and first.epochs == second.epochs and second.stopped


def test_nothing_is_pickled(tmp_path: Path) -> None:
    fit(net(), Training.on(loader(), nn.CrossEntropyLoss()), 1, folder=tmp_path / "run")
    (path,) = (tmp_path / "run").iterdir()
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors", "weights.safetensors"]
    assert graphprune.weights.read_weights(path / "weights.safetensors").keys() == net().state_dict().keys()


def test_a_snapshot_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = net(), tmp_path / "run"
    training = Training.on(loader(), nn.CrossEntropyLoss())
    fit(model, training, 1, folder=folder)
    monkeypatch.setattr(json, "dumps", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        fit(net(), training, 3, folder=folder, resume=True)
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["epoch-00001"]
    fit(net(), training, 2, folder=folder, resume=True)
    assert [path.name for path in folder.iterdir()] == ["epoch-00002"]  # what the dead one left is gone


def test_a_rate_that_is_a_tensor_and_moves(tmp_path: Path) -> None:
    def made(parameters):
        return torch.optim.AdamW(parameters, lr=torch.tensor(1e-3))

    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

    loop = Training.on(loader(), nn.CrossEntropyLoss(), optimizer=made, schedule=cosine)
    whole, first, second = net(), net(), net()
    fit(whole, loop, 2)
    fit(first, loop, 1, folder=tmp_path)
    fit(second, loop, 2, folder=tmp_path, resume=True)
    assert same(second, whole)


def test_snapshots_of_something_else_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(net(), Training.on(loader(), nn.CrossEntropyLoss(), optimizer=sgd), 1, folder=folder)
    plain = Training.on(loader(), nn.CrossEntropyLoss(), optimizer=sgd)
    with pytest.raises(ConfigError, match="holds a training run. Resume it"):
        fit(net(), plain, 2, folder=folder)
    with pytest.raises(ModelError, match="was written with optimizer SGD, not AdamW"):
        fit(net(), Training.on(loader(), nn.CrossEntropyLoss()), 2, folder=folder, resume=True)
    with pytest.raises(ModelError, match=r"was written with an optimizer of lr 0.1, not 0.5. Use the same one."):
        faster = Training(plain.trainer, lambda parameters: torch.optim.SGD(parameters, lr=0.5), plain.criterion)
        fit(net(), faster, 2, folder=folder, resume=True)
    with pytest.raises(ModelError, match="was written with schedule None, not StepLR"):
        scheduled = Training(plain.trainer, sgd, plain.criterion, RUNS["schedule"][1])
        fit(net(), scheduled, 2, folder=folder, resume=True)
    model = net()
    with pytest.raises(ModelError, match="was written with 0 generators of a loader, not 1. Use the same loader."):
        drawn = Training.on(loader(generator=torch.Generator()), nn.CrossEntropyLoss(), optimizer=sgd)
        fit(model, drawn, 2, folder=folder, resume=True)
    assert same(model, net())
    with pytest.raises(ModelError, match="0.weight has shape"):
        fit(nn.Sequential(nn.Linear(6, 9), *net()[1:]), plain, 2, folder=folder, resume=True)
    with pytest.raises(ModelError, match=r"has groups of \[6\] parameters, the optimizer of \[2\]"):
        few = Training(plain.trainer, lambda parameters: sgd(parameters[:2]), plain.criterion)
        fit(net(), few, 2, folder=folder, resume=True)
    (folder / "epoch-00001" / "state.json").write_text("{}")
    with pytest.raises(ModelError, match="is no snapshot of a training run"):
        fit(net(), plain, 2, folder=folder, resume=True)


# --- after a shrink ---------------------------------------------------------------------------------------------------


def test_training_follows_a_shrunk_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = sgd(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    training = Training.on(loader(), nn.CrossEntropyLoss(), optimizer=optimizer, schedule=schedule)
    fit(model, training, 1)
    result = graphprune.compress(model, X, 0.5, round_to=1)
    after = training.following(model, result)
    fitted = fit(result.model, after, 3)
    assert [epoch.rate for epoch in fitted.epochs] == pytest.approx([0.1, 0.01, 0.01])
    assert fitted.optimizer is after.optimizer and result.model[0].weight.shape == (4, 6)
    with pytest.raises(ConfigError, match="optimizer: holds 4 parameters that the model does not have"):
        fit(result.model, training, 1)
    factory = Training.on(loader(), nn.CrossEntropyLoss(), optimizer=sgd)
    assert factory.following(model, result) is factory
