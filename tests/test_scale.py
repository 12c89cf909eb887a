"""Models larger than the memory: planned on the meta device, shrunk from checkpoint to checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import re
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphprune
from graphprune import compress_checkpoint
from graphprune.architecture import resized
from graphprune.checkpoint import INDEX, SINGLE, Checkpoint
from graphprune.cli import app
from graphprune.criteria import CRITERIA
from graphprune.dependency import find_dependencies
from graphprune.errors import ConfigError, ModelError
from graphprune.select import select
from graphprune.skeleton import Skeleton
from speedup.analysis import analyse
from speedup.capture import capture
from speedup.errors import CaptureError, ProofError
from speedup.plan import ShrinkPlan
from speedup.planning import make_plan

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quiet_and_quick")


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "models")
    import llama

    return llama


def small(llama: Any, **changed: Any) -> Callable[[], nn.Module]:
    config = replace(
        llama.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=8), **changed
    )
    return lambda: llama.Llama(config)


IDS = torch.arange(24).reshape(2, 12)

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


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


def plan_of(model: nn.Module, example: Any) -> ShrinkPlan:
    analysis = analyse(capture(model, example))
    dependencies = find_dependencies(analysis)
    return make_plan(analysis, select(dependencies, CRITERIA["random"](analysis, 0), 0.5).live)


def test_a_model_without_weights_gets_the_plan_of_one_with_weights(llama: Any) -> None:
    with torch.device("meta"):
        hollow = small(llama)()
    assert plan_of(hollow, IDS).to_json() == plan_of(small(llama)(), IDS).to_json()


def test_what_needs_numbers_says_that_there_are_none(llama: Any) -> None:
    with torch.device("meta"):
        hollow = small(llama)()
    with pytest.raises(CaptureError, match="meta device and holds nothing"):
        graphprune.compress(hollow, IDS)


def test_twice_the_layers_are_twice_the_work(llama: Any) -> None:
    def calls(layers: int) -> int:
        with torch.device("meta"):
            captured = capture(small(llama, num_hidden_layers=layers)(), IDS)
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        sys.setprofile(counted)
        try:
            analysis = analyse(captured)
            dependencies = find_dependencies(analysis)
            make_plan(analysis, select(dependencies, CRITERIA["random"](analysis, 0), 0.5).live)
        finally:
            sys.setprofile(None)
        return count

    few, some, many = calls(2), calls(4), calls(8)
    assert many - some == pytest.approx(2 * (some - few), rel=0.02)


class Buffers(nn.Module):
    """A buffer that is computed, two names for one parameter, and a constant index."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.mid = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.mid.weight
        self.down = nn.Linear(16, 4)
        self.register_buffer("order", torch.arange(15, -1, -1), persistent=False)
        self.register_buffer("scale", torch.linspace(1, 2, 16), persistent=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.mid(self.up(x).relu() * self.scale).relu())
        return self.down(x[:, self.order].relu())


