"""Config lists of NNI, from a file or as an argument, in the ordinary pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import COMPLETE, QUICK, complaint, run
from torch import nn

import graphprune
from graphprune.config_file import read_config_file
from graphprune.errors import ConfigError, ModelError
from graphprune.search import Space

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

LIST = "- {op_types: [Conv2d], sparsity: 0.5}\n- {op_names: [head], exclude: true}\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(COMPLETE)
    return tmp_path


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.three, self.fc = nn.Conv2d(32, 8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.three(self.two(self.one(x).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


def kept(config_list: Any, **options: Any) -> tuple[int, ...]:
    """The channels that are left of each convolution."""
    torch.manual_seed(0)
    result = graphprune.compress(Chain(), torch.randn(2, 3, 9, 9), config_list=config_list, round_to=1, **options)
    return tuple(result.model.get_submodule(name).out_channels for name in ("one", "two", "three"))


def test_a_config_list_says_how_much_of_which_layers_goes() -> None:
    assert kept([{"op_types": ["Conv2d"], "sparsity": 0.5}]) == (8, 16, 4)
    assert kept([{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["two"], "sparsity": 0.25}]) == (8, 24, 4)
    assert kept([{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["two"], "exclude": True}]) == (8, 32, 4)
    assert kept([{"op_names": ["one"], "sparsity": 0.75}]) == (4, 32, 8)
    assert kept([{"op_types": ["Conv2d"], "sparsity": 0.5}], exclude=("one",)) == (16, 16, 4)
    assert kept([{"op_types": ["Conv2d"], "sparsity": 0.5}], min_channels=6) == (8, 16, 6)
    assert kept([{"op_types": ["Conv2d"], "sparsity": 0.3}], scope="global") != kept(
        [{"op_types": ["Conv2d"], "sparsity": 0.3}]
    )


def test_what_a_config_list_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"config_list\[0\]: no layer is called 'tow' \(did you mean 'two'\?\)"):
        kept([{"op_names": ["tow"], "sparsity": 0.5}])
    with pytest.raises(ConfigError, match=r"config_list \(\): is no list of entries"):
        kept([])
    with pytest.raises(graphprune.errors.ModelError, match=r"nothing can be pruned"):
        kept([{"op_names": ["fc"], "sparsity": 0.5}])
    for entry, why in (
        ({"op_names": ["fc"], "sparsity": 0.5}, r"is an output of the model \(output\)"),
        ({"op_names": ["one"], "sparsity": 0}, "the sparsity that is asked for is 0"),
    ):
        for asking in (kept, lambda listed: Space.of(Chain(), torch.randn(2, 3, 9, 9), config_list=listed, round_to=1)):
            if asking is kept or entry["sparsity"]:
                with pytest.raises(ModelError, match=rf"^model: nothing can be pruned \({why}\)\. Look at"):
                    asking([entry])
    for key, value in (("start_epoch", 1), ("end_epoch", 3), ("frequency", 2), ("prune_iterations", 3)):
        with pytest.raises(ConfigError, match=rf"config_list\[0\]: {key} has no effect where no loop of epochs is"):
            kept([{"op_types": ["Conv2d"], "sparsity": 0.5, key: value}])
    with pytest.raises(ConfigError, match=r"config_list\[0\]: initial_sparsity has no effect without rounds"):
        kept([{"op_types": ["Conv2d"], "sparsity": 0.5, "initial_sparsity": 0.2}])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.yaml", LIST),
        ("list.json", json.dumps([{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["head"], "exclude": True}])),
        ("more.yaml", "criterion: l2\nround_to: 4\nseed: 3\nconfig_list:\n" + LIST),
    ],
)
def test_compress_reads_a_config_list(place: Path, name: str, text: str) -> None:
    (place / name).write_text(text)
    done = run("compress", "net.py", "--config", name, "--no-bench", "--round-to", 8, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [(group["name"], group["units"], group["kept"]) for group in report["groups"]] == [("stem.weight", 32, 16)]
    assert report["round_to"] == 8  # the command line wins
    assert report["request"]["criterion"] == ("l2" if name == "more.yaml" else "l1")
    assert report["request"]["seed"] == (3 if name == "more.yaml" else 0)
    assert report["request"]["config_list"][1] == {"op_names": ["head"], "exclude": True}


def test_a_file_may_say_how_to_search(place: Path) -> None:
    (place / "run.yaml").write_text(
        "schedule: linear\nrounds: 2\njournal: rounds.jsonl\nseed: 3\nconfig_list:\n" + LIST
    )
    done = run("compress", "net.py", "--config", "run.yaml", "--rounds", 3, *QUICK)
    assert done.exit_code == 0, done.output
    header, *rounds = map(json.loads, (place / "rounds.jsonl").read_text().splitlines())
    assert header["settings"]["schedule"] == "linear" and header["seed"] == 3
    assert len(rounds) == 3  # the command line wins


def test_a_file_may_hold_options_alone(place: Path) -> None:
    (place / "options.yaml").write_text("sparsity: 0.25\nexclude: [body]\n")
    line = complaint(run("compress", "net.py", "--config", "options.yaml", *QUICK))
    assert line.startswith("model: nothing can be pruned (excluded by name (body)")


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("- {op_types: [Conv2d], sparsity: 2}", (), "config_list[0]: sparsity 2 is not in [0, 1). Use a share"),
        ("- {op_typs: [Conv2d], sparsity: 0.5}", (), "config_list[0]: 'op_typs' is no key of an entry (did you mean"),
        ("config_lst: []", (), "c.yaml: 'config_lst' is no key of it (did you mean 'config_list'?)"),
        ("prunning: {}", (), "c.yaml: 'prunning' is no key of it (did you mean 'pruning'?)"),
        ("words", (), "c.yaml: holds 'words'. Give a config list, or pruning in the form of LPOT."),
        (LIST, ("--sparsity", 0.3), "sparsity: is said by the config_list of c.yaml. Leave it out."),
        ("sparsity: 0.3\nconfig_list: []", (), "sparsity: is said by the config_list of c.yaml. Leave it out."),
        (
            "config_list: Conv2d",
            (),
            "c.yaml: config_list 'Conv2d': is no list of entries. Give a list of dictionaries.",
        ),
        (
            "config_list: {op_types: [Conv2d]}",
            (),
            "c.yaml: config_list {'op_types': ['Conv2d']}: is no list of entries.",
        ),
        ("[]", (), "c.yaml: config_list []: is no list of entries."),
        ("config_list: null", (), "c.yaml: config_list: holds nothing. Give it a value, or leave it out."),
        ("exclude: 3", (), "c.yaml: exclude 3: is no list. Give one, in brackets."),
        ("exclude: [3]", (), "c.yaml: exclude [3]: is no text. Use a name."),
        ("heads: perhaps", (), "c.yaml: heads 'perhaps': is neither true nor false. Use one of them."),
        ("sparsity: half", (), "c.yaml: sparsity 'half': is no number. Use one such as 0.5."),
        ("round_to: true", (), "c.yaml: round_to True: is no whole number. Use one such as 8."),
        ("sparsity: false", (), "c.yaml: sparsity False: is no number. Use one such as 0.5."),
        ("epochs: true", (), "c.yaml: epochs True: is no whole number. Use one such as 8."),
        ("round_to: 2.5", (), "c.yaml: round_to 2.5: is no whole number. Use one such as 8."),
        ("criterion: l11", (), "c.yaml: criterion 'l11': is not known. Use one of l1"),
        ("scope: here", (), "c.yaml: scope 'here': input should be 'local' or 'global'. Use one of them."),
        ("epochs: many", (), "c.yaml: epochs 'many': is no whole number. Use one such as 8."),
        ("epochs: -1", (), "c.yaml: epochs -1: is below 0. Use 0 or more."),
        ("journal: 3", (), "c.yaml: journal 3: is no name of a file. Use one."),
        ("schedule: cubic", (), "c.yaml: schedule 'cubic': is not known. Use one of one_shot, "),
        ("rounds: 3", (), "--rounds: has no effect without --schedule, --search or --epochs."),
        ("search: amc", ("--schedule", "agp"), "--search and --schedule: exclude each other."),
        ("", (), "c.yaml: holds nothing."),
    ],
)
def test_a_file_that_makes_no_sense(place: Path, text: str, options: tuple[Any, ...], line: str) -> None:
    (place / "c.yaml").write_text(text)
    assert complaint(run("compress", "net.py", "--config", "c.yaml", *options)).startswith(line)
    assert not (place / "net-pruned").exists()


def test_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("[1e-4, 1E3, -2.5e+1, 1.e2, 1e5x, 12e, 0.1, 'a1e5', 3]")
    assert read_config_file(path) == [1e-4, 1e3, -25.0, 100.0, "1e5x", "12e", 0.1, "a1e5", 3]
    path.write_text("a: &x {b: 1}\nc:\n  <<: *x\n  b: 2\n")
    assert read_config_file(path) == {"a": {"b": 1}, "c": {"b": 2}}


def test_what_is_tied_to_a_layer_that_is_not_selected_says_so(place: Path) -> None:
    (place / "c.yaml").write_text("- {op_names: [stem], sparsity: 0.5}\n")
    line = complaint(run("compress", "net.py", "--config", "c.yaml", *QUICK))
    assert line.startswith("model: nothing can be pruned (tied to body, which the config list does not select).")
