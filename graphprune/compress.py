"""The pipeline: capture, analyse, score, select, plan, shrink, verify. Read this first."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from graphprune.budget import Cost, cost
from graphprune.config import Request, closest
from graphprune.config_list import read_config_list
from graphprune.config_list import target_of as listed_target
from graphprune.criteria import CRITERIA, Scores
from graphprune.dependency import DependencyGraph, find_dependencies
from graphprune.errors import ConfigError, ModelError
from graphprune.evidence import Evidence, gather
from graphprune.groups import ChannelGroup, Member
from graphprune.kinds import MEANINGS
from graphprune.report import Report, build_report
from graphprune.schedule import check_followed
from graphprune.select import Selection, select
from graphprune.targets import Target
from speedup.analysis import Analysis, analyse
from speedup.capture import Captured, attribute, capture
from speedup.errors import MisfitError
from speedup.inputs import ExampleInputs
from speedup.plan import ShrinkPlan
from speedup.planning import make_plan
from speedup.proof import prove
from speedup.shrink import Shrunk, shrink

T = TypeVar("T")
Progress = Callable[[str], None]
Calibrate = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Result:
    """A shrunk model with everything that is known of it.

    Attributes:
        model: The shrunk model, in the mode of the original: its class where possible, else the rewritten graph.
        plan: What was kept of each tensor.
        report: Everything measured, as plain data.
        dependencies: The channel groups of the original.
        selection: What was asked of each group and what it got.
        shrunk: The model together with its rewritten graph.
    """

    model: nn.Module
    plan: ShrinkPlan
    report: Report
    dependencies: DependencyGraph
    selection: Selection
    shrunk: Shrunk


@dataclass
class Stages:
    """Runs the stages of the pipeline, tells their names and keeps their seconds."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Returns ``work(*args, **kwargs)``, timed as stage ``name``."""
        self.progress(name)
        start = time.perf_counter()
        result = work(*args, **kwargs)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    sparsity: float = 0.5,
    *,
    calibrate: Calibrate | None = None,
    progress: Progress = lambda name: None,
    **options: Any,
) -> Result:
    """Returns a physically smaller ``model``, proven equal to the original with the removed channels masked.

    The user's model is not changed.

    Args:
        model: Any module that ``torch.export`` can capture.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs.
        sparsity: Share of the channels of every prunable group that goes, in [0, 1); not for a ``config_list``.
        calibrate: Runs the model that it is given on some batches, for criteria that look at activations; with the loss
            backwards for those that look at gradients. What it changes of the model is put back.
        progress: Called with the name of each stage as it begins.
        **options: The other fields of :class:`~graphprune.config.Request`: criterion, batches, scope, exclude, only,
            heads, head_dims, ffn, width, round_to, min_channels, seed, strict, config_list.

    Raises:
        ConfigError: An option makes no sense for this model.
        ModelError: Nothing can be pruned, or the weights are not numbers.
        CaptureError: ``torch.export`` cannot capture the model.
        ProofError: The shrunk model is not equal to the masked original: no model is handed over.
    """
    request = Request.of(sparsity=sparsity, **options)
    stage = Stages(progress)

    captured = stage("capture", capture, model, example_inputs)
    unfit: dict[str, str] = {}
    while True:
        dependencies, selection, plan, block = planned(captured, request, stage, unfit, calibrate)
        try:
            shrunk = stage("shrink", shrink, captured, plan)
            break
        except MisfitError as error:
            if not error.parts.keys() - unfit.keys():
                raise
            unfit |= error.parts
    return finished(request, dependencies, selection, plan, shrunk, block, stage)


def finished(
    request: Request,
    dependencies: DependencyGraph,
    selection: Selection,
    plan: ShrinkPlan,
    shrunk: Shrunk,
    block: int,
    stage: Stages,
) -> Result:
    """Returns a shrunk model with its proof and its report.

    Raises:
        ProofError: It is not equal to the original with everything but the selection masked.
    """
    proof = stage("verify", prove, dependencies.analysis, selection.live, plan, shrunk.graph, seed=request.seed)
    costs = stage("count", costs_of, dependencies.analysis.captured, shrunk)
    report = build_report(
        request=request,
        block=block,
        dependencies=dependencies,
        selection=selection,
        shrunk=shrunk,
        proof=proof,
        costs=costs,
        seconds=stage.seconds,
    )
    return Result(shrunk.model, plan, report, dependencies, selection, shrunk)


