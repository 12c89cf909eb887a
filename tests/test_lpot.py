"""LPOT's form of pruning: its file, its loop, what becomes zero and when, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import COMPLETE, complaint, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune import folder as files
from graphprune.callbacks import lightning_callback
from graphprune.config import Request, read_request
from graphprune.config_file import read_config_file
from graphprune.errors import ConfigError, TrainingError
from graphprune.lpot import Pruning, common
from graphprune.lpot.config import read_lpot
from graphprune.training import Training
from speedup.masking import attach_masks, attached_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

FILE = """
version: 1.0
pruning:
  train:
    start_epoch: 0
    end_epoch: 6
    iteration: 5
    frequency: 2

    dataloader:
      batch_size: 4
      dataset:
        ImageFolder:
          root: ROOT
      transform:
        RandomResizedCrop:
          size: 8
        RandomHorizontalFlip:
        ToTensor:
        Normalize:
          mean: [0.5, 0.4, 0.3]
          std: [0.2, 0.2, 0.3]
    criterion:
      CrossEntropyLoss:
        reduction: None
    optimizer:
      SGD:
        learning_rate: 2e-2
        momentum: 0.8
        weight_decay: 0.0001
        nesterov: True

  approach:
    weight_compression:
      initial_sparsity: 0.1
      target_sparsity: 0.6
      pruners:
        - !Pruner
            initial_sparsity: 0.2
            target_sparsity: 0.8
            prune_type: basic_magnitude
            names: ['first.weight']
            start_epoch: 1
            end_epoch: 4
            update_frequency: 0.25
        - !Pruner
            names: ['last.*']
"""
TENSORS = {"first.weight": 8 * 32, "last.weight": 32 * 3, "last.bias": 3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(batches, 6, 8, generator=torch.Generator().manual_seed(1))
    return [(one, one[:, :3].argmax(1)) for one in x]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the file with something in it replaced."""

    def written(*changes: tuple[str, str], text: str = FILE) -> Path:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "conf.yaml").write_text(text)
        return tmp_path / "conf.yaml"

    return written


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


def pruning(path: Path, model: nn.Module | None = None, **options: Any) -> Pruning:
    prune = Pruning(path, **options)
    prune.model = common.Model(model or net())
    prune.train_dataloader = data()
    return prune


def run_described(model: nn.Module, path: Path) -> nn.Module:
    prune = Pruning(path)
    prune.model = model
    return prune()


def run_on(model: nn.Module, path: Path) -> nn.Module:
    return pruning(path, model)()


