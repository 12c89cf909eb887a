"""torchvision's classification networks, as the other benchmarks want them."""

from types import ModuleType
from typing import Any

import torch
from torch import nn

SIZES = {"inception_v3": 299}
"""Networks that want another image than 224 x 224."""


def import_torchvision() -> ModuleType:
    """Returns torchvision, also where its compiled operators do not fit the installed torch.

    Its wheels are built for CUDA; beside a CPU build of torch the import stops at operators of detection that have
    no kernel. Classification needs none of them, so it is enough to declare them.
    """
    try:
        import torchvision
    except RuntimeError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(declared)
        import torchvision
    return torchvision


_DECLARED: list[Any] = []
"""Declarations live as long as their library object."""


def classification_networks() -> list[str]:
    """The names of all classification networks."""
    torchvision = import_torchvision()
    return list(torchvision.models.list_models(module=torchvision.models))


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Returns a network with random weights and an example of two images."""
    torchvision = import_torchvision()
    torch.manual_seed(0)
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    size = SIZES.get(name, 224)
    return torchvision.models.get_model(name, **extra).eval(), torch.randn(2, 3, size, size)


def build_by_shape(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Returns the same without memory for its tensors; some constructors compute with numbers and need it all the same."""
    try:
        with torch.device("meta"):
            return build(name)
    except NotImplementedError:
        model, example = build(name)
        return model.to("meta"), example.to("meta")
