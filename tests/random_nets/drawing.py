"""Programs, drawn step by step: each operation is applied to real tensors, so that every shape is what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from random_nets.catalogue import BY_NAME, operation_names
from random_nets.net import randomise
from random_nets.op import Op
from random_nets.program import Choose, Program, Settings, Step
from random_nets.shapes import WIDTHS, Shape, channels


def draw_program(choose: Choose, *, most: int = 9) -> Program:
    """A random program; `choose` picks one of a sequence."""
    builder = _Builder(choose)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _draw_inputs(builder, choose)
        names = operation_names()
        for _ in range(choose(list(range(2, most + 1)))):
            builder.step(names)
            if len(builder.steps) > 2 and choose([False] * 9 + [True]):
                builder.again()
        outputs = _draw_outputs(builder, choose)
    ties = _draw_ties(builder, choose)
    container = choose(["tuple", "list", "dict", *(["tensor"] * 3 if len(outputs) == 1 else [])])
    return Program(
        inputs=tuple(builder.inputs),
        steps=tuple(builder.steps),
        outputs=outputs,
        container=container,
        ties=ties,
        unused=choose([False, False, False, True]),
        training=choose([False, True]),
        seed=choose([0, 1, 2]),
        exact=builder.exact,
    )


def _draw_inputs(builder: _Builder, choose: Choose) -> None:
    kind = choose(["image", "image", "image", "image", "sequence", "vector", "ids"])
    width = choose([3, 4, 8])
    shapes: Mapping[str, Shape] = {
        "image": (width, 4, 4),
        "sequence": (choose([4, 5]), width),
        "vector": (width,),
        "ids": (-choose([4, 5]),),
    }
    builder.start(shapes[kind])
    if choose([False] * 5 + [True]):
        second = choose(["image", "sequence", "vector"])
        builder.start({"image": (4, 4, 4), "sequence": (4, 6), "vector": (5,)}[second])
    first: Settings = {"cin": width, "cout": choose(WIDTHS), "bias": True}  # the channels of the input are fixed
    if kind == "ids":
        builder.apply("Embedding", (0,), {"words": 7, "width": choose(WIDTHS)})
    elif kind == "image":
        builder.apply("Conv", (0,), {**first, "kernel": 3, "stride": 1, "groups": 1})
    else:
        builder.apply("Linear", (0,), first)


def _draw_outputs(builder: _Builder, choose: Choose) -> tuple[int, ...]:
    """Ends the network: everything unused into one head, or the last value through a head or as it is."""
    last = len(builder.values) - 1
    end = choose(["head", "head", "head", "flat", "image", "image", "raw"])
    ends = [i for i in range(len(builder.values)) if i not in builder.used and builder.values[i].is_floating_point()]
    if end in ("head", "flat"):
        flatten = end == "flat" and sum(math.prod(builder.shape(i)) for i in ends) <= 1000
        builder.apply("Head", tuple(ends), {"shapes": [builder.shape(i) for i in ends], "flatten": flatten})
    elif end == "image":
        builder.apply("ImageHead", (last,), {"shape": builder.shape(last)})
    outputs = [len(builder.values) - 1]
    if choose([False] * 4 + [True]):
        outputs.append(choose(list(range(len(builder.inputs), len(builder.values)))))
    return tuple(dict.fromkeys(outputs))


def _draw_ties(builder: _Builder, choose: Choose) -> tuple[tuple[str, str], ...]:
    """Sometimes two parameters of equal shape are one."""
    if not choose([False] * 5 + [True]):
        return ()
    ops = nn.ModuleList(BY_NAME[step.op](**step.settings) for step in builder.steps if step.again is None)
    shapes: dict[Shape, list[str]] = {}
    for name, parameter in ops.named_parameters(prefix="ops"):
        if parameter.dim() and "parametrizations" not in name:
            shapes.setdefault(tuple(parameter.shape), []).append(name)
    pairs = [(a, b) for names in shapes.values() for i, a in enumerate(names) for b in names[i + 1 :]]
    return (choose(pairs),) if pairs else ()


class _Builder:
    """A program in the making.

    It knows the values so far as tensors, whether each is silent, and whether its space can shrink.
    """

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.steps: list[Step] = []
        self.inputs: list[Shape] = []
        self.values: list[Tensor] = []
        self.silent: list[bool] = []
        self.open: list[bool] = []
        self.used: set[int] = set()
        self.exact = True

    def shape(self, value: int) -> Shape:
        return tuple(self.values[value].shape[1:])

    def start(self, shape: Shape) -> None:
        """Adds an input."""
        self.inputs.append(shape)
        ids = shape[0] < 0
        self.values.append(torch.zeros(2, -shape[0], dtype=torch.long) if ids else torch.randn(2, *shape))
        self.silent.append(True)
        self.open.append(False)

    def apply(self, op: str, operands: tuple[int, ...], settings: Settings, again: int | None = None) -> None:
        """Adds a step and its outputs, unless they are too large."""
        kind = BY_NAME[op]
        module = kind(**settings)
        randomise(module, 0)
        with torch.no_grad():
            result = module.eval()(*(self.values[i] for i in operands))
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        if any(out[0].numel() > 1500 or channels(tuple(out.shape[1:])) > 32 for out in outputs):
            return
        flags = [self.silent[i] for i in operands]
        opened, over_space = any(self.open[i] for i in operands), kind.over_space(settings)
        self.exact = self.exact and kind.valid(flags, settings) and not (opened and over_space == "mixes")
        self.steps.append(Step(op, operands, settings, again))
        self.values += outputs
        self.silent += [kind.silent(flags, settings)] * len(outputs)
        self.open += [over_space == "opens" or (opened and over_space != "closes")] * len(outputs)
        self.used.update(operands)

    def candidates(self, op: type[Op]) -> list[tuple[int, ...]]:
        """The operands that an operation could take, the latest first."""
        recent = [i for i in range(len(self.values) - 1, -1, -1) if i >= len(self.values) - 5 or i == 0]
        recent = [i for i in recent if self.values[i].is_floating_point()]
        if op.arity == 1:
            return [(i,) for i in recent if op.fits(self.shape(i))]
        return [(i, j) for i in recent for j in recent if op.fits(self.shape(i), self.shape(j))]

    def step(self, names: Sequence[str]) -> None:
        """Adds one drawn step, or none where the drawn operation fits nowhere."""
        name = self.choose(names)
        op = BY_NAME[name]
        found = self.candidates(op)
        if not found:
            return
        operands = self.choose(found)
        if op.arity == -1:
            for _ in range(self.choose([0, 0, 1, 2])):
                more = [i for i in range(len(self.values)) if self._joins(op, (*operands, i))]
                operands = (*operands, self.choose(more)) if more else operands
        settings = op.draw(self.choose, *(self.shape(i) for i in operands))
        self.apply(name, operands, settings)

    def _joins(self, op: type[Op], operands: tuple[int, ...]) -> bool:
        return self.values[operands[-1]].is_floating_point() and op.fits(*(self.shape(i) for i in operands))

    def again(self) -> None:
        """Calls the module of an earlier step a second time, where a later value has the shape it takes."""
        pairs = [
            (k, operands)
            for k, step in enumerate(self.steps)
            if step.again is None
            for operands in self._like(step.operands)
        ]
        if pairs:
            k, operands = self.choose(pairs)
            self.apply(self.steps[k].op, operands, self.steps[k].settings, k)

    def _like(self, operands: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Other operands of the same shapes and types: the first one replaced."""
        first = self.values[operands[0]]
        return [
            (i, *operands[1:])
            for i in range(len(self.values) - 1, 0, -1)
            if i != operands[0] and self.values[i].shape == first.shape and self.values[i].dtype == first.dtype
        ]
