"""What the tests of searches share: small nets, evaluators and trainers that workers can import by name."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.search import Space

MODELS = Path(__file__).parent.parent / "models"
if str(MODELS) not in sys.path:
    sys.path.append(str(MODELS))


class Chain(nn.Module):
    """Linear layers with norms between them; the widths are the groups."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((4, *widths), (*widths, 3), strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = norm(layer(x)).relu()
        return self.layers[-1](x)


def chain(*widths: int, seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return Chain(*widths)


def chain_space(*widths: int, **options: Any) -> Space:
    return Space.of(chain(*widths), torch.randn(2, 4), **{"round_to": 1, **options})


def widths(model: nn.Module) -> list[int]:
    """The widths of a chain, whichever form it came in."""
    return [model.get_parameter(f"layers.{place}.weight").shape[0] for place in range(100) if has(model, place + 1)]


def has(model: nn.Module, place: int) -> bool:
    return any(name == f"layers.{place}.weight" for name, _ in model.named_parameters())


def weigh(model: nn.Module) -> float:
    """A score that depends on every weight, and on the generators of random numbers."""
    return sum(float(p.detach().abs().sum()) for p in model.parameters()) + float(torch.rand(()))


def jiggle(model: nn.Module) -> None:
    """Training of a kind: a few steps on random numbers."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


def fit(model: nn.Module) -> float:
    """How well a model computes the sum of its inputs; what it saw in training is in its norms."""
    torch.manual_seed(1)
    x = torch.randn(64, 4)
    model.eval()
    with torch.no_grad():
        return -float((model(x)[:, 0] - x.sum(1)).square().mean())
