"""What a search can choose: the groups of one model, what a choice leaves and costs, and the model that it makes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.compress import Calibrate, Result, Stages, block_of, finished, nothing_goes, scores_of, target_of
from graphprune.config import Request, closest
from graphprune.criteria import Scores
from graphprune.dependency import DependencyGraph, find_dependencies
from graphprune.errors import ConfigError, ModelError
from graphprune.groups import ChannelGroup
from graphprune.search.candidate import seeded
from graphprune.search.remains import remaining
from graphprune.search.state import State, bytes_of, digest, holding, scattered, shrunk_model, tensors_of
from graphprune.search.tally import Tally
from graphprune.select import Choice, Selection, select
from graphprune.targets import Target
from speedup.analysis import Analysis, analyse
from speedup.capture import attribute, capture
from speedup.errors import MisfitError
from speedup.inputs import ExampleInputs
from speedup.labels import Mask
from speedup.planning import make_plan
from speedup.program import is_hollow
from speedup.repair import repaired
from speedup.shrink import shrink

Shares = Mapping[str, float]
"""Name of a group -> the share that goes of its units that may go, in [0, 1)."""

Measure = Literal["weights", "params", "macs"]
"""What a target counts: weights that make the channels of the groups (the manuals' sparsity), or what is physically
left of all parameters or of the multiply-accumulates."""

Asked = Callable[[ChannelGroup], Target | str]

Score = Callable[[Analysis, int], Scores]
"""From an analysed model and a seed to a score for each class, shape (classes,)."""


@dataclass(frozen=True, eq=False)
class Space:
    """One model, captured and analysed once, and what can be chosen of it.

    Shares are always those of the dense model; a candidate never brings back what its state has lost.

    Attributes:
        dependencies: The model's channel groups.
        groups: Those of which something may go, by name; the second group of one name is called «name#2».
        targets: What was asked of each of them.
        reasons: Why each of the others is left alone, by its index.
        request: How it was captured, and what limits what stays.
        criterion: Scores the channels of the model with any weights.
        block: What is kept of an axis is a multiple of this.
        keep_at_least: Share of the channels of every group that stays, in [0, 1].
        example_inputs: What the model is captured with.
        start: Everything lives, with the weights that the model came with.
    """

    dependencies: DependencyGraph
    groups: Mapping[str, ChannelGroup]
    targets: Mapping[str, Target]
    reasons: Mapping[int, str]
    request: Request
    criterion: Score
    block: int
    keep_at_least: float
    example_inputs: ExampleInputs
    start: State
    _chosen: dict[Any, tuple[Choice, Mask]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        criterion: str | Score = "l1",
        asked: Callable[[Analysis], Asked] | None = None,
        calibrate: Calibrate | None = None,
        keep_at_least: float = 0.0,
        **options: Any,
    ) -> "Space":
        """Returns what can be chosen of ``model``, which is not changed.

        Args:
            model: Any module that ``torch.export`` can capture.
            example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
            criterion: Name of a criterion, or a function of the analysed model and a seed that gives a score for each
                class, shape (classes,); one that compares slices with each other sees those that are gone as zeros.
            asked: Gives for the analysed model what says how much of a group goes, or why it is left alone; by default
                what ``options`` say. Searches that are told how much goes in all choose the share of each themselves.
            calibrate: Runs the model on some batches, for criteria that look at activations or gradients.
            keep_at_least: Share of the channels of every group that stays, in [0, 1].
            **options: The other fields of :class:`~graphprune.config.Request`.

        Raises:
            ConfigError: An option makes no sense.
            ModelError: Nothing can be pruned, or the weights are not numbers.
            CaptureError: ``torch.export`` cannot capture the model.
        """
        named = criterion if isinstance(criterion, str) else "l1"
        request = Request.of(criterion=named, **options)
        if not 0 <= keep_at_least <= 1:
            raise ConfigError(f"keep_at_least {keep_at_least}: is not in [0, 1]. Use a share such as 0.2.")
        if is_hollow(model):
            raise ModelError("model: is on the meta device and holds nothing to evaluate. Give it with its weights.")
        analysis = analyse(capture(repaired(model, {}, ()), example_inputs))
        dependencies = find_dependencies(analysis, whole_heads=not request.head_dims)

        def score(some: Analysis, seed: int) -> Any:
            with seeded(seed, torch.get_num_threads()):  # of what calibrates
                return scores_of(some, request, calibrate) if isinstance(criterion, str) else criterion(some, seed)

        scores = score(analysis, request.seed)
        live = analysis.classes.with_slabs(np.ones(analysis.classes.count, dtype=np.bool_))
        says = asked(analysis) if asked else target_of(analysis, request)
        groups, targets, reasons = _choosable(dependencies, says, scores)
        if not groups:
            raise nothing_goes([(group, reasons.get(group.index)) for group in dependencies.groups], says)
        space = cls(
            dependencies,
            groups,
            targets,
            reasons,
            request,
            score,
            block_of(request),
            keep_at_least,
            example_inputs,
            State(live, scores),
        )
        return space._that_fits() if analysis.captured.parts is not None else space

    def _that_fits(self) -> "Space":
        """The same without the groups of parts whose code does not fit smaller tensors, tried at half of the channels.

        Raises:
            ModelError: Nothing of it may go.
            MisfitError: It is not known which parts those are.
        """
        unfit: dict[str, str] = {}
        space = self
        while True:
            live = space.live(dict.fromkeys(space.groups, 0.5))
            try:
                shrink(space.analysis.captured, make_plan(space.analysis, live))
            except MisfitError as error:
                if not error.parts.keys() - unfit.keys():
                    raise
                unfit |= error.parts
                fits = target_of(space.analysis, Request(), unfit)
                notes = {name: fits(group) for name, group in space.groups.items()}
                groups = {name: group for name, group in space.groups.items() if not isinstance(notes[name], str)}
                left = {self.groups[name].index: note for name, note in notes.items() if isinstance(note, str)}
                if not groups:
                    raise nothing_goes(
                        [(group, left.get(group.index)) for group in self.groups.values()], fits
                    ) from error
                space = replace(space, groups=groups, reasons={**space.reasons, **left}, _chosen={})
            else:
                return space

    @property
    def analysis(self) -> Analysis:
        """The model and its labels."""
        return self.dependencies.analysis

    @cached_property
    def tally(self) -> Tally:
        """What counts parameters and multiply-accumulates."""
        return Tally(self.analysis)

    @cached_property
    def fingerprint(self) -> str:
        """Says which model this is, weights and the sizes of its inputs included, and what can be chosen of it."""
        parts: list[bytes | str] = [f"{self.block} {self.keep_at_least} {self.request.model_dump_json()}"]
        for name, tensor in tensors_of(self.analysis.captured.model).items():
            parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", bytes_of(tensor)]
        for name, group in self.groups.items():
            parts += [name, repr(self.targets[name]), group.classes.tobytes(), group.unit_of.tobytes()]
        for tensor in self.analysis.captured.flat_inputs():
            if isinstance(tensor, Tensor):
                parts.append(f"{tuple(tensor.shape)} {tensor.dtype}")
        return digest(*parts, self.start.scores.tobytes())

    @cached_property
    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """For each group the modules whose weights make its channels."""
        tensors = {name: attribute(self.analysis.captured.graph_module, name) for name in self.analysis.parameters}
        return {
            name: tuple(
                dict.fromkeys(m.module for m in group.members if m.role == "out" and tensors[m.tensor].dim() > 1)
            )
            or (group.name.rpartition(".")[0],)
            for name, group in self.groups.items()
        }

    @cached_property
    def weight_counts(self) -> Mapping[str, int]:
        """For each group the elements of the weights that make its channels."""
        found = {}
        for name, group in self.groups.items():
            count = 0
            for member in group.members:
                held: Tensor = attribute(self.analysis.captured.graph_module, member.tensor)
                if member.role == "out" and held.dim() > 1:
                    share = member.channels / math.prod(held.shape[dim] for dim in member.dims)
                    count += round(held.numel() * share)
            found[name] = max(count, 1)
        return found

    def limited(self, block: int, keep_at_least: float) -> "Space":
        """Returns the same space, where what is kept of an axis is a multiple of ``block`` and at least that share."""
        return replace(self, block=block, keep_at_least=max(keep_at_least, self.keep_at_least), _chosen={})

    def checked(self, shares: Shares) -> Shares:
        """Returns ``shares``.

        Raises:
            ConfigError: There is no such group, or a share is not in [0, 1].
        """
        for name, share in shares.items():
            if name not in self.groups:
                near = closest(name, list(self.groups))
                raise ConfigError(f"{name!r}: no group of which something may go has that name{near}. Use one that is.")
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}: a share of {share} is not in [0, 1]. Use one such as 0.5.")
        return shares

    def selection(self, shares: Shares, state: State | None = None) -> Selection:
        """Returns what stays when of each group goes its share, and of groups without one nothing more.

        Args:
            shares: Shares of the dense groups by name.
            state: Where the search stands; what is gone there stays gone.
        """
        state = state or self.start
        self.checked(shares)
        live = state.live.copy()
        choices = []
        names = {group.index: name for name, group in self.groups.items()}
        for group in self.dependencies.groups:
            if group.index not in names:
                choices.append(Choice(group, group.units, group.units, self.reasons.get(group.index)))
                continue
            choice, keep = self._choice(group, shares.get(names[group.index], 0.0), state)
            choices.append(choice)
            live[group.classes[~keep]] = False
        return Selection(self.analysis.classes.with_slabs(live), tuple(choices))

    def live(self, shares: Shares, state: State | None = None) -> Mask:
        """Returns the classes that live when of each group goes its share, shape (classes,)."""
        return self.selection(shares, state).live

    def shares(self, live: Mask) -> dict[str, float]:
        """Returns which share of each group is gone when the classes ``live`` are left."""
        return {name: self.gone(name, live) / max(group.size, 1) for name, group in self.groups.items()}

    def gone(self, name: str, live: Mask) -> int:
        """Returns how many units of a group are gone when the classes ``live`` are left."""
        group = self.groups[name]
        dead = np.zeros(group.units, dtype=np.bool_)
        dead[group.unit_of[~live[group.classes]]] = True
        return int(dead.sum())

    def most(self, name: str) -> float:
        """Returns the largest share of a group that may go."""
        group = self.groups[name]
        return min(
            1 - self.keep_at_least,
            self.targets[name].most,
            (group.size - 1) / group.size if group.size == group.units else 1.0,
        )

    def left(self, live: Mask, of: Measure) -> float:
        """Returns which share of the dense model is left when the classes ``live`` are, in (0, 1].

        Raises:
            ConfigError: ``of`` is nothing that is counted.
        """
        if of == "weights":
            total = sum(self.weight_counts.values())
            gone = {name: self.gone(name, live) / group.units for name, group in self.groups.items()}
            return 1 - sum(self.weight_counts[name] * share for name, share in gone.items()) / total
        if of not in get_args(Measure):
            raise ConfigError(f"{of!r}: nothing that is counted. Use one of {', '.join(get_args(Measure))}.")
        count = self.tally.params if of == "params" else self.tally.macs
        return count(live) / max(count(self.start.live), 1)

    def moved(self, state: State, live: Mask, found: Mapping[str, Tensor], key: str) -> State:
        """Returns the state after the model of ``live`` was trained from ``state``.

        Args:
            state: Where it started.
            live: What was left of it, shape (classes,).
            found: The tensors of the trained model by name.
            key: Says which training it was.
        """
        weights = scattered(self.analysis, make_plan(self.analysis, live), found)
        with holding(self.analysis.captured.model, weights):
            scores = self.criterion(self.analysis, self.request.seed)
        return State(live, scores, {**(state.weights or {}), **weights}, digest(state.key, live.tobytes(), key))

    def cut(self, state: State, live: Mask) -> State:
        """Returns ``state`` with nothing but the classes ``live`` left of it, its weights otherwise the same."""
        return State(live, state.scores, state.weights, digest(state.key, live.tobytes()))

    def model(self, live: Mask, state: State | None = None) -> nn.Module:
        """Returns the physically smaller model in which only the classes ``live`` are left; milliseconds, no proof."""
        return shrunk_model(self.analysis, live, (state or self.start).weights)

    def result(self, shares: Shares, state: State | None = None, sparsity: float | None = None) -> Result:
        """Returns what the pipeline makes of the choice: the shrunk model with its proof and its report.

        Args:
            shares: Shares of the dense groups by name.
            state: Where a search stands.
            sparsity: What was asked for, for the report; None for what goes of the weights.

        Raises:
            ProofError: It is not equal to the model with everything else masked.
        """
        state = state or self.start
        if state.weights is not None:
            return self._with(state).result(shares, sparsity=sparsity)
        stage = Stages(lambda name: None)
        selection = stage("select", self.selection, shares, state)
        plan = stage("plan", make_plan, self.analysis, selection.live)
        shrunk = stage("shrink", shrink, self.analysis.captured, plan)
        if sparsity is None:
            sparsity = round(min(max(1 - self.left(selection.live, "weights"), 0.0), 1 - 1e-9), 6)
        request = self.request.model_copy(update={"sparsity": sparsity})
        return finished(request, self.dependencies, selection, plan, shrunk, self.block, stage)

    def _with(self, state: State) -> "Space":
        """The same space over a model of its own that holds the weights of ``state``."""
        with holding(self.analysis.captured.model, state.weights):
            own = repaired(self.analysis.captured.model, {}, ())
        dependencies = find_dependencies(
            analyse(capture(own, self.example_inputs)), whole_heads=not self.request.head_dims
        )
        groups = {name: dependencies.groups[group.index] for name, group in self.groups.items()}
        start = State(state.live, state.scores)
        return replace(self, dependencies=dependencies, groups=groups, start=start, _chosen={})

    def _choice(self, group: ChannelGroup, share: float, state: State) -> tuple[Choice, Mask]:
        """What is asked of one group and what it keeps, and which of its classes those are, shape (its classes,)."""
        removed = min(int(np.ceil(group.size * share - 1e-9)), group.units - 1)
        key = (state.key, group.index, removed)
        if key not in self._chosen:
            alive = state.live[group.classes]
            rest = remaining(group, alive)
            more = max(removed - (group.units - rest.units), 0) / max(rest.size, 1)
            least = math.ceil(self.keep_at_least * group.units - 1e-9) * group.width
            chosen = select(
                DependencyGraph(self.analysis, (rest,)),
                state.scores,
                lambda _: Target(more),
                round_to=self.block,
                min_channels=max(self.request.min_channels, least),
            )
            made = chosen.choices[0]
            self._chosen[key] = (
                Choice(group, group.units - removed, made.kept, made.note),
                chosen.live[group.classes] & alive,
            )
        return self._chosen[key]


def _choosable(
    dependencies: DependencyGraph, asked: Asked, scores: Scores
) -> tuple[dict[str, ChannelGroup], dict[str, Target], dict[int, str]]:
    """The groups of which something may go and what is asked of them by name; by index why others are left alone."""
    groups: dict[str, ChannelGroup] = {}
    targets: dict[str, Target] = {}
    reasons: dict[int, str] = {}
    seen: dict[str, int] = {}
    for group in dependencies.groups:
        wish = group.pin or asked(group)
        totals = np.bincount(group.unit_of, weights=scores[group.classes], minlength=group.units)
        if not isinstance(wish, str) and np.isnan(totals[~group.locked]).any():
            wish = "the criterion has no score for it"
        if isinstance(wish, str):
            reasons[group.index] = wish
            continue
        seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}"
        groups[name], targets[name] = group, wish
    return groups, targets, reasons
