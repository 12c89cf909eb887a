"""What masks leave behind in channels that go: folded into the next bias where that is exact, told where it is not.

The masked model runs on numbers. Where an operator takes what is removed, it runs twice: with what the masked model
holds there, and with zeros, as in the shrunk model. If the two differ, something is left behind. Where that is a
product of constants, the same at every place of every example, it belongs into a bias.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from speedup.analysis import Analysis
from speedup.capture import at_source
from speedup.constants import Constants
from speedup.inputs import batch_size, with_batch
from speedup.labels import Labels, Mask
from speedup.masked import BatchError, at_batch, exact_defaults, execute, masked, silenced
from speedup.numeric import exact, relative_difference, varied
from speedup.proof import last_uses
from speedup.rules import contraction, norm, rule_for
from speedup.rules.call import raw_argument
from speedup.spreading import CLOSE, Seen, filled, operands, rule_of, spaces, unlike, wider

aten = torch.ops.aten
_UNCERTAIN = "what is left in removed channels is not known for all inputs"
_MIXED = "mixes what is left in removed channels with what is kept"
_UNEVEN = "what removed channels add is not the same at every place, as where zeros are padded"
_BATCH = "what removed channels add depends on the batch"
_NO_BIAS = "removed channels add a constant, and there is no bias of its own that it could go into"
_SHARED = "removed channels add a constant, but the bias is used elsewhere too, where they do not add the same"


@dataclass(frozen=True)
class Leftovers:
    """What masks leave behind.

    Attributes:
        folds: By name of a parameter or buffer what to add to it, of its dense shape, in double precision.
        left: By name of the parameter, or node, that takes what is not folded: why, in one line.
    """

    folds: Mapping[str, Tensor]
    left: Mapping[str, str]


@dataclass(frozen=True)
class _Slot:
    """A place for a constant: an argument of a call, and whether it is added there or taken away."""

    node: fx.Node
    argument: str
    sign: int
    dim: int


class _Stays(Exception):  # noqa: N818  # it is caught here
    """What is left behind is not folded; the text is why."""


@dataclass
class _Found:
    """What one run finds: what goes into which argument of which call and where it is from, and what is left."""

    added: dict[tuple[fx.Node, str], tuple[fx.Node, Tensor]] = field(default_factory=dict)
    left: dict[fx.Node, str] = field(default_factory=dict)


def find_leftovers(analysis: Analysis, live: Mask, held: Callable[[str], Tensor]) -> Leftovers:
    """Returns what the channels that go leave behind in the masked model.

    Args:
        analysis: The captured model and its labels.
        live: Which classes live, shape (classes,).
        held: Gives the tensor of the masked model by its name in the graph; of the dense shape.
    """
    with exact_defaults(), torch.no_grad():
        runs = [_run(analysis, live, held, analysis.captured.batches[0])]
        try:
            runs += [_run(analysis, live, held, batch) for batch in analysis.captured.batches[1:]]
        except BatchError:
            runs.append(_Found())  # nothing is sure to be the same
    left = {node: reason for run in reversed(runs) for node, reason in run.left.items()}
    added = runs[0].added
    for run in runs[1:]:
        for key in added.keys() | run.added.keys():
            pair = [one.added.get(key) for one in (runs[0], run)]
            if pair[0] is None or pair[1] is None or not _alike(pair[0][1], pair[1][1]):
                left.setdefault(next(one for one in pair if one is not None)[0], _BATCH)
                added = {other: found for other, found in added.items() if other != key}
    folds = {}
    readers = _readers(analysis)
    for key, (node, _) in added.items():
        name = analysis.aliases[str(raw_argument(*key).target)]
        vector = _common(added, readers[name])
        if vector is None:
            left[node] = _SHARED
        else:
            folds[name] = vector.reshape(analysis.parameters[name].shape)
    told: dict[str, str] = {}
    for node in analysis.captured.nodes:
        if node in left:
            name = _subject(analysis, node)
            line = left[node] if name != node.name else f"{left[node]}{at_source(node)}"
            told[name] = "; ".join(dict.fromkeys([*filter(None, [told.get(name)]), line]))
    return Leftovers(folds, told)


def _common(added: Mapping[tuple[fx.Node, str], tuple[fx.Node, Tensor]], keys: Any) -> Tensor | None:
    """What all readers of a tensor would add to it; None if that is not one thing."""
    vectors = [added[key][1] if key in added else None for key in keys]
    first = vectors[0]
    if first is None or any(vector is None or not _alike(first, vector) for vector in vectors):
        return None
    return first


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and relative_difference(one, other) <= CLOSE


def _readers(analysis: Analysis) -> dict[str, list[tuple[fx.Node | None, str]]]:
    """For each tensor of the model the arguments that read it; one without a node where it is read in other ways."""
    found: dict[str, list[tuple[fx.Node | None, str]]] = {}
    for node in analysis.captured.nodes:
        sources = [source for source in node.all_input_nodes if source.op == "get_attr"]
        for source in sources:
            name = analysis.aliases.get(str(source.target), str(source.target))
            schema = getattr(node.target, "_schema", None)
            arguments = [] if schema is None else [argument.name for argument in schema.arguments]
            places = [argument for argument in arguments if raw_argument(node, argument) is source]
            found.setdefault(name, []).extend([(node, place) for place in places] or [(None, "")])
    for name, count in _training_reads(analysis).items():
        reads = found.setdefault(name, [])
        reads += [(None, "")] * (count - len(reads))
    return found


def _training_reads(analysis: Analysis) -> dict[str, int]:
    """How often what training computes reads each tensor, where that is captured."""
    counts: dict[str, int] = {}
    for node in analysis.captured.training.graph.nodes if analysis.captured.training is not None else ():
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                name = analysis.aliases.get(str(source.target), str(source.target))
                counts[name] = counts.get(name, 0) + 1
    return counts


def _subject(analysis: Analysis, node: fx.Node) -> str:
    """The weight that a call reads, by its name; the name of the node where there is none."""
    for source in node.all_input_nodes:
        name = analysis.aliases.get(str(source.target), "") if source.op == "get_attr" else ""
        if name in analysis.parameters and len(analysis.parameters[name].shape) > 1:
            return name
    return node.name


def _run(analysis: Analysis, live: Mask, held: Callable[[str], Tensor], batch: int) -> _Found:
    """Runs the masked model at a batch size, and looks at each operator before it runs."""
    captured = analysis.captured
    generator = torch.Generator().manual_seed(batch)
    given = pytree.tree_leaves(with_batch((captured.args, captured.kwargs), batch))
    inputs = iter([exact(varied(leaf, generator)) for leaf in given])
    ends = last_uses(captured.graph_module.graph)
    state, found = Constants(), _Found()
    for node in captured.nodes:
        if node.op == "placeholder":
            value = next(inputs)
            state.give(node, value.clone() if isinstance(value, Tensor) else value, varies=True)
        elif node.op == "get_attr":
            value = exact(held(str(node.target))) if node.users else None
            state.give(node, value.clone() if isinstance(value, Tensor) else value, varies=False)
        elif node.op == "call_function":
            taken = _Taken.of(analysis, live, node, state) if node.users else None
            if taken is not None:
                taken.account(found)
            state.run(node)
        for name in ends.get(node.name, ()):
            state.forget(name)
    return found


@dataclass(frozen=True)
class _Taken:
    """A call that takes removed elements.

    Attributes:
        analysis: The captured model and its labels.
        live: Which classes live.
        node: The call.
        varies: Which elements of its operands vary.
        full: What its operands hold in the masked model; what varies there and is removed holds other numbers.
        certain: The same with zeros for what varies and is removed.
        silent: The same with zeros for all that is removed.
    """

    analysis: Analysis
    live: Mask
    node: fx.Node
    varies: Mapping[str, Any]
    full: Mapping[str, Any]
    certain: Mapping[str, Any]
    silent: Mapping[str, Any]

    @classmethod
    def of(cls, analysis: Analysis, live: Mask, node: fx.Node, state: Constants) -> "_Taken | None":
        """Returns the call ``node`` with its operands; None if it takes nothing that is removed, or only moves it."""
        rule = rule_for(node.target)
        if rule is None or rule.moves or node.name not in analysis.labels:
            return None
        full, certain, silent = {}, {}, {}
        generator = torch.Generator().manual_seed(0)
        removed = False
        for source in node.all_input_nodes:
            name, value = source.name, state.values[source.name]
            labels = analysis.labels.get(name)
            full[name] = certain[name] = silent[name] = value
            mask = analysis.classes.live_mask(labels, live) if isinstance(labels, Labels) else None
            if mask is None or not isinstance(value, Tensor):
                continue
            removed = True
            silent[name] = silenced(analysis, live, value, labels)
            open_ = state.varies[name] & ~at_batch(mask, value.shape, batch_size(analysis.captured.flat_inputs()))
            certain[name] = value.masked_fill(open_, 0)
            full[name] = value
            if value.is_floating_point():
                moved = value + (1 + value.abs()) * torch.rand(value.shape, generator=generator, dtype=value.dtype)
                full[name] = torch.where(open_, moved, value)
        return cls(analysis, live, node, state.varies, full, certain, silent) if removed else None

    def account(self, found: _Found) -> None:
        """Notes in ``found`` what the call lets through of what is removed."""
        kept = self._silenced(masked(self.analysis, self.live, self.node, _copies(self.silent)))
        full = self._given(self.full)
        if not self._differ(full, kept):
            return
        try:
            slot, vector = self._folded(full, kept)
        except _Stays as reason:
            found.left[self.node] = str(reason)
        else:
            if slot.sign:
                found.added[slot.node, slot.argument] = (self.node, slot.sign * vector)

    def _given(self, values: Mapping[str, Any]) -> Any:
        return self._silenced(execute(self.node, _copies(values)))

    def _silenced(self, result: Any) -> Any:
        return silenced(self.analysis, self.live, result, self.analysis.labels[self.node.name])

    def _differ(self, one: Any, other: Any) -> bool:
        floor = 1e-4 * max((_size(value) for value in self.full.values()), default=0.0)
        pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
        return any(
            not relative_difference(first, second, floor) <= CLOSE
            if first.is_floating_point() or first.is_complex()
            else not torch.equal(first, second)
            for first, second in pairs
            if isinstance(first, Tensor)
        )

    def _folded(self, full: Any, kept: Any) -> tuple[_Slot, Tensor]:
        """Where what is let through belongs, and how much it is for each channel.

        Raises:
            _Stays: It belongs nowhere; why.
        """
        call = Seen(self.node, self.certain, self.varies)
        pair = operands(call)
        if pair is None:
            raise _Stays(_MIXED)
        certain = self._given(self.certain)
        if all(bool(call.open(operand).any()) for operand in pair) or self._differ(full, certain):
            raise _Stays(_UNCERTAIN)
        slot = _own_slot(self.node, kept) or _next_slot(self.node, kept)
        if slot is None:
            raise _Stays(_NO_BIAS)
        vector = self._by_channel(certain - kept, slot.dim)
        if rule_of(self.node) in _CONVOLUTIONS:
            self._check_any_size(call, vector, certain.shape, slot.dim)
        tensor = raw_argument(slot.node, slot.argument) if slot.sign else None
        if tensor is not None and (tensor.op != "get_attr" or tensor.meta["val"].numel() != len(vector)):
            raise _Stays(_NO_BIAS)
        return slot, vector

    def _alive(self, shape: torch.Size) -> Tensor:
        """Which elements of the result are kept."""
        labels = self.analysis.labels[self.node.name]
        assert isinstance(labels, Labels)
        alive = self.analysis.classes.live_mask(labels, self.live)
        batch = batch_size(self.analysis.captured.flat_inputs())
        return torch.ones(shape, dtype=torch.bool) if alive is None else at_batch(alive, shape, batch)

    def _by_channel(self, added: Tensor, dim: int) -> Tensor:
        """What is added to each channel along ``dim``, zero where it is removed.

        Raises:
            _Stays: It differs within a channel.
        """
        rows, inside = (x.movedim(dim, 0).flatten(1) for x in (added, self._alive(added.shape)))
        some = inside.any(1)
        low = rows.masked_fill(~inside, torch.inf).amin(1).masked_fill(~some, 0)
        high = rows.masked_fill(~inside, -torch.inf).amax(1).masked_fill(~some, 0)
        if not float((high - low).max()) <= CLOSE * _size(added):
            raise _Stays(_UNEVEN)
        return (low + high) / 2

    def _check_any_size(self, call: Seen, vector: Tensor, shape: torch.Size, dim: int) -> None:
        """Checks that a convolution adds ``vector`` at every place, whatever size its space has.

        Raises:
            _Stays: It does not.
        """
        x, rank = call.first, spaces(self.node)
        constant = self.certain[x.name] - self.silent[x.name]
        found = [wider(call, value, rank) for value in (constant, torch.zeros_like(constant))]
        if found[0] is None or found[1] is None or bool(call.open(raw_argument(self.node, "weight")).any()):
            raise _Stays(_UNEVEN)
        added = found[0] - found[1]
        other = unlike(added, vector.reshape(-1, *(1,) * rank), filled(added, False)).movedim(dim, 0).flatten(1)
        alive = self._alive(shape).movedim(dim, 0).flatten(1)
        if bool((other.any(1) & alive.any(1)).any()):
            raise _Stays(_UNEVEN)


def _own_slot(node: fx.Node, result: Tensor) -> _Slot | None:
    """The bias of a product; None if it has none."""
    flow = rule_of(node)
    name = "self" if flow is contraction.addmm else "bias" if flow in (contraction.linear, *_CONVOLUTIONS) else ""
    bias = raw_argument(node, name) if name else None
    if not isinstance(bias, fx.Node) or len(bias.meta["val"].shape) != 1:
        return None
    scaled = name == "self" and (raw_argument(node, "beta"), raw_argument(node, "alpha")) != (1, 1)
    space = spaces(node) if flow in _CONVOLUTIONS else 0
    return None if scaled else _Slot(node, name, 1, result.dim() - 1 - space)


def _next_slot(node: fx.Node, result: Tensor) -> _Slot | None:
    """What comes after a product and can take a constant: a stored mean, or a vector that is added.

    A norm that takes the mean of what it gets takes the constant away: its slot has sign 0.
    """
    user = next(iter(node.users))
    if len(node.users) > 1 or rule_for(user.target) is None or user.args[:1] != (node,):
        return None
    if rule_of(user) in (norm.batch_norm, norm.instance_norm):
        if raw_argument(user, "training") or raw_argument(user, "use_input_stats"):
            return _Slot(user, "", 0, 1)
        mean = raw_argument(user, "running_mean")
        return _Slot(user, "running_mean", -1, 1) if isinstance(mean, fx.Node) else None
    other = raw_argument(user, "other") if user.target in (aten.add.Tensor, aten.add_.Tensor) else None
    if not isinstance(other, fx.Node) or other is node or raw_argument(user, "alpha") != 1:
        return None
    shape = tuple(other.meta["val"].shape)
    wide = [dim for dim, size in enumerate(shape, result.dim() - len(shape)) if size != 1]
    return _Slot(user, "other", 1, wide[0]) if len(wide) == 1 and wide[0] >= 0 else None


_CONVOLUTIONS = (contraction.convolution, contraction.transposed_convolution)


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pytree.tree_map_only(Tensor, torch.clone, value) for name, value in values.items()}


def _size(value: Any) -> float:
    """The largest magnitude of a finite element."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0.0
    finite = value[value.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0
