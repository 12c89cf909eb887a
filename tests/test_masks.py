"""Masks made elsewhere: what they make of a model, and what is said of masks that cannot be followed."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import Net, conv, image
from torch import Tensor, nn

from graphprune.pruners import L1NormPruner
from speedup import ModelSpeedup, SpeedupError, attach_masks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2))


def ones(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def check(model: nn.Module, masks: dict[str, Tensor]) -> tuple[ModelSpeedup, Any]:
    """The shrunk model computes what the original with masked weights does."""
    speedup = ModelSpeedup(model, image(), masks)
    small = speedup.speedup_model()
    assert speedup.proof is not None and speedup.proof.nodes > 5
    assert speedup.difference is not None and speedup.difference < 1e-5
    torch.testing.assert_close(small(image()), masked(net(), masks)(image()), rtol=1e-4, atol=1e-5)
    return speedup, small


def test_whole_channels() -> None:
    masks = ones(net())
    masks["0.weight"][[1, 4]] = 0
    masks["0.bias"][[1, 4]] = 0
    speedup, small = check(net(), masks)
    assert small[0].weight.shape == (6, 3, 3, 3) and small[2].weight.shape == (6, 6, 3, 3)
    assert set(speedup.reconciled.values()) == {0}


def test_masks_of_inputs_and_of_single_weights_stay_in_what_is_kept() -> None:
    masks = ones(net())
    masks["2.weight"][:, :3] = 0
    masks["2.weight"][1, 5] = 0
    masks["4.weight"] = (torch.rand(2, 6, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    _, small = check(net(), masks)
    assert small[0].weight.shape == (8, 3, 3, 3)


def test_masks_of_coupled_layers_are_reconciled() -> None:
    def build() -> Net:
        torch.manual_seed(0)
        return Net(lambda n, x: n.o(n.a(x) + n.b(x)), a=conv(3, 8, bias=False), b=conv(3, 8, bias=False), o=conv(8, 2))

    masks = {"a": {"weight": torch.ones(8, 3, 3, 3)}, "b": {"weight": torch.ones(8, 3, 3, 3)}}
    masks["a"]["weight"][:4] = 0
    masks["b"]["weight"][2:6] = 0
    speedup = ModelSpeedup(build(), image(), masks)
    small: Any = speedup.speedup_model()
    assert small.a.weight.shape[0] == 6 and speedup.reconciled == {"a.weight": 2, "b.weight": 2}
    reference = masked(build(), {f"{name}.weight": one["weight"] for name, one in masks.items()})
    torch.testing.assert_close(small(image()), reference(image()), rtol=1e-4, atol=1e-5)


def test_what_a_mask_leaves_behind_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 2))
    nn.init.uniform_(model[1].bias, 1, 2)
    mask = torch.ones(8, 3, 3, 3)
    mask[:4] = 0
    speedup = ModelSpeedup(model, image(), {"0.weight": mask, "0.bias": mask[:, 0, 0, 0]})
    small: Any = speedup.speedup_model()
    assert small[0].weight.shape[0] == 4
    assert speedup.difference is not None and speedup.difference > 0.01  # the shift of the norm is gone
    assert not speedup.folded and "where zeros are padded" in speedup.left_behind["2.weight"]


def test_something_stays_of_every_layer() -> None:
    masks = ones(net())
    masks["0.weight"][:] = 0
    masks["0.bias"][:] = 0
    speedup, small = check(net(), masks)
    assert small[0].weight.shape[0] == 1 and speedup.reconciled["0.weight"] == 1


def test_what_a_shuffle_takes_in_turns_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.ReLU(), conv(8, 2))
    masks = ones(model)
    masks["0.weight"][[0, 1, 6, 7]] = 0  # of the first group its first half, of the second its second half
    masks["0.bias"][[0, 1, 6, 7]] = 0
    speedup = ModelSpeedup(model, image(), masks)
    small: Any = speedup.speedup_model()
    torch.testing.assert_close(small(image()), masked(model, masks)(image()), rtol=1e-4, atol=1e-5)
    assert not speedup.left_behind


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (None, "^masks: are of type NoneType. Give"),
        ({"9.weight": torch.ones(3)}, "^9.weight: is masked, but the model has no parameter of that name"),
        ({"0.weight": torch.ones(8)}, r"^0.weight: the mask has shape \(8,\)"),
        ({"0.weight": torch.full((8, 3, 3, 3), torch.nan)}, "^0.weight: the mask holds nan"),
    ],
)
def test_masks_that_fit_nothing(masks: Any, message: str) -> None:
    with pytest.raises(SpeedupError, match=message):
        ModelSpeedup(net(), image(), masks)


def test_of_a_grouped_transposed_convolution_an_output_goes_with_all_inputs_of_its_group() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
        return nn.Sequential(conv(3, 4, 1), layer, nn.PReLU(6), nn.Conv2d(6, 2, 1))

    def weight(masks: dict[str, Tensor]) -> tuple[ModelSpeedup, Any]:
        speedup = ModelSpeedup(build(), image(), masks)
        small: Any = speedup.speedup_model()
        assert speedup.difference is not None and speedup.difference < 1e-5
        torch.testing.assert_close(small(image()), masked(build(), masks)(image()), rtol=1e-4, atol=1e-5)
        return speedup, small[1].weight.shape

    masks = {"1.weight": torch.ones(4, 3, 2, 2), "1.bias": torch.ones(6), "2.weight": torch.ones(6)}
    masks["1.bias"][[0, 4]] = masks["2.weight"][[0, 4]] = 0  # which says nothing of what is convolved
    speedup, shape = weight(masks)
    assert shape == (4, 3, 2, 2) and speedup.reconciled == {"1.weight": 0, "1.bias": 2, "2.weight": 2}
    masks["1.weight"][:2, 0] = masks["1.weight"][2:, 1] = 0
    speedup, shape = weight(masks)
    assert shape == (4, 2, 2, 2) and set(speedup.reconciled.values()) == {0}
    masks["1.weight"][2, 1] = 1  # an input keeps it, and its partner in the other group
    speedup, shape = weight(masks)
    assert shape == (4, 3, 2, 2) and speedup.reconciled == {"1.weight": 1, "1.bias": 2, "2.weight": 2}


def test_groups_that_read_the_same_lose_the_same() -> None:
    """Straight from the input every group keeps the same outputs; what comes after carries their labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.PReLU(6), nn.Conv2d(6, 2, 1))
    masks = {"0.weight": torch.ones(4, 3, 2, 2), "0.bias": torch.ones(6)}
    masks["0.weight"][:, 1] = masks["0.bias"][[1, 4]] = 0
    speedup = ModelSpeedup(model, image(4), masks)
    small: Any = speedup.speedup_model()
    assert small[0].weight.shape == (4, 2, 2, 2) and small[1].num_parameters == 4
    assert speedup.difference is not None and speedup.difference < 1e-5 and set(speedup.reconciled.values()) == {0}


