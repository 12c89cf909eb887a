"""Which code functions are: what tells one from another, and what does not."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.search.code import code_of


def scaled(model: nn.Module, *, by: float = 1.0) -> float:
    return by * float(model(torch.ones(1, 2)).sum())


def shifted(model: nn.Module, *, by: float = 1.0) -> float:
    return by + float(model(torch.ones(1, 2)).sum())


def closing(value: Any) -> Any:
    return lambda model: value


class Scorer:
    """Remembers in its namespace what its score does not depend on."""

    def __init__(self, limit: Any) -> None:
        self.limit, self.notes = limit, SimpleNamespace(calls=0)

    def __call__(self, model: nn.Module) -> float:
        self.notes.calls += 1
        return float(self.limit)

    def score(self, model: nn.Module) -> float:
        return self(model)


class Recursive:
    """Holds itself."""

    def __init__(self) -> None:
        self.own = self

    def __call__(self, model: nn.Module) -> float:
        return 0.0


class Task:
    """Is called by a method."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def evaluate(self, model: nn.Module) -> float:
        return float(self.sign)


@dataclass(frozen=True)
class Setting:
    size: int


def hooked(hook: Any) -> nn.Module:
    loss = nn.L1Loss()
    loss.register_forward_hook(hook)
    return loss


def weighted(first: float) -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([first, 1.0]))


def kept(function: Any, **defaults: Any) -> Any:
    """The same function with other defaults by keyword."""

    def other(model: nn.Module, *, by: float = 1.0) -> float:
        return function(model, by=by)

    other.__kwdefaults__ = defaults
    return other


DIFFERENT: list[Any] = [
    scaled,
    shifted,
    torch.no_grad()(scaled),
    torch.no_grad()(shifted),
    partial(scaled, by=2.0),
    partial(scaled, by=3.0),
    partial(shifted, by=3.0),
    kept(scaled, by=1.0),
    kept(scaled, by=5.0),
    closing(1),
    closing(2),
    closing(scaled),
    closing(shifted),
    closing([1, {"a": scaled}]),
    closing([1, {"a": shifted}]),
    Scorer(1),
    Scorer(2),
    Scorer(1).score,
    Scorer(2).score,
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.5),
    nn.MultiMarginLoss(),
    weighted(1.0),
    weighted(2.0),
    nn.Sequential(nn.CrossEntropyLoss()),
    Recursive(),
    Task(1).evaluate,
    Task(-1).evaluate,
    closing(Path("a")),
    closing(Path("b")),
    closing({1, "a"}),
    closing({2, "a"}),
    closing(torch.float32),
    closing(torch.float16),
    closing(Setting(1)),
    closing(Setting(2)),
    len,
    sum,
]


def test_other_functions_have_other_digests() -> None:
    assert len({code_of(one) for one in DIFFERENT}) == len(DIFFERENT)


def test_the_same_functions_have_the_same_digests() -> None:
    pairs = [
        (closing(1), closing(1)),
        (Scorer(1), Scorer(1)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss().eval()),
        (weighted(2.0), weighted(2.0)),
        (partial(scaled, by=2.0), partial(scaled, by=2.0)),
        (hooked(print), hooked(print)),
        (torch.compile(weighted(2.0)), weighted(2.0)),
        (closing({1, "a", None}), closing({None, "a", 1})),
        (closing(torch.zeros(2)), closing(torch.ones(2))),  # data and example inputs are told by their shapes
    ]
    assert all(code_of(one) == code_of(other) for one, other in pairs)


def test_a_deep_module_takes_no_time() -> None:
    """Nobody would wait for what doubles with each level."""
    module: nn.Module = nn.Linear(2, 2)
    shared: list[Any] = [scaled]
    for _ in range(60):
        module, shared = nn.Sequential(module), [shared, shared]
    assert code_of(closing(module)) != code_of(closing(nn.Sequential(module))) != code_of(closing(shared))


def test_tensors_of_any_kind() -> None:
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("conjugate", torch.ones(2, dtype=torch.complex64).conj())
    assert code_of(closing(module)) != code_of(closing(nn.LazyLinear(2)))


def test_what_a_call_notes_elsewhere_does_not_count() -> None:
    scorer = Scorer(1)
    before = code_of(scorer)
    scorer(nn.Identity())
    assert code_of(scorer) == before and scorer.notes.calls == 1


def test_a_name_that_has_no_value_yet() -> None:
    def outer() -> Any:
        def inner(x: Tensor) -> Tensor:
            return late(x)

        digest = code_of(inner)
        late = torch.relu
        return digest, code_of(inner), late

    before, after, _ = outer()
    assert before != after
