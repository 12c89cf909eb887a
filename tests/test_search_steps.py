"""Searches that go step by step: sensitivity, NetAdapt and AutoCompress, by hand and with training."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from searching import MODELS, chain, chain_space, fit, jiggle, widths
from test_rules import one_thread
from torch import nn

from graphprune.compress import compress, target_of
from graphprune.config import Request
from graphprune.errors import ConfigError, ModelError
from graphprune.schedule import SCHEDULES
from graphprune.search import (
    Schedule,
    Sensitivity,
    Space,
    Trials,
    autocompress,
    netadapt,
    prune_by_sensitivity,
    sensitivity,
)
from graphprune.search.asked import asked_sparsity
from graphprune.search.rounds import in_rounds
from graphprune.search.state import tensors_after
from graphprune.source import load_source

FIRST, SECOND, THIRD = (f"layers.{place}.weight" for place in range(3))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def space() -> Space:
    return chain_space(10, 20)


def first_matters(model: nn.Module) -> float:
    """Nine tenths for the first group, one for the second."""
    first, second = widths(model)
    return 0.9 * first / 10 + 0.1 * second / 20


def test_scores_of_groups_one_at_a_time(space: Space) -> None:
    table = sensitivity(Trials(space, first_matters), (0.2, 0.5))
    assert table.dense == 1.0
    assert table.scores[FIRST] == pytest.approx({0.2: 0.82, 0.5: 0.55})
    assert table.scores[SECOND] == pytest.approx({0.2: 0.98, 0.5: 0.95})


def test_a_table_as_csv_and_back() -> None:
    source = load_source(str(MODELS / "resnet20_cifar.py"))
    space = Space.of(source.model, source.example_inputs, round_to=1, only=["layer1.*", "conv1"])
    table = Sensitivity(1.0, {name: {0.1: 1 - place / 10, 0.5: 0.25} for place, name in enumerate(space.groups)})
    text = table.to_csv(space)
    lines = text.splitlines()
    assert lines[0] == "layername,0.1,0.5" and "layer1.0.conv1,0.9,0.25" in lines
    assert [line for line in lines if line.startswith(("conv1", "layer1.2.conv2"))] == [
        "conv1,1.0,0.25",
        "layer1.2.conv2,1.0,0.25",  # the residual stream: one group, several layers
    ]
    assert Sensitivity.from_csv(text, space, 1.0) == table


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layername,0.1\nlayers.7,0.5\n", "csv: 'layers.7' makes no channels that may go."),
        ("layername,much\nlayers.0,0.5\n", "csv: is no table of sensitivities"),
        ("layername,0.1\nlayers.0,0.5,0.6\n", "csv: is no table of sensitivities"),
        ("", "csv: is no table of sensitivities"),
    ],
)
def test_tables_of_something_else(space: Space, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sensitivity.from_csv(text, space, 1.0)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_sensitive_group_gives_less(space: Space) -> None:
    """The score may fall by 0.05: 0.05 / 0.9 of the first group, half of the second."""
    found = prune_by_sensitivity(Trials(space, first_matters), 0.4, step=0.4, drop=0.05, shares=(0.1, 0.5, 0.9))
    assert found.shares[FIRST] == pytest.approx(0.1) and found.shares[SECOND] == pytest.approx(0.5)
    assert found.score == pytest.approx(0.81 + 0.05)
    assert space.left(space.live(found.shares), "weights") <= 0.6


@pytest.mark.parametrize("of", ["weights", "params", "macs"])
def test_rounds_end_at_the_overall_target(space: Space, of: str) -> None:
    found = prune_by_sensitivity(
        Trials(space, fit),
        0.5,
        of=of,
        step=0.2,
        drop=0.5,
        shares=(0.3, 0.6),
        finetune=jiggle,  # type: ignore[arg-type]
    )
    assert 0.4 < space.left(space.live(found.shares), of) <= 0.5  # type: ignore[arg-type]
    rounds = [e for e in found.history if sum(e.shares.values()) > 0]
    assert len(rounds) >= 3 * 4 - 1 and fit(found.result.model) == found.score


def test_each_step_is_the_smallest_cut_that_is_enough(space: Space) -> None:
    """20 % of the multiply-accumulates of 4 x 10 x 20 x 3: 40 + 200 + 60 = 300, in one group at a time."""
    found = netadapt(Trials(space, first_matters), 0.8, step=0.2)
    assert [tuple(e.shares.values()) for e in found.history] == [(0.3, 0.0), (0.0, 0.25)]
    assert [space.left(e.live, "macs") for e in found.history] == pytest.approx(
        [(28 + 140 + 60) / 300, (40 + 150 + 45) / 300]
    )
    assert found.shares == {FIRST: 0.0, SECOND: 0.25} and found.score == pytest.approx(0.975)


@pytest.mark.parametrize("resource", ["weights", "params", "macs"])
def test_the_budget_is_kept_and_the_training_as_well(space: Space, resource: str) -> None:
    trials = Trials(space, fit, seed=2)
    found = netadapt(trials, 0.5, resource=resource, step=0.2, decay=0.9, finetune=jiggle)  # type: ignore[arg-type]
    assert space.left(space.live(found.shares), resource) <= 0.5 and found.note is None  # type: ignore[arg-type]
    assert fit(found.result.model) == found.score == max(e.score for e in found.history[-2:])
    assert found.history == netadapt(trials, 0.5, resource=resource, step=0.2, decay=0.9, finetune=jiggle).history  # type: ignore[arg-type]
    dense = tensors_after(space.analysis.captured.model)["layers.2.bias"]
    assert not torch.equal(tensors_after(found.result.model)["layers.2.bias"], dense)  # it was trained


def test_the_best_candidate_of_a_step_goes_on(space: Space) -> None:
    """Each step's candidates contain the best one of the step before."""
    found = netadapt(Trials(space, first_matters), 0.3, step=0.1)
    best, steps = {FIRST: 0.0, SECOND: 0.0}, 0
    history = list(found.history)
    while history:
        batch = [e for e in history[:2] if all(e.shares[name] >= best[name] for name in best)]
        batch = [e for e in batch if sum(e.shares[name] != best[name] for name in best) == 1]
        assert batch
        best, steps = dict(max(batch, key=lambda e: e.score).shares), steps + 1
        history = history[len(batch) :]
    assert best == found.shares and steps >= 6