def planned(
    captured: Captured,
    request: Request,
    stage: Stages,
    unfit: Mapping[str, str] = MappingProxyType({}),
    calibrate: Calibrate | None = None,
) -> tuple[DependencyGraph, Selection, ShrinkPlan, int]:
    """Returns what goes together, what was chosen, the plan of that, and what was rounded to.

    Args:
        captured: The model.
        request: What is asked.
        stage: Runs the stages.
        unfit: Modules that are left alone because code does not fit smaller ones, and why.
        calibrate: Runs the model on some batches.

    Raises:
        ConfigError: An option makes no sense for this model.
        ModelError: Nothing can be pruned, or the weights are not numbers.
    """
    analysis = stage("analyse", analyse, captured)
    dependencies = stage("group", find_dependencies, analysis, whole_heads=not request.head_dims)
    scores = stage("score", scores_of, analysis, request, calibrate)
    block = stage("probe", block_of, request) if request.round_to == "auto" else block_of(request)
    selection = stage(
        "select",
        select,
        dependencies,
        scores,
        target_of(analysis, request, unfit),
        round_to=block,
        min_channels=request.min_channels,
    )
    _check_something_goes(dependencies, selection, request)
    return dependencies, selection, stage("plan", make_plan, analysis, selection.live), block


def costs_of(captured: Captured, shrunk: Shrunk) -> tuple[Cost, Cost]:
    """Returns what the captured graph and the shrunk one cost."""
    return cost(captured.graph_module, captured), cost(shrunk.graph, captured)


def block_of(request: Request) -> int:
    """Returns what the kept channels of an axis are a multiple of."""
    if request.round_to != "auto":
        return request.round_to
    from speedup.probe import preferred_block  # noqa: PLC0415 - onnxruntime takes half a second to import

    return preferred_block()


def scores_of(analysis: Analysis, request: Request, calibrate: Calibrate | None = None) -> Scores:
    """The scores of all classes, after a check that there are numbers to make them of."""
    _check(analysis, request)
    criterion = CRITERIA[request.criterion]
    if criterion.need == "weights":
        return criterion(analysis, Evidence(request.seed))
    if calibrate is None:
        raise ConfigError(
            f"criterion {request.criterion!r}: looks at {criterion.need}. Give calibrate(model), or training() beside "
            "the model: it is run on some batches, and for gradients its loss backwards."
        )
    run = partial(calibrate, analysis.captured.model)
    evidence = gather(analysis, criterion.need, run, batches=request.batches, seed=request.seed)
    return criterion(analysis, evidence)


def _check(analysis: Analysis, request: Request) -> None:
    """Refuses weights that are not numbers and, if strict, operators without a rule."""
    for name in analysis.parameters:
        held = attribute(analysis.captured.graph_module, name)
        learned = isinstance(held, nn.Parameter)  # a buffer may hold a mask of -inf
        tensor = analysis.captured.tensor(name).detach()
        if tensor.is_floating_point() and not _numbers(tensor, learned):
            raise ModelError(f"{name}: holds values that are not finite. Load weights that are.")
    if request.strict and analysis.unknown:
        node = analysis.unknown[0]
        raise ModelError(f"{node.name}: operator {node.target} has no rule. Leave out --strict to pin what reaches it.")


def _numbers(tensor: Tensor, finite: bool) -> bool:
    """Whether no element is nan, nor infinite if ``finite``."""
    flat = tensor.reshape(-1)
    step = 1 << 24  # so that little memory is needed
    parts = (flat[start : start + step] for start in range(0, len(flat), step))
    return not any(bool((~part.isfinite() if finite else part.isnan()).any()) for part in parts)


_UNASKED = ("not selected by the config list", "not among the modules asked for")
"""What is said of groups that nobody asked anything of."""

_UNFIT = "code does not fit a smaller"


