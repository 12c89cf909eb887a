"""Labels, planes, and what the record of their flow comes to: small cases by hand, and laws for any shape."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speedup.classes import Classes, solve
from speedup.errors import PlanError
from speedup.flow import Flow
from speedup.labels import Labels, broadcast, core, factor, narrowed, settle, support


def plane(flow: Flow, shape: tuple[int, ...], *dims: int) -> Tensor:
    return flow.mint(shape, dims)


def labelled(flow: Flow, shape: tuple[int, ...], *supports: tuple[int, ...]) -> Labels:
    return Labels(shape, tuple(flow.mint(shape, dims) for dims in supports))


def without(classes: Classes, *atoms: int) -> np.ndarray:
    live = np.ones(classes.count, dtype=np.bool_)
    live[classes.of[list(atoms)]] = False
    return live


def together(classes: Classes) -> set[frozenset[int]]:
    """The classes of more than one atom."""
    members: dict[int, set[int]] = {}
    for atom, label in enumerate(classes.of.tolist()):
        members.setdefault(label, set()).add(atom)
    return {frozenset(atoms) for atoms in members.values() if len(atoms) > 1}


# Planes.


def test_a_minted_plane_varies_along_its_dimensions_only() -> None:
    flow = Flow()
    first, second = plane(flow, (2, 3, 4), 1), plane(flow, (2, 3, 4), 0, 2)
    assert support(first) == (1,) and support(second) == (0, 2)
    assert core(first).tolist() == [0, 1, 2]
    assert core(second).tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert flow.size == 11 and first.shape == second.shape == (2, 3, 4)
    assert first.stride() == (0, 1, 0)


def test_a_dimension_of_one_is_no_support() -> None:
    assert support(plane(Flow(), (1, 3), 0, 1)) == (1,)
    assert support(plane(Flow(), (1,), 0)) == ()


def test_narrowed_keeps_what_varies_and_what_is_asked() -> None:
    wide = plane(Flow(), (2, 3, 4), 1)
    assert narrowed(wide).shape == (1, 3, 1)
    assert narrowed(wide, [2]).shape == (1, 3, 4)


def test_settle_finds_what_is_constant() -> None:
    labels = torch.arange(3)[None, :, None].repeat(2, 1, 4)
    assert support(labels) == (0, 1, 2)
    settled = settle(labels)
    assert support(settled) == (1,) and torch.equal(settled, labels)
    assert support(settle(torch.full((2, 3), 7))) == ()


def test_labels_know_what_is_covered_and_what_is_fixed() -> None:
    labels = labelled(Flow(), (2, 3, 1, 4), (1,), (1, 3))
    assert labels.covered == {1, 3} and labels.fixed == {0}
    assert [support(p) for p in labels.along(3)] == [(1, 3)]
    assert len(labels.along(1)) == 2 and labels.along(0) == ()


def test_broadcast_adds_leading_dimensions() -> None:
    wide = broadcast(labelled(Flow(), (3,), (0,)), (2, 4, 3))
    assert wide.shape == (1, 1, 3) and support(wide.planes[0]) == (2,)


# Factors of a reshape.


@pytest.mark.parametrize(
    ("old", "new", "runs"),
    [
        ((2, 12), (2, 3, 4), [([0], [0]), ([1], [1, 2])]),
        ((2, 3, 4), (2, 12), [([0], [0]), ([1, 2], [1])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
        ((2, 3, 4, 5), (6, 20), [([0, 1], [0]), ([2, 3], [1])]),
        ((), (1,), [([], [0])]),
        ((1, 1), (), [([0], []), ([1], [])]),
    ],
)
def test_factor(old: tuple[int, ...], new: tuple[int, ...], runs: list[tuple[list[int], list[int]]]) -> None:
    assert factor(old, new) == runs


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape, and another of as many elements."""
    old = draw(SHAPES)
    left, new = int(np.prod(old)), []
    while left > 1:
        size = draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        new.append(size)
        left //= size
        if len(new) == 4:
            new.append(left)
            break
    return tuple(old), tuple(new) or (1,)