def test_a_budget_that_cannot_be_met_is_refused(space: Space) -> None:
    asked: list[nn.Module] = []
    with pytest.raises(ConfigError, match=r"^target: 0.200 of the macs may be left, and 0.4\d\d stay even where every"):
        netadapt(Trials(chain_space(10, 20, keep_at_least=0.6), asked.append), 0.2, step=0.3)
    assert not asked


def test_a_budget_that_no_step_meets_is_said(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which only cutting both layers helps, and a step cuts one."""

    def clock(model: nn.Module, example_inputs: object) -> float:
        return 10.0 - 8.0 * (widths(model)[0] < 10 and widths(model)[1] < 20)

    monkeypatch.setattr("graphprune.search.trials.measured_ms", clock)
    found = netadapt(Trials(space, first_matters), 0.5, resource="latency", step=0.3)
    assert found.note == "1.000 of the latency are left, not 0.5: no group can give more"
    assert widths(found.result.model) == [10, 20]


def test_measured_latency_is_written_down_and_used(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts: each channel of the first layer takes a millisecond, the rest three."""
    asked: list[list[int]] = []

    def clock(model: nn.Module, example_inputs: object) -> float:
        asked.append(widths(model))
        return 3.0 + widths(model)[0]

    monkeypatch.setattr("graphprune.search.trials.measured_ms", clock)
    found = netadapt(Trials(space, first_matters), 0.8, resource="latency", step=0.2)
    assert widths(found.result.model) == [7, 20]  # (3 + 7) / 13 < 0.8 < (3 + 8) / 13
    assert len(asked) == len({tuple(one) for one in asked}) and [10, 20] in asked


def test_latency_comes_from_onnxruntime(space: Space) -> None:
    from graphprune.search.latency import measured_ms

    assert 0 < measured_ms(space.model(space.live({SECOND: 0.5})), space.example_inputs) < 100


def test_rounds_multiply_to_the_overall_sparsity(space: Space) -> None:
    """1 - (1 - P)^(1/N) of what is left, N times; what is regularised is the model of its round."""
    seen: list[tuple[list[int], dict[str, float]]] = []

    def regularise(model: nn.Module, shares: dict[str, float]) -> None:
        seen.append((widths(model), dict(shares)))
        jiggle(model)

    schedule = Schedule(start=20, tries=1, batch=2)
    found = autocompress(Trials(space, fit), 0.6, rounds=3, schedule=schedule, regularise=regularise)
    assert len(seen) == 3 and seen[0][0] == [10, 20]
    for place, (sizes, shares) in enumerate(seen):
        following = [*(one for one, _ in seen), widths(found.result.model)][place + 1]
        kept = [round(size * (1 - share)) for size, share in zip(sizes, shares.values(), strict=True)]
        assert kept == following  # what it was told is what goes
        left = 1 - (40 * (1 - following[0] / 10) + 200 * (1 - following[1] / 20)) / 240
        assert left <= 0.4 ** ((place + 1) / 3) + 1e-9
    assert fit(found.result.model) == found.score
    again = autocompress(Trials(space, fit), 0.6, rounds=3, schedule=schedule, regularise=regularise)
    assert again.history == found.history


def test_without_regularisation_the_weights_stay(space: Space) -> None:
    found = autocompress(Trials(space, first_matters), 0.4, rounds=2, schedule=Schedule(start=20, tries=1))
    dense = tensors_after(space.analysis.captured.model)["layers.2.bias"]
    assert torch.equal(tensors_after(found.result.model)["layers.2.bias"], dense)
    assert space.left(space.live(found.shares), "weights") <= 0.6


def reshapes(model: nn.Module) -> None:
    model.get_submodule("layers.0").weight = nn.Parameter(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: sensitivity(t, (0.0,)), "shares: 0.0 is not in (0, 1). Use shares such as 0.1."),
        (lambda t: sensitivity(t, ("0.5",)), "shares: '0.5' is not in (0, 1)."),  # type: ignore[arg-type]
        (lambda t: sensitivity(t, ()), "shares: is empty, so that nothing is tried."),
        (lambda t: Trials(None, fit), "space: is None. Give what can be chosen, Space.of(model, inputs)."),  # type: ignore[arg-type]
        (lambda t: Trials(t.space, 3), "evaluate: is 3. Give a function of a model"),  # type: ignore[arg-type]
        (lambda t: Trials(t.space, fit, seed=-1), "seed: is -1. Give a whole number in [0, 2**63)."),
        (lambda t: prune_by_sensitivity(t, 1.0), "sparsity 1.0: is not in (0, 1)."),
        (lambda t: prune_by_sensitivity(t, 0.5, step=0), "step 0: is not above 0."),
        (lambda t: netadapt(t, 1.0), "budget 1.0: is not in (0, 1). Use one such as 0.5."),
        (lambda t: netadapt(t, 0.5, decay=0), "decay 0: is not in (0, 1)."),
        (lambda t: netadapt(t, 0.5, resource="flops"), "'flops': nothing that is counted."),  # type: ignore[arg-type]
        (lambda t: autocompress(t, 0.5, rounds=0), "rounds 0: is below 1. Use 1 or more."),
        (lambda t: autocompress(t, 0.0), "sparsity 0.0: is not in (0, 1)."),
    ],
)
def test_wrong_settings(space: Space, call: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(Trials(space, fit))  # type: ignore[operator]
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_training_that_changes_shapes(space: Space) -> None:
    trials = Trials(space, lambda model: 0.5)
    with pytest.raises(ModelError, match=r"layers.0.weight: training has made its shape \(2, 4\), not"):
        netadapt(trials, 0.8, step=0.2, finetune=reshapes)


LISTS = {
    "shares": [{"op_types": ["Linear"], "sparsity": 0.2}, {"op_names": ["layers.1"], "sparsity": 0.75}],
    "together": [{"op_names_re": [r"layers\.[01]"], "total_sparsity": 0.4, "max_sparsity_per_layer": 0.45}],
    "one alone": [{"op_names": ["layers.0"], "sparsity": 0.3}],
}


def asked_space(config_list: list[dict[str, object]] | None = None, scope: str = "local", **options: object) -> Space:
    request = Request.of(config_list=config_list, scope=scope, round_to=1, **options)
    return Space.of(
        chain(10, 20),
        torch.randn(2, 4),
        asked=partial(target_of, request=request, grows=True),
        **request.model_dump(exclude={"sparsity"}),
    )


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", [*LISTS, "no list"])
def test_rounds_end_where_one_shot_does(name: str, scope: str) -> None:
    asked = {"config_list": LISTS[name]} if name in LISTS else {"sparsity": 0.3}
    once = compress(chain(10, 20), torch.randn(2, 4), scope=scope, round_to=1, **asked)
    ranked = scope == "global" or name == "together"  # which of them go then depends on training between rounds
    for schedule in SCHEDULES:
        trials = Trials(asked_space(scope=scope, **asked), fit)
        found = in_rounds(trials, schedule, 1 if ranked else 3, finetune=None if ranked else jiggle)
        assert widths(found.result.model) == widths(once.model) != [10, 20]


def test_rounds_of_a_ranking_count_what_is_gone() -> None:
    space = asked_space(scope="global", sparsity=0.5)
    for rounds in (1, 2, 5):
        found = in_rounds(Trials(space, fit), "linear", rounds)
        assert sum(widths(found.result.model)) == 15
        gone = [round(10 * one.shares[FIRST] + 20 * one.shares[SECOND]) for one in found.history]
        assert gone == [math.ceil(15 * place / rounds) for place in range(1, rounds + 1)]


def test_rounds_begin_with_the_initial_sparsity() -> None:
    listed = [{"op_names": ["layers.1"], "initial_sparsity": 0.2, "sparsity": 0.8}]
    found = in_rounds(Trials(asked_space(listed), fit), "linear", 3)
    assert [evaluation.shares[SECOND] for evaluation in found.history] == [0.4, 0.6, 0.8]


def test_how_much_a_list_asks_for_in_all() -> None:
    space = asked_space(LISTS["shares"])  # 4 * 10 and 10 * 20 weights
    assert asked_sparsity(space) == pytest.approx((0.2 * 40 + 0.75 * 200) / 240)
    assert asked_sparsity(asked_space(sparsity=0.3)) == 0.3
    assert asked_space(LISTS["together"]).most(FIRST) == 0.45