@pytest.mark.parametrize("wrap", [lambda mask: {"0.weight": mask}, lambda mask: {"0": {"weight": mask}}])
def test_masks_that_are_no_tensors_are_refused(wrap) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for use in (lambda masks: ModelSpeedup(model, torch.randn(2, 4), masks), lambda masks: attach_masks(model, masks)):
        with pytest.raises(SpeedupError, match="^0.weight: the mask is of type ndarray. Give a tensor"):
            use(wrap(np.ones((4, 4))))


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_one_mask_under_two_names_acts_once(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    mask = torch.full((4, 4), value)
    mask[0, 0] = 0
    masks, x = {"0.weight": mask, "1.weight": mask.clone()}, torch.randn(2, 4)
    small = ModelSpeedup(model, x, masks).speedup_model()
    attach_masks(model, masks)
    torch.testing.assert_close(small(x), model(x))
    again = ModelSpeedup(model, x, masks).speedup_model()  # as pruners return them: they are attached
    torch.testing.assert_close(again(x), model(x))


def test_masks_of_one_parameter_that_differ() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(SpeedupError, match=r"^1.weight: is the same parameter as 0.weight, and their masks differ\."):
        ModelSpeedup(model, torch.randn(2, 4), {"0.weight": torch.eye(4), "1.weight": 1 - torch.eye(4)})


class Auxiliary(nn.Module):
    """A head that only training uses, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.aux, self.spare, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        x = self.c(x).relu()
        return (self.d(x), self.aux(x)) if self.training else self.d(x)


def test_masks_of_what_the_model_does_not_use_while_it_is_evaluated() -> None:
    torch.manual_seed(0)
    model, x = Auxiliary(), torch.randn(4, 8)
    masks = ones(model)
    for name in ("c", "aux", "spare"):
        masks[f"{name}.weight"][[0, 2, 3]], masks[f"{name}.bias"][[0, 2, 3]] = 0, 0
    masks["aux.weight"][:, 7] = 0
    small: Any = ModelSpeedup(model.eval(), x, masks).speedup_model()
    assert small.c.weight.shape == (5, 8) and small.d.weight.shape == (8, 5)
    dense = masked(model, masks).train()
    torch.testing.assert_close(small.train()(x), dense(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(small.spare.weight, dense.spare.weight) and not small.spare.weight[0].any()
    with pytest.raises(SpeedupError, match=r"^spare.weight: the mask has shape \(3,\), the parameter \(8, 8\)"):
        ModelSpeedup(model.eval(), x, {"spare.weight": torch.ones(3)})


def test_a_tied_weight_that_nothing_uses_is_masked_once() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.u, self.t = nn.Linear(4, 4), nn.Linear(3, 3), nn.Linear(3, 3)
            self.t.weight = self.u.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    model, half = Spare(), torch.full((3, 3), 0.5)
    small: Any = ModelSpeedup(model, torch.randn(1, 4), {"u.weight": half, "t.weight": half}).speedup_model()
    torch.testing.assert_close(small.t.weight, model.u.weight / 2)
    with pytest.raises(SpeedupError, match="^t.weight: is the same parameter as u.weight, and their masks differ"):
        ModelSpeedup(model, torch.randn(1, 4), {"u.weight": half, "t.weight": 2 * half})


@pytest.mark.parametrize("look", ["penalty first", "penalty last", "transposed", "normalised"])
def test_what_is_made_of_a_weight_alone_produces_nothing(look: str) -> None:
    """The inputs of the second layer are those of the first, however its weight is read.

    Where all of that weight counts, with and without a mask on what reads the removed channels, that is said.
    """

    def forward(n: Any, x: Tensor) -> Any:
        penalty = n.fc2.weight.pow(2).sum() if look == "penalty first" else None
        h = n.fc1(x).relu()
        if look == "transposed":
            return h @ n.fc2.weight.t()
        if look == "normalised":
            return n.fc2(h), F.linear(F.normalize(h), F.normalize(n.fc2.weight))
        return n.fc2(h), n.fc2.weight.pow(2).sum() if penalty is None else penalty

    model, x = Net(forward, fc1=nn.Linear(8, 32), fc2=nn.Linear(32, 4)), torch.randn(3, 8)
    masks = ones(model)
    masks["fc1.weight"][:16], masks["fc1.bias"][:16] = 0, 0
    speedup = ModelSpeedup(model, x, masks)
    small: Any = speedup.speedup_model()
    assert small.fc1.weight.shape == (16, 8) and speedup.reconciled["fc1.weight"] == 0
    assert (speedup.difference < 1e-5) == (not speedup.left_behind) == (look == "transposed")
    found = L1NormPruner(model, [{"op_names": ["fc1"], "sparsity": 0.5}], dummy_input=x).compress()[1]
    expected = model.fc1.weight.abs().sum(1).argsort()[:16].sort().values
    assert torch.equal((~found["fc1"]["weight"].any(1)).nonzero()[:, 0], expected)


def test_a_weight_that_is_used_both_ways_produces_both_of_its_dimensions() -> None:
    """A tied autoencoder: what goes of its inputs has to be masked in the weight too, or stays."""

    def build() -> Net:
        torch.manual_seed(0)
        layers = {"i": nn.Linear(8, 6), "e": nn.Linear(6, 10), "o": nn.Linear(6, 8)}
        return Net(lambda n, x: n.o((n.e(n.i(x).relu()).relu() @ n.e.weight).relu()), **layers)

    x = torch.randn(4, 8)
    masks = ones(build())
    masks["i.weight"][[1, 4]], masks["i.bias"][[1, 4]] = 0, 0
    speedup = ModelSpeedup(build(), x, masks)
    speedup.speedup_model()
    assert speedup.difference < 1e-5 and not speedup.left_behind and not speedup.plan.tensors
    masks["e.weight"][:, [1, 4]] = 0
    speedup = ModelSpeedup(build(), x, masks)
    small: Any = speedup.speedup_model()
    assert speedup.difference < 1e-5 and not speedup.left_behind and small.e.weight.shape == (10, 4)
