"""Checkpoints shrunk from folder to folder, tensor by tensor; those with a fault are refused in one line."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_skeleton import IDS, Buffers, small
from torch import Tensor, nn

import graphprune
from graphprune import compress_checkpoint
from graphprune.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from graphprune.errors import ConfigError, ModelError
from speedup.errors import ProofError

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

FIRST = "model.embed_tokens.weight"


def saved(model: nn.Module, folder: Path, shards: int = 3, leave_out: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Writes a checkpoint as the hub has them: several files with an index, or one without."""
    folder.mkdir()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in leave_out}
    if shards == 1:
        save_file(state, folder / SINGLE, metadata={"format": "pt"})
        return state
    names, where = list(state), {}
    for place in range(shards):
        file = f"model-{place + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in names[place::shards]}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names[place::shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return state


def checkpoint_and_model(build: Callable[[], nn.Module], folder: Path, **how: Any) -> nn.Module:
    torch.manual_seed(1)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    saved(model, folder, **how)
    return model.eval()


class Stubborn(nn.Module):
    """A size in the code of forward, which no attribute can change."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, 1, 32).squeeze(1).relu())


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": ({}, IDS, {}),
    "one file": ({"num_hidden_layers": 1}, IDS, {"shards": 1}),
    "tied": ({"num_hidden_layers": 1, "tie_word_embeddings": True}, IDS, {"leave_out": ("lm_head.weight",)}),
    "tied, the other name": (
        {"num_hidden_layers": 1, "tie_word_embeddings": True},
        IDS,
        {"leave_out": ("model.embed_tokens.weight",)},
    ),
    "buffers": (Buffers, torch.randn(2, 8), {"leave_out": ("again.weight",)}),
    "graph": (Stubborn, torch.randn(2, 8), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_shrinks_as_the_model_does(name: str, llama: Any, tmp_path: Path) -> None:
    what, example, how = CASES[name]
    build = small(llama, **what) if isinstance(what, dict) else what
    model = checkpoint_and_model(build, tmp_path / "dense", **how)
    direct = graphprune.compress(model, example, 0.5, round_to=1)
    report = compress_checkpoint(build, example, tmp_path / "dense", tmp_path / "small", 0.5, round_to=1)
    assert report["result"]["form"] == direct.report["result"]["form"]
    assert report["proof"]["nodes"] == direct.report["proof"]["nodes"]
    assert report["params"] == direct.report["params"]
    loaded = graphprune.load(tmp_path / "small", build()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(example), direct.model(example))
    dense, shrunk = (Checkpoint.open(tmp_path / folder) for folder in ("dense", "small"))
    assert shrunk.files.keys() == dense.files.keys()
    assert all(set(names) == set(dense.files[file]) for file, names in shrunk.files.items())
    assert shrunk.metadata == dense.metadata
    if INDEX in {path.name for path in shrunk.folder.iterdir()}:
        told = json.loads((shrunk.folder / INDEX).read_text())
        assert told["metadata"]["total_size"] == shrunk.bytes < dense.bytes
        assert told["weight_map"] == {name: entry.file for name, entry in dense.entries.items()}


def test_types_are_those_of_the_checkpoint(llama: Any, tmp_path: Path) -> None:
    saved(small(llama)().bfloat16(), tmp_path / "dense")
    compress_checkpoint(small(llama), IDS, tmp_path / "dense", tmp_path / "small", round_to=1)
    found = Checkpoint.open(tmp_path / "small")
    assert {entry.dtype for entry in found.entries.values()} == {"BF16"}
    file = next(iter(found.files))
    assert load_file(tmp_path / "small" / file).keys() == set(found.files[file])


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm"])
def test_few_tensors_are_in_memory_at_once(
    criterion: str, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_and_model(small(llama), tmp_path / "dense")
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = Checkpoint.tensor

    def counted(self: Checkpoint, name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    compress_checkpoint(
        small(llama), IDS, tmp_path / "dense", tmp_path / "small", round_to=1, criterion=criterion, prove_it=False
    )
    assert len(alive) > 20
    assert most <= 1  # the one before, until its name gets the next


def test_what_was_written_wrongly_is_not_handed_over(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphprune.checkpoints import stream

    checkpoint_and_model(small(llama), tmp_path / "dense")
    write = stream.write_checkpoint

    def wrong(folder: Path, like: Checkpoint, shapes: Any, tensor: Callable[[str], Tensor]) -> None:
        write(folder, like, shapes, lambda name: tensor(name).flip(0) if "up_proj" in name else tensor(name))

    monkeypatch.setattr(stream, "write_checkpoint", wrong)
    with pytest.raises(ProofError, match="up_proj.weight does not hold what the plan keeps"):
        compress_checkpoint(small(llama), IDS, tmp_path / "dense", tmp_path / "small", round_to=1)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_request_is_checked_before_anything_is_read(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sparsity 2"):
        compress_checkpoint(small(llama), IDS, tmp_path / "none", tmp_path / "small", 2)


def edited(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    told = json.loads((folder / INDEX).read_text())
    edit(told["weight_map"])
    (folder / INDEX).write_text(json.dumps(told))


def rewritten(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "00002.*names it, but there is no such"),
    "not in the file": (lambda f: rewritten(f, lambda state: state.pop(FIRST)), f"{FIRST}: .* which it does not"),
    "other file": (
        lambda f: edited(f, lambda where: where.update({FIRST: "model-00002-of-00003.safetensors"})),
        f"{FIRST}: .* which it does not",
    ),
    "other shape": (
        lambda f: rewritten(f, lambda state: state.update({FIRST: torch.zeros(95, 32)})),
        r"has shape \(95, 32\), in the model \(96, 32\)",
    ),
    "twice": (
        lambda f: save_file({FIRST: torch.zeros(96, 32)}, f / "model-00002-of-00003.safetensors"),
        "both hold it",
    ),
    "unknown": (
        lambda f: rewritten(f, lambda state: state.update({"model.embed_token.weight": torch.zeros(2)})),
        "unknown to the model .did you mean",
    ),
    "lacking": (
        lambda f: (rewritten(f, lambda s: s.pop(FIRST)), edited(f, lambda where: where.pop(FIRST))),
        f"lacks {FIRST}",
    ),
    "outside": (
        lambda f: edited(f, lambda where: where.update({FIRST: "../x.safetensors"})),
        "no safetensors file beside",
    ),
    "no index": (lambda f: (f / INDEX).write_text("{"), "is no index of a checkpoint"),
    "damaged": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes(b"12"), "is no safetensors file"),
    "nan": (
        lambda f: rewritten(f, lambda state: state[FIRST].view(-1)[5:6].fill_(float("nan"))),
        f"{FIRST}: holds values that are not finite",
    ),
}

FAULTS["other type"] = (
    lambda f: rewritten(f, lambda state: state.update({FIRST: torch.zeros(96, 32, dtype=torch.int8)})),
    f"{FIRST} is of type I8, in the model float32",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_refused_in_one_line(fault: str, llama: Any, tmp_path: Path) -> None:
    saved(small(llama)(), tmp_path / "dense")
    spoil, message = FAULTS[fault]
    spoil(tmp_path / "dense")
    with pytest.raises(ModelError, match=message) as caught:
        compress_checkpoint(small(llama), IDS, tmp_path / "dense", tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_files_beside_the_weights_may_hold_anything(llama: Any, tmp_path: Path) -> None:
    saved(small(llama)(), tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_bytes(b"\xff\xfe\x00")
    told = json.loads((tmp_path / "dense" / INDEX).read_text())
    (tmp_path / "dense" / INDEX).write_text(json.dumps(told | {"metadata": [1]}))
    report = compress_checkpoint(small(llama), IDS, tmp_path / "dense", tmp_path / "small", prove_it=False)
    assert report["checkpoint"]["config"] == {"written": False, "reason": "it is no JSON object"}
    assert (tmp_path / "small" / "config.dense.json").read_bytes() == b"\xff\xfe\x00"
    assert list(json.loads((tmp_path / "small" / INDEX).read_text())["metadata"]) == ["total_size"]


def test_pickles_are_not_read(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    torch.save(small(llama)().state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is a pickle, and nothing is unpickled"):
        compress_checkpoint(small(llama), IDS, tmp_path / "dense", tmp_path / "small")
    with pytest.raises(ConfigError, match="no such folder"):
        compress_checkpoint(small(llama), IDS, tmp_path / "other", tmp_path / "small")


def test_names_of_one_tensor_may_not_differ(llama: Any, tmp_path: Path) -> None:
    saved(small(llama)(), tmp_path / "dense")
    with pytest.raises(ModelError, match="differ, and the model makes one tensor of them"):
        compress_checkpoint(small(llama, tie_word_embeddings=True), IDS, tmp_path / "dense", tmp_path / "small")
