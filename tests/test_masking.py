"""Masks inside a model while it trains: what it computes, what optimizers and files see, and how they leave it."""

import copy
import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from graphprune.compress import compress
from speedup import ModelSpeedup, SpeedupError
from speedup.capture import capture
from speedup.errors import PlanError
from speedup.masking import attach_masks, attached_masks, detach_masks, multiply_masks, plain_state, without_masks


class Held(nn.Module):
    """Parameters of its own, in a list and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 4))
        self.listed = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.named = nn.ParameterDict({"shift": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        for shift in self.listed:
            x = x + shift
        return torch.tanh(x) @ self.scale + self.named["shift"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(4, 6, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.again = self.inner
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.again(self.inner(self.embed(x)))))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 3)
    )


IMAGE, SEQUENCE, WORDS = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 4), torch.tensor([[1, 2, 0], [6, 2, 2]])
NETS = {
    "convolutions": (convolutions, IMAGE),
    "held": (Held, SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True, proj_size=3), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "attention with biases": (lambda: Attention(add_bias_kv=True, kdim=4, vdim=4), SEQUENCE),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2),
        SEQUENCE,
    ),
    "tied": (Tied, WORDS),
    "sparse embedding": (lambda: nn.Embedding(7, 4, sparse=True), WORDS),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), SEQUENCE),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))), SEQUENCE),
}
of_every_net = pytest.mark.filterwarnings("ignore:.*nested_tensor.*:UserWarning", "ignore:.*oneDNN.*:UserWarning")
every_net = pytest.mark.parametrize(("build", "x"), NETS.values(), ids=NETS)


def masks_of(model: nn.Module, *, soft: bool = False) -> dict[str, Tensor]:
    """About half of each parameter masked out; of tied ones by the first name."""
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in model.named_parameters()}
    for values in drawn.values():
        values[..., 0] = 1  # weight norm divides by the norm of a row
    return {name: values if soft else (values > 0.5).float() for name, values in drawn.items()}


def fresh(build: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build()
    return model.eval()


def multiplied(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """The oracle: a plain model with its parameters multiplied."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            if name in masks:
                tensor.mul_(masks[name])
    return plain


def shape_of(model: nn.Module) -> Any:
    """What must be the same again once masks are gone."""
    modules = [
        (
            path,
            type(module),
            sorted(vars(module)),
            [len(value) for key, value in vars(module).items() if "hooks" in key],
        )
        for path, module in model.named_modules()
    ]
    named = [(name, id(tensor)) for name, tensor in model.named_parameters(remove_duplicate=False)]
    return modules, named, list(model.state_dict()), list(dict(model.named_buffers()))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


@of_every_net
@every_net
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_model_computes_with_masked_parameters(build: Any, x: Tensor, soft: bool) -> None:
    model = fresh(build)
    before, masks = shape_of(model), masks_of(model, soft=soft)
    plain = multiplied(model, masks)
    names = [name for name, _ in model.named_parameters()]
    hidden = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    attach_masks(model, masks)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    with torch.no_grad():  # where attention takes its fast path
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-7)
    loss_of(model, x).backward()
    loss_of(plain, x).backward()
    expected = {name: tensor.grad for name, tensor in plain.named_parameters()}
    for name, tensor in model.named_parameters():
        grad, wanted = tensor.grad, expected[name]
        assert grad is not None and wanted is not None and bool((wanted.to_dense() != 0).any())
        torch.testing.assert_close(grad.to_dense(), wanted.to_dense() * masks[name], rtol=1e-5, atol=1e-6)
        assert not bool(grad.to_dense()[masks[name] == 0].any())
    assert all(torch.equal(mask, masks[name]) for name, mask in attached_masks(model).items() if name in masks)
    twin = copy.deepcopy(model)  # after it ran
    detach_masks(model, multiply=False)
    assert shape_of(model) == before
    assert all(torch.equal(tensor, hidden[name]) for name, tensor in model.named_parameters())
    torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=0)
    detach_masks(twin)
    assert list(twin.state_dict()) == list(model.state_dict()) and not attached_masks(twin)
    assert all(torch.equal(tensor, hidden[name] * masks[name]) for name, tensor in twin.named_parameters())
    torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=0)