@given(reshapes())
def test_factors_hold_as_many_elements_and_cover_all_in_order(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    runs = factor(old, new)
    assert [dim for left, _ in runs for dim in left] == list(range(len(old)))
    assert [dim for _, right in runs for dim in right] == list(range(len(new)))
    for left, right in runs:
        assert np.prod([old[dim] for dim in left]) == np.prod([new[dim] for dim in right])


@given(reshapes(), st.data())
def test_a_reshape_moves_every_label_with_its_element(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    old, new = shapes
    dims = data.draw(st.sets(st.sampled_from(range(len(old)))))
    flow = Flow(kind="reshape")
    labels = labelled(flow, old, tuple(sorted(dims)))
    moved = flow.reshape(labels, new)
    assert moved.shape == new
    assert torch.equal(moved.planes[0], labels.planes[0].reshape(new))


@settings(max_examples=60, deadline=None)
@given(reshapes(), st.data())
def test_what_is_rectangular_after_a_reshape_has_as_many_elements(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    """Whatever dies: both shapes either hold the same number of elements, or one of them is refused."""
    old, new = shapes
    flow = Flow(kind="reshape")
    labels = labelled(flow, old, tuple(range(len(old))))
    moved = flow.reshape(labels, new)
    classes = solve(flow)
    live = np.array(data.draw(st.lists(st.booleans(), min_size=classes.count, max_size=classes.count)), dtype=np.bool_)
    if not live.any():
        return
    try:
        sizes = [classes.live_shape(item, live, "n") for item in (labels, moved)]
    except PlanError as error:
        assert str(error).startswith("n: its rows would keep")
        return
    assert np.prod(sizes[0]) == np.prod(sizes[1]) == live[classes.of].sum()


# What can happen to labels.


def test_unite_makes_atoms_one_element_by_element() -> None:
    flow = Flow()
    flow.unite(plane(flow, (2, 3), 1), plane(flow, (2, 3), 1))
    assert together(solve(flow)) == {frozenset({0, 3}), frozenset({1, 4}), frozenset({2, 5})}


def test_freeze_pins_a_plane_that_has_nothing_else() -> None:
    flow = Flow(node="n")
    left = flow.freeze(labelled(flow, (2, 3), (1,)), [1], "because", structural=True)
    classes = solve(flow)
    assert left.planes == () and (classes.pin_of == 0).all()
    assert (classes.pins[0].node, classes.pins[0].reason, classes.pins[0].structural) == ("n", "because", True)


def test_freeze_ties_what_differs_along_the_frozen_dimension_only() -> None:
    flow = Flow()
    left = flow.freeze(labelled(flow, (2, 3), (0, 1)), [1], "because")
    classes = solve(flow)
    assert together(classes) == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}
    assert support(left.planes[0]) == (0,) and (classes.pin_of < 0).all()


def test_freeze_leaves_other_dimensions_alone() -> None:
    flow = Flow()
    labels = labelled(flow, (2, 3), (1,))
    assert flow.freeze(labels, [0], "because").planes[0] is labels.planes[0]
    assert not flow.pins and not flow.pairs


def test_the_first_reason_to_pin_counts() -> None:
    flow = Flow(node="first")
    atoms = plane(flow, (3,), 0)
    flow.pin(atoms, "one")
    flow.node = "second"
    flow.pin(atoms, "two")
    classes = solve(flow)
    assert {classes.pins[i].node for i in classes.pin_of} == {"first"}


def test_meeting_planes_are_united() -> None:
    flow = Flow()
    met = flow.meet([labelled(flow, (2, 3, 1), (1,)), labelled(flow, (3, 4), (0,))], (2, 3, 4))
    assert met.shape == (2, 3, 4) and [support(p) for p in met.planes] == [(1,)]
    assert together(solve(flow)) == {frozenset({0, 3}), frozenset({1, 4}), frozenset({2, 5})}


def test_meeting_something_of_fixed_size_pins() -> None:
    flow = Flow(node="n")
    met = flow.meet([labelled(flow, (2, 3), (1,)), Labels((3,))], (2, 3))
    assert met.planes == () and (solve(flow).pin_of >= 0).all()


def test_meeting_something_of_size_one_does_not_pin() -> None:
    flow = Flow()
    met = flow.meet([labelled(flow, (2, 3), (1,)), Labels((1,)), Labels(())], (2, 3))
    assert [support(p) for p in met.planes] == [(1,)] and (solve(flow).pin_of < 0).all()


def test_planes_of_one_operand_are_not_united() -> None:
    flow = Flow()
    met = flow.meet([labelled(flow, (4,), (0,), (0,))], (4,))
    assert len(met.planes) == 2 and together(solve(flow)) == set()


def test_planes_along_different_dimensions_do_not_touch() -> None:
    flow = Flow()
    met = flow.meet([labelled(flow, (4, 1), (0,)), labelled(flow, (1, 3), (1,))], (4, 3))
    assert {support(p) for p in met.planes} == {(0,), (1,)}
    assert together(solve(flow)) == set() and not flow.blocks


def test_a_smaller_plane_counts_slabs_of_a_larger() -> None:
    flow = Flow(node="n", kind="mul")
    met = flow.meet([labelled(flow, (2, 3), (0, 1)), labelled(flow, (2, 1), (0,))], (2, 3))
    assert [support(p) for p in met.planes] == [(0, 1)]
    block = solve(flow).blocks[0]
    assert (block.node, block.kind, block.members.tolist()) == ("n", "mul", [[0, 1, 2], [3, 4, 5]])
    assert block.slabs is not None and block.slabs.tolist() == [6, 7]


def test_planes_that_overlap_share_slabs() -> None:
    flow = Flow()
    met = flow.meet([labelled(flow, (2, 3, 1), (0, 1)), labelled(flow, (2, 1, 4), (0, 2))], (2, 3, 4))
    assert {support(p) for p in met.planes} == {(0, 1), (0, 2)}
    first, second = solve(flow).blocks
    assert first.members.shape == (2, 3) and second.members.shape == (2, 4)
    assert first.slabs is not None and second.slabs is not None and (first.slabs == second.slabs).all()


def test_reduce_drops_what_it_sums_over() -> None:
    flow = Flow()
    labels = labelled(flow, (2, 3, 4), (1,), (2,))
    left = flow.reduce(labels, [2])
    assert left.shape == (2, 3) and [support(p) for p in left.planes] == [(1,)]
    kept = flow.reduce(labels, [2], keepdim=True)
    assert kept.shape == (2, 3, 1) and [support(p) for p in kept.planes] == [(1,)]
    assert not flow.blocks


def test_reduce_leaves_slabs_of_a_joint_plane() -> None:
    flow = Flow(kind="reduction")
    left = flow.reduce(labelled(flow, (2, 3), (0, 1)), [1])
    assert left.shape == (2,) and support(left.planes[0]) == (0,)
    classes = solve(flow)
    block = classes.blocks[0]
    assert block.members.tolist() == [[0, 1, 2], [3, 4, 5]] and block.slabs is not None
    live = classes.with_slabs(without(classes, 3, 4, 5))
    assert live[block.slabs].tolist() == [True, False]
    assert classes.live_shape(left, live, "n") == (1,)


def test_reduce_of_two_joint_planes_leaves_one_row_of_slabs() -> None:
    flow = Flow()
    left = flow.reduce(labelled(flow, (2, 3, 4), (0, 1), (0, 2)), [1, 2])
    assert left.shape == (2,) and left.covered == {0}


# What lives.


def test_an_element_goes_when_any_of_its_atoms_goes() -> None:
    flow = Flow()
    labels = labelled(flow, (2, 3), (0,), (1,))
    classes = solve(flow)
    assert classes.live_mask(labels, without(classes)) is None
    mask = classes.live_mask(labels, without(classes, 0, 3))
    assert mask is not None and mask.expand(2, 3).tolist() == [[False] * 3, [True, False, True]]
    assert classes.live_shape(labels, without(classes, 0, 3), "n") == (1, 2)


def test_rows_may_keep_different_positions() -> None:
    flow = Flow()
    labels = labelled(flow, (2, 4), (0, 1))
    classes = solve(flow)
    assert classes.live_shape(labels, without(classes, 0, 1, 6, 7), "n") == (2, 2)
    assert classes.live_shape(labels, without(classes, 0, 1, 2, 3), "n") == (1, 4)


def test_what_is_no_rectangle_is_refused() -> None:
    flow = Flow()
    labels = labelled(flow, (2, 4), (0, 1))
    classes = solve(flow)
    with pytest.raises(PlanError, match=r"^view: its rows would keep \[3, 4\] of 4 elements each"):
        classes.live_shape(labels, without(classes, 0), "view")


def test_pinned_labels_of_size_one_are_not_forgotten() -> None:
    flow = Flow(node="n")
    flow.pin(plane(flow, (4,), 0).narrow(0, 2, 1), "is taken alone")
    assert (solve(flow).pin_of >= 0).tolist() == [False, False, True, False]


def test_classes_are_numbered_by_their_first_atom() -> None:
    flow = Flow()
    atoms = plane(flow, (6,), 0)
    flow.unite(atoms[:2], atoms[4:])
    assert solve(flow).of.tolist() == [0, 1, 2, 3, 0, 1]


def test_equal_blocks_stand_once() -> None:
    flow = Flow(kind="reshape")
    labels = labelled(flow, (2, 6), (1,))
    for _ in range(3):
        flow.reshape(labels, (2, 2, 3))
    assert len(solve(flow).blocks) == 1


def test_a_shuffle_is_a_weave() -> None:
    """Twelve channels in two rows, merged in turn: what stays must take turns as all of it does."""
    flow = Flow(kind="reshape")
    rows = flow.reshape(labelled(flow, (12,), (0,)), (2, 6))
    turned = Labels((6, 2), tuple(p.t() for p in rows.planes))
    flow.reshape(turned, (12,))
    weaves = solve(flow).weaves
    assert len(weaves) == 1
    assert weaves[0].turns.tolist() == [[i, i + 6] for i in range(6)]


def test_a_view_there_and_back_is_no_weave() -> None:
    flow = Flow(kind="reshape")
    flow.reshape(flow.reshape(labelled(flow, (12,), (0,)), (2, 6)), (12,))
    assert solve(flow).weaves == ()
