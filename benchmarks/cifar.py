"""Writes docs/results.md: ResNet-20 on CIFAR-10, pruned to half by every algorithm and trained again for some epochs.

    python benchmarks/cifar.py --data FOLDER [--only NAME ...] [--out docs/results.md] [--jobs 2] [--epochs 4] [--seed 0]

FOLDER holds ``cifar10/`` (see cifar_data.py) and ``resnet20_cifar10.safetensors``. Each run is a process of its own.
A page that is there keeps its other rows; each row says how it was trained. Needs pillow.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import own_process
import page

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "resnet20_cifar10.safetensors"
DENSE = 91.73
HEAD = (
    "run", "what goes", "MACs", "parameters", "dense %", "pruned %", "trained %", "epochs", "images", "seed", "seconds",
    "threads",
)  # fmt: skip
KEYS = ("how", "macs", "params", "dense", "pruned", "tuned", "epochs", "images", "seed", "seconds", "threads")
SIZE = 128
SCORED = 1000


def network(folder: Path) -> Any:
    """ResNet-20 with its trained weights."""
    from safetensors.torch import load_file

    sys.path.insert(0, str(ROOT / "models"))
    import resnet20_cifar

    if not (folder / CHECKPOINT).is_file():
        raise SystemExit(f"{folder}: holds no {CHECKPOINT}. Give the folder with the trained weights.")
    model = resnet20_cifar.build_model()
    model.load_state_dict(load_file(folder / CHECKPOINT))
    return model.eval()


def check(folder: Path) -> None:
    """Prints the accuracy of the dense network, and refuses one that is not what it should be."""
    import cifar_data

    images, labels = cifar_data.load(folder / "cifar10", "test")
    found = cifar_data.accuracy(images, labels)(network(folder))
    print(f"dense: {found:.2f} % of {len(labels)} test images", flush=True)
    if abs(found - DENSE) > 0.02:
        raise SystemExit(f"{folder}: the dense network should have {DENSE} %. Check the images and the weights.")


def row(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Everything about one run, in this process."""
    import cifar_data
    import torch
    from algorithms_table import RUNS, result
    from training_setup import Setup, Shuffled

    torch.set_num_threads(given.threads)
    images, labels = cifar_data.load(given.data / "cifar10", "train")
    images, labels = images[: given.images], labels[: given.images]
    tested = cifar_data.load(given.data / "cifar10", "test")
    setup = Setup(
        data=Shuffled(len(labels), SIZE, cifar_data.augmented(images, labels)),
        evaluate=cifar_data.accuracy(*tested),
        score=cifar_data.accuracy(images[:SCORED], labels[:SCORED]),
        example_inputs=cifar_data.normalised(images[:2]),
        epochs=given.epochs,
        learning=given.learning,
        seed=given.seed,
        autocast=not given.float32,
        layout=torch.channels_last,
    )
    found = result(name, network(given.data), setup)
    return {
        "how": RUNS[name].how,
        "macs": _after(found.macs, 1e6, "M"),
        "params": _after(found.params, 1e3, "k"),
        **{key: f"{getattr(found, key):.2f}" for key in ("dense", "pruned", "tuned")},
        "epochs": " + ".join(str(count) for count in found.epochs if count),
        "images": str(len(labels)),
        "seed": str(given.seed),
        "seconds": f"{found.seconds:.0f}",
        "threads": str(torch.get_num_threads()),
    }


def _after(sizes: tuple[int, int], unit: float, letter: str) -> str:
    dense, small = sizes
    return f"{small / unit:.1f} {letter} ({small / dense:.0%})"


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page; rows in the order of the table of runs."""
    from algorithms_table import RUNS

    missing = [f"`{name}`" for name in RUNS if name not in rows]
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/cifar.py --data FOLDER --out docs/results.md`: ResNet-20 on CIFAR-10, a trained network of "
        "269.7 k parameters and 40.6 M multiply-accumulates, pruned to 50 % by every algorithm and trained again. The same for all: "
        f"SGD with momentum 0.9 and batches of {SIZE}, random crops and flips, a learning rate that rises to 0.05 and falls to "
        "zero, bfloat16 where PyTorch's autocast has it. *Pruned*: accuracy on the 10,000 test images right after pruning, of a "
        "schedule after its last round; *trained*: after training. *Epochs*: those in which an algorithm learns what goes, if it "
        "does, and those of training what stays, which a schedule shares out between its rounds, four at most; lottery tickets begin again "
        "after all rounds. No epoch was chosen by the test images. "
        "*Parameters*: those that are not masked; where single weights go, the network keeps its shape, and its "
        "multiply-accumulates. Where layers are ranked together, half of all scales, or of all weights by the channels that "
        "produce them, go. Searches look for half of the weights by the channels that produce them, netadapt and amc of the multiply-accumulates; "
        f"they choose by the accuracy on {SCORED} training images. *Seconds*: all but the evaluations. One seed; an accuracy of 90 % on 10,000 images has a standard error of 0.3.",
        "",
        *([f"Without a result so far: {', '.join(missing)}.", ""] if missing else []),
        *page.table(HEAD, KEYS, {name: rows[name] for name in RUNS if name in rows}),
    ]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    from algorithms_table import RUNS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--out", type=Path, help="the page; printed only, if left out")
    parser.add_argument("--epochs", type=int, default=4, help="of training after pruning")
    parser.add_argument("--learning", type=int, default=2, metavar="EPOCHS", help="of algorithms that learn")
    parser.add_argument("--images", type=int, default=50_000, help="how many training images are used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="train without autocast to bfloat16")
    parser.add_argument("--seconds", type=int, default=3600, help="limit of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of each run; the cores shared out among them, if left out")
    parser.add_argument("--row", help="one run, as JSON")
    given = parser.parse_args()
    if unknown := [name for name in given.only if name not in RUNS]:
        parser.error(f"--only {unknown[0]}: is no run. Use some of {', '.join(RUNS)}.")
    if given.threads is None:
        given.threads = max(1, len(os.sched_getaffinity(0)) // max(1, given.jobs))
    if min(given.jobs, given.threads) < 1:
        parser.error("there is nothing to run with: use one job or more, and one thread or more.")
    if min(given.epochs, given.learning) < 1 or given.images < SIZE:
        parser.error(f"there is nothing to train with: use one epoch or more, and {SIZE} images or more.")
    return given


def main() -> None:
    from algorithms_table import RUNS

    given = arguments()
    if given.row:
        print(json.dumps({given.row: row(given.row, given)}))
        return
    check(given.data)
    passed = [
        f"--{name}={getattr(given, name)}" for name in ("data", "epochs", "learning", "images", "seed", "threads")
    ]
    words = [*passed, *(["--float32"] if given.float32 else [])]
    runs = {name: [*words, f"--row={name}"] for name in given.only or RUNS}
    found = own_process.side_by_side(__file__, runs, given.seconds, given.jobs)
    page.fill(given.out, HEAD, KEYS, markdown, found)


if __name__ == "__main__":
    main()
