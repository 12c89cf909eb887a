"""Every algorithm at work on a trained network: half goes, some epochs bring the accuracy back.

The same table as in benchmarks/cifar.py, on the digits of models/digits.py.
"""

import functools
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

from algorithms_table import LEARNED, RUNS, SCHEDULED, SEARCHED, Result, result  # noqa: E402
from digits import DigitsNet, build_model, evaluate, example_inputs, load_split  # noqa: E402
from training_setup import BATCHES, OneCycle, Setup, Shuffled, cycle  # noqa: E402

from speedup.masking import attached_masks  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_and_quick")
CONVOLUTIONS = ("conv1", "conv2", "conv3")
EPOCHS = 4
LEARNING = {"slim": 16, "admm": 16, "autocompress": 16, "movement": 4}
"""Epochs; 16 of them are 352 steps, about one epoch of CIFAR-10."""


def setup(epochs: int, learning: int, seed: int = 0) -> Setup:
    images, labels, _, _ = load_split()
    data = Shuffled(len(labels), 64, lambda index: (images[index], labels[index]))

    def score(model: torch.nn.Module) -> float:
        return 100 * (model(images[:500]).argmax(1) == labels[:500]).float().mean().item()

    return Setup(data, evaluate, score, example_inputs(), epochs, learning=learning, seed=seed)


@functools.cache
def found(name: str) -> Result:
    """What a run comes to."""
    return result(name, build_model().eval(), setup(EPOCHS, LEARNING.get(name, 1)))


def weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SEARCHED else []) for name in RUNS]
)
def test_an_algorithm_at_half(name: str) -> None:
    one, kind = found(name), RUNS[name].kind
    dense, half = weights(DigitsNet()), weights(DigitsNet(16))
    assert one.params[0] == dense and one.dense > 99 and one.seconds > 0
    assert one.epochs == ({**LEARNING, "lottery-l1": EPOCHS}.get(name, 0), EPOCHS)
    if kind == "channels":
        assert [getattr(one.model, layer).out_channels for layer in CONVOLUTIONS] == [16, 32, 64]
        assert one.params[1] == half == weights(one.model) and one.macs[1] < 0.26 * one.macs[0]
    elif kind == "ranked":
        widths = [getattr(one.model, layer).out_channels for layer in CONVOLUTIONS]
        assert widths != [16, 32, 64] and min(widths) >= 6  # no layer loses more than 80 %
        assert 0.1 * dense < one.params[1] == weights(one.model) < 0.6 * dense
    elif kind == "searched":
        assert 0.1 * dense < one.params[1] == weights(one.model) < 0.7 * dense and one.macs[1] < 0.7 * one.macs[0]
        assert one.pruned > 75  # candidates were looked at
        assert one.macs[1] <= 0.5 * one.macs[0] or name not in ("netadapt", "amc")
    else:
        masks = attached_masks(one.model)
        sizes = [getattr(one.model, layer).weight.numel() for layer in CONVOLUTIONS]
        assert [int((masks[f"{layer}.weight"] == 0).sum()) for layer in CONVOLUTIONS] == [n // 2 for n in sizes]
        assert one.params[1] == dense - sum(sizes) // 2 and one.macs[1] == one.macs[0]
    assert one.tuned >= 96, one
    assert one.tuned >= found("random").tuned - 2, one


@pytest.mark.parametrize("name", ["slim", "admm", "movement", "level", "linear-l1", "agp-l1"])
def test_what_goes_slowly_is_not_missed(name: str) -> None:
    """Where training prepares what goes, little is lost when it goes; channels by lot take most of the accuracy."""
    assert found("random").pruned < 50 < 75 < found(name).pruned, found(name)


def test_lottery_tickets_begin_again() -> None:
    assert found("lottery-l1").pruned < found("linear-l1").pruned  # what survives has its first values


def test_every_run_is_of_one_kind() -> None:
    assert {run.kind for run in RUNS.values()} == {"channels", "ranked", "elements", "searched"}
    assert LEARNED.keys() | SCHEDULED.keys() < RUNS.keys()


@pytest.mark.parametrize("name", ["random", "slim"])
def test_a_seed_decides(name: str) -> None:
    """What goes by lot, and what is learned before anything goes."""

    def pruned(seed: int) -> dict[str, torch.Tensor]:
        before, after = RUNS[name].way(build_model().eval(), setup(epochs=1, learning=1, seed=seed))
        assert any(
            not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True)
        )
        return before.state_dict()

    first, same, other = (pruned(seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(first[key].shape != other[key].shape or not torch.equal(first[key], other[key]) for key in first)


def test_the_dense_model_stays() -> None:
    model = build_model().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result("level", model, setup(epochs=1, learning=1))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not attached_masks(model) and not model.training


def test_batches_of_an_epoch() -> None:
    data = Shuffled(11, 4, lambda index: (index, -index))
    batches = list(data)
    assert len(data) == len(batches) == 2 and all(len(index) == 4 for index, _ in batches)
    seen = torch.cat([index for index, _ in batches])
    assert len(seen.unique()) == 8 and not torch.equal(seen, torch.cat([index for index, _ in data]))


def test_one_cycle_of_the_learning_rate() -> None:
    rates = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    model = torch.nn.Linear(2, 2)
    trainer = OneCycle([(torch.rand(3, 2), torch.zeros(3).long())] * 9, 5, 2, 0.3, autocast=False)
    for epoch in range(2):
        trainer(model, Noting(model.parameters(), lr=1.0), torch.nn.functional.cross_entropy, epoch)
    at = [(step + 0.5) / 10 for step in range(10)]
    wanted = [0.3 * (5 * x if x < 0.2 else math.cos(math.pi * (x - 0.2) / 1.6) ** 2) for x in at]
    assert rates == pytest.approx(wanted) and cycle(0.2) == 1 and cycle(1) == pytest.approx(0)
    assert BATCHES < 22  # of the 22 of an epoch of digits
