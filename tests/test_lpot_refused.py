"""What LPOT's form of pruning refuses, in one line that says what would be right."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lpot_file import CONV, manual_loop, net, pruning, run_on
from test_cli import COMPLETE, complaint, run

from graphprune.errors import ConfigError, TrainingError
from graphprune.lpot import Pruning, common
from speedup.masking import attach_masks, attached_masks

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

HERE = r"^\S+conf\.yaml"
PRUNER = HERE + r": pruning\.approach\.weight_compression\.pruners\[0\]"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("initial_sparsity: 0.2", "initial_sparsty: 0.2", PRUNER + r": 'initial_sparsty' is no key of it \(did you mean 'initial_sparsity'\?\)\. Use some of "),
        ("target_sparsity: 0.8", "target_sparsity: 1.5", PRUNER + r"\.target_sparsity: 1.5 is not in \[0, 1\)\. Use a share such as 0\.5\.$"),
        ("target_sparsity: 0.8", "target_sparsity: much", PRUNER + r"\.target_sparsity: is 'much'\. Give a valid number"),
        ("target_sparsity: 0.8", "target_sparsity: 0.1", PRUNER + r"\.target_sparsity: 0.1 is below the initial_sparsity 0.2"),
        ("basic_magnitude", "lottery", PRUNER + r"\.prune_type: 'lottery' is not known\. Use basic_magnitude\.$"),
        ("            end_epoch: 4", "            end_epoch: 1", PRUNER + r"\.end_epoch: 1 is no later than the start_epoch 1, so that it never starts"),
        ("            end_epoch: 4", "            end_epoch: 2.5", PRUNER + r"\.end_epoch: is 2.5\. Give a valid integer\.$"),
        ("update_frequency: 0.25", "update_frequency: 0", PRUNER + r"\.update_frequency: is 0\. Give a number greater than 0\.$"),
        ("update_frequency: 0.25", "update_frequency: 1\n            frequency: 1", PRUNER + r": has both frequency and update_frequency, which are the same"),
        ("update_frequency: 0.25", "update_frequency: 1\n            update_frequency: 1", HERE + r":46: 'update_frequency' is there twice\. Correct it there\.$"),
        ("        - !Pruner\n            initial", "        - !Purner\n            initial", HERE + r":38: nothing is known of the tag '!Purner', only of !Pruner"),
        ("        - !Pruner\n            initial", "        - !!python/object/apply:os.system\n            initial", HERE + r":38: nothing is known of the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("pruners:", "pruners: []\n      others:", HERE + r": pruning.approach.weight_compression: 'others' is no key"),
        ("basic_magnitude", "'", HERE + r":42: .*Correct it there\.$"),
        ("  approach:", "  aproach:", HERE + r": pruning: 'aproach' is no key of it \(did you mean 'approach'\?\)"),
        ("weight_compression:", "activation_compression:", HERE + r": pruning.approach: 'activation_compression' is no key of it"),
        ("version: 1.0", "pruner: 1.0", HERE + r": 'pruner' is no key of it \(did you mean 'pruning'\?\)"),
        ("batch_size: 4", "batch_size: 0", HERE + r": pruning.train.dataloader.batch_size: is 0\. Give a number greater than or equal to 1"),
        ("CrossEntropyLoss:\n        reduction: None", "- CrossEntropyLoss", HERE + r": pruning.train.criterion: is \['CrossEntropyLoss'\]\. Give one name"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense(write: Callable[..., Path], old: str, new: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        Pruning(write((old, new)))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", HERE + r": holds nothing\. Describe there what to prune\.$"),
        ("just words", HERE + r": holds 'just words', which is no configuration"),
        ("[1, 2]", HERE + r": holds \[1, 2\], which is no configuration"),
        ("version: 1.0", HERE + r": pruning: is missing"),
        ("pruning:", HERE + r": pruning: is None\. Give it some of train, approach\.$"),
        ("pruning: {train: {}}", HERE + r": pruning.approach: is missing\. Give it there\.$"),
        ("pruning: {approach: {weight_compression: {pruners: []}}}", HERE + r": pruning.approach.weight_compression.pruners: is empty"),
        ("pruning: {approach: {weight_compression: {pruners: [{}]}}}", PRUNER + r"\.target_sparsity: is missing"),
        ("pruning: {approach: {weight_compression: {pruners: [{target_sparsity: 0.5}]}}}", PRUNER + r"\.end_epoch: is missing"),
        ("pruning: {approach: {weight_compression: {pruners: [!Pruner all]}}}", HERE + r":1: !Pruner holds no keys"),
        ("pruning: {approach: {weight_compression: {pruners: [all]}}}", PRUNER + r": is 'all'\. Give it some of initial_sparsity"),
        ("a: [1", HERE + r":1: .*Correct it there\.$"),
        ("a: b\n--- c", HERE + r":2: .*Correct it there\.$"),
        ("? [a]\n: b", HERE + r":1: .*Correct it there\.$"),
    ],
)  # fmt: skip
def test_a_file_that_is_none(write: Callable[..., Path], text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        Pruning(write(text=text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read \(No such file or directory\)\. Name a YAML"):
        Pruning(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes.yaml: is no text\."):
        Pruning(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("'first.weight'", "'frst.weight'", PRUNER + r"\.names: the model has no parameter 'frst.weight' \(did you mean 'first.weight'\?\)"),
        ("'first.weight'", "'norm.running_mean'", PRUNER + r"\.names: the model has no parameter 'norm.running_mean'"),
        ("'first.weight'", "'first.weight', 'first.*'", PRUNER + r"\.names: 'first.weight' is there twice"),
        ("'first.weight'", "'last.weight'", r"pruners\[1\]\.names: 'last.weight' is asked for in pruners\[0\] too"),
        ("['first.weight']", "\n            frequency: 1", r"frequency and update_frequency"),
        ("    end_epoch: 6", "    end_epoch: 3", r"pruners\[0\]\.end_epoch: 4 is later than that of train, 3, so that it never reaches its target"),
        ("    end_epoch: 6", "    end_epoch: 1", r"pruners\[0\]\.end_epoch: 4 is later than that of train, 1, so that it never starts"),
        ("    criterion:\n      CrossEntropyLoss:\n        reduction: None\n", "", HERE + r": pruning.train.criterion: is missing\. Give it there, or set pruning_func"),
        ("CrossEntropyLoss:", "CrossEntropy:", HERE + r": pruning.train.criterion: torch.nn has no 'CrossEntropy' \(did you mean 'CrossEntropyLoss'\?\)"),
        ("reduction: None", "reduction: maximum", r"CrossEntropyLoss.reduction: 'maximum' makes no number of a batch\. Use mean or sum\.$"),
        ("reduction: None", "reducton: mean", HERE + r": pruning.train.criterion.CrossEntropyLoss: 'reducton' is no argument of it \(did you mean 'reduction'\?\)"),
        ("SGD:", "SDG:", HERE + r": pruning.train.optimizer: torch.optim has no 'SDG' \(did you mean 'SGD'\?\)"),
        ("momentum: 0.8", "momentum: 0", HERE + r": pruning.train.optimizer.SGD: Nesterov momentum requires a momentum"),
        ("        momentum: 0.8\n        weight_decay: 0.0001\n        nesterov: True\n", "        momentun: 1\n", r"optimizer.SGD: 'momentun' is no argument of it \(did you mean 'momentum'\?\)"),
        ("SGD:\n        learning_rate: 2e-2\n        momentum: 0.8\n        weight_decay: 0.0001\n        nesterov: True\n", "LBFGS:\n", r"optimizer.LBFGS: needs a closure in each step"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(write: Callable[..., Path], old: str, new: str, line: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ConfigError, ValueError), match=line):
        run_on(model, write((old, new)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("learning_rate: 2e-2", "learning_rate: fast", r"optimizer.SGD: .*\(lr 'fast', .*\)\. Correct its arguments\.$"),
        ("root: ROOT", "root: elsewhere", r"dataset.ImageFolder: there is no elsewhere\. Correct its arguments\.$"),
        ("root: ROOT", "rot: ROOT", r"dataset.ImageFolder: 'rot' is no argument of it \(did you mean 'root'\?\)\. It has root, transform\.$"),
        ("ImageFolder:", "ImageFolders:", r"dataset: torchvision.datasets has no 'ImageFolders' \(did you mean 'ImageFolder'\?\)"),
        ("Normalize:", "Normalise:", r"transform: torchvision.transforms has no 'Normalise' \(did you mean 'Normalize'\?\)"),
        ("          mean: [0.5, 0.4, 0.3]\n", "", r"transform.Normalize: .*mean.* Correct its arguments\.$"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("vision")
def test_data_that_is_not_there(write: Callable[..., Path], old: str, new: str, line: str) -> None:
    prune = pruning(write(CONV[0], (old, new)))
    prune.train_dataloader = None
    with pytest.raises(ConfigError, match=line):
        prune()


def test_torchvision_is_only_needed_for_its_data(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
    pruning(write())()
    prune = pruning(write())
    prune.train_dataloader = None
    with pytest.raises(ConfigError, match=r"pip install 'graphprune\[vision\]', or set train_dataloader\.$"):
        prune()


def test_mistakes_around_the_file(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"model: is not set"):
        Pruning(write())()
    with pytest.raises(ConfigError, match=r"common.Model: is given a int"):
        Pruning(write()).model = common.Model(3)  # type: ignore[arg-type]
    masked = net()
    attach_masks(masked, {"first.weight": torch.ones(32, 8)})
    with pytest.raises(ConfigError, match=r"model: has masks already"):
        run_on(masked, write())
    prune = pruning(write())
    prune.pruning_func = 3  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"pruning_func: is a int\. Give a function"):
        prune()
    prune.pruning_func = lambda model: copy.deepcopy(model)
    with pytest.raises(TrainingError, match=r"pruning_func: returns another model"):
        prune()
    prune.pruning_func = lambda model: None
    with pytest.raises(TrainingError, match=r"pruning_func: called no hook, so that nothing was pruned"):
        prune()
    prune.pruning_func = lambda model: prune.on_batch_begin(0)
    with pytest.raises(TrainingError, match=r"on_batch_begin: comes before any on_epoch_begin"):
        prune()
    with pytest.raises(TrainingError, match=r"Pruning: a hook is called while nothing is pruned"):
        prune.on_batch_end()
    for options, name in (({"folder": "runs"}, "folder"), ({"resume": True}, "resume")):
        prune = Pruning(write(), **options)
        prune.model, prune.pruning_func = common.Model(net()), manual_loop(prune)
        with pytest.raises(ConfigError, match=f"^{name}: is for training by the file, and there is a pruning_func"):
            prune()
    prune = pruning(write(("iteration: 5", "iteration:")))
    prune.train_dataloader = (one for one in ())
    prune.pruning_func = manual_loop(prune)
    with pytest.raises(ConfigError, match=r"pruners\[0\]\.frequency: is 0.25 epochs, but how many batches"):
        prune()
    assert not attached_masks(prune.model)  # type: ignore[arg-type]


def test_the_command_line_ends_in_one_line(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(COMPLETE)
    path = write(*CONV)
    assert complaint(run("compress", "net.py", "--config", path, "--criterion", "l2")).startswith(
        "--criterion: is not for "
    )
    assert complaint(run("compress", "net.py", "--config", path, "--checkpoint", ".")).startswith(
        "--checkpoint: is not for "
    )
    assert "pruners[0].names: the model has no parameter" in complaint(
        run("compress", "net.py", "--config", write(CONV[0]))
    )
    assert complaint(run("compress", "net.py", "--config", "no.yaml")).startswith("no.yaml: cannot be read")
    assert sorted(one.name for one in tmp_path.iterdir() if one.name != "__pycache__") == ["conf.yaml", "net.py"]


def test_a_configuration_is_a_file() -> None:
    with pytest.raises(ConfigError, match=r"^config: is a dict\. Name a YAML file\.$"):
        Pruning({"pruning": 1})  # type: ignore[arg-type]
