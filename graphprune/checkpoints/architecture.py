"""config.json of a shrunk checkpoint: its sizes follow where the family's own code would build exactly what is left.

One table for each layout: which sizes make the shape of which tensor. A config is written only if the dense one gives
every dense shape, the new one every new shape, and whole heads are left that attend to the same keys as before.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speedup.plan import Axis, ShrinkPlan

_ROTARY_DECODER: Mapping[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocabulary", "hidden"),
    "lm_head.weight": ("vocabulary", "hidden"),
    "model.norm.weight": ("hidden",),
    "model.layers.#.input_layernorm.weight": ("hidden",),
    "model.layers.#.post_attention_layernorm.weight": ("hidden",),
    "model.layers.#.self_attn.q_proj.weight": ("queries", "hidden"),
    "model.layers.#.self_attn.k_proj.weight": ("keys", "hidden"),
    "model.layers.#.self_attn.v_proj.weight": ("keys", "hidden"),
    "model.layers.#.self_attn.o_proj.weight": ("hidden", "queries"),
    "model.layers.#.self_attn.q_proj.bias": ("queries",),
    "model.layers.#.self_attn.k_proj.bias": ("keys",),
    "model.layers.#.self_attn.v_proj.bias": ("keys",),
    "model.layers.#.self_attn.o_proj.bias": ("hidden",),
    "model.layers.#.self_attn.q_norm.weight": ("head",),
    "model.layers.#.self_attn.k_norm.weight": ("head",),
    "model.layers.#.mlp.gate_proj.weight": ("inner", "hidden"),
    "model.layers.#.mlp.up_proj.weight": ("inner", "hidden"),
    "model.layers.#.mlp.down_proj.weight": ("hidden", "inner"),
}

LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3"), _ROTARY_DECODER
)
"""``model_type`` of config.json -> the sizes that make the shape of each tensor, layers written as #."""

Shapes = Mapping[str, Sequence[int]]


class _UncertainError(Exception):
    """Why no config is certain to build what is left."""


def resized(config: Mapping[str, Any], dense: Shapes, shrunk: Shapes, plan: ShrinkPlan) -> dict[str, Any] | str:
    """Returns ``config`` with the sizes of what is left, or in one line why that is not certain.

    Args:
        config: What config.json holds.
        dense: Shape of every tensor of the checkpoint.
        shrunk: The same after the shrink.
        plan: What was kept of them.
    """
    try:
        return _resized(config, dense, shrunk, plan)
    except _UncertainError as error:
        return str(error)


def _resized(config: Mapping[str, Any], dense: Shapes, shrunk: Shapes, plan: ShrinkPlan) -> dict[str, Any]:
    kind = config.get("model_type")
    layout = LAYOUTS.get(str(kind))
    if layout is None:
        raise _UncertainError(f"what the sizes of a model_type {kind!r} mean is not known")
    before, after = _solved(dense, layout, str(kind)), _solved(shrunk, layout, str(kind))
    told = _told(config)
    for size, number in before.items():
        if told[size] != number:
            raise _UncertainError(f"config.json says {told[size]} for {size}, the checkpoint has {number}")
    head = told["head"]
    _check_heads(plan, dense, told)
    if after.get("vocabulary", told["vocabulary"]) != told["vocabulary"]:
        raise _UncertainError("the vocabulary would shrink")
    heads, keys = (after[size] // head for size in ("queries", "keys"))
    if after["hidden"] % heads:
        raise _UncertainError(
            f"a hidden_size of {after['hidden']} is no multiple of {heads} heads, as it has to be there"
        )
    new = {
        "hidden_size": after["hidden"],
        "intermediate_size": after["inner"],
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }
    if config.get("head_dim") is not None or after["hidden"] != heads * head:
        new["head_dim"] = head
    return {**config, **new}


def _told(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that a config gives."""
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        keys = config.get("num_key_value_heads")
        given = config.get("head_dim")
        head = hidden // heads if given is None else int(given)
        return {
            "vocabulary": int(config["vocab_size"]),
            "hidden": hidden,
            "inner": int(config["intermediate_size"]),
            "queries": heads * head,
            "keys": (heads if keys is None else int(keys)) * head,
            "head": head,
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _UncertainError("config.json does not give the sizes that its model_type has") from error


def _solved(shapes: Shapes, layout: Mapping[str, tuple[str, ...]], kind: str) -> dict[str, int]:
    """The sizes that give every one of ``shapes``."""
    found: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        sizes = layout.get(re.sub(r"(?<=\.)\d+(?=\.)", "#", name))
        if sizes is None or len(sizes) != len(shape):
            raise _UncertainError(f"{name} is no tensor of a {kind}")
        for size, number in zip(sizes, shape, strict=True):
            first, where = found.setdefault(size, (number, name))
            if first != number:
                raise _UncertainError(f"layers differ: {size} is {first} in {where} and {number} in {name}")
    if missing := {"hidden", "inner", "queries", "keys"} - found.keys():
        raise _UncertainError(f"no tensor of the checkpoint has the size {min(missing)}")
    return {size: number for size, (number, _) in found.items()}


def _check_heads(plan: ShrinkPlan, dense: Shapes, told: Mapping[str, int]) -> None:
    """Refuses parts of heads, and heads of queries that would read other heads of keys than they did."""
    for name in dense:
        if not name.endswith(".self_attn.q_proj.weight"):
            continue
        other = name.replace("q_proj", "k_proj")
        queries, keys = (
            _heads(plan, one, told[size], told["head"]) for one, size in ((name, "queries"), (other, "keys"))
        )
        shared = told["queries"] // told["keys"]
        if len(queries) % len(keys) or (keys.repeat(len(queries) // len(keys)) != queries // shared).any():
            raise _UncertainError(f"the heads that are left in {name} do not share keys evenly")


def _heads(plan: ShrinkPlan, name: str, rows: int, head: int) -> Any:
    """The heads whose rows a plan keeps of a projection."""
    kept = plan.keep.get(Axis(name, 0), np.arange(rows))
    heads = np.unique(kept // head)
    if not np.array_equal(kept, (heads[:, None] * head + np.arange(head)).reshape(-1)):
        raise _UncertainError(f"{name} keeps parts of heads")
    return heads
