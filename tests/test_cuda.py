"""The same on an accelerator: what is proven, scored, trained, resumed and searched there is what it is on the CPU."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_pruners
import torch
import torch.nn.functional as F
from test_pruners import CASES, CONVS, Case, X, Y, made, sgd, sizes, small
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import graphprune
from graphprune import pruners
from graphprune.cli import app
from graphprune.training import Training
from graphprune.training.fit import fit
from speedup import ModelSpeedup, detach_masks
from speedup.masking import attached_masks

pytestmark = [
    pytest.mark.usefixtures("quiet_and_quick"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no accelerator here"),
]
MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """As on the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int = 0) -> None:
    model.train()
    for batch in torch.arange(32).split(8):
        optimizer.zero_grad()
        criterion(model(X[batch].cuda()), Y[batch].cuda()).backward()
        optimizer.step()


def there(case: Case) -> Case:
    """The case with its trainer and tensors on the accelerator."""
    name, ops, args, options = case

    def moved(value: Any) -> Any:
        return trainer if value is test_pruners.trainer else value.cuda() if isinstance(value, Tensor) else value

    return name, ops, *pytree.tree_map(moved, (args, options))


def near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.cpu(), other.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_pruner_shrinks_there(case: Case) -> None:
    model = small().cuda()
    _, masks = made(model, there(case)).compress()
    assert masks and all(mask.is_cuda for mask in attached_masks(model).values())
    model.eval()
    if test_pruners.is_structured(case):
        speedup = ModelSpeedup(model, X[:2].cuda(), masks)
        shrunk = speedup.speedup_model().eval()
        assert sizes(shrunk) < sizes(model)
        assert all(tensor.is_cuda for tensor in (*shrunk.parameters(), *shrunk.buffers()))
        if not speedup.left_behind:
            assert near(shrunk(X.cuda()), model(X.cuda()))
    detach_masks(model)
    assert not attached_masks(model) and type(model) is test_pruners.Small


@pytest.mark.parametrize("name", ["L1NormPruner", "L2NormPruner", "FPGMPruner", "RandomPruner", "LevelPruner"])
def test_masks_are_those_of_the_cpu(name: str) -> None:
    case = next(case for case in CASES if case[0] == name)
    (_, far), (_, near_by) = made(small().cuda(), there(case)).compress(), made(small(), case).compress()
    flat = [pytree.tree_leaves(masks) for masks in (far, near_by)]
    assert all(torch.equal(one.cpu(), other) for one, other in zip(*flat, strict=True))


def test_compress_and_an_optimizer_that_follows() -> None:
    model = small().cuda()
    training = Training(trainer, sgd(model.parameters()), F.cross_entropy)
    fit(model, training, 2)
    result = graphprune.compress(model.eval(), X[:2].cuda(), sparsity=0.5, round_to=1)
    plain = graphprune.compress(copy.deepcopy(model).cpu(), X[:2], sparsity=0.5, round_to=1)
    assert sizes(result.model) == sizes(plain.model)
    assert near(result.model(X.cuda()), plain.model(X))
    followed = training.following(model, result)
    momenta = [state["momentum_buffer"] for state in followed.optimizer.state.values()]
    assert momenta and all(one.is_cuda and one.any() for one in momenta)
    done = fit(result.model, followed, 2)
    assert len(done.epochs) == 2


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    def begun() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Dropout(), nn.Linear(16, 3)).cuda()

    batches = [(X[batch], Y[batch]) for batch in torch.arange(32).split(8)]
    training = Training.on(batches, F.cross_entropy, optimizer=sgd)
    whole, parted = begun(), begun()
    torch.backends.cudnn.deterministic = True
    fit(whole, training, 4)
    fit(parted, training, 2, folder=tmp_path)
    again = begun()
    fit(again, training, 4, folder=tmp_path, resume=True)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(whole.parameters(), parted.parameters(), strict=True))


@pytest.mark.parametrize("name", ["LinearPruner", "LotteryTicketPruner"])
def test_rounds_there(name: str) -> None:
    model = small().cuda()
    training = Training(trainer, sgd, F.cross_entropy)
    pruner = getattr(pruners, name)(
        model,
        [{"op_types": CONVS, "sparsity": 0.5}],
        "l1",
        2,
        finetuner=functools.partial(fit, training=training, epochs=1),
        speedup=True,
        dummy_input=X[:2].cuda(),
    )
    small_one, _ = pruner.compress()
    assert sizes(small_one) < sizes(small()) and next(small_one.parameters()).is_cuda


def accuracy(model: nn.Module) -> float:
    assert next(model.parameters()).is_cuda
    return (model(X.cuda()).argmax(1) == Y.cuda()).float().mean().item()


@pytest.mark.parametrize("name", ["SimulatedAnnealingPruner", "NetAdaptPruner", "SensitivityPruner", "AMCPruner"])
def test_a_search_there(name: str) -> None:
    def found() -> list[Tensor]:
        model = small().cuda()
        entry: dict[str, Any] = {"op_types": CONVS, "sparsity": 0.5}
        options: dict[str, Any] = {"dummy_input": X[:2].cuda(), "seed": 3}
        if name == "NetAdaptPruner":
            options |= {"short_term_fine_tuner": None, "sparsity_per_iteration": 0.25}
        if name == "AMCPruner":
            del entry["sparsity"]
            options |= {"train_episode": 4, "warmup": 2, "channel_round": 2}
        _, masks = getattr(pruners, name)(model, [entry], evaluator=accuracy, **options).compress()
        return pytree.tree_leaves(masks)

    first, second = found(), found()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert any((mask == 0).any() for mask in first)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["compress", str(MODELS / "digits.py"), "--sparsity", "0.5", "--no-bench", "--device", "cuda"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "there")])
    assert done.exit_code == 0, done.output
    proven = CliRunner().invoke(app, ["verify", str(tmp_path / "there")])
    assert proven.exit_code == 0, proven.output
