"""The network of a program, its parameters and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from random_nets.catalogue import BY_NAME
from random_nets.program import Program


class Net(nn.Module):
    """The network of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.ops = nn.ModuleList()
        self.places = []  # of each step, among the modules
        for step in program.steps:
            if step.again is not None:
                self.places.append(self.places[step.again])
            else:
                self.places.append(len(self.ops))
                self.ops.append(BY_NAME[step.op](**step.settings))
        if program.unused:
            self.never = nn.Linear(3, 4)
        for first, second in program.ties:
            owner, _, name = second.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(first))
        randomise(self, program.seed)
        self.train(program.training)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values: list[Tensor] = [x] if y is None else [x, y]
        for step, place in zip(self.program.steps, self.places, strict=True):
            result = self.ops[place](*(values[i] for i in step.operands))
            values += result if isinstance(result, tuple | list) else [result]
        outputs = [values[i] for i in self.program.outputs]
        if self.program.container == "tensor":
            return outputs[0]
        if self.program.container == "dict":
            return {f"out{i}": out for i, out in enumerate(outputs)}
        return outputs if self.program.container == "list" else tuple(outputs)


def randomise(module: nn.Module, seed: int) -> None:
    """Gives every parameter and every floating buffer values among which nothing can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() < 2:
                tensor.copy_(noise.sign() * (0.5 + 0.5 * torch.rand(tensor.shape, generator=generator)))
            else:
                fan = max(tensor.numel() // tensor.shape[0], 1)
                tensor.copy_(noise * (1.0 if fan == 1 else fan**-0.5))


def example_inputs(program: Program, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs for a network: normal numbers, or token ids."""
    generator = torch.Generator().manual_seed(1000 + program.seed + seed)
    return tuple(
        torch.randint(0, 7, (batch, -shape[0]), generator=generator)
        if shape[0] < 0
        else torch.randn(batch, *shape, generator=generator)
        for shape in program.inputs
    )
