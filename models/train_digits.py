"""Trains the network of `digits.py` and writes its checkpoint: `python models/train_digits.py`, seconds on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import CHECKPOINT, DigitsNet, evaluate, load_split
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset


def shift(images: Tensor) -> Tensor:
    """The images moved together by up to one pixel each way."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[:, :, 1 + down : 9 + down, 1 + right : 9 + right]


def train(epochs: int, batch_size: int, learning_rate: float, seed: int) -> DigitsNet:
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    images, labels, _, _ = load_split()
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = DataLoader(TensorDataset(images, labels), batch_size, shuffle=True, drop_last=True)
    scheduler = OneCycleLR(optimizer, learning_rate, epochs=epochs, steps_per_epoch=len(batches))
    for epoch in range(epochs):
        for image, label in batches:
            loss = F.cross_entropy(model(shift(image)), label)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.4f}")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    model = train(arguments.epochs, arguments.batch_size, arguments.learning_rate, arguments.seed)
    save_file(model.state_dict(), arguments.output)
    print(f"{arguments.output}: {evaluate(model):.2f} % on the test images")


if __name__ == "__main__":
    main()