@of_every_net
@every_net
def test_states_of_masked_and_plain_models(build: Any, x: Tensor) -> None:
    model, other, plain = fresh(build), fresh(build), fresh(build)
    masks = masks_of(model)
    attach_masks(model, masks)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(1)
    attach_masks(other, {name: 1 - mask for name, mask in masks.items()})
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    assert set(plain.state_dict()) < set(state)
    for name, tensor in model.named_parameters():
        assert torch.equal(state[name], tensor)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Unexpected key.*mask_of_"):
        plain.load_state_dict(state)
    assert list(plain_state(state)) == list(plain.state_dict())
    plain.load_state_dict(plain_state(state))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
    other.load_state_dict(fresh(build).state_dict())  # without masks: those it has stay
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    other.load_state_dict(state, assign=True)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("first", ["optimizer", "masks"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_moves_hidden_values_and_nothing_that_is_seen(make: Any, first: str) -> None:
    model = fresh(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    plain = copy.deepcopy(model)
    x, masks = torch.randn(6, 4), masks_of(model)
    optimizer = make(model.parameters())
    loss_of(model, x).backward()
    optimizer.step()  # momentum that goes on once masks are there
    if first == "masks":
        attach_masks(model, masks)
        state, optimizer = optimizer.state_dict(), make(model.parameters())
        optimizer.load_state_dict(state)
    attach_masks(model, masks)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        seen = {name: tensor * masks[name] for name, tensor in model.named_parameters()}
        torch.testing.assert_close(model(x), functional_call(plain, seen, (x,)), rtol=0, atol=0)
    for name, tensor in model.named_parameters():
        assert bool((tensor != before[name])[masks[name] == 0].any())  # hidden
        assert bool((tensor != before[name])[masks[name] == 1].any())
    detach_masks(model)
    assert all(not bool(tensor[masks[name] == 0].any()) for name, tensor in model.named_parameters())


def test_training_with_masks_is_training_by_projection() -> None:
    """Plain SGD: the same as multiplying gradients and parameters by the masks in each step."""
    model = fresh(convolutions).train()
    masks = masks_of(model)
    plain = multiplied(model, masks)
    attach_masks(model, masks)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (model, plain)]
    for _ in range(4):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(each, IMAGE).backward()
            optimizer.step()
        with torch.no_grad():
            for name, tensor in plain.named_parameters():
                tensor.mul_(masks[name])
    torch.testing.assert_close(model.eval()(IMAGE), plain.eval()(IMAGE), rtol=1e-5, atol=1e-6)


def test_masks_are_replaced_where_they_are() -> None:
    model = fresh(convolutions)
    first = masks_of(model)
    attach_masks(model, first)
    kinds = [type(module) for module in model.modules()]
    there = {name: id(buffer) for name, buffer in model.named_buffers()}
    given = 1 - first["3.weight"]
    attach_masks(model, {"3": {"weight": given, "bias": None}})  # type: ignore[dict-item]  # as NNI has them
    expected = first | {"3.weight": given.clone()}
    given.zero_()  # it was copied
    snapshot = attached_masks(model)
    assert kinds == [type(module) for module in model.modules()]
    assert there == {name: id(buffer) for name, buffer in model.named_buffers()}
    attach_masks(model, {"3.bias": torch.zeros(5, dtype=torch.bool)})
    assert snapshot.keys() == expected.keys() and all(torch.equal(snapshot[name], expected[name]) for name in expected)
    plain = fresh(convolutions)
    torch.testing.assert_close(
        model(IMAGE), multiplied(plain, expected | {"3.bias": torch.zeros(5)})(IMAGE), rtol=0, atol=0
    )


def test_masks_from_inference_mode_can_be_trained_with() -> None:
    model = fresh(convolutions)
    with torch.inference_mode():
        attach_masks(model, masks_of(model))
        attach_masks(model, {name: mask * 0.5 for name, mask in masks_of(model).items()})
    loss_of(model, IMAGE).backward()
    torch.testing.assert_close(
        model(IMAGE), multiplied(fresh(convolutions), {n: m * 0.5 for n, m in masks_of(model).items()})(IMAGE)
    )


def test_mixed_precision_with_a_scaler() -> None:
    model = fresh(convolutions)
    masks = masks_of(model)
    attach_masks(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, IMAGE)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor[masks[name] == 0], before[name][masks[name] == 0])
        assert not torch.equal(tensor, before[name])


def test_masks_of_one_module_may_come_one_by_one() -> None:
    model = fresh(lambda: nn.Linear(4, 3))
    attach_masks(model, {"weight": torch.zeros(3, 4)})
    assert torch.equal(model(SEQUENCE), model.bias.expand(2, 5, 3))
    attach_masks(model, {"bias": torch.zeros(3)})
    assert not bool(model(SEQUENCE).any()) and list(attached_masks(model)) == ["weight", "bias"]
    detach_masks(model, multiply=False)
    assert type(model) is nn.Linear and bool(model(SEQUENCE).all())


def test_tied_parameters_are_masked_wherever_they_are() -> None:
    model = fresh(Tied)
    mask = masks_of(model)["embed.weight"]
    attach_masks(model, {"head.weight": mask, "embed.weight": mask, "again.bias": torch.zeros(4)})
    assert attached_masks(model).keys() == {"head.weight", "embed.weight", "inner.bias", "again.bias"}
    torch.testing.assert_close(
        model(WORDS), multiplied(fresh(Tied), {"embed.weight": mask, "inner.bias": torch.zeros(4)})(WORDS)
    )
    attach_masks(model, attached_masks(model))
    model.double()  # each module converts its own buffers
    attach_masks(model, {"head.weight": mask * 0.5})
    soft = multiplied(fresh(Tied), {"embed.weight": mask * 0.5, "inner.bias": torch.zeros(4)}).double()
    torch.testing.assert_close(model(WORDS), soft(WORDS))
    torch.testing.assert_close(without_masks(model)(WORDS), soft(WORDS))  # multiplied once
    with pytest.raises(PlanError, match="embed.weight: is the same parameter as head.weight"):
        attach_masks(model, {"head.weight": mask, "embed.weight": 1 - mask})


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(3))
        self.kept = {"all": [self.a]}


