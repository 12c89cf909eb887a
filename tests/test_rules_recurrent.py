"""Recurrent layers and cells: gates go together, and all layers and directions keep the same number of units."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rules import Case, Net, check, parameters, weight
from test_shrink import compressed
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import graphprune
from graphprune.config import Request
from graphprune.deliver import deliver
from graphprune.source import Source
from speedup.export import export_onnx
from speedup.masks import ModelSpeedup

Module = Callable[[], nn.Module]
STEPS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(7))


def outputs(layer: Module, width: int = 8) -> Module:
    """The layer and a linear one of all that it gives out."""
    return lambda: Net(lambda n, x: n.o(n.r(x)[0]), r=layer(), o=nn.Linear(width, 2))


def last(layer: Module, width: int = 8, function: Callable[[Tensor], Tensor] = lambda h: h[-1]) -> Module:
    """The layer and a linear one of a function of its last hidden states."""

    def forward(net: Net, x: Tensor) -> Tensor:
        state = net.r(x)[1]
        return net.o(function(state[0] if isinstance(state, tuple) else state))

    return lambda: Net(forward, r=layer(), o=nn.Linear(width, 2))


def started(layer: Module, start: Callable[[Net, Tensor], Any], **parts: Callable[[], Any]) -> Module:
    """A linear layer, the layer with a first state from a function of the net and the example, a linear layer."""
    return lambda: Net(
        lambda n, x: n.o(n.r(n.a(x), start(n, x))[0]),
        a=nn.Linear(5, 6),
        r=layer(),
        o=nn.Linear(8, 2),
        **{name: part() for name, part in parts.items()},
    )


def loop(cell: Module, **parts: Callable[[], Any]) -> Module:
    """A cell that takes every step, from a first state of its own or from a part ``h``."""

    def forward(net: Net, x: Tensor) -> Tensor:
        state: Any = net.h.expand(x.shape[0], -1) if parts else None
        if parts and isinstance(net.r, nn.LSTMCell):
            state = (state, state.tanh())
        for step in x.unbind(1):
            state = net.r(step, state)
        return net.o(state[0] if isinstance(state, tuple) else state)

    return lambda: Net(forward, r=cell(), o=nn.Linear(8, 2), **{name: part() for name, part in parts.items()})


def cell(name: str, *more: str) -> str:
    """The axes of one layer in one direction that run along its units."""
    kinds = ("weight_ih{}/0", "weight_hh{}/0", "weight_hh{}/1", "bias_ih{}/0", "bias_hh{}/0")
    return " ".join([*(f"r.{kind.format(name)}" for kind in kinds), *more])


def unbiased(axes: str) -> str:
    return " ".join(axis for axis in axes.split() if "bias" not in axis)


def both(layer: int) -> str:
    return f"{cell(f'_l{layer}')} {cell(f'_l{layer}_reverse')}"


PROJECTED = cell("_l0", "r.weight_hr_l0/1").replace("r.weight_hh_l0/1 ", "")
A6 = "6: a.weight/0 a.bias/0 r.weight_ih_l0/1"
GIVEN = {f"r.{name}/0": "first state whose size is fixed" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0")}


LAYERS = (
    Case("lstm", outputs(lambda: nn.LSTM(5, 8, batch_first=True)), STEPS, (f"8: {cell('_l0')} o.weight/1",)),
    Case("lstm_without_bias", outputs(lambda: nn.LSTM(5, 8, bias=False, batch_first=True)), STEPS, (f"8: {unbiased(cell('_l0'))} o.weight/1",)),
    Case("lstm_with_steps_first", outputs(lambda: nn.LSTM(5, 8)), STEPS, (f"8: {cell('_l0')} o.weight/1",)),
    Case("lstm_of_one_example", lambda: Net(lambda n, x: torch.stack([n.o(n.r(x[0])[0]), n.o(n.r(x[1])[0])]), r=nn.LSTM(5, 8), o=nn.Linear(8, 2)), STEPS, (f"8: {cell('_l0')} o.weight/1",)),
    Case("lstm_of_two_layers", outputs(lambda: nn.LSTM(5, 8, 2, batch_first=True)), STEPS, (f"16: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1",)),
    Case("lstm_in_both_directions", outputs(lambda: nn.LSTM(5, 8, batch_first=True, bidirectional=True), 16), STEPS, (f"16: {both(0)} o.weight/1",)),
    Case(
        "lstm_of_two_layers_in_both_directions",
        outputs(lambda: nn.LSTM(5, 8, 2, batch_first=True, bidirectional=True), 16),
        STEPS,
        (f"32: {both(0)} r.weight_ih_l1/1 r.weight_ih_l1_reverse/1 {both(1)} o.weight/1",),
    ),
    Case("projected_lstm", outputs(lambda: nn.LSTM(5, 8, proj_size=4, batch_first=True), 4), STEPS, (f"8: {PROJECTED}", "4: r.weight_hr_l0/0 r.weight_hh_l0/1 o.weight/1")),
    Case(
        "projected_lstm_of_two_layers",
        outputs(lambda: nn.LSTM(5, 8, 2, bias=False, proj_size=4, batch_first=True), 4),
        STEPS,
        (f"16: {unbiased(PROJECTED)} {unbiased(PROJECTED.replace('l0', 'l1'))}", "8: r.weight_hr_l0/0 r.weight_hh_l0/1 r.weight_ih_l1/1 r.weight_hr_l1/0 r.weight_hh_l1/1 o.weight/1"),
    ),
    Case("projection_almost_as_wide_as_the_units", outputs(lambda: nn.LSTM(5, 6, proj_size=5, batch_first=True), 5), STEPS, ("5: r.weight_hr_l0/0 r.weight_hh_l0/1 o.weight/1",), {"r.weight_hh_l0/0": "projected to one channel less"}),
    Case("gru", outputs(lambda: nn.GRU(5, 8, batch_first=True)), STEPS, (f"8: {cell('_l0')} o.weight/1",)),
    Case("gru_of_two_layers_in_both_directions", outputs(lambda: nn.GRU(5, 8, 2, bias=False, batch_first=True, bidirectional=True), 16), STEPS, (unbiased(f"32: {both(0)} r.weight_ih_l1/1 r.weight_ih_l1_reverse/1 {both(1)} o.weight/1"),)),
    Case("rnn", outputs(lambda: nn.RNN(5, 8, 2, batch_first=True)), STEPS, (f"16: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1",)),
    Case("rnn_of_relus", outputs(lambda: nn.RNN(5, 8, 2, nonlinearity="relu", batch_first=True)), STEPS, (f"16: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1",)),
    Case("last_state", last(lambda: nn.GRU(5, 8, 2, batch_first=True)), STEPS, (f"16: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1",)),
    Case("last_states_joined", last(lambda: nn.LSTM(5, 8, batch_first=True, bidirectional=True), 16, lambda h: torch.cat([h[-2], h[-1]], 1)), STEPS, (f"16: {both(0)} o.weight/1",)),
    Case("last_states_flat", last(lambda: nn.LSTM(5, 8, batch_first=True, bidirectional=True), 16, lambda h: h.transpose(0, 1).flatten(1)), STEPS, (f"16: {both(0)} o.weight/1",)),
    Case("last_states_that_take_turns", last(lambda: nn.GRU(5, 8, batch_first=True, bidirectional=True), 16, lambda h: h.permute(1, 2, 0).flatten(1)), STEPS, (f"16: {both(0)} o.weight/1",)),
    Case("last_states_added", last(lambda: nn.GRU(5, 8, batch_first=True, bidirectional=True), 8, lambda h: h.sum(0)), STEPS, (f"8: {both(0)} o.weight/1",)),
    Case("heads_of_added_states", lambda: Net(lambda n, x: n.o((n.r(x)[1].sum(0).unflatten(-1, (2, 4)) * n.s).flatten(-2)), s=weight(2, 1), r=nn.GRU(5, 8, batch_first=True, bidirectional=True), o=nn.Linear(8, 2)), STEPS, (f"2: s/0 {both(0)} o.weight/1",)),
    Case(
        "directions_added",
        lambda: Net(lambda n, x: n.o(n.r(x)[0].unflatten(-1, (2, 8)).sum(-2)), r=nn.LSTM(5, 8, batch_first=True, bidirectional=True), o=nn.Linear(8, 2)),
        STEPS,
        (f"8: {both(0)} o.weight/1",),
    ),
    Case(
        "residual_around_a_layer",
        lambda: Net(lambda n, x: n.o(n.a(x) + n.r(n.a(x))[0]), a=nn.Linear(5, 8), r=nn.GRU(8, 8, batch_first=True), o=nn.Linear(8, 2)),
        STEPS,
        (f"8: a.weight/0 a.bias/0 r.weight_ih_l0/1 {cell('_l0')} o.weight/1",),
    ),
    Case(
        "layer_over_the_columns_of_an_image",
        lambda: Net(lambda n, x: n.o(n.r(n.a(x[:, None]).mean(2).transpose(1, 2))[0]), a=nn.Conv2d(1, 6, 3), r=nn.LSTM(6, 8, batch_first=True), o=nn.Linear(8, 2)),
        STEPS,
        (A6, f"8: {cell('_l0')} o.weight/1"),
    ),
    Case(
        "output_of_the_model_pins_all_layers",
        lambda: Net(lambda n, x: n.r(n.a(x))[0], a=nn.Linear(5, 6), r=nn.LSTM(6, 8, 2, batch_first=True)),
        STEPS,
        (A6,),
        {"r.weight_hh_l0/0": "output of the model", "r.weight_hh_l1/0": "output of the model"},
    ),
    Case(
        "steps_that_are_channels_pin",
        lambda: Net(lambda n, x: n.o(n.r(n.a(x.transpose(1, 2)).transpose(1, 2))[0]), a=nn.Linear(4, 6), r=nn.GRU(5, 8, batch_first=True), o=nn.Linear(8, 2)),
        STEPS,
        (f"8: {cell('_l0')} o.weight/1",),
        {"a.weight/0": "step or an example"},
    ),
    Case(
        "random_dropout_between_layers_pins",
        lambda: Net(lambda n, x: n.o(torch.gru(n.a(x), torch.zeros(2, x.shape[0], 8), [n.w, n.u, n.v, n.y], False, 2, 0.5, True, False, True)[0]), a=nn.Linear(5, 6), w=weight(24, 6), u=weight(24, 8), v=weight(24, 8), y=weight(24, 8), o=nn.Linear(8, 2)),
        STEPS,
        (),
        {"w/0": "random in evaluation", "a.weight/0": "random in evaluation"},
    ),
)  # fmt: skip


def encoded(net: Net, x: Tensor) -> Any:
    return net.e(x)[1]


PARAMETRISED = (
    Case(
        "weight_norm_of_a_layer",
        outputs(lambda: weight_norm(nn.LSTM(5, 8, batch_first=True), "weight_hh_l0")),
        STEPS,
        (f"8: {cell('_l0').replace('r.weight_hh_l0/0', '').replace('r.weight_hh_l0', 'r.parametrizations.weight_hh_l0.original1')} r.parametrizations.weight_hh_l0.original0/0 r.parametrizations.weight_hh_l0.original1/0 o.weight/1",),
        mixes=True,
    ),
)  # fmt: skip

STATES = (
    Case("state_from_the_input_pins", started(lambda: nn.GRU(6, 8, batch_first=True), lambda n, x: x.flatten(1)[None, :, :8].contiguous()), STEPS, (A6,), GIVEN),
    Case(
        "learned_state",
        started(lambda: nn.LSTM(6, 8, 2, batch_first=True), lambda n, x: (n.h.expand(-1, x.shape[0], -1), n.c.repeat(1, x.shape[0], 1)), h=lambda: weight(2, 1, 8), c=lambda: weight(2, 1, 8)),
        STEPS,
        (A6, f"8: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} h/2 c/2 o.weight/1"),
        {"h/0": "is a layer or a direction"},
    ),
    Case(
        "state_of_another_layer",
        started(lambda: nn.LSTM(6, 8, 2, batch_first=True), encoded, e=lambda: nn.LSTM(5, 8, 2, batch_first=True)),
        STEPS,
        (A6, f"16: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} {cell('_l0', 'r.weight_ih_l1/1').replace('r.', 'e.')} {cell('_l1').replace('r.', 'e.')} o.weight/1"),
    ),
    Case(
        "state_from_a_linear_layer",
        started(lambda: nn.GRU(6, 8, 2, batch_first=True), lambda n, x: n.e(x[:, 0]).unflatten(1, (2, 8)).transpose(0, 1).contiguous(), e=lambda: nn.Linear(5, 16)),
        STEPS,
        (A6, f"16: e.weight/0 e.bias/0 {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1"),
    ),
    Case(
        "zeros_by_hand",
        started(lambda: nn.LSTM(6, 8, 2, batch_first=True), lambda n, x: (torch.zeros(2, x.shape[0], n.r.hidden_size), x.new_zeros(2, x.shape[0], n.r.hidden_size))),
        STEPS,
        (A6, f"16: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1"),
    ),
    Case(
        "zeros_for_two_layers",
        started(lambda: nn.LSTM(6, 8, 2, batch_first=True), lambda n, x: (lambda z: (z, z))(torch.zeros(2, x.shape[0], n.r.hidden_size))),
        STEPS,
        (A6, f"16: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1"),
    ),
    Case(
        "ones_are_not_zeros",
        started(lambda: nn.GRU(6, 8, 2, batch_first=True), lambda n, x: torch.ones(2, x.shape[0], 8)),
        STEPS,
        (A6, f"8: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1"),
    ),
    Case(
        "zeros_that_are_written_to",
        started(lambda: nn.GRU(6, 8, 2, batch_first=True), lambda n, x: torch.zeros(2, x.shape[0], n.r.hidden_size).add_(1)),
        STEPS,
        (A6, f"8: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1"),
    ),
    Case(
        "zeros_of_which_a_layer_is_written_to",
        started(lambda: nn.GRU(6, 8, 2, batch_first=True), lambda n, x: (lambda z: (z[0].add_(1), z)[1])(torch.zeros(2, x.shape[0], n.r.hidden_size))),
        STEPS,
        (A6, f"8: {cell('_l0', 'r.weight_ih_l1/1')} {cell('_l1')} o.weight/1"),
    ),
)  # fmt: skip

CELLS = tuple(
    case
    for name, build in {
        "lstm_cell": lambda **o: nn.LSTMCell(5, 8, **o),
        "gru_cell": lambda **o: nn.GRUCell(5, 8, **o),
        "rnn_cell": lambda **o: nn.RNNCell(5, 8, **o),
        "rnn_cell_of_relus": lambda **o: nn.RNNCell(5, 8, nonlinearity="relu", **o),
    }.items()
    for case in (
        Case(name, loop(build), STEPS, (f"8: {cell('')} o.weight/1",)),
        Case(
            f"{name}_without_bias",
            loop(lambda build=build: build(bias=False)),
            STEPS,
            (f"8: {unbiased(cell(''))} o.weight/1",),
        ),
        Case(
            f"{name}_from_a_learned_state",
            loop(build, h=lambda: weight(8)),
            STEPS,
            (f"8: {cell('', 'h/0')} o.weight/1",),
        ),
    )
)

CASES = LAYERS + PARAMETRISED + STATES + CELLS


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)


def test_layers_of_the_users_class_have_their_sizes() -> None:
    layer = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, proj_size=4, dropout=0.2)
    model = nn.Sequential(nn.Linear(5, 6), layer, Taken(), nn.Linear(8, 2)).train()
    small: Any = compressed(model, STEPS).model
    assert type(small) is nn.Sequential and small.training
    assert (small[1].input_size, small[1].hidden_size, small[1].proj_size) == (3, 5, 2)
    assert [id(one) for one in small[1]._flat_weights] == [id(one) for one in small[1].parameters()]
    assert layer.hidden_size == 8 and layer.weight_ih_l1.shape == (32, 8)
    small(STEPS).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    again: Any = compressed(small, STEPS).model
    assert (again[1].hidden_size, again[1].proj_size) == (3, 1)


class Taken(nn.Module):
    def forward(self, outputs: tuple[Tensor, Any]) -> Tensor:
        return outputs[0]


def test_a_layer_loads_from_a_folder(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.GRU(6, 8, 2, batch_first=True), Taken(), nn.Linear(8, 2)).eval()
    made = deliver(Source("net", "net", model, STEPS, None), tmp_path / "small", Request(round_to=1), limits=None)
    fresh = nn.Sequential(nn.Linear(5, 6), nn.GRU(6, 8, 2, batch_first=True), Taken(), nn.Linear(8, 2))
    loaded: Any = graphprune.load(made.folder, fresh)
    assert loaded[1].hidden_size == 4
    torch.testing.assert_close(loaded.eval()(STEPS), made.result.model(STEPS))


@pytest.mark.parametrize("kind", ["lstm", "projected", "gru", "tanh", "relu"])
def test_layers_go_to_onnx(kind: str, tmp_path: Path) -> None:
    layers: dict[str, nn.Module] = {
        "lstm": nn.LSTM(6, 8, 2, batch_first=True),
        "projected": nn.LSTM(6, 8, 2, batch_first=True, proj_size=4),
        "gru": nn.GRU(6, 8, 2, batch_first=True),
        "tanh": nn.RNN(6, 8, 2, batch_first=True),
        "relu": nn.RNN(6, 8, 2, batch_first=True, nonlinearity="relu"),
    }
    width = 4 if kind == "projected" else 8
    result = compressed(nn.Sequential(nn.Linear(5, 6), layers[kind], Taken(), nn.Linear(width, 2)), STEPS)
    for model in (result.model, result.shrunk.graph):
        file = export_onnx(model, STEPS, tmp_path / "model.onnx")
        assert file.checked and file.dynamic_batch


def test_masks_of_a_whole_layer_leave_as_many_units_as_the_others_have() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.GRU(6, 8, 2, batch_first=True), Taken(), nn.Linear(8, 2)).eval()
    masks = {name: torch.ones_like(p) for name, p in model.named_parameters() if name.startswith("1.") and "h_" in name}
    for name, mask in masks.items():
        mask.unflatten(0, (3, 8))[:, slice(None) if name.endswith("l1") else slice(5, 8)] = 0
    speedup = ModelSpeedup(model, STEPS, masks)
    small: Any = speedup.speedup_model()
    assert small[1].hidden_size == 5 and speedup.proof is not None


def test_masks_leave_more_units_than_they_are_projected_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(5, 8, proj_size=4, batch_first=True), Taken(), nn.Linear(4, 2)).eval()
    masks = {name: torch.ones_like(p) for name, p in model.named_parameters() if "_l0" in name}
    for name, mask in masks.items():
        (mask.T if "hr" in name else mask.unflatten(0, (4, 8)).transpose(0, 1))[2:] = 0
    small: Any = ModelSpeedup(model, STEPS, masks).speedup_model()
    assert (small[0].hidden_size, small[0].proj_size) == (5, 4)
