"""Writes docs/manual_cases.md: the experiments that NNI's manuals report, repeated as far as data allows.

    python benchmarks/manual_cases.py --data FOLDER [--only CASE ...] [--device cuda] [--out docs/manual_cases.md]

FOLDER holds ``cifar10/`` (see cifar_data.py) and ``resnet56_cifar10.safetensors``. Each case is a process of its own;
on one accelerator all of them take minutes side by side (``--jobs 5``), without one the VGG networks take days. A page
that is there keeps its other rows. Needs pillow and scikit-learn.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import own_process
import page

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "resnet56_cifar10.safetensors"
HEAD = (
    "case", "parameters", "MACs", "dense %", "pruned %", "trained %", "reported", "epochs", "seconds", "device",
)  # fmt: skip
KEYS = ("params", "macs", "dense", "pruned", "tuned", "reported", "epochs", "seconds", "device")
SIZE = 128
SCORED = 2000
SEEDS = 5
"""Of the small network, whose accuracy is a mean."""
PRUNED_A: Mapping[str, Any] = {
    "op_types": ["Conv2d"],
    "op_names": [f"feature.{place}" for place in (0, 24, 27, 30, 34, 37, 40)],
    "sparsity": 0.5,
}
"""The first convolution of VGG-16 and those of 512 channels."""
PENALTY = 1e-3
"""On the scales of VGG-19. Liu et al. 2017 have 1e-4 and 125,000 steps: the sum of learning rate times penalty over all
steps, by which a scale is drawn to zero, is 0.66 there, and 0.49 here in 25 epochs."""

Row = dict[str, str]
Rows = Iterator[tuple[str, Row]]


@dataclass(frozen=True)
class Case:
    """An experiment.

    Attributes:
        work: Gives its rows, by what distinguishes them from each other.
        reported: What the manuals say of the dense and of the pruned network.
    """

    work: Callable[[argparse.Namespace], Rows]
    reported: str


def vgg16_l1(given: argparse.Namespace) -> Rows:
    """Half of the first convolution and of the last six, those of 512 channels (Li et al. 2017, VGG-16-pruned-A)."""
    import vgg16_cifar
    from algorithms_table import at_once

    from graphprune.pruners import L1NormPruner

    setup, model = _vgg(vgg16_cifar, given)
    start = time.perf_counter()
    setup.tune(model, given.epochs)
    before, after = at_once(L1NormPruner, PRUNED_A)(copy.deepcopy(model), replace(setup, rate=0.01, epochs=given.again))
    yield "", _row(setup, (model, before, after), f"{given.epochs} + {given.again}", start)


def vgg19_dense(given: argparse.Namespace) -> Rows:
    """Nothing goes: what `vgg19_slim` is to be compared with."""
    import vgg19_cifar

    setup, model = _vgg(vgg19_cifar, given)
    start = time.perf_counter()
    setup.tune(model, given.epochs)
    yield "", _row(setup, (model,), str(given.epochs), start)


def vgg19_slim(given: argparse.Namespace) -> Rows:
    """70 % of all channels by their batch norm scale; the dense network learned with a penalty (Liu et al. 2017).

    As in section 4.2 there, it learns so from its first values on, the scales begin at 0.5, and what stays is trained
    in the same way as all of it was.
    """
    import torch
    import vgg19_cifar

    from graphprune.pruners import SlimPruner
    from speedup import ModelSpeedup, detach_masks

    setup, model = _vgg(vgg19_cifar, given)
    start = time.perf_counter()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.5)
    training = setup.training(given.learning)
    _, masks = SlimPruner(
        model.to(memory_format=setup.layout),
        [{"op_types": ["BatchNorm2d"], "total_sparsity": 0.7}],
        trainer=training.trainer,
        optimizer=training.optimizer,
        criterion=training.criterion,
        training_epochs=given.learning,
        scale=PENALTY,
        dummy_input=setup.example_inputs,
        seed=given.seed,
    ).compress()
    before = ModelSpeedup(model, setup.example_inputs, masks).speedup_model()
    after = copy.deepcopy(before)
    setup.tune(after, given.again)
    detach_masks(model, multiply=False)
    yield "", _row(setup, (model, before, after), f"{given.learning} + {given.again}", start)


def _vgg(module: Any, given: argparse.Namespace) -> tuple[Any, Any]:
    """How a network is trained from its first values, and these."""
    import torch

    torch.manual_seed(given.seed)
    return replace(_setup(given), rate=0.1, decay=5e-4), module.build_model().to(given.device)


def amc_resnet56(given: argparse.Namespace) -> Rows:
    """Half of the multiply-accumulates of a trained ResNet-56 by the agent; the manual's is MobileNet on ImageNet."""
    import resnet56_cifar
    from algorithms_table import searched
    from safetensors.torch import load_file

    from graphprune.pruners import AMCPruner

    if not (given.data / CHECKPOINT).is_file():
        raise SystemExit(f"{given.data}: holds no {CHECKPOINT}. Give the folder with the trained weights.")
    setup = replace(_setup(given), rate=0.05, epochs=given.again)
    model = resnet56_cifar.build_model()
    model.load_state_dict(load_file(given.data / CHECKPOINT))
    model = model.eval().to(given.device)
    start = time.perf_counter()
    agent = {"flops_ratio": 0.5, "train_episode": given.episodes, "warmup": given.episodes // 4, "channel_round": 4}
    way = searched(AMCPruner, {"op_types": ["Conv2d"]}, lambda setup: agent)
    before, after = way(copy.deepcopy(model), setup)
    yield "", _row(setup, (model, before, after), f"{given.episodes} episodes + {given.again}", start)


def lottery_digits(given: argparse.Namespace) -> Rows:
    """LeNet-300-100 on scikit-learn's digits: ten rounds, each 50 epochs from the first values; mean of five seeds."""
    import torch
    from digits import load_split

    images, labels, others, classes = load_split()
    parts = (images.flatten(1), labels), (others.flatten(1), classes)
    found = [_tickets(64, *parts, 50, seed) for seed in range(SEEDS)]
    yield from _lottery(given, found, 50, torch.device("cpu"))


def lottery_cifar(given: argparse.Namespace) -> Rows:
    """LeNet-300-100 on the pixels of CIFAR-10: ten rounds, each from the first values."""
    import cifar_data
    import torch

    epochs = max(1, given.again // 2)
    images, tests = _images(given, "train"), _images(given, "test")
    parts = [(cifar_data.normalised(pictures).flatten(1), labels) for pictures, labels in (images, tests)]
    yield from _lottery(given, [_tickets(3 * 32 * 32, *parts, epochs, given.seed)], epochs, torch.device(given.device))


def _tickets(inputs: int, trained: Any, tested: Any, epochs: int, seed: int) -> list[tuple[float, float, float, float]]:
    """Of each round its sparsity, accuracy when it is pruned and rewound and after training, and the seconds.

    The loop is that of the manual, and the network and its training are those of Frankle & Carbin 2019, table 2.
    """
    import torch
    from torch import nn

    from graphprune.pruners import LotteryTicketPruner
    from speedup.masking import attached_masks

    (images, labels), (others, classes) = trained, tested
    torch.manual_seed(seed)
    widths = (inputs, 300, 100, 10)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3)

    def accuracy() -> float:
        with torch.no_grad():
            return 100 * (model(others).argmax(1) == classes).float().mean().item()

    pruner = LotteryTicketPruner(
        model, [{"prune_iterations": 10, "sparsity": 0.96, "op_types": ["default"]}], optimizer
    )
    pruner.compress()
    found = []
    for _ in pruner.get_prune_iterations():
        start = time.perf_counter()
        pruner.prune_iteration_start()
        rewound = accuracy()
        for _ in range(epochs):
            for index in torch.randperm(len(labels)).to(images.device).split(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
                optimizer.step()
        masks = attached_masks(model).values()
        gone = sum(int((mask == 0).sum()) for mask in masks) / sum(layer.weight.numel() for layer in layers)
        found.append((gone, rewound, accuracy(), time.perf_counter() - start))
    return found


def _lottery(given: argparse.Namespace, found: list[Any], epochs: int, device: Any) -> Rows:
    dense = mean(rounds[0][2] for rounds in found)
    for rounds in zip(*found, strict=True):
        gone, rewound, tuned, seconds = (mean(numbers) for numbers in zip(*rounds, strict=True))
        yield (
            f" at {gone:.1%}",
            {
                "params": f"{1 - gone:.1%} of the weights",
                "dense": f"{dense:.2f}",
                "pruned": f"{rewound:.2f}",
                "tuned": f"{tuned:.2f}",
                "epochs": str(epochs),
                "seconds": f"{seconds:.0f}",
                "device": _name(device),
            },
        )


def _images(given: argparse.Namespace, part: str) -> tuple[Any, Any]:
    import cifar_data

    images, labels = cifar_data.load(given.data / "cifar10", part)
    return images[: given.images].to(given.device), labels[: given.images].to(given.device)


def _setup(given: argparse.Namespace) -> Any:
    import cifar_data
    import torch
    from training_setup import Setup, Shuffled

    images, labels = _images(given, "train")
    return Setup(
        data=Shuffled(len(labels), SIZE, cifar_data.augmented(images, labels)),
        evaluate=cifar_data.accuracy(*_images(given, "test")),
        score=cifar_data.accuracy(images[:SCORED], labels[:SCORED]),
        example_inputs=cifar_data.normalised(images[:2]),
        epochs=given.epochs,
        learning=given.learning,
        seed=given.seed,
        autocast=True,
        layout=torch.channels_last,
    )


def _row(setup: Any, models: Sequence[Any], epochs: str, start: float) -> Row:
    """Of the dense network and, where there is one, of the pruned one before and after it was trained again."""
    from algorithms_table import size

    from graphprune.training.fit import evaluated

    seconds = time.perf_counter() - start
    macs, params = zip(*(size(model, setup.example_inputs) for model in (models[0], *models[2:])), strict=True)
    accuracies = (f"{evaluated(setup.evaluate, model.eval()):.2f}" for model in models)
    return {
        "params": _change(params, 2),
        "macs": _change(macs, 1),
        **dict(zip(("dense", "pruned", "tuned"), accuracies, strict=False)),
        "epochs": epochs,
        "seconds": f"{seconds:.0f}",
        "device": _name(setup.example_inputs.device),
    }


def _change(counts: Sequence[int], digits: int) -> str:
    """From what the first is to what the second is, in millions."""
    words = " to ".join(f"{count / 1e6:.{digits}f} M" for count in counts)
    return f"{words} ({1 - counts[1] / counts[0]:.1%} gone)" if counts[1:] else words


def _name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


CASES: Mapping[str, Case] = {
    "vgg16-l1": Case(vgg16_l1, "14.99 M to 5.4 M (64.0% gone): 93.51, then 93.53"),
    "vgg19": Case(vgg19_dense, "20.04 M: 93.60"),
    "vgg19-slim": Case(vgg19_slim, "20.04 M to 2.03 M (88.5% gone): 93.74"),
    "amc-resnet56": Case(amc_resnet56, "ImageNet, MobileNet, half of the MACs: 70.6, then 69.9"),
    "lottery-digits": Case(lottery_digits, "MNIST: as the dense one to about 80%, worse beyond 94%"),
    "lottery-cifar": Case(lottery_cifar, "MNIST: as the dense one to about 80%, worse beyond 94%"),
}


def rows_of(name: str, given: argparse.Namespace) -> dict[str, Row]:
    """Everything about one case, in this process."""
    import torch

    sys.path.insert(0, str(ROOT / "models"))
    torch.set_num_threads(given.threads)
    torch.backends.cudnn.benchmark = True
    case = CASES[name]
    return {name + which: {**row, "reported": case.reported} for which, row in case.work(given)}


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page; cases in the order of their table."""
    order = [name for case in CASES for name in rows if name.partition(" ")[0] == case]
    missing = [f"`{case}`" for case in CASES if all(name.partition(" ")[0] != case for name in order)]
    lines = [
        "# The manuals' own cases",
        "",
        "Written by `python benchmarks/manual_cases.py --data FOLDER --out docs/manual_cases.md`: the experiments of which NNI's "
        "manuals report numbers, repeated as far as there is data. Accuracies on test images, in percent; where the manuals have "
        "errors, a hundred less them. *Pruned*: right after pruning; *trained*: after training what stays. *Epochs*: of training "
        "the dense network from its first values, of learning what goes, and of training what stays, where there are these.",
        "",
        "`vgg16-l1`: VGG-16 on CIFAR-10, half of the first convolution and of the last six by L1 norm. `vgg19`: VGGNet on "
        "CIFAR-10; `vgg19-slim`: 70 % of its channels by batch norm scale, where the dense network is one that has learned with a "
        f"penalty of {PENALTY:g} on the scales, 1e-4 in the paper, which takes more steps. Both papers train for 160 epochs or more "
        "with steps of the learning rate, here it is one cycle of fewer epochs. `amc-resnet56`: half of the multiply-accumulates by the agent, of a ResNet-56 trained "
        "on CIFAR-10, because ImageNet is not at hand; for that network the paper reports 92.8, then 90.2 without and 91.9 with "
        f"training (He et al. 2018, table 2). The agent sees the accuracy on {SCORED} training images. `lottery`: single weights of "
        "LeNet-300-100, rewound after each of ten rounds, by the manual's own loop; not on MNIST, but on the digits of "
        f"scikit-learn (mean of {SEEDS} seeds) and on the pixels of CIFAR-10.",
        "",
        *([f"Without a result so far: {', '.join(missing)}.", ""] if missing else []),
        *page.table(HEAD, KEYS, {name: rows[name] for name in order}),
    ]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="*", default=[], metavar="CASE", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, help="the page; printed only, if left out")
    parser.add_argument("--device", default="cpu", help="where networks are trained")
    parser.add_argument("--epochs", type=int, default=80, help="of training the dense VGG networks")
    parser.add_argument("--learning", type=int, default=40, metavar="EPOCHS", help="of training with a penalty")
    parser.add_argument("--again", type=int, default=40, metavar="EPOCHS", help="of training what stays")
    parser.add_argument("--episodes", type=int, default=400, help="of the agent")
    parser.add_argument("--images", type=int, default=50_000, help="how many training images are used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=3600, help="limit of a case")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each case")
    parser.add_argument("--case", help="one case, as JSON")
    given = parser.parse_args()
    if unknown := [name for name in given.only if name not in CASES]:
        parser.error(f"--only {unknown[0]}: is no case. Use some of {', '.join(CASES)}.")
    if min(given.epochs, given.learning, given.again, given.jobs, given.threads) < 1 or given.images < SIZE:
        parser.error(
            f"there is nothing to train with: use one epoch, job and thread or more, and {SIZE} images or more."
        )
    return given


def main() -> None:
    given = arguments()
    if given.case:
        print(json.dumps(rows_of(given.case, given)))
        return
    names = ("data", "device", "epochs", "learning", "again", "episodes", "images", "seed", "threads")
    words = [f"--{name}={getattr(given, name)}" for name in names]
    runs = {name: [*words, f"--case={name}"] for name in given.only or CASES}
    found = own_process.side_by_side(__file__, runs, given.seconds, given.jobs)
    page.fill(given.out, HEAD, KEYS, markdown, found)


if __name__ == "__main__":
    main()