class Keeping(nn.Module):
    """Uses a parameter in some way that is none of its own attributes."""

    def __init__(self, keep: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.kept = keep(self.a)


def tied(layer: nn.Linear) -> list[nn.Module]:
    other = nn.Linear(2, 2)
    other.weight = layer.weight
    return [other]


class Named(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("mask_of_weight", torch.ones(2))


class Odd(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.names, self.plain = ["mine"], "mine"


SQUARE = torch.ones(2, 2)
WRONG: dict[str, tuple[Any, Any, str]] = {
    "name": (nn.Linear(2, 2), {"wait": SQUARE}, "wait: is masked, but the model has no parameter"),
    "module": (nn.Sequential(nn.Linear(2, 2)), {"0": {"w": SQUARE}}, "0.w: is masked, but the model has no parameter"),
    "shape": (nn.Linear(2, 2), {"weight": torch.ones(2)}, r"has shape \(2,\), the parameter \(2, 2\)"),
    "kind": (nn.Linear(2, 2), {"weight": [1]}, "the mask is of type list"),
    "nan": (nn.Linear(2, 2), {"weight": SQUARE * math.nan}, "holds nan"),
    "inf": (nn.Linear(2, 2).half(), {"weight": SQUARE * 70000}, "holds inf"),
    "masks": (nn.Linear(2, 2), [SQUARE], "masks: are of type list"),
    "lazy": (nn.LazyLinear(2), {"weight": SQUARE}, "has no shape yet"),
    "parametrised": (
        parametrizations.weight_norm(nn.Linear(2, 2)),
        {"weight": SQUARE},
        "computed from parameters. Mask one of them: parametrizations.weight.original0, ",
    ),
    "listed": (Listed(), {"a": torch.ones(3)}, "a: is held in attribute kept of Listed as well"),
    "unregistered": (Keeping(tied), {"a.weight": SQUARE}, "held in attribute kept of Keeping as well"),
    "partial": (Keeping(lambda a: partial(F.linear, weight=a.weight)), {"a.weight": SQUARE}, "held in attribute kept"),
    "default": (
        Keeping(lambda a: lambda x, weight=a.weight: x @ weight),
        {"a.weight": SQUARE},
        "held in attribute kept",
    ),
    "closure": (
        Keeping(lambda a: (lambda w: lambda x: x @ w)(a.weight)),
        {"a.weight": SQUARE},
        "held in attribute kept",
    ),
    "method": (Keeping(lambda a: tied(a)[0].forward), {"a.weight": SQUARE}, "held in attribute kept"),
    "function of a module": (
        Keeping(lambda a: (lambda layers: lambda x: layers[0](x))(tied(a))),
        {"a.weight": SQUARE},
        "held in attribute kept",
    ),
    "cached": (
        Keeping(lambda a: functools.cache((lambda w: lambda x: x @ w)(a.weight))),
        {"a.weight": SQUARE},
        "held in attribute kept",
    ),
    "view": (Keeping(lambda a: a.weight.t()), {"a.weight": SQUARE}, "held in attribute kept"),
    "named": (nn.Sequential(Named()), {"0.weight": SQUARE}, "0 has an attribute mask_of_weight of its own"),
    "renormalised": (nn.Embedding(2, 2, max_norm=1.0), {"weight": SQUARE}, "max_norm"),
}


@pytest.mark.parametrize(("model", "masks", "text"), WRONG.values(), ids=WRONG)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_masked_is_refused(model: nn.Module, masks: Any, text: str) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(PlanError, match=text) as caught:
        attach_masks(model, masks)
    assert "\n" not in str(caught.value)
    assert before == [type(module) for module in model.modules()] and not attached_masks(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_code_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(PlanError, match="ScriptModule"):
        attach_masks(scripted, {"0.weight": SQUARE})


def test_nothing_is_attached_when_one_mask_is_wrong() -> None:
    model = fresh(convolutions)
    with pytest.raises(SpeedupError):
        attach_masks(model, {"0.weight": torch.zeros(6, 3, 3, 3), "3.bias": torch.zeros(4)})
    assert not attached_masks(model) and type(model[0]) is nn.Conv2d  # type: ignore[index]
    attach_masks(model, {})
    assert without_masks(model) is model


def test_classes_look_as_they_did() -> None:
    model = fresh(convolutions)
    text = repr(model)
    attach_masks(model, masks_of(model))
    layer = model.get_submodule("0")
    assert isinstance(layer, nn.Conv2d) and type(layer).__name__ == "Conv2d" and repr(model) == text
    assert type(layer).__module__ == nn.Conv2d.__module__


def test_attributes_of_users_do_not_collide() -> None:
    model = fresh(Odd)
    attach_masks(model, {"weight": torch.zeros(2, 2)})
    assert (model.names, model.plain) == (["mine"], "mine")
    assert torch.equal(copy.deepcopy(model)(SQUARE), model.bias.expand(2, 2))
    detach_masks(model)
    assert type(model) is Odd and not bool(model.weight.any())


def test_registers_of_subclasses_stay_as_they_are() -> None:
    known: list[type] = []

    class Registered(nn.Linear):
        def __init_subclass__(cls, *, key: str) -> None:
            known.append(cls)

    model = Registered(2, 2)
    attach_masks(model, {"weight": torch.zeros(2, 2)})
    assert not known and torch.equal(model(SQUARE), model.bias.expand(2, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_by_hooks() -> None:
    model, plain = (nn.utils.weight_norm(fresh(lambda: nn.Linear(4, 4))) for _ in range(2))
    masks = masks_of(model)
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            tensor.mul_(masks[name])
    attach_masks(model, masks)
    torch.testing.assert_close(model(SEQUENCE), plain(SEQUENCE), rtol=0, atol=0)
    loss_of(model, SEQUENCE).backward()
    assert not bool(model._parameters["weight_v"].grad[masks["weight_v"] == 0].any())
    detach_masks(model)
    torch.testing.assert_close(model(SEQUENCE), plain(SEQUENCE), rtol=0, atol=0)
    with pytest.raises(PlanError, match="weight: "):
        attach_masks(model, {"weight": torch.ones(4, 4)})


def test_a_masked_parameter_can_be_given_anew() -> None:
    model = fresh(lambda: nn.Linear(2, 2))
    attach_masks(model, {"weight": torch.eye(2), "bias": torch.zeros(2)})
    parameter = nn.Parameter(torch.full((2, 2), 3.0))
    model.weight = parameter
    assert dict(model.named_parameters())["weight"] is parameter
    assert torch.equal(model.weight, 3 * torch.eye(2))
    model.bias = None
    assert torch.equal(model(SQUARE), torch.full((2, 2), 3.0))
    detach_masks(model)
    assert model.weight is parameter and model.bias is None


def test_parametrising_what_is_masked_is_refused() -> None:
    model = fresh(lambda: nn.Linear(2, 2))
    attach_masks(model, {"weight": torch.eye(2)})
    with pytest.raises(PlanError, match="weight: is masked"):
        parametrizations.weight_norm(model)
    parametrizations.orthogonal(model2 := nn.Linear(2, 2))
    attach_masks(model2, {"bias": torch.zeros(2)})
    assert not bool(copy.deepcopy(model2).bias.any())
    detach_masks(model2, multiply=False)
    parametrizations.weight_norm(model2, "bias", dim=None)


def test_a_class_put_over_masks_is_refused_when_they_should_go() -> None:
    model = fresh(lambda: nn.Sequential(nn.Linear(2, 2), nn.LSTMCell(2, 2)))
    attach_masks(model, {"0.weight": SQUARE, "1.weight_ih": torch.zeros(8, 2)})
    parametrizations.weight_norm(model.get_submodule("1"), "bias_ih", dim=None)
    with pytest.raises(PlanError, match="ParametrizedLSTMCell: got this class after"):
        detach_masks(model)
    with pytest.raises(PlanError, match="1.bias_hh: cannot be masked, 1 got its class ParametrizedLSTMCell after"):
        attach_masks(model, {"1.bias_hh": torch.zeros(8)})
    assert len(attached_masks(model)) == 2
    nn.utils.parametrize.remove_parametrizations(model.get_submodule("1"), "bias_ih")
    detach_masks(model)
    assert type(model.get_submodule("1")) is nn.LSTMCell


@of_every_net
@every_net
@pytest.mark.parametrize("how", ["double", "bfloat16", "meta"])
def test_masks_go_where_the_model_goes(build: Any, x: Tensor, how: str) -> None:
    model = fresh(build)
    masks = masks_of(model)
    dtype, device = (torch.float32, "meta") if how == "meta" else (getattr(torch, how), "cpu")
    plain = multiplied(model, masks).to(device, dtype)
    attach_masks(model, masks)
    model.to(device, dtype)
    moved = x.to(device) if not x.is_floating_point() else x.to(device, dtype)
    result = model(moved)
    assert result.dtype == dtype and result.device.type == device
    if how != "meta":
        torch.testing.assert_close(result, plain(moved), rtol=0, atol=0)
        detach_masks(model)
        torch.testing.assert_close(model(moved), plain(moved), rtol=0, atol=0)


@every_net
@of_every_net
def test_autocast(build: Any, x: Tensor) -> None:
    model = fresh(build)
    masks = masks_of(model)
    plain = multiplied(model, masks)
    attach_masks(model, masks)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        loss = loss_of(model, x)
    loss.backward()
    for name, tensor in model.named_parameters():
        assert tensor.grad is not None and not bool(tensor.grad.to_dense()[masks[name] == 0].any())


@every_net
@of_every_net
def test_replicas_as_data_parallel_makes_them(build: Any, x: Tensor) -> None:
    """What torch.nn.parallel.replicate does with one device, which it cannot do without CUDA."""
    model = fresh(build)
    masks = masks_of(model)
    plain = multiplied(model, masks)
    attach_masks(model, masks)
    modules = list(model.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    places = dict(zip(modules, replicas, strict=True))
    sent = {id(tensor): tensor * 1 for tensor in model.parameters()}  # one each: no leaf any more, and tied
    for module, replica in places.items():
        for name, inner in module._modules.items():
            setattr(replica, name, None if inner is None else places[inner])
        for name, tensor in module._parameters.items():
            setattr(replica, name, None if tensor is None else sent[id(tensor)])
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    torch.testing.assert_close(replicas[0](x), plain(x), rtol=0, atol=0)
    loss_of(replicas[0], x).backward()
    for name, tensor in model.named_parameters():
        assert tensor.grad is not None and not bool(tensor.grad.to_dense()[masks[name] == 0].any())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    model = fresh(convolutions)
    masks = masks_of(model)
    attach_masks(model, masks)
    image = IMAGE.clone().requires_grad_()
    loss_of(model, image).backward()
    expected = [tensor.grad for tensor in model.parameters()]
    model.zero_grad()
    checkpoint(loss_of, model, image, use_reentrant=reentrant).backward()
    for tensor, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_functional_calls() -> None:
    model = fresh(convolutions)
    masks = masks_of(model)
    attach_masks(model, masks)
    given = {name: torch.randn_like(tensor) for name, tensor in model.named_parameters()}
    plain = fresh(convolutions)
    expected = functional_call(plain, {name: tensor * masks[name] for name, tensor in given.items()}, (IMAGE,))
    torch.testing.assert_close(functional_call(model, given, (IMAGE,)), expected, rtol=0, atol=0)
    gradient = torch.func.grad(lambda tensors: functional_call(model, tensors, (IMAGE,)).square().sum())(given)
    assert all(not bool(gradient[name][masks[name] == 0].any()) for name in given)


def test_an_average_of_the_weights_is_masked() -> None:
    model = fresh(convolutions)
    attach_masks(model, masks_of(model))
    average = AveragedModel(model)
    average.update_parameters(model)
    torch.testing.assert_close(average(IMAGE), model(IMAGE), rtol=0, atol=0)


def test_hooks_on_gradients_see_masked_ones() -> None:
    model = fresh(lambda: nn.Linear(4, 3))
    mask, seen = torch.eye(3, 4), []
    model.weight.register_hook(lambda grad: seen.append(grad.clone()))
    model.weight.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad))
    attach_masks(model, {"weight": mask})
    loss_of(model, SEQUENCE).backward()
    assert len(seen) == 2 and all(not bool(grad[mask == 0].any()) and bool(grad.any()) for grad in seen)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_distributed_data_parallel(one_process: None) -> None:
    model = fresh(convolutions)
    masks = masks_of(model)
    late = {f"module.{name}": masks.pop(name) for name in ("5.weight", "5.bias")}
    attach_masks(model, masks)
    shared = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        loss_of(shared, IMAGE).backward()
    assert all(
        not bool(tensor.grad[masks[name] == 0].any()) for name, tensor in model.named_parameters() if name in masks
    )
    attach_masks(shared, late)
    attach_masks(shared, {"module.5.weight": torch.zeros(3, 20), "module.5.bias": torch.ones(3)})
    assert torch.equal(shared(IMAGE), model[5].bias.expand(2, 3))  # type: ignore[index]
    assert not any("mask" in key for key in plain_state(shared.state_dict()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_follow_new_masks(backend: str) -> None:
    torch._dynamo.reset()
    model = fresh(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Held2()))
    first = masks_of(model)
    attach_masks(model, first)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    compiled(SEQUENCE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for masks in (first, {name: 1 - mask for name, mask in first.items()}, masks_of(model, soft=True)):
            attach_masks(model, masks)
            plain = multiplied(without_masks(model), {})
            torch.testing.assert_close(compiled(SEQUENCE), model(SEQUENCE))
            torch.testing.assert_close(compiled(SEQUENCE), plain(SEQUENCE))
            model.zero_grad()
            loss_of(compiled, SEQUENCE).backward()
            assert all(not bool(tensor.grad[masks[name] == 0].any()) for name, tensor in model.named_parameters())


class Held2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.scale)


def test_whole_models_are_stored_with_their_masks() -> None:
    model = fresh(lambda: nn.Sequential(nn.LSTM(4, 3), nn.Identity()))
    attach_masks(model, masks_of(model))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    torch.testing.assert_close(again(SEQUENCE)[0], model(SEQUENCE)[0], rtol=0, atol=0)
    detach_masks(again)
    assert type(again[0]) is nn.LSTM


def test_graphs_are_masked_like_any_module() -> None:
    graph = torch.fx.symbolic_trace(fresh(Held2))
    attach_masks(graph, {"scale": torch.zeros(6, 4)})
    x = torch.randn(2, 6)
    twin = copy.deepcopy(graph)
    for each in (graph, twin):
        assert not bool(each(x).any()) and list(attached_masks(each)) == ["scale"]
        assert [name for name, _ in each.named_parameters()] == ["scale"]
    with pytest.raises(Exception, match="cannot be stored with masks"):
        torch.save(graph, io.BytesIO())
    detach_masks(twin, multiply=False)
    assert bool(twin(x).any())


def test_symbolic_trace_follows_layers_and_refuses_the_rest() -> None:
    model = fresh(convolutions)
    attach_masks(model, masks_of(model))
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(IMAGE), model(IMAGE), rtol=0, atol=0)
    assert attached_masks(graph).keys() == attached_masks(model).keys()
    held = fresh(Held2)
    attach_masks(held, {"scale": torch.zeros(6, 4)})
    with pytest.raises(PlanError, match="scale: is masked, which symbolic_trace cannot follow"):
        torch.fx.symbolic_trace(held)


@of_every_net
@every_net
def test_export(build: Any, x: Tensor) -> None:
    model = fresh(build)
    attach_masks(model, masks_of(model))
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))
    masks = {name for name, _ in model.named_buffers(remove_duplicate=False) if "mask_of_" in name}
    assert masks <= set(program.state_dict)


def channels_out(model: nn.Module) -> dict[str, Tensor]:
    masks = {name: torch.ones_like(tensor) for name, tensor in model.named_parameters()}
    for name in ("0.weight", "1.weight", "1.bias"):
        masks[name][[1, 4]] = 0
    return masks


def test_speedup_while_masks_are_attached() -> None:
    model = fresh(convolutions)
    masks = channels_out(model)
    attach_masks(model, masks)
    speedup = ModelSpeedup(model, IMAGE, masks)
    small: Any = speedup.speedup_model()
    assert small[0].weight.shape == (4, 3, 3, 3) and type(small[0]) is nn.Conv2d and not attached_masks(small)
    torch.testing.assert_close(small(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)
    assert attached_masks(model).keys() == masks.keys()


def test_a_masked_model_is_captured_and_compressed_like_any_other() -> None:
    model = fresh(convolutions)
    attach_masks(model, masks_of(model))
    captured = capture(model, IMAGE)
    torch.testing.assert_close(captured.graph_module(IMAGE), model(IMAGE))
    result = compress(model, IMAGE, 0.5, round_to=1)
    small: Any = result.model
    assert dict(small.named_parameters())["0.weight"].shape == (3, 3, 3, 3)


def test_tied_embeddings_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = fresh(lambda: transformers.GPT2LMHeadModel(config))
    masks = masks_of(model)
    plain = multiplied(model, masks)
    assert "lm_head.weight" not in masks
    attach_masks(model, masks)
    torch.testing.assert_close(model(WORDS).logits, plain(WORDS).logits, rtol=0, atol=0)
    assert torch.equal(attached_masks(model)["lm_head.weight"], masks["transformer.wte.weight"])
    detach_masks(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(WORDS).logits, plain(WORDS).logits, rtol=0, atol=0)


def test_parameters_are_multiplied_while_masks_stay() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[1].weight = nn.Parameter(net[0].weight.detach()[:, :2].clone())
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    weight = net[0].weight
    before, other = weight.detach().clone(), net[1].weight.detach().clone()
    attach_masks(net, {"0.weight": mask})
    for _ in range(2):
        multiply_masks(net)
        assert torch.equal(weight, before * mask) and torch.equal(attached_masks(net)["0.weight"], mask)
    detach_masks(net, multiply=False)
    assert torch.equal(net[0].weight, before * mask) and torch.equal(net[1].weight, other)


def test_a_way_back_to_the_model_is_no_other_use() -> None:
    model = nn.Sequential(Keeping(lambda a: [a]))
    model[0].parent = [model]
    attach_masks(model, {"0.a.weight": torch.zeros(2, 2)})
    detach_masks(model)
    attach_masks(model[0], {"a.weight": torch.zeros(2, 2)})
    assert not bool(model[0].a.weight.any())
