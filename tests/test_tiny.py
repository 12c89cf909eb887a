"""The whole pipeline on tiny nets, in seconds: what a user asks, what comes back, and what is refused in one line."""

import json
from typing import Any, get_args

import pytest
import torch
from test_rules import check_oracle, conv, image
from torch import Tensor, nn

import graphprune
from graphprune.criteria import CRITERIA, CriterionName
from graphprune.errors import ConfigError, GraphpruneError, ModelError
from speedup.errors import CaptureError, SpeedupError
from speedup.proof import verify


class Tiny(nn.Module):
    """A stem, a residual block with a padded shortcut, grouped and depthwise convolutions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 12, groups=12), conv(12, 12, 1))
        self.mix = conv(12, 12, groups=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x) + nn.functional.pad(x, (0, 0, 0, 0, 2, 2))
        return self.head(self.mix(y).relu().mean((2, 3)))


pytestmark = pytest.mark.usefixtures("quiet_and_quick")


def tiny() -> Tiny:
    net = Tiny().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "random"])
def test_a_tiny_net_comes_back_smaller_and_right(criterion: str, scope: str) -> None:
    net = tiny()
    result = graphprune.compress(net, image(), 0.5, criterion=criterion, scope=scope, round_to=1)
    dense, small = result.report["params"]["dense"], result.report["params"]["shrunk"]
    assert dense == sum(p.numel() for p in net.parameters()) and small == sum(
        p.numel() for p in result.model.parameters()
    )
    assert small < 0.6 * dense
    assert result.report["proof"]["difference"] < 1e-10
    check_oracle(net, result.plan, result.model.eval(), image())
    assert verify(net, result.plan, image()).difference < 1e-10


def test_the_stages_have_names_in_order_and_seconds() -> None:
    seen: list[str] = []
    result = graphprune.compress(tiny(), image(), 0.5, round_to=1, progress=seen.append)
    assert seen == ["capture", "analyse", "group", "score", "select", "plan", "shrink", "verify", "count"]
    assert list(result.report["seconds"]) == seen and all(seconds >= 0 for seconds in result.report["seconds"].values())


def test_the_report_is_plain_data() -> None:
    result = graphprune.compress(tiny(), image(), 0.5, round_to=1, exclude=("mix",))
    report: dict[str, Any] = json.loads(json.dumps(result.report))
    assert report["request"]["exclude"] == ["mix"] and report["round_to"] == 1
    assert report["params"]["ratio"] == report["params"]["dense"] / report["params"]["shrunk"]
    assert report["macs"]["shrunk"] < report["macs"]["dense"]
    assert report["result"]["form"] == "graph"  # the padding of the shortcut stands in the code
    assert report["result"]["obstacle"].startswith(__file__) and "size of tensor" in report["result"]["obstacle"]
    shapes = {name: shape for layer in report["layers"] for name, shape in layer["shapes"].items()}
    assert shapes["stem.0.weight"] == {"dense": [8, 3, 3, 3], "shrunk": [4, 3, 3, 3]}
    assert "excluded by name (mix)" in {item["reason"] for item in report["pinned"]}


def test_macs_are_those_of_one_example() -> None:
    net = nn.Sequential(conv(3, 8), conv(8, 2, 1))
    for batch in (1, 2, 4):
        report = graphprune.compress(net, torch.randn(batch, 3, 6, 6), 0.5, round_to=1).report
        assert report["macs"]["dense"] == 36 * (8 * 3 * 9 + 2 * 8)
        assert report["macs"]["shrunk"] == 36 * (4 * 3 * 9 + 2 * 4)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.7, 0.9, 0.99])
def test_every_share_is_proven(sparsity: float) -> None:
    result = graphprune.compress(tiny(), image(), sparsity, round_to=1)
    assert result.report["proof"]["difference"] < 1e-10
    assert all(size >= 1 for p in result.model.parameters() for size in p.shape)


def test_a_share_of_nothing_changes_nothing() -> None:
    net = tiny()
    result = graphprune.compress(net, image(), 0.0, round_to=1)
    assert result.report["params"]["ratio"] == 1 and not result.plan.keep
    torch.testing.assert_close(result.model(image()), net(image()))


def test_small_again() -> None:
    """What comes back can be compressed again, in both forms."""
    first = graphprune.compress(tiny(), image(), 0.3, round_to=1)
    for model in (first.model, first.shrunk.graph):
        second = graphprune.compress(model.eval(), image(), 0.3, round_to=1)
        assert second.report["params"]["shrunk"] < first.report["params"]["shrunk"]
        assert second.report["proof"]["difference"] < 1e-10


def test_it_learns_after_it_was_shrunk() -> None:
    result = graphprune.compress(tiny(), image(), 0.5, round_to=1)
    model = result.model.train()
    x, y = torch.randn(64, 3, 6, 6), torch.randint(0, 5, (64,))
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# What is refused, in one line.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"^sparsity 1.0: is not in \[0, 1\). Use a share such as 0.5\.$"),
        ({"sparsity": -0.1}, r"^sparsity -0.1: is not in \[0, 1\)"),
        ({"sparsity": "much"}, "^sparsity 'much': "),
        (
            {"criterion": "l3"},
            "^criterion 'l3': is not known. Use one of l1, l2, fpgm, bn_scale, apoz, mean_activation, taylor, random",
        ),
        (
            {"criterion": "taylor"},
            r"^criterion 'taylor': looks at gradients. Give calibrate\(model\), or training\(\) beside the model",
        ),
        ({"criterion": "apoz", "calibrate": lambda model: None}, "^calibrate: the model was not called while it ran"),
        ({"batches": 0}, "^batches 0: is below 1"),
        ({"scope": "here"}, "^scope 'here': "),
        ({"round_to": 0}, "^round_to 0: is below 1"),
        ({"min_channels": 0}, "^min_channels 0: is below 1"),
        ({"sparcity": 0.5}, "^sparcity 0.5: "),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        graphprune.compress(tiny(), image(), **options)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers() -> None:
    net = tiny()
    net.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"^head.weight: holds values that are not finite"):
        graphprune.compress(net, image(), 0.5)


def test_a_mask_of_minus_infinities_is_no_weight() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 2)
            self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.o((self.a(x) @ self.b(x).mT + self.mask).softmax(-1) @ x)

    assert graphprune.compress(Masked(), torch.randn(2, 5, 12), 0.5, round_to=1).report["proof"]["difference"] < 1e-10


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(
        CaptureError, match=r"^Tiny: raises RuntimeError on the example inputs .* 2x4x6x6 float32\.$"
    ) as caught:
        graphprune.compress(tiny(), torch.randn(2, 4, 6, 6), 0.5)
    assert "\n" not in str(caught.value)


def test_nothing_to_prune() -> None:
    with pytest.raises(ModelError, match=r"^model: nothing can be pruned \(is an output of the model \(output\)\)"):
        graphprune.compress(nn.Linear(3, 4), torch.randn(2, 3), 0.5, round_to=1)


def test_strict_refuses_an_operator_without_a_rule() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.a(x.cummax(1).values))

    assert graphprune.compress(Unknown(), image(), 0.5, round_to=1).model
    with pytest.raises(ModelError, match=r"^cummax: operator aten.cummax.default has no rule"):
        graphprune.compress(Unknown(), image(), 0.5, strict=True)


def test_all_errors_are_of_one_family() -> None:
    assert issubclass(GraphpruneError, SpeedupError) and issubclass(CaptureError, SpeedupError)
    assert set(CRITERIA) == set(get_args(CriterionName))
