"""Wide & Deep (Cheng et al. 2016, arXiv:1606.07792) at the shape of the Criteo data: 13 floats and 26 ids -> 1 logit.

For pruning: two inputs, by keyword; each field's embedding is concatenated before the first layer, so every column of a
table is one input of that layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = 13
# Buckets that the ids of each of the 26 fields are hashed into.
BUCKETS = 9 * (20000,) + (10000, 10000, 5000, 4000, 3000, 2000, 1000, 600, 500, 300, 100, 26, 20, 18, 15, 10, 4)


class WideDeep(nn.Module):
    """Sum of a linear model (wide) and a perceptron over embeddings (deep)."""

    def __init__(self, embed_dim: int = 16, hidden: tuple[int, ...] = (1024, 512, 256)) -> None:
        super().__init__()
        self.wide = nn.Linear(FLOATS, 1)
        self.wide_tables = nn.ModuleList(nn.Embedding(buckets, 1) for buckets in BUCKETS)
        self.deep_tables = nn.ModuleList(nn.Embedding(buckets, embed_dim) for buckets in BUCKETS)
        layers: list[nn.Module] = []
        width = FLOATS + embed_dim * len(BUCKETS)
        for units in hidden:
            layers += [nn.Linear(width, units), nn.BatchNorm1d(units), nn.ReLU(), nn.Dropout(0.1)]
            width = units
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, floats: Tensor, ids: Tensor) -> Tensor:
        fields = ids.unbind(dim=1)
        wide = self.wide(floats)
        for table, field in zip(self.wide_tables, fields, strict=True):
            wide = wide + table(field)
        embedded = [table(field) for table, field in zip(self.deep_tables, fields, strict=True)]
        deep = self.deep(torch.cat([floats, *embedded], dim=1))
        return (wide + deep).squeeze(1)


def build_model() -> WideDeep:
    return WideDeep()


def example_inputs() -> dict[str, Tensor]:
    ids = torch.stack([torch.randint(buckets, (2,)) for buckets in BUCKETS], dim=1)
    return {"floats": torch.randn(2, FLOATS), "ids": ids}