class Stubborn(nn.Module):
    """A size in the code of forward, which no attribute can change."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, 1, 32).squeeze(1).relu())


def test_a_skeleton_has_shapes_ties_and_buffers() -> None:
    skeleton = Skeleton.of(Buffers)
    assert all(tensor.is_meta for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers()))
    assert skeleton.model.again.weight is skeleton.model.mid.weight
    assert torch.equal(skeleton.buffers["scale"], Buffers().scale)
    assert not any(parameter.is_meta for parameter in Buffers().parameters())


def checkpoint_and_model(build: Callable[[], nn.Module], folder: Path, **how: Any) -> nn.Module:
    torch.manual_seed(1)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    saved(model, folder, **how)
    return model.eval()


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
    from graphprune import stream

    checkpoint_and_model(small(llama), tmp_path / "dense")
    write = stream.write_checkpoint

    def wrong(folder: Path, like: Checkpoint, shapes: Any, tensor: Callable[[str], Tensor]) -> None:
        write(folder, like, shapes, lambda name: tensor(name).flip(0) if "up_proj" in name else tensor(name))

    monkeypatch.setattr(stream, "write_checkpoint", wrong)
    with pytest.raises(ProofError, match="up_proj.weight does not hold what the plan keeps"):
        compress_checkpoint(small(llama), IDS, tmp_path / "dense", tmp_path / "small", round_to=1)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def edited(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    told = json.loads((folder / INDEX).read_text())
    edit(told["weight_map"])
    (folder / INDEX).write_text(json.dumps(told))


def rewritten(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


FIRST = "model.embed_tokens.weight"

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


def test_what_lies_beside_the_weights_comes_along(llama: Any, tmp_path: Path) -> None:
    checkpoint_and_model(small(llama), tmp_path / "dense")
    for name in ("tokenizer.json", "LICENSE", "pytorch_model.bin", "other.safetensors"):
        (tmp_path / "dense" / name).write_text("{}")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(CONFIG))
    report = compress_checkpoint(small(llama), IDS, tmp_path / "dense", tmp_path / "small", round_to=1)
    found = {path.name for path in (tmp_path / "small").iterdir() if not path.name.startswith("model-")}
    assert found == {"tokenizer.json", "LICENSE", "config.json", INDEX, "plan.json", "report.json"}
    new = json.loads((tmp_path / "small" / "config.json").read_text())
    assert new == CONFIG | {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    assert report["checkpoint"]["config"]["changed"]["hidden_size"] == [32, 16]


def test_layers_that_differ_have_no_config(llama: Any, tmp_path: Path) -> None:
    checkpoint_and_model(small(llama), tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(CONFIG))
    report = compress_checkpoint(
        small(llama), IDS, tmp_path / "dense", tmp_path / "small", round_to=1, exclude=("model.layers.0.mlp.gate_proj",)
    )
    assert "layers differ: inner is 48" in report["checkpoint"]["config"]["reason"]
    assert not (tmp_path / "small" / "config.json").exists()
    assert json.loads((tmp_path / "small" / "config.dense.json").read_text()) == CONFIG
    loaded = graphprune.load(tmp_path / "small", small(llama)())
    assert loaded.model.layers[0].mlp.up_proj.weight.shape == (48, 16)
    assert loaded.model.layers[1].mlp.up_proj.weight.shape == (24, 16)


def shapes(hidden: int, inner: int, queries: int, keys: int) -> dict[str, tuple[int, ...]]:
    at = "model.layers.0."
    return {
        FIRST: (96, hidden),
        f"{at}self_attn.q_proj.weight": (queries, hidden),
        f"{at}self_attn.k_proj.weight": (keys, hidden),
        f"{at}self_attn.v_proj.weight": (keys, hidden),
        f"{at}mlp.up_proj.weight": (inner, hidden),
    }


def kept(**rows: list[int]) -> ShrinkPlan:
    keep = {f"model.layers.0.self_attn.{name}.weight": {"0": indices} for name, indices in rows.items()}
    return ShrinkPlan.from_json({"keep": keep, "rows": {}, "literals": {}})


DENSE = shapes(32, 48, 32, 16)
HEADS = [*range(4), *range(12, 20), *range(28, 32)]


@pytest.mark.parametrize(
    ("config", "shrunk", "plan", "expected"),
    [
        ({}, shapes(28, 24, 16, 16), kept(q_proj=HEADS), {"hidden_size": 28, "num_attention_heads": 4, "head_dim": 4}),
        ({"model_type": "other"}, DENSE, kept(), "what the sizes of a model_type 'other' mean is not known"),
        ({"hidden_size": 64}, DENSE, kept(), "says 64 for hidden, the checkpoint has 32"),
        ({}, DENSE | {"model.extra": (3,)}, kept(), "model.extra is no tensor of a llama"),
        ({}, shapes(32, 48, 16, 16), kept(q_proj=[*range(15), 16]), "keeps parts of heads"),
        ({}, shapes(32, 48, 16, 16), kept(q_proj=list(range(16))), "do not share keys evenly"),
        ({}, shapes(30, 48, 16, 8), kept(q_proj=list(range(16)), k_proj=list(range(8))), "is no multiple of 4 heads"),
    ],
)
def test_a_config_is_new_only_where_it_is_certain(
    config: dict[str, Any], shrunk: dict[str, Any], plan: ShrinkPlan, expected: Any
) -> None:
    found = resized(CONFIG | config, DENSE, shrunk, plan)
    if isinstance(expected, str):
        assert isinstance(found, str) and expected in found
    else:
        assert isinstance(found, dict) and expected.items() <= found.items()


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen3"))]
)
def test_transformers_builds_what_the_config_says(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from torchvision_zoo import import_torchvision

    with suppress(ImportError):  # transformers asks for it only where it is installed
        import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind,
        **{key: value for key, value in CONFIG.items() if key != "model_type"},
        head_dim=4,
        use_cache=False,
        tie_word_embeddings=kind == "qwen2",
    )
    classes = transformers.AutoModelForCausalLM
    classes.from_config(config).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    example = {"input_ids": IDS}
    compress_checkpoint(
        lambda: classes.from_config(config),
        example,
        tmp_path / "dense",
        tmp_path / "small",
        sparsity=0.25,
        round_to=1,
        exclude=("*.q_proj",),
    )
    theirs = classes.from_pretrained(tmp_path / "small").eval()
    ours = graphprune.load(tmp_path / "small", classes.from_config(config)).eval()
    assert theirs.config.hidden_size == 24
    with torch.no_grad():
        assert torch.equal(theirs(**example).logits, ours(**example).logits)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        app(list(words))
    return int(left.value.code or 0)


def test_the_command_line(llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dense, out = str(ROOT / "models" / "llama.py"), tmp_path / "dense", tmp_path / "small"
    saved(llama.build_model(), dense)
    common = ("compress", model, "--checkpoint", str(dense), "--out", str(out), "--round-to", "1")
    assert run(*common) == 0
    assert "Proven: all" in capsys.readouterr().out
    assert graphprune.load(out, llama.build_model()).model.layers[0].self_attn.num_heads == 4
    assert run(*common, "--force", "--no-proof") == 0
    assert "Not proven" in capsys.readouterr().out
    assert run("verify", str(out)) == 2
    assert "shrunk checkpoint" in capsys.readouterr().err
    for wrong in ([*common, "--opset", "18"], ["compress", model, "--no-proof"], [*common]):
        assert run(*wrong) == 2
        assert re.search(r"(Leave it out|another --out)\.$", capsys.readouterr().err.strip())


def test_a_request_is_checked_before_anything_is_read(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sparsity 2"):
        compress_checkpoint(small(llama), IDS, tmp_path / "none", tmp_path / "small", 2)
