"""The config.json of a shrunk checkpoint: written with new sizes only where they are certain."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_skeleton import IDS, small
from test_stream import FIRST, checkpoint_and_model

import graphprune
from graphprune import compress_checkpoint
from graphprune.checkpoints.architecture import resized
from graphprune.checkpoints.checkpoint import INDEX
from speedup.plan import ShrinkPlan

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

ROOT = Path(__file__).parent.parent

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


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
