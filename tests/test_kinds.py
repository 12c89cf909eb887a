"""Heads, dimensions of heads, hidden channels and the residual stream: found from the graph alone, pruned as asked."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import build
from test_rules import conv
from torch import Tensor, nn

from graphprune.compress import Result, compress
from graphprune.config import Request
from graphprune.dependency import trace
from graphprune.errors import ConfigError, ModelError

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


class Block(nn.Module):
    """Attention by hand with a fused projection and a bias for each head, and a gated feed-forward network."""

    def __init__(self, heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.heads, self.size, self.scale = heads, size, size**-0.5
        self.qkv = nn.Linear(16, 3 * heads * size)
        self.table = nn.Parameter(torch.randn(heads, 5, 5))
        self.o = nn.Linear(heads * size, 16)
        self.gate, self.up, self.down = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 5, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale + self.table).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).reshape(x.shape[0], 5, self.heads * self.size))
        return x + self.down(F.gelu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.one, self.two = Block(), Block()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x))))


def kept(**options: Any) -> dict[str, tuple[int, ...]]:
    result = shrunk(Stack(), torch.randn(2, 5, 12), **options)
    assert isinstance(result.model, Stack)
    return {name: tuple(tensor.shape) for name, tensor in result.model.named_parameters()}


def shrunk(model: nn.Module, x: Tensor, **options: Any) -> Result:
    torch.manual_seed(0)
    return compress(model.eval(), x, 0.5, round_to=1, **options)


def test_kinds_are_found_from_the_graph() -> None:
    inside = [f"{block}.{name}" for block in ("one", "two") for name in ("down", "gate", "o", "qkv", "up")]
    groups = trace(Stack().eval(), torch.randn(2, 5, 12)).prunable
    assert {(group.kind, group.units, tuple(sorted({m.module for m in group.members}))) for group in groups} == {
        ("width", 16, tuple(sorted(["head", "stem", *inside]))),
        ("heads", 4, ("one", "one.o", "one.qkv")),
        ("ffn", 20, ("one.down", "one.gate", "one.up")),
        ("heads", 4, ("two", "two.o", "two.qkv")),
        ("ffn", 20, ("two.down", "two.gate", "two.up")),
    }


def test_channels_that_layers_add_to_are_the_width_of_convolutional_networks_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.o = conv(3, 8), conv(8, 6), conv(6, 8), conv(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.a(x)
            y = y + 0.04 * y**3  # of one source: no residual stream
            return self.o(x + self.b(y))

    kinds = {group.name: group.kind for group in trace(Net().eval(), torch.randn(2, 3, 6, 6)).prunable}
    assert kinds == {"stem.weight": "width", "a.weight": "ffn"}


def test_whole_heads() -> None:
    shapes = kept(heads=True)
    assert shapes["one.qkv.weight"] == (3 * 2 * 6, 16)
    assert shapes["one.table"] == (2, 5, 5)
    assert shapes["one.o.weight"] == (16, 12)
    assert shapes["one.gate.weight"] == (20, 16)


def test_dimensions_of_heads() -> None:
    shapes = kept(head_dims=True)
    assert shapes["one.qkv.weight"] == (3 * 4 * 3, 16)
    assert shapes["one.table"] == (4, 5, 5)
    assert shapes["one.o.weight"] == (16, 12)
    assert shapes["stem.weight"] == (16, 12)


class Scaled(Block):
    """The scale is computed from the size of a head each time."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.size**-0.5
        return super().forward(x)


def test_a_class_that_would_scale_otherwise_is_not_handed_over() -> None:
    result = shrunk(nn.Sequential(nn.Linear(12, 16), Scaled(), nn.Linear(16, 3)), torch.randn(2, 5, 12), head_dims=True)
    assert result.report["result"]["form"] == "graph"
    assert "computes something else" in result.report["result"]["obstacle"]


def test_hidden_channels() -> None:
    shapes = kept(ffn=True)
    assert shapes["one.gate.weight"] == shapes["one.up.weight"] == (10, 16)
    assert shapes["one.qkv.weight"] == (72, 16)


def test_the_residual_stream() -> None:
    shapes = kept(width=True)
    assert shapes["stem.weight"] == (8, 12)
    assert shapes["one.qkv.weight"] == (72, 8)
    assert shapes["two.down.weight"] == (8, 20)


def test_everything_but_the_residual_stream() -> None:
    shapes = kept(width=False)
    assert shapes["stem.weight"] == (16, 12)
    assert shapes["one.qkv.weight"] == (36, 16)
    assert shapes["one.down.weight"] == (16, 10)


def test_a_global_ranking_takes_other_numbers_of_heads_from_other_layers() -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    with torch.no_grad():
        model.two.qkv.weight[:] *= torch.tensor([0.1, 0.1, 0.1, 4.0]).repeat(3).repeat_interleave(6)[:, None]
    result = compress(model, torch.randn(2, 5, 12), 0.5, round_to=1, heads=True, scope="global")
    assert isinstance(result.model, Stack)
    counts = [result.model.get_parameter(f"{name}.table").shape[0] for name in ("one", "two")]
    assert sum(counts) == 4 and counts[0] != counts[1]
    assert [result.model.one.heads, result.model.two.heads] == counts


def test_groups_of_heads_under_grouped_queries() -> None:
    model, _ = build("llama")
    ids = torch.randint(512, (2, 9))
    whole = shrunk(model, ids, heads=True)
    attention = whole.model.model.layers[0].self_attn
    assert (attention.num_heads, attention.num_kv_heads) == (4, 2)
    assert tuple(attention.k_proj.weight.shape) == (2 * 16, 128)
    dims = shrunk(model, ids, head_dims=True).model  # a graph: the class would scale by the smaller size
    assert tuple(dims.get_parameter("model.layers.1.self_attn.q_proj.weight").shape) == (8 * 8, 128)
    assert tuple(dims.get_parameter("model.layers.1.self_attn.v_proj.weight").shape) == (4 * 8, 128)
    assert tuple(dims.get_buffer("model.rotary.inv_freq").shape) == (4,)  # both halves of a head turn together


def test_the_report_says_what_was_not_asked_for() -> None:
    report = shrunk(Stack(), torch.randn(2, 5, 12), ffn=True).report
    notes = {group["name"]: (group["kind"], group["note"]) for group in report["groups"]}
    assert notes["stem.weight"] == ("width", "the residual stream should stay")
    assert ("heads", "heads of attention should stay") in notes.values()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": True, "head_dims": True}, r"^heads and head_dims: exclude each other\. Let whole heads go, or dim"),
        ({"heads": False, "ffn": False, "width": False}, r"^heads, ffn and width: none of them may go\. Leave one"),
        ({"heads": "many"}, r"^heads 'many': is neither true nor false\. Use one of them\."),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request.of(**options)


def test_nothing_of_the_kind_is_there() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2))
    with pytest.raises(
        ModelError, match=r"^model: nothing can be pruned \(hidden channels between two layers should stay\)"
    ):
        compress(model.eval(), torch.randn(2, 3, 6, 6), 0.5, heads=True, round_to=1)
