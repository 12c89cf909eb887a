"""Every network of models/ through the whole pipeline: proof, forward, backward, ONNX, and the channels asked for."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import graphprune
from speedup import export_onnx
from speedup.inputs import split_inputs, with_batch
from speedup.proof import TOLERANCE

MODELS = Path(__file__).resolve().parent.parent / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.py") if "def build_model" in path.read_text())
QUICK = ("digits", "resnet20_cifar", "mobilenet_v2", "shufflenet_v2", "mha_encoder", "tied_lm", "wide_deep", "swin")
HEADLINE = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "shufflenet_v2", "convnext", "vit", "swin")
NESTED = ("shufflenet_v2",)
"""Networks whose shuffles after shuffles cannot meet every count: the report says what was kept instead."""


def build(name):
    sys.path.insert(0, str(MODELS))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(MODELS))
    torch.manual_seed(0)
    return module.build_model(), module.example_inputs()


def check(name, sparsity, onnx_path=None):
    model, example = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = graphprune.compress(model, example, sparsity, round_to=1)
    assert result.report["proof"]["difference"] < TOLERANCE
    for choice in result.selection.choices:
        if choice.group.pin is None:
            asked = choice.group.units - min(choice.group.size - 1, -int(-choice.group.size * sparsity // 1))
            assert choice.asked == asked or choice.note
            rows = max((len(table) for table in choice.group.counts), default=1)  # each keeps the same number
            assert abs(choice.kept - choice.asked) < rows or (name in NESTED and choice.note)
            assert choice.kept == choice.asked or choice.note
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    shrunk = result.model.eval()
    args, kwargs = split_inputs(example)
    with torch.no_grad():
        dense = pytree.tree_leaves(model.eval()(*args, **kwargs))
        for batch in (1, 3):
            some_args, some_kwargs = with_batch((args, kwargs), batch)
            outputs = pytree.tree_leaves(shrunk(*some_args, **some_kwargs))
            assert [tuple(output.shape[1:]) for output in outputs] == [tuple(output.shape[1:]) for output in dense]
            assert all(bool(output.isfinite().all()) for output in outputs)
    shrunk.train()
    outputs = pytree.tree_leaves(shrunk(*args, **kwargs))
    sum(output.float().square().mean() for output in outputs if isinstance(output, Tensor)).backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in shrunk.parameters())
    if onnx_path is not None:
        written = export_onnx(shrunk.eval(), example, onnx_path)
        assert written.checked and written.dynamic_batch and written.batches == (1, 3)
        assert written.difference is not None and written.difference < 1e-4
    return result


@pytest.mark.parametrize("name", QUICK)
def test_half_of_the_channels(name):
    result = check(name, 0.5)
    if name in HEADLINE:
        assert result.report["params"]["ratio"] > 1 / 0.4


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_every_network_with_onnx(name, sparsity, tmp_path):
    result = check(name, sparsity, tmp_path / "model.onnx")
    if name in HEADLINE and sparsity == 0.5:
        assert result.report["params"]["ratio"] > 1 / 0.4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    model, example = build("digits")
    result = graphprune.compress(model.to(dtype), example.to(dtype), 0.5, round_to=1)
    assert next(result.model.parameters()).dtype == dtype
    assert result.report["proof"]["difference"] < TOLERANCE
    assert result.model(example.to(dtype)).dtype == dtype
