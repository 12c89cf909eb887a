"""Small convolutional network trained on scikit-learn's digits (Alpaydin & Kaynak 1998), 1x8x8 -> 10 classes.

The one network here with trained weights and an `evaluate`: a whole run, accuracy included, takes seconds.
`train_digits.py` made the checkpoint beside this file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graphprune.training import Training

CHECKPOINT = Path(__file__).with_name("digits.safetensors")


class DigitsNet(nn.Module):
    """Three stages of convolution, batch norm and ReLU; 8x8, 8x8 and 4x4 pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * width * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.pool(self.bn2(self.conv2(x)).relu())
        x = self.pool(self.bn3(self.conv3(x)).relu())
        return self.fc(x.flatten(1))


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels: 1437 and 360, the same ones always; images in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


def build_model() -> DigitsNet:
    model = DigitsNet()
    model.load_state_dict(load_file(CHECKPOINT))
    return model


def example_inputs() -> Tensor:
    return torch.rand(2, 1, 8, 8)


def training() -> Training:
    """How it is trained: cross entropy of shuffled batches of 64, AdamW."""
    images, labels, _, _ = load_split()
    data = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    return Training.on(data, nn.functional.cross_entropy, optimizer=torch.optim.AdamW)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Accuracy in percent on the 360 test images; the model's mode is given back."""
    device = next(model.parameters()).device
    images, labels = (part.to(device) for part in load_split()[2:])
    training = model.training
    model.eval()
    correct = (model(images).argmax(1) == labels).sum().item()
    model.train(training)
    return 100.0 * correct / len(labels)
