"""LPOT's form of pruning: its file, its loop, what becomes zero and when."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lpot_file import CONV, FILE, Net, data, manual_loop, net, pruning, run_described, run_on
from test_cli import COMPLETE, complaint, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune import folder as files
from graphprune.config import Request, read_request
from graphprune.config_file import read_config_file
from graphprune.errors import ConfigError
from graphprune.lpot import Pruning, common
from graphprune.lpot.config import read_lpot
from graphprune.training import Training
from graphprune.training.callbacks import lightning_callback
from speedup.masking import attached_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

TENSORS = {"first.weight": 8 * 32, "last.weight": 32 * 3, "last.bias": 3}


def zeros(model: nn.Module, name: str) -> int:
    """How many elements of a weight are zero, as the model computes with it."""
    path, _, last = name.rpartition(".")
    return int((getattr(model.get_submodule(path), last) == 0).sum())


def held(model: nn.Module, name: str) -> Tensor:
    """What a parameter itself holds."""
    return dict(model.named_parameters())[name].detach()


def at(time: Fraction, initial: str, target: str, start: int, end: int, frequency: str) -> Fraction:
    """The sparsity at a time, in exact numbers."""
    if time < start:
        return Fraction(0)
    low, high = Fraction(initial), Fraction(target)
    steps = (time - start) // Fraction(frequency)
    return low + (high - low) * min(steps * Fraction(frequency), end - start) / (end - start) if time < end else high


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_a_pruner_does_not_say_stands_one_level_higher(write: Callable[..., Path]) -> None:
    config = read_lpot(write())
    first, second = config.goals
    assert (first.names, first.initial, first.target) == (("first.weight",), 0.2, 0.8)
    assert (first.start, first.end, first.frequency) == (1, 4, 0.25)
    assert (second.initial, second.target, second.start, second.end, second.frequency) == (0.1, 0.6, 0, 6, 2.0)
    (nearer,) = read_lpot(
        write(
            ("      target_sparsity: 0.6\n", "      target_sparsity: 0.6\n      end_epoch: 5\n      frequency: 3\n"),
            ("        - !Pruner\n            names: ['last.*']\n", ""),
            ("            end_epoch: 4\n            update_frequency: 0.25\n", ""),
        )
    ).goals
    assert (nearer.end, nearer.frequency) == (5, 3.0)
    train = config.train
    assert (train.start_epoch, train.end_epoch, train.iteration) == (0, 6, 5)
    assert train.criterion is not None and not train.criterion.arguments  # the word None is YAML's for nothing said
    assert train.optimizer is not None and train.optimizer.arguments["learning_rate"] == 0.02
    assert train.dataloader is not None
    assert [one.name for one in train.dataloader.transform][1:3] == ["RandomHorizontalFlip", "ToTensor"]


def test_without_names_all_weights_go_that_nothing_else_names(write: Callable[..., Path]) -> None:
    prune = pruning(write(("names: ['last.*']", "end_epoch: 6")))
    prune.pruning_func = manual_loop(prune, epochs=6)
    prune()
    assert {name: goal.target for name, goal in prune.goals.items()} == {"first.weight": 0.8, "last.weight": 0.6}


def test_of_a_tied_weight_any_name_will_do(write: Callable[..., Path]) -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    model["last"].weight = model["first"].weight
    with pytest.raises(ConfigError, match=r"pruners\[1\].names: 'last.weight' is asked for in pruners\[0\] too"):
        run_on(model, write())
    prune = Pruning(write(("['last.*']", "['last.bias']"), ("'first.weight'", "'last.weight'")))
    prune.model, prune.pruning_func = model, lambda model: (prune.on_epoch_begin(4), prune.on_batch_begin(0))
    prune.train_dataloader = data()
    with pytest.warns(UserWarning, match="last.bias: .* training ended before epoch 6"):
        prune()
    assert (model["first"].weight == 0).sum() == math.ceil(0.8 * 16)


def test_the_files_of_the_documentation_are_read(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
    pruning, listed = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "conf.yaml").write_text(pruning)
    first, second = read_lpot(tmp_path / "conf.yaml").goals
    assert (first.target, first.end, first.frequency, second.target, second.names) == (0.9, 8, 0.1, 0.5, ())
    (tmp_path / "list.yaml").write_text(listed)
    request = Request.of(**read_request(read_config_file(tmp_path / "list.yaml"), tmp_path))
    assert request.criterion == "taylor" and request.config_list is not None and len(request.config_list) == 2


# --- what becomes zero, and when --------------------------------------------------------------------------------------


def test_sparsity_grows_linearly_by_epochs_and_inside_of_them(write: Callable[..., Path]) -> None:
    by_hand = {0: [0.0] * 8, 1: [0.2, 0.2, 0.25, 0.25, 0.3, 0.3, 0.35, 0.35], 4: [0.8] * 8, 6: [0.8] * 8}
    by_epoch = {0: 0.1, 1: 0.1, 2: 0.1 + 0.5 / 3, 3: 0.1 + 0.5 / 3, 4: 0.1 + 1 / 3, 5: 0.1 + 1 / 3, 6: 0.6}
    seen: dict[str, dict[tuple[int, int], int]] = {"first.weight": {}, "last.weight": {}, "last.bias": {}}

    def watch(model: nn.Module, epoch: int, step: int) -> None:
        for name, counts in seen.items():
            counts[epoch, step] = zeros(model, name)
            assert counts[epoch, step] == int((held(model, name) == 0).sum())  # in the parameter as well

    prune = pruning(write())
    prune.pruning_func = manual_loop(prune, watch=watch)
    prune()
    for (epoch, step), count in seen["first.weight"].items():
        share = at(epoch + Fraction(step, 8), "1/5", "4/5", 1, 4, "1/4")
        assert count == math.ceil(256 * share), (epoch, step)
        if epoch in by_hand:
            assert abs(share - by_hand[epoch][step]) < 1e-12
    for name in ("last.weight", "last.bias"):
        for (epoch, step), count in seen[name].items():
            assert count == min(math.ceil(TENSORS[name] * by_epoch[epoch] - 1e-9), TENSORS[name] - 1), (
                name,
                epoch,
                step,
            )


@pytest.mark.parametrize(("batches", "frequency"), [(7, "0.1"), (10, "0.1"), (3, "0.3"), (4, "1.5")])
def test_a_step_that_does_not_fit_the_batches_is_at_the_next_one(
    write: Callable[..., Path], batches: int, frequency: str
) -> None:
    prune = pruning(
        write(("update_frequency: 0.25", f"update_frequency: {frequency}"), ("['last.*']", "['last.weight']"))
    )
    prune.train_dataloader = data(batches)

    def watch(model: nn.Module, epoch: int, step: int) -> None:
        share = at(epoch + Fraction(step, batches), "1/5", "4/5", 1, 4, frequency)
        assert zeros(model, "first.weight") == math.ceil(256 * share)

    prune.pruning_func = manual_loop(prune, watch=watch)
    prune()


def test_the_smallest_go_and_what_is_zero_stays_zero(write: Callable[..., Path]) -> None:
    counts = [0]

    class Watched(Pruning):
        def on_epoch_begin(self, epoch: int) -> None:
            self.watched(lambda: super(Watched, self).on_epoch_begin(epoch))

        def on_batch_begin(self, step: int) -> None:
            self.watched(lambda: super(Watched, self).on_batch_begin(step))

        def watched(self, hook: Callable[[], None]) -> None:
            assert self.model is not None
            before = held(self.model, "first.weight").numpy().copy()
            hook()
            gone = self.model.get_submodule("first").weight.detach().numpy() == 0
            if gone.sum() > counts[-1]:
                smallest = np.argsort(np.abs(before), axis=None, kind="stable")[: gone.sum()]
                assert np.array_equal(np.flatnonzero(gone), np.sort(smallest))
                counts.append(int(gone.sum()))
            assert gone[before == 0].all()

    prune = Watched(write(("start_epoch: 1", "start_epoch: 0"), ("update_frequency: 0.25", "update_frequency: 0.5")))
    prune.model, prune.train_dataloader = net(), data()
    prune.pruning_func = manual_loop(prune)
    prune()
    assert counts == [0, *(math.ceil(256 * (Fraction(1, 5) + Fraction(3, 5) * step / 8)) for step in range(9))]


def test_the_result_is_the_users_model_with_zeros_in_place(write: Callable[..., Path]) -> None:
    model = net()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    prune = pruning(write(), model)
    prune.eval_func = lambda model: 90.0 + model.training
    assert prune.model is model
    prune.pruning_func = manual_loop(prune)
    result = prune()
    assert result is model and type(model.first) is nn.Linear and not attached_masks(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert list(model.state_dict()) == list(net().state_dict())
    assert prune.score == 90.0 and model.training
    counts = {name: int((model.get_parameter(name) == 0).sum()) for name in TENSORS}
    assert counts == {"first.weight": 205, "last.weight": 58, "last.bias": 2}
    assert prune.sparsity == {name: count / TENSORS[name] for name, count in counts.items()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_masked_elements_take_no_part_in_training(write: Callable[..., Path], accumulate: int) -> None:
    """The same as a hand-written loop that multiplies by the mask in forward, gradients accumulated or not."""
    one_shot = (
        ("start_epoch: 1\n            end_epoch: 4", "start_epoch: 0\n            end_epoch: 1"),
        ("initial_sparsity: 0.2", "initial_sparsity: 0.8"),
        ("        - !Pruner\n            names: ['last.*']\n", ""),
    )
    prune = pruning(write(*one_shot))
    prune.pruning_func = manual_loop(prune, epochs=2, accumulate=accumulate)
    result = prune()

    other = net()
    order = np.argsort(np.abs(other.first.weight.detach().numpy()), axis=None, kind="stable")
    mask = torch.ones(256)
    mask[order[:205]] = 0
    mask = mask.reshape(32, 8)
    other.first.weight.data.mul_(mask)
    other.first.weight.register_hook(lambda gradient: gradient * mask)

    class Silent:
        train_dataloader = data()

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    manual_loop(Silent(), epochs=2, accumulate=accumulate)(other)  # type: ignore[arg-type]
    for name, parameter in result.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_a_loop_without_known_batches_prunes_at_epochs(write: Callable[..., Path]) -> None:
    prune = pruning(write(("update_frequency: 0.25", "update_frequency: 1"), ("iteration: 5", "iteration:")))
    loop = manual_loop(prune, epochs=6)
    batches = prune.train_dataloader
    prune.train_dataloader = (one for one in ())

    def train(model: nn.Module) -> None:
        prune.train_dataloader = batches
        loop(model)

    prune.pruning_func = train
    prune()  # reaches 0.6 in epoch 6, which begins when the last one is over
    assert prune.sparsity["last.weight"] == 58 / 96


def test_an_epoch_that_is_left_early_does_not_count_as_whole(write: Callable[..., Path]) -> None:
    prune = pruning(
        write(("['last.*']", "['last.weight']"), ("target_sparsity: 0.6", "target_sparsity: 0.6\n      end_epoch: 2"))
    )

    def train(model: nn.Module) -> None:
        for epoch in range(2):
            prune.on_epoch_begin(epoch)
            for step in range(8 if epoch == 0 else 3):
                prune.on_batch_begin(step)
                prune.on_batch_end()

    prune.pruning_func = train
    with pytest.warns(UserWarning, match=r"first.weight: 0.250 of it is zero, not 0.8: training ended before epoch 4"):
        prune()
    assert prune.sparsity["first.weight"] == 64 / 256  # as at 1.375, not as at 2


def test_lightning_calls_the_hooks(write: Callable[..., Path], tmp_path: Path) -> None:
    library = pytest.importorskip("pytorch_lightning")

    class Module(library.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    prune = pruning(write())
    prune.train_dataloader = loader = DataLoader(TensorDataset(x, y), batch_size=6)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = library.Trainer(
        max_epochs=6,
        callbacks=[lightning_callback(prune)],
        default_root_dir=tmp_path,
        enable_model_summary=False,
        **options,
    )
    prune.pruning_func = lambda model: trainer.fit(Module(model), loader)
    prune()
    assert prune.sparsity == {"first.weight": 205 / 256, "last.weight": 58 / 96, "last.bias": 2 / 3}


# --- training that the file describes ---------------------------------------------------------------------------------


def test_the_file_trains(write: Callable[..., Path]) -> None:
    weights = []
    for seed in (0, 0, 1):
        x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
        prune = pruning(write(), seed=seed)
        prune.train_dataloader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
        weights.append(prune().state_dict())
        assert prune.fit is not None and len(prune.fit.epochs) == 6
        assert prune.fit.epochs[0].rate == 0.02 and prune.fit.optimizer.defaults["nesterov"]
        assert prune.sparsity == {"first.weight": 205 / 256, "last.weight": 58 / 96, "last.bias": 2 / 3}
        assert prune.fit.epochs[-1].loss < prune.fit.epochs[0].loss  # type: ignore[operator]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_iteration_ends_an_epoch(write: Callable[..., Path]) -> None:
    class Counted(list):  # type: ignore[type-arg]
        taken = 0

        def __iter__(self) -> Iterator[Any]:
            for one in super().__iter__():
                self.taken += 1
                yield one

    prune = pruning(write())
    prune.train_dataloader = counted = Counted(data())
    prune()
    assert counted.taken == 6 * 5

    prune = pruning(write())
    counted.taken, optimizer = 0, torch.optim.SGD
    prune.training = Training.on(counted, nn.functional.cross_entropy, optimizer=lambda some: optimizer(some, lr=0.02))
    prune()
    assert counted.taken == 6 * 5


def test_epochs_begin_where_the_file_says(write: Callable[..., Path]) -> None:
    prune = pruning(write(("    start_epoch: 0\n    end_epoch: 6", "    start_epoch: 3\n    end_epoch: 6")))
    said: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        assert prune.model is not None
        said.append(zeros(prune.model, "first.weight"))
        return nn.functional.cross_entropy(outputs, targets)

    prune.training = Training.on(prune.train_dataloader or (), loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    prune()
    assert len(said) == 3 * 8 and said[0] == math.ceil(Fraction(3, 5) * 256) and said[-1] == 205


def test_a_run_that_was_stopped_ends_like_one_that_was_not(write: Callable[..., Path], tmp_path: Path) -> None:
    whole = pruning(write())().state_dict()

    class Stopping(list):  # type: ignore[type-arg]
        epoch = 0

        def __iter__(self) -> Iterator[Any]:
            self.epoch += 1
            if self.epoch > 3:
                raise KeyboardInterrupt
            return super().__iter__()

    prune = pruning(write(), folder=tmp_path / "run")
    prune.train_dataloader = Stopping(data())
    with pytest.raises(KeyboardInterrupt):
        prune()
    assert not attached_masks(prune.model)  # type: ignore[arg-type]
    for _ in range(2):  # the second time all epochs are there already
        again = pruning(write(), Net(), folder=tmp_path / "run", resume=True)
        state = again().state_dict()
        assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_images_of_a_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # one for another torch
        pytest.skip(f"needs torchvision ({error})")
    from PIL import Image

    values = np.random.default_rng(0)
    for label in ("cat", "dog", "hen"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(8):
            pixels = values.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    model = nn.Sequential()
    model.add_module("first", nn.Conv2d(3, 8, 3))
    model.add_module("flat", nn.Flatten())
    model.add_module("last", nn.Linear(288, 3))
    word = ("          size: 8\n", "          size: 8\n          interpolation: bicubic\n")
    path = write(("ROOT", str(tmp_path / "images")), word)
    results = []
    for _ in range(2):
        prune = Pruning(path)
        prune.model = common.Model(copy.deepcopy(model))
        results.append(prune().state_dict())
        assert prune.sparsity["first.weight"] == math.ceil(0.8 * 216) / 216
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    with pytest.raises(ConfigError, match=r"dataset.ImageFolder: .*Correct its arguments\.$"):
        run_described(model, write(("ROOT", str(tmp_path / "nothing"))))
    with pytest.raises(ConfigError, match=r"Crop.interpolation: 'bicubik' is not known \(did you mean 'bicubic'\?\)"):
        run_described(model, write((word[0], word[1].replace("ic\n", "ik\n"))))


@pytest.mark.usefixtures("vision")
def test_compress_delivers_the_zeros(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(COMPLETE)
    path = write(*CONV)
    done = run("compress", "net.py", "--config", path, "--no-bench", "--json", "--out", "out")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["pruning"]["tensors"]}
    assert rows["stem.weight"] == {"name": "stem.weight", "elements": 864, "zeros": 692, "asked": 0.8}
    assert rows["head.weight"]["zeros"] == math.ceil(0.6 * 128 - 1e-9)
    assert report["params"]["shrunk"] == report["params"]["dense"] == report["pruning"]["parameters"]
    assert report["accuracy"] == {"dense": 97.5, "shrunk": 97.5} and len(report["pruning"]["epochs"]) == 6
    assert {one.name for one in (tmp_path / "out").iterdir()} == set(files.FILES)
    namespace: dict[str, Any] = {"__name__": "net"}
    exec(COMPLETE, namespace)
    model = graphprune.load(tmp_path / "out", namespace["build_model"]())
    assert int((model.body.weight == 0).sum()) == rows["body.weight"]["zeros"] == math.ceil(0.8 * 9216 - 1e-9)
    assert run("verify", "out").exit_code == 0
    again = run("compress", "net.py", "--config", path, "--no-bench", "--out", "out", "--force")
    assert "Zero: " in again.stdout and "0.8009" in again.stdout
    weights = (tmp_path / "out" / files.WEIGHTS).read_bytes()
    run("compress", "net.py", "--config", path, "--no-bench", "--out", "out", "--force")
    assert weights == (tmp_path / "out" / files.WEIGHTS).read_bytes()


TRAINING = """
from graphprune.training import Training

def training():
    data = [(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(i)), torch.arange(4)) for i in range(3)]
    return Training.on(data, nn.functional.cross_entropy)
"""


def test_compress_takes_the_training_beside_the_model(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(COMPLETE + TRAINING)
    start, end = FILE.index("    dataloader:"), FILE.index("    criterion:")
    part = FILE[:start] + FILE[end:]
    for text in (part, part[: part.index("    criterion:")] + part[part.index("\n  approach:") :]):
        path = write(*CONV[1:], text=text)
        done = run("compress", "net.py", "--config", path, "--no-bench", "--json", "--force")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["pruning"]["tensors"][0]["zeros"] == 692
    (tmp_path / "net.py").write_text(COMPLETE + TRAINING.replace("torch.arange(4))", "torch.arange(4) + 9)"))
    line = complaint(run("compress", "net.py", "--config", path, "--no-bench", "--force"))
    assert line.startswith("net.py: raises while it trains as training() says (IndexError: Target ")
