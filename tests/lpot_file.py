"""A file of LPOT, a model that it fits, and the loop of LPOT's manual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.lpot import Pruning, common

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

CONV = (
    ("        RandomResizedCrop:\n          size: 8\n        RandomHorizontalFlip:\n        ToTensor:\n", ""),
    ("'first.weight'", "'stem.weight', 'body.weight'"),
    ("'last.*'", "'head.weight'"),
)
"""Changes for the model of test_cli.py, and for what stands in for torchvision."""


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


def pruning(path: Path, model: nn.Module | None = None, **options: Any) -> Pruning:
    prune = Pruning(path, **options)
    prune.model = common.Model(model or net())
    prune.train_dataloader = data()
    return prune


def run_on(model: nn.Module, path: Path) -> nn.Module:
    return pruning(path, model)()


def run_described(model: nn.Module, path: Path) -> nn.Module:
    prune = Pruning(path)
    prune.model = model
    return prune()


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