def manual_loop(
    prune: Pruning,
    epochs: int = 7,
    accumulate: int = 1,
    watch: Callable[[nn.Module, int, int], None] = lambda *_: None,
    momentum: float = 0.9,
) -> Callable[[nn.Module], None]:
    """The loop of the manual: it knows of pruning what the three hooks are."""

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3)
        for epoch in range(epochs):
            model.train()
            prune.on_epoch_begin(epoch)
            for step, batch in enumerate(prune.train_dataloader or ()):
                prune.on_batch_begin(step)
                watch(model, epoch, step)
                loss = nn.functional.cross_entropy(model(batch[0]), batch[1]) / accumulate
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if (step + 1) % accumulate == 0:
                    optimizer.step()
                    model.zero_grad()
                prune.on_batch_end()

    return train


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


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something like torchvision: images of noise that are not in any folder."""

    class ImageFolder(torch.utils.data.Dataset[Any]):
        def __init__(self, root: str, transform: Callable[[Any], Tensor] | None = None) -> None:
            if root != "ROOT":
                raise FileNotFoundError(f"there is no {root}.")
            self.images = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
            self.transform = transform or (lambda image: image)

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.transform(self.images[index]), index % 4

    class Compose:
        def __init__(self, transforms: list[Callable[[Any], Any]]) -> None:
            self.transforms = transforms

        def __call__(self, image: Any) -> Any:
            for one in self.transforms:
                image = one(image)
            return image

    class Normalize:
        def __init__(self, mean: list[float], std: list[float]) -> None:
            self.mean, self.std = (torch.tensor(one).reshape(3, 1, 1) for one in (mean, std))

        def __call__(self, image: Tensor) -> Tensor:
            return (image - self.mean) / self.std

    for name, classes in (("datasets", [ImageFolder]), ("transforms", [Compose, Normalize])):
        module = ModuleType(f"torchvision.{name}")
        vars(module).update({one.__name__: one for one in classes})
        monkeypatch.setitem(sys.modules, module.__name__, module)


CONV = (
    ("        RandomResizedCrop:\n          size: 8\n        RandomHorizontalFlip:\n        ToTensor:\n", ""),
    ("'first.weight'", "'stem.weight', 'body.weight'"),
    ("'last.*'", "'head.weight'"),
)


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


# --- refusals ---------------------------------------------------------------------------------------------------------

HERE = r"^\S+conf\.yaml"
PRUNER = HERE + r": pruning\.approach\.weight_compression\.pruners\[0\]"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("initial_sparsity: 0.2", "initial_sparsty: 0.2", PRUNER + r": 'initial_sparsty' is no key of it \(did you mean 'initial_sparsity'\?\)\. Use some of "),
        ("target_sparsity: 0.8", "target_sparsity: 1.5", PRUNER + r"\.target_sparsity: 1.5 is not in \[0, 1\)\. Use a share such as 0\.5\.$"),
        ("target_sparsity: 0.8", "target_sparsity: much", PRUNER + r"\.target_sparsity: is 'much'\. Give a valid number"),
        ("target_sparsity: 0.8", "target_sparsity: 0.1", PRUNER + r"\.target_sparsity: 0.1 is below the initial_sparsity 0.2"),
        ("basic_magnitude", "lottery", PRUNER + r"\.prune_type: 'lottery' is not known\. Use basic_magnitude\.$"),
        ("            end_epoch: 4", "            end_epoch: 1", PRUNER + r"\.end_epoch: 1 is no later than the start_epoch 1, so that it never starts"),
        ("            end_epoch: 4", "            end_epoch: 2.5", PRUNER + r"\.end_epoch: is 2.5\. Give a valid integer\.$"),
        ("update_frequency: 0.25", "update_frequency: 0", PRUNER + r"\.update_frequency: is 0\. Give a number greater than 0\.$"),
        ("update_frequency: 0.25", "update_frequency: 1\n            frequency: 1", PRUNER + r": has both frequency and update_frequency, which are the same"),
        ("update_frequency: 0.25", "update_frequency: 1\n            update_frequency: 1", HERE + r":46: 'update_frequency' is there twice\. Correct it there\.$"),
        ("        - !Pruner\n            initial", "        - !Purner\n            initial", HERE + r":38: nothing is known of the tag '!Purner', only of !Pruner"),
        ("        - !Pruner\n            initial", "        - !!python/object/apply:os.system\n            initial", HERE + r":38: nothing is known of the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("pruners:", "pruners: []\n      others:", HERE + r": pruning.approach.weight_compression: 'others' is no key"),
        ("basic_magnitude", "'", HERE + r":42: .*Correct it there\.$"),
        ("  approach:", "  aproach:", HERE + r": pruning: 'aproach' is no key of it \(did you mean 'approach'\?\)"),
        ("weight_compression:", "activation_compression:", HERE + r": pruning.approach: 'activation_compression' is no key of it"),
        ("version: 1.0", "pruner: 1.0", HERE + r": 'pruner' is no key of it \(did you mean 'pruning'\?\)"),
        ("batch_size: 4", "batch_size: 0", HERE + r": pruning.train.dataloader.batch_size: is 0\. Give a number greater than or equal to 1"),
        ("CrossEntropyLoss:\n        reduction: None", "- CrossEntropyLoss", HERE + r": pruning.train.criterion: is \['CrossEntropyLoss'\]\. Give one name"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense(write: Callable[..., Path], old: str, new: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        Pruning(write((old, new)))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", HERE + r": holds nothing\. Describe there what to prune\.$"),
        ("just words", HERE + r": holds 'just words', which is no configuration"),
        ("[1, 2]", HERE + r": holds \[1, 2\], which is no configuration"),
        ("version: 1.0", HERE + r": pruning: is missing"),
        ("pruning:", HERE + r": pruning: is None\. Give it some of train, approach\.$"),
        ("pruning: {train: {}}", HERE + r": pruning.approach: is missing\. Give it there\.$"),
        ("pruning: {approach: {weight_compression: {pruners: []}}}", HERE + r": pruning.approach.weight_compression.pruners: is empty"),
        ("pruning: {approach: {weight_compression: {pruners: [{}]}}}", PRUNER + r"\.target_sparsity: is missing"),
        ("pruning: {approach: {weight_compression: {pruners: [{target_sparsity: 0.5}]}}}", PRUNER + r"\.end_epoch: is missing"),
        ("pruning: {approach: {weight_compression: {pruners: [!Pruner all]}}}", HERE + r":1: !Pruner holds no keys"),
        ("pruning: {approach: {weight_compression: {pruners: [all]}}}", PRUNER + r": is 'all'\. Give it some of initial_sparsity"),
        ("a: [1", HERE + r":1: .*Correct it there\.$"),
        ("a: b\n--- c", HERE + r":2: .*Correct it there\.$"),
        ("? [a]\n: b", HERE + r":1: .*Correct it there\.$"),
    ],
)  # fmt: skip
def test_a_file_that_is_none(write: Callable[..., Path], text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        Pruning(write(text=text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read \(No such file or directory\)\. Name a YAML"):
        Pruning(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes.yaml: is no text\."):
        Pruning(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("'first.weight'", "'frst.weight'", PRUNER + r"\.names: the model has no parameter 'frst.weight' \(did you mean 'first.weight'\?\)"),
        ("'first.weight'", "'norm.running_mean'", PRUNER + r"\.names: the model has no parameter 'norm.running_mean'"),
        ("'first.weight'", "'first.weight', 'first.*'", PRUNER + r"\.names: 'first.weight' is there twice"),
        ("'first.weight'", "'last.weight'", r"pruners\[1\]\.names: 'last.weight' is asked for in pruners\[0\] too"),
        ("['first.weight']", "\n            frequency: 1", r"frequency and update_frequency"),
        ("    end_epoch: 6", "    end_epoch: 3", r"pruners\[0\]\.end_epoch: 4 is later than that of train, 3, so that it never reaches its target"),
        ("    end_epoch: 6", "    end_epoch: 1", r"pruners\[0\]\.end_epoch: 4 is later than that of train, 1, so that it never starts"),
        ("    criterion:\n      CrossEntropyLoss:\n        reduction: None\n", "", HERE + r": pruning.train.criterion: is missing\. Give it there, or set pruning_func"),
        ("CrossEntropyLoss:", "CrossEntropy:", HERE + r": pruning.train.criterion: torch.nn has no 'CrossEntropy' \(did you mean 'CrossEntropyLoss'\?\)"),
        ("reduction: None", "reduction: maximum", r"CrossEntropyLoss.reduction: 'maximum' makes no number of a batch\. Use mean or sum\.$"),
        ("reduction: None", "reducton: mean", HERE + r": pruning.train.criterion.CrossEntropyLoss: 'reducton' is no argument of it \(did you mean 'reduction'\?\)"),
        ("SGD:", "SDG:", HERE + r": pruning.train.optimizer: torch.optim has no 'SDG' \(did you mean 'SGD'\?\)"),
        ("momentum: 0.8", "momentum: 0", HERE + r": pruning.train.optimizer.SGD: Nesterov momentum requires a momentum"),
        ("        momentum: 0.8\n        weight_decay: 0.0001\n        nesterov: True\n", "        momentun: 1\n", r"optimizer.SGD: 'momentun' is no argument of it \(did you mean 'momentum'\?\)"),
        ("SGD:\n        learning_rate: 2e-2\n        momentum: 0.8\n        weight_decay: 0.0001\n        nesterov: True\n", "LBFGS:\n", r"optimizer.LBFGS: needs a closure in each step"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(write: Callable[..., Path], old: str, new: str, line: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ConfigError, ValueError), match=line):
        run_on(model, write((old, new)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("root: ROOT", "root: elsewhere", r"dataset.ImageFolder: there is no elsewhere\. Correct its arguments\.$"),
        ("root: ROOT", "rot: ROOT", r"dataset.ImageFolder: 'rot' is no argument of it \(did you mean 'root'\?\)\. It has root, transform\.$"),
        ("ImageFolder:", "ImageFolders:", r"dataset: torchvision.datasets has no 'ImageFolders' \(did you mean 'ImageFolder'\?\)"),
        ("Normalize:", "Normalise:", r"transform: torchvision.transforms has no 'Normalise' \(did you mean 'Normalize'\?\)"),
        ("          mean: [0.5, 0.4, 0.3]\n", "", r"transform.Normalize: .*mean.* Correct its arguments\.$"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("vision")
def test_data_that_is_not_there(write: Callable[..., Path], old: str, new: str, line: str) -> None:
    prune = pruning(write(CONV[0], (old, new)))
    prune.train_dataloader = None
    with pytest.raises(ConfigError, match=line):
        prune()


def test_torchvision_is_only_needed_for_its_data(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
    pruning(write())()
    prune = pruning(write())
    prune.train_dataloader = None
    with pytest.raises(ConfigError, match=r"pip install 'graphprune\[vision\]', or set train_dataloader\.$"):
        prune()


def test_mistakes_around_the_file(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"model: is not set"):
        Pruning(write())()
    with pytest.raises(ConfigError, match=r"common.Model: is given a int"):
        Pruning(write()).model = common.Model(3)  # type: ignore[arg-type]
    masked = net()
    attach_masks(masked, {"first.weight": torch.ones(32, 8)})
    with pytest.raises(ConfigError, match=r"model: has masks already"):
        run_on(masked, write())
    prune = pruning(write())
    prune.pruning_func = 3  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"pruning_func: is a int\. Give a function"):
        prune()
    prune.pruning_func = lambda model: copy.deepcopy(model)
    with pytest.raises(TrainingError, match=r"pruning_func: returns another model"):
        prune()
    prune.pruning_func = lambda model: None
    with pytest.raises(TrainingError, match=r"pruning_func: called no hook, so that nothing was pruned"):
        prune()
    prune.pruning_func = lambda model: prune.on_batch_begin(0)
    with pytest.raises(TrainingError, match=r"on_batch_begin: comes before any on_epoch_begin"):
        prune()
    with pytest.raises(TrainingError, match=r"Pruning: a hook is called while nothing is pruned"):
        prune.on_batch_end()
    prune = pruning(write(("iteration: 5", "iteration:")))
    prune.train_dataloader = (one for one in ())
    prune.pruning_func = manual_loop(prune)
    with pytest.raises(ConfigError, match=r"pruners\[0\]\.frequency: is 0.25 epochs, but how many batches"):
        prune()
    assert not attached_masks(prune.model)  # type: ignore[arg-type]


def test_the_command_line_ends_in_one_line(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(COMPLETE)
    path = write(*CONV)
    assert complaint(run("compress", "net.py", "--config", path, "--criterion", "l2")).startswith(
        "--criterion: is not for "
    )
    assert complaint(run("compress", "net.py", "--config", path, "--checkpoint", ".")).startswith(
        "--checkpoint: is not for "
    )
    assert "pruners[0].names: the model has no parameter" in complaint(
        run("compress", "net.py", "--config", write(CONV[0]))
    )
    assert complaint(run("compress", "net.py", "--config", "no.yaml")).startswith("no.yaml: cannot be read")
    assert sorted(one.name for one in tmp_path.iterdir() if one.name != "__pycache__") == ["conf.yaml", "net.py"]
