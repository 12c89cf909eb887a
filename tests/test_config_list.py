"""Config lists: which layers they select, what they ask of groups, and what is refused."""

from typing import Any

import pytest
import torch
from test_rules import Net, conv, image
from torch import nn

import graphprune
from graphprune.config_list import read_config_list, target_of
from graphprune.dependency import trace
from graphprune.errors import ConfigError
from graphprune.targets import Target


class Residual(nn.Module):
    """Groups: conv1 with conv3 (they are added), conv2, and the linear layer that is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.ModuleDict(
            {"conv2": nn.Conv2d(8, 6, 3, padding=1), "bn2": nn.BatchNorm2d(6), "conv3": nn.Conv2d(6, 8, 3, padding=1)}
        )
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        y = self.block["bn2"](self.block["conv2"](x)).relu()
        return self.fc((x + self.block["conv3"](y)).mean((2, 3)))


def selected(*entries: dict[str, Any]) -> dict[str, float | None]:
    """The share of each layer; None for layers that are excluded."""
    found = read_config_list(Residual(), list(entries))
    return {name: None if one.entry.exclude else one.entry.share for name, one in found.items()}


CONVS = ("conv1", "block.conv2", "block.conv3")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"op_types": ["Conv2d"], "sparsity": 0.5}], dict.fromkeys(CONVS, 0.5)),
        ([{"op_types": "default", "sparsity": 0.5}], {**dict.fromkeys(CONVS, 0.5), "fc": 0.5}),
        ([{"op_types": ["default"], "sparsity_per_layer": 0.5}], {**dict.fromkeys(CONVS, 0.5), "fc": 0.5}),
        ([{"op_types": ["BatchNorm2d", "Linear"], "sparse_ratio": 0.2}], {"bn1": 0.2, "block.bn2": 0.2, "fc": 0.2}),
        ([{"op_names": ["conv1"], "total_sparsity": 0.2}], {"conv1": 0.2}),
        ([{"op_types": ["Conv2d"], "op_names": ["conv1", "fc"], "sparsity": 0.2}], {"conv1": 0.2}),
        (
            [{"op_partial_names": ["block."], "op_types": ["Conv2d"], "sparsity": 0.1}],
            {"block.conv2": 0.1, "block.conv3": 0.1},
        ),
        ([{"op_names_re": [r"block\.conv\d", "conv"], "sparsity": 0.1}], {"block.conv2": 0.1, "block.conv3": 0.1}),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv1"], "sparsity": 0.1}],
            {**dict.fromkeys(CONVS, 0.5), "conv1": 0.1},
        ),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv1"], "exclude": True}],
            {**dict.fromkeys(CONVS, 0.5), "conv1": None},
        ),
        (
            [{"op_names": ["conv1"], "exclude": True}, {"op_types": ["Conv2d"], "sparsity": 0.5}],
            dict.fromkeys(CONVS, 0.5),
        ),
        ([{"op_types": ["_ConvNd"], "sparsity": 0.5}], dict.fromkeys(CONVS, 0.5)),
        (
            [
                {
                    "initial_sparsity": 0,
                    "final_sparsity": 0.8,
                    "start_epoch": 0,
                    "end_epoch": 10,
                    "frequency": 1,
                    "op_types": "default",
                }
            ],
            {**dict.fromkeys(CONVS, 0.8), "fc": 0.8},
        ),
    ],
)
def test_which_layers_are_selected(entries: list[dict[str, Any]], expected: dict[str, float | None]) -> None:
    assert selected(*entries) == expected


def targets(*entries: dict[str, Any], **how: Any) -> dict[str, Target | str]:
    """What is asked of the groups of conv1 with conv3, and of conv2."""
    dependencies = graphprune.trace(Residual(), image())
    target = target_of(
        dependencies.analysis, read_config_list(dependencies.analysis.captured.model, list(entries)), **how
    )
    return {group.name: target(group) for group in dependencies.prunable}


FIRST, SECOND = "conv1.weight", "block.conv2.weight"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"op_types": ["Conv2d"], "sparsity": 0.5}], {FIRST: Target(0.5), SECOND: Target(0.5)}),
        # tied layers lose what the least of them is asked for
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["block.conv3"], "sparsity": 0.2}],
            {FIRST: Target(0.2), SECOND: Target(0.5)},
        ),
        (
            [{"op_names": ["conv1", "block.conv2"], "sparsity": 0.5}],
            {FIRST: "tied to block.conv3, which the config list does not select", SECOND: Target(0.5)},
        ),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["block.conv3"], "exclude": True}],
            {FIRST: "excluded by the config list (block.conv3)", SECOND: Target(0.5)},
        ),
        (
            [{"op_names": ["block.conv2"], "sparsity": 0.5}],
            {FIRST: "not selected by the config list", SECOND: Target(0.5)},
        ),
        # a norm speaks for all that it scales
        ([{"op_types": ["BatchNorm2d"], "sparsity": 0.5}], {FIRST: Target(0.5), SECOND: Target(0.5)}),
        ([{"op_names": ["bn1"], "sparsity": 0.5}], {FIRST: Target(0.5), SECOND: "not selected by the config list"}),
        # units weigh what their own weights hold: (8 x 3 + 8 x 6) x 9 over 8, and 6 x 8 x 9 over 6
        (
            [{"op_types": ["Conv2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.8}],
            {FIRST: Target(0.5, "config_list[0]", 0.8, 81.0), SECOND: Target(0.5, "config_list[0]", 0.8, 72.0)},
        ),
        # layers of different entries are not ranked together
        (
            [{"op_types": ["Conv2d"], "total_sparsity": 0.5}, {"op_names": ["block.conv3"], "total_sparsity": 0.2}],
            {FIRST: Target(0.2), SECOND: Target(0.5, "config_list[0]", 1.0, 72.0)},
        ),
    ],
)
def test_what_is_asked_of_groups(entries: list[dict[str, Any]], expected: dict[str, Target | str]) -> None:
    assert targets(*entries) == expected


def test_norms_are_ranked_together_where_that_is_wanted() -> None:
    found = targets({"op_types": ["BatchNorm2d"], "sparsity": 0.5}, together=True, relative=False)
    assert found == dict.fromkeys((FIRST, SECOND), Target(0.5, "config_list[0]", 1.0, 1.0, relative=False))


def test_a_tied_weight_is_selected_by_any_of_its_names() -> None:
    net = Net(lambda n, x: n.o(n.a(x) + n.b(x)), a=conv(3, 6), b=conv(3, 6), o=conv(6, 2))
    net.b.weight = net.a.weight
    dependencies = graphprune.trace(net, image())
    for name in ("a", "b"):
        asked = read_config_list(net, [{"op_names": [name], "sparsity": 0.5}])
        assert target_of(dependencies.analysis, asked)(dependencies.prunable[0]) == Target(0.5)


@pytest.mark.parametrize(
    ("config_list", "message"),
    [
        ({"sparsity": 0.5}, r"^config_list \{'sparsity': 0.5\}: is no list of entries. Give a list of dictionaries.$"),
        ([], r"^config_list \[\]: is no list of entries"),
        (["Conv2d"], r"^config_list\[0\]: is 'Conv2d'. Give a dictionary"),
        (
            [{"op_types": ["Conv2d"], "sparsity": 1.0}],
            r"^config_list\[0\]: sparsity 1.0 is not in \[0, 1\). Use a share such as 0.5.$",
        ),
        ([{"op_types": ["Conv2d"], "sparsity": -0.5}], r"^config_list\[0\]: sparsity -0.5 is not in"),
        ([{"op_types": ["Conv2d"], "sparsity": "half"}], r"^config_list\[0\]: sparsity 'half' "),
        ([{"op_types": ["Conv2d"], "sparse_ratio": 2}], r"^config_list\[0\]: sparse_ratio 2 is not in"),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5, "total_sparsity": 0.5}],
            r"^config_list\[0\]: has both sparsity and total_sparsity. Give one of them.$",
        ),
        (
            [{"op_types": ["Conv2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.4}],
            r"^config_list\[0\]: asks for a total_sparsity of 0.5 that max_sparsity_per_layer 0.4 cannot reach. Raise",
        ),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5, "sparse_ratio": 0.9}],
            r"^config_list\[0\]: sparsity and sparse_ratio are names of one key. Give one of them.$",
        ),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5, "exclude": True}],
            r"^config_list\[0\]: both excludes layers and says",
        ),
        ([{"sparsity": 0.5}], r"^config_list\[0\]: selects no layers. Give it one of op_types"),
        (
            [{"op_types": ["Conv2d"]}],
            r"^config_list\[0\]: does not say how much goes. Give it a sparsity such as 0.5.$",
        ),
        (
            [{"op_type": ["Conv2d"], "sparsity": 0.5}],
            r"^config_list\[0\]: 'op_type' is no key of an entry \(did you mean 'op_types'\?\). Use some of op_types",
        ),
        (
            [{"op_types": ["Conv2D"], "sparsity": 0.5}],
            r"^config_list\[0\]: no layer is of type 'Conv2D' \(did you mean 'Conv2d'\?\). Use some of BatchNorm2d, Conv2d",
        ),
        (
            [{"op_types": ["Conv1d"], "sparsity": 0.5}],
            r"^config_list\[0\]: selects no layer with weights. The model has some of BatchNorm2d",
        ),
        (
            [{"op_names": ["conv4"], "sparsity": 0.5}],
            r"^config_list\[0\]: no layer is called 'conv4' \(did you mean 'conv1'\?\)",
        ),
        (
            [{"op_names_re": ["conv("], "sparsity": 0.5}],
            r"^config_list\[0\]: op_names_re 'conv\(' is no regular expression",
        ),
        ([{"op_types": ["Conv2d"], "exclude": True}], r"^config_list: excludes all that it selects"),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5, "start_epoch": 5, "end_epoch": 5}],
            r"^config_list\[0\]: ends in epoch 5, but starts in 5, so that it never starts",
        ),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_types": ["Conv2d"], "sparsity": 0.5, "frequency": 0}],
            r"^config_list\[1\]: frequency 0 is below 1",
        ),
        (
            [{"op_types": ["Conv2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0}],
            r"^config_list\[0\]: max_sparsity_per_layer 0 is not in \(0, 1\]",
        ),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5, "max_sparsity_per_layer": 0.3}],
            r"^config_list\[0\]: asks for a sparsity of 0.5 that max_sparsity_per_layer 0.3 cannot reach. Raise the latter",
        ),
        ([{"op_types": 3, "sparsity": 0.5}], r"^config_list\[0\]: op_types 3 is no list. Give one, in brackets.$"),
        ([{3: 1}], r"^config_list\[0\]: 3 is no key of an entry. Use names such as 'sparsity'.$"),
        (
            [{"op_types": ["Conv2d"], "sparsity": "half"}],
            r"^config_list\[0\]: sparsity 'half' is no number. Use one such",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(config_list: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config_list(Residual(), config_list)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_one_layer_says_so() -> None:
    with pytest.raises(
        ConfigError, match="selects no layer with weights. The model is one layer without a name: put it"
    ):
        read_config_list(nn.Linear(4, 4), [{"op_types": ["Linear"], "sparsity": 0.5}])


def test_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match="^model: is 'm'. Give a torch.nn.Module.$"):
        read_config_list("m", [{"op_types": ["Conv2d"], "sparsity": 0.5}])  # type: ignore[arg-type]


def test_a_limit_of_a_layer_holds_for_searches_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    settings = read_config_list(model, [{"op_names": ["0"], "sparsity": 0.5, "max_sparsity_per_layer": 0.6}])
    dependencies = trace(model, torch.randn(1, 3, 4, 4))
    target = target_of(dependencies.analysis, settings)
    assert {one.most for group in dependencies.groups if isinstance(one := target(group), Target)} == {0.6}


def test_a_search_finds_the_shares_itself() -> None:
    assert set(read_config_list(Residual(), [{"op_types": ["Conv2d"]}], shares=False)) == set(CONVS)
