"""CIFAR-10 (Krizhevsky 2009) in memory, and batches of it: decoded once, cropped and flipped a whole batch at a time.

A folder holds ``train_NNN.webp`` and ``test_NNN.webp``, strips of images of 32 x 32 pixels stacked downwards, lossless,
and ``train_labels.npy`` and ``test_labels.npy`` in their order.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32
MARGIN = 4
MEAN = torch.tensor((0.485, 0.456, 0.406))
STD = torch.tensor((0.229, 0.224, 0.225))


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """The images of ``train`` or ``test``, uint8 of shape (images, 32, 32, 3), and their labels."""
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("pillow: is not installed, and decodes the images. Run pip install pillow.") from None
    strips = sorted(folder.glob(f"{part}_*.webp"))
    labels = folder / f"{part}_labels.npy"
    if not strips or not labels.is_file():
        raise SystemExit(f"{folder}: holds no {part}_000.webp or no {labels.name}. Give the folder of CIFAR-10.")
    images = np.concatenate([np.asarray(Image.open(strip)).reshape(-1, SIDE, SIDE, 3) for strip in strips])
    classes = torch.from_numpy(np.load(labels)).long()
    if len(images) != len(classes):
        raise SystemExit(f"{folder}: holds {len(images)} {part} images, but {len(classes)} labels. Copy it again.")
    return torch.from_numpy(images), classes


def normalised(images: Tensor) -> Tensor:
    """Images as the network wants them, shape (images, 3, 32, 32), channels last in memory."""
    mean, std = MEAN.to(images.device), STD.to(images.device)
    return images.float().sub_(255 * mean).div_(255 * std).permute(0, 3, 1, 2)


def padded(images: Tensor) -> Tensor:
    """Images with a black margin of four pixels on each side."""
    return F.pad(images, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))


def cropped(images: Tensor, index: Tensor, down: Tensor, right: Tensor, flipped: Tensor) -> Tensor:
    """Crops of some padded images: ``y[b, i, j] = x[index[b], down[b] + i, right[b] + (31 - j if flipped[b] else j)]``.

    Args:
        images: With their margin, shape (all images, 40, 40, 3), on the device of the other arguments.
        index: Which images, shape (images,); the other arguments have one number for each of them.
        down: How far from the top.
        right: How far from the left.
        flipped: Whether left and right change places.
    """
    steps = torch.arange(SIDE, device=images.device)
    rows = down[:, None] + steps
    columns = right[:, None] + torch.where(flipped[:, None], steps.flip(0), steps)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def augmented(images: Tensor, labels: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From numbers of training images to a batch of random crops, half of them flipped, and its labels.

    What is random is drawn on the CPU, whatever the device of the images.
    """
    large = padded(images)

    def batch(index: Tensor) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(0, 2 * MARGIN + 1, (2, len(index)))
        flipped = torch.rand(len(index)) < 0.5
        index, *where = (one.to(images.device, non_blocking=True) for one in (index, down, right, flipped))
        return normalised(cropped(large, index, *where)), labels[index]

    return batch


def accuracy(images: Tensor, labels: Tensor, size: int = 500) -> Callable[[nn.Module], float]:
    """From a model in eval mode to its accuracy in percent."""

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            correct = sum(
                (model(normalised(batch)).argmax(1) == classes).sum()
                for batch, classes in zip(images.split(size), labels.split(size), strict=True)
            )
        return 100 * int(correct) / len(labels)

    return evaluate
