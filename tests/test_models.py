"""The networks in `models/`: each loads by its path, runs at any batch size, trains, and has its paper's size."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

MODELS = Path(__file__).parent.parent / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.py") if "def build_model(" in path.read_text())

# Parameters of the papers' reference implementations; the networks not named here are not the replica of one.
PARAMETERS = {
    "convnext": 28_589_128,
    "densenet121": 7_978_856,
    "groupnorm_net": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "pixelshuffle_sr": 1_369_859,
    "resnet18": 11_689_512,
    "resnet20_cifar": 269_722,
    "resnet50": 25_557_032,
    "resnet56_cifar": 853_018,
    "resnext50": 25_028_904,
    "se_resnet": 28_088_024,
    "shufflenet_v2": 2_278_604,
    "swin": 28_288_354,
    "vgg16_bn": 138_365_992,
    "vgg16_cifar": 14_991_946,
    "vgg19_cifar": 20_035_018,
    "vit": 86_567_656,
}

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@pytest.fixture(autouse=True)
def seeded_and_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(MODELS)
    torch.manual_seed(0)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"models_{name}", MODELS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(model: nn.Module, inputs: Inputs, batch: int) -> list[Tensor]:
    """The output tensors for the example inputs, cut or repeated to `batch`."""

    def resize(x: Tensor) -> Tensor:
        return x[torch.arange(batch) % len(x)]

    if isinstance(inputs, dict):
        return list(tensors(model(**{name: resize(x) for name, x in inputs.items()})))
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return list(tensors(model(*map(resize, inputs))))


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


@pytest.mark.parametrize("name", NAMES)
def test_network(name: str) -> None:
    module = load(name)
    model = module.build_model().eval()
    inputs = module.example_inputs()
    with torch.no_grad():
        one, three = call(model, inputs, 1), call(model, inputs, 3)
    for a, b in zip(one, three, strict=True):
        assert len(a) == 1 and len(b) == 3 and b.isfinite().all()
        scale = b.abs().max().item()
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-4 * scale)
        assert (b[0] - b[1]).abs().max() > 1e-3 * scale, "the output hardly depends on the input"

    outputs = call(model.train(), inputs, 2)
    torch.stack([out.square().mean() for out in outputs]).sum().backward()  # type: ignore[no-untyped-call]  # torch's own gap
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = load(name).build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_tied_weight_is_one_parameter() -> None:
    model = load("tied_lm").build_model()
    assert model.lm_head.weight is model.wte.weight


def test_digits_accuracy() -> None:
    module = load("digits")
    model = module.build_model().train()
    assert module.evaluate(model) > 99.0
    assert model.training