def target_of(
    analysis: Analysis,
    request: Request,
    unfit: Mapping[str, str] = MappingProxyType({}),
    *,
    grows: bool = False,
) -> Callable[[ChannelGroup], Target | str]:
    """Returns the function that says what is asked of a group, or why it is left alone: by kind, or by module.

    Args:
        analysis: The model.
        request: What is asked.
        unfit: Modules that are left alone because code does not fit smaller ones, and why.
        grows: Whether what is asked is reached in rounds, so that a config list may say with how much they begin.
    """
    share = _share(analysis, request, grows)
    model = analysis.captured.model
    modules_by_name = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    excluded, wanted = (_matching(modules_by_name, patterns) for patterns in (request.exclude, request.only))
    owners: dict[int, set[str]] = {}  # a tied weight has several
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        owners.setdefault(id(tensor), set()).add(name.rpartition(".")[0])

    def modules(group: ChannelGroup, member: Member) -> set[str]:
        """The modules that produce the channels; of those that share a weight, the ones whose calls do."""
        sharing = owners.get(id(tensors.get(member.tensor)), {member.module})
        calls = analysis.producers(member.tensor, group.classes) if len(sharing) > 1 else []
        callers = {path for node in calls for path, _ in list(node.meta.get("nn_module_stack", {}).values())[-1:]}
        return sharing & callers or sharing

    def target(group: ChannelGroup) -> Target | str:
        if group.kind not in request.kinds:
            return f"{MEANINGS[group.kind]} should stay"
        producers = set().union(*(modules(group, member) for member in group.members if member.role == "out"))
        if hit := sorted(producers & excluded):
            return f"excluded by name ({hit[0]})"
        for path, why in unfit.items():
            if any(f"{producer}.".startswith(f"{path}.") for producer in producers):
                return f"{_UNFIT} {path}: {why}"
        if request.only and not producers & wanted:
            return _UNASKED[1]
        return share(group)

    return target


def _share(analysis: Analysis, request: Request, grows: bool) -> Callable[[ChannelGroup], Target | str]:
    """The function that says how much of a group goes: as much as of all others, or what a config list says."""
    together, relative = request.scope == "global", not CRITERIA[request.criterion].absolute
    if request.config_list is not None:
        settings = read_config_list(analysis.captured.model, request.config_list)
        check_followed(settings, grows=grows)
        return listed_target(analysis, settings, together=together, relative=relative)
    wanted = Target(request.sparsity, ranking="all" if together else None, relative=relative)
    return lambda group: wanted


def _matching(modules: Mapping[str, nn.Module], patterns: tuple[str, ...]) -> set[str]:
    """The modules that a name or glob means, with everything inside them, by all their names."""
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in modules if fnmatchcase(name, pattern)]
        if not hits:
            names = list(modules)
            raise ConfigError(
                f"{pattern!r}: no module has that name{closest(pattern, names)}. Use a name or glob of modules."
            )
        inside = set(hits)
        found.update(name for name in modules if not inside.isdisjoint(_ancestry(name)))
    meant = {id(modules[name]) for name in found}
    return {name for name, module in modules.items() if id(module) in meant}


def _ancestry(name: str) -> Iterator[str]:
    """A module and the modules that it is in."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _check_something_goes(dependencies: DependencyGraph, selection: Selection, request: Request) -> None:
    if (request.sparsity == 0 and request.config_list is None) or not bool(np.all(selection.live)):
        return
    parts = dependencies.analysis.captured.parts
    if parts is not None:
        named = ", ".join(dict.fromkeys(parts.paths))
        unfit = next((choice.note for choice in selection.choices if (choice.note or "").startswith(_UNFIT)), None)
        raise ModelError(
            f"model: nothing can be pruned in what can be captured of it ({unfit or named}). {parts.stopped['']}"
        )
    notes = [(choice.group, choice.note) for choice in selection.choices]
    raise nothing_goes(notes, target_of(dependencies.analysis, request))


def nothing_goes(
    notes: Sequence[tuple[ChannelGroup, str | None]], asked: Callable[[ChannelGroup], Target | str]
) -> ModelError:
    """Returns the error that nothing goes, with the commonest reason of the groups of which something should.

    Args:
        notes: The groups, and why each was left alone.
        asked: Says what was asked of a group.
    """
    free: list[str] = []
    pinned: list[str] = []
    unasked: list[str] = []
    for group, note in notes:
        wish = asked(group)
        if group.pin is not None:
            if wish not in _UNASKED and "kernel" not in group.pin:
                pinned.append(group.pin)
        elif isinstance(wish, str):
            (unasked if wish in _UNASKED else free).append(note or wish)
        elif note is not None or wish.sparsity == 0:
            free.append(note or "the sparsity that is asked for is 0")
    reasons = free or pinned or unasked or ["it has no channels that could go"]
    why = max(dict.fromkeys(reasons), key=reasons.count)
    return ModelError(f"model: nothing can be pruned ({why}). Look at its groups with graphprune inspect.")
