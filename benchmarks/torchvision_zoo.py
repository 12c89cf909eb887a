"""Every network of torchvision with random weights and an example, as the other benchmarks want them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def import_torchvision() -> ModuleType:
    """Returns torchvision, also where its compiled operators do not fit the installed torch.

    Its wheels are built for CUDA; beside a CPU build of torch the import stops at operators of detection that have
    no kernel. Everything but detection can do without them, so it is enough to declare them.
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


@dataclass(frozen=True)
class Task:
    """How the networks of one task are made.

    Attributes:
        module: Their module inside ``torchvision.models``; the empty string for that itself.
        inputs: Makes an example for a network by name.
        options: Arguments of every constructor.
        special: Further arguments of some, by a part of their name.
    """

    module: str
    inputs: Callable[[str], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _images(name: str) -> Tensor:
    size = 299 if "inception" in name else 224
    return torch.randn(2, 3, size, size)


def _clips(name: str) -> Tensor:
    long = name.startswith(("mvit", "s3d"))
    return torch.randn(2, 3, *((16, 224, 224) if long else (8, 112, 112)))


def _pairs(name: str) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)


def _scenes(name: str) -> tuple[list[Tensor]]:
    return ([torch.rand(3, 256, 256), torch.rand(3, 200, 240)],)


_BARE = {"weights": None, "weights_backbone": None}
_INCEPTION = {"googlenet": {"init_weights": True}, "inception": {"init_weights": True}}
_BOXES = {"min_size": 256, "max_size": 320}
_EVERY_BOX = {**_BOXES, "box_score_thresh": 0.0, "box_detections_per_img": 8}  # so that the heads have work

TASKS = (
    Task("", _images, special=_INCEPTION),
    Task("segmentation", _images, _BARE),
    Task("video", _clips),
    Task("optical_flow", _pairs),
    Task("detection", _scenes, _BARE, {"rcnn": _EVERY_BOX, "retinanet": _BOXES, "fcos": _BOXES}),
    Task("quantization", _images, {"quantize": False}, _INCEPTION),
)


LONG = ("mvit_v1_b", "mvit_v2_s")
"""Networks whose every run in double precision takes minutes: 25,089 tokens for each clip, whatever the example."""


def networks() -> list[str]:
    """The names of all networks, task by task."""
    return [name for task in TASKS for name in _names(task)]


def build(name: str) -> tuple[nn.Module, Any]:
    """Returns a network with random weights and an example of two."""
    task = next(task for task in TASKS if name in _names(task))
    options = dict(task.options)
    for part, more in task.special.items():
        options |= more if part in name else {}
    torch.manual_seed(0)
    return import_torchvision().models.get_model(name, **options).eval(), task.inputs(name)


def build_by_shape(name: str) -> tuple[nn.Module, Any]:
    """Returns the same without memory for its tensors; some constructors compute with numbers and need it all the same."""
    try:
        with torch.device("meta"):
            return build(name)
    except NotImplementedError:
        model, example = build(name)
        return model.to("meta"), torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), example)


def _names(task: Task) -> list[str]:
    models = import_torchvision().models
    return list(models.list_models(module=getattr(models, task.module) if task.module else models))
