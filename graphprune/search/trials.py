"""What a search tries and what it finds: candidates are evaluated in batches, each once, and written down."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from graphprune.compress import Result
from graphprune.errors import ConfigError, shown
from graphprune.search.candidate import Evaluate, Job, Origin, Outcome, Tune
from graphprune.search.code import code_of
from graphprune.search.journal import Journal
from graphprune.search.latency import measured_ms
from graphprune.search.pool import Executor, executor_of, outcomes
from graphprune.search.space import Shares, Space
from graphprune.search.state import State, Weights, digest
from speedup.labels import Mask


@dataclass(frozen=True)
class Evaluation:
    """A candidate that was evaluated.

    Attributes:
        shares: Which share of each group is gone.
        score: What the evaluator gave.
    """

    shares: Mapping[str, float]
    score: float
    live: Mask = field(repr=False, compare=False)
    key: str = field(repr=False, compare=False)


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        shares: Which share of each group is gone in the end.
        score: What the evaluator gave for that.
        history: All evaluations, in the order in which the search used them.
        result: The shrunk model from the pipeline, with its proof and its report.
        note: What kept the search from its target; None if nothing did.
    """

    shares: Mapping[str, float]
    score: float
    history: tuple[Evaluation, ...]
    result: Result = field(repr=False)
    note: str | None = None


@dataclass(frozen=True, eq=False)
class Trials:
    """How candidates are evaluated.

    Attributes:
        space: What can be chosen.
        evaluate: Gives a number for a model, such as its accuracy; it depends on nothing else, and what is random in it
            only on the generators of torch, numpy and random.
        minimize: Whether lower numbers are better.
        workers: None for this process, «ray», «ray://host:port», or an executor of ``concurrent.futures``.
        journal: File in which everything is written down that was found out, so that a search that was stopped goes on
            where it was; None for none.
        seed: Of everything that is random.
        modules: Modules that workers of Ray do not have, whose code goes there with what needs it; that of the script
            that is run does so anyway.
        code: Says which code evaluates and trains, as a digest; a journal is that of this code alone. Empty for that of
            the very functions, which does not know what they read elsewhere.
        about: What else results depend on, by name, such as how long candidates are trained.
    """

    space: Space
    evaluate: Evaluate
    minimize: bool = False
    workers: str | Executor | None = None
    journal: Path | str | None = None
    seed: int = 0
    modules: Sequence[ModuleType] = ()
    code: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = isinstance(self.seed, Integral) and not isinstance(self.seed, bool)
        told = (
            ("space", self.space, isinstance(self.space, Space), "what can be chosen, Space.of(model, inputs)"),
            ("evaluate", self.evaluate, callable(self.evaluate), "a function of a model that returns a number"),
            ("seed", self.seed, whole and 0 <= int(self.seed) < 1 << 63, "a whole number in [0, 2**63)"),
        )
        for name, value, holds, what in told:
            if not holds:
                raise ConfigError(f"{name}: is {shown(value)}. Give {what}.")

    def over(self, space: Space) -> "Trials":
        """Returns the same over another space of the model."""
        return replace(self, space=space)

    @contextmanager
    def begin(self, search: str, **settings: Any) -> Iterator["Run"]:
        """Yields a run of a search.

        Args:
            search: Its name.
            **settings: All that its result depends on, functions among it; ``sparsity`` is what goes in the end.

        Raises:
            ConfigError: The journal is that of another search, or the workers are none.
        """
        journal = Journal(self.journal, {} if self.journal is None else self._header(search, settings))
        with executor_of(self.workers, self.modules) as executor:
            yield Run(self, journal, executor, settings.get("sparsity"))
        journal.tidy()

    def _header(self, search: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All that the result of a search depends on."""

        def said(value: Any) -> Any:
            return value if not callable(value) else "given" if self.code else code_of(value)

        return {
            "search": search,
            "minimize": self.minimize,
            "seed": int(self.seed),
            "settings": {**{name: said(value) for name, value in settings.items()}, **self.about},
            "code": self.code or code_of(self.evaluate),
            "model": self.space.fingerprint,
        }


class Run:
    """One run of a search: evaluates, remembers, and makes the result."""

    def __init__(
        self, trials: Trials, journal: Journal, executor: Executor | None, sparsity: float | None = None
    ) -> None:
        self.space, self.minimize, self.seed = trials.space, trials.minimize, trials.seed
        self.history: list[Evaluation] = []
        self._journal, self._executor, self._sparsity = journal, executor, sparsity
        captured = trials.space.analysis.captured
        self._origin = Origin(
            captured.model,
            trials.space.example_inputs,
            trials.evaluate,
            torch.get_num_threads(),
            digest(trials.space.fingerprint),
        )

    def merit(self, score: float) -> float:
        """How good a score is: higher is better."""
        return -score if self.minimize else score

    def best(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """The best of some evaluations, of equal ones the first."""
        return max(evaluations, key=lambda evaluation: self.merit(evaluation.score))

    def evaluate(
        self, candidates: Sequence[Shares], state: State, *, tune: Tune | None = None, use: str = ""
    ) -> list[Evaluation]:
        """Returns the evaluations of a batch, in its order; what is known already is not evaluated again.

        Args:
            candidates: Shares of the dense groups that should go.
            state: Where the search stands.
            tune: Trains each candidate before it is evaluated; the weights of the best are kept for :meth:`trained`.
            use: Tells apart what trains differently.
        """
        lives = [self.space.live(shares, state) for shares in candidates]
        found = self._scored(lives, state, tune, use)
        self.history += found
        return found

    def trained(self, chosen: Evaluation, state: State, tune: Tune | None, use: str = "") -> State:
        """Returns the state after ``chosen``, which was evaluated in ``state``, with the weights that it had then."""
        if tune is None:
            return self.space.cut(state, chosen.live)
        weights = self._journal.weights(chosen.key)
        if weights is None:
            job = self._job(self._key(chosen.live, state, tune, use), chosen.live, scored=False)
            weights = next(outcome.weights for _, outcome in self._outcomes([job], state, tune))
            self._journal.keep(chosen.key, weights or {})
        return self.space.moved(state, chosen.live, weights or {}, chosen.key)

    def tuned(self, shares: Shares, state: State, tune: Tune, use: str) -> State:
        """Returns the state after ``tune`` has trained the model of ``shares``, which is not evaluated."""
        live = self.space.live(shares, state)
        key = self._key(live, state, tune, use)
        return self.trained(Evaluation(self.space.shares(live), 0.0, live, key), state, tune, use)

    def latency_ms(self, live: Mask) -> float:
        """Returns the median latency of one example in milliseconds, measured once, here, while nothing else runs."""
        widths = [f"{name} {self.space.gone(name, live)}" for name in self.space.groups]
        key = digest("latency", *widths)
        if key not in self._journal:
            model = self.space.model(live)
            self._journal.record(key, ms=measured_ms(model, self.space.example_inputs))
        return float(self._journal[key]["ms"])

    def found(self, chosen: Evaluation, state: State, note: str | None = None, *, asked: Shares | None = None) -> Found:
        """Returns what the search has found: ``chosen``, with the weights of ``state``; its report has the note.

        Args:
            chosen: What is left.
            state: Where the search stands.
            note: What kept it from its target.
            asked: Shares that a user asked for, of which ``chosen`` is what rounding left; None if nobody did.
        """
        result = self.space.result(chosen.shares if asked is None else asked, state, self._sparsity)
        result = replace(result, report={**result.report, "note": note})
        return Found(chosen.shares, chosen.score, tuple(self.history), result, note)

    def trained_and_found(self, best: Evaluation, state: State, tune: Tune | None) -> Found:
        """Returns what the search has found: ``best``, trained in the end unless ``tune`` is None."""
        if tune is None:
            return self.found(best, state)
        (best,) = self.evaluate([best.shares], state, tune=tune, use="what was found")
        return self.found(best, self.trained(best, state, tune, use="what was found"))

    def _scored(self, lives: Sequence[Mask], state: State, tune: Tune | None, use: str) -> list[Evaluation]:
        keys = [self._key(live, state, tune, use) for live in lives]
        missing = {key: live for key, live in zip(keys, lives, strict=True) if key not in self._journal}
        order = {key: place for place, key in reversed(list(enumerate(keys)))}
        held: str | None = None  # whose weights are kept: the best so far, as if they had come in order

        def rank(key: str) -> tuple[float, int]:
            return self.merit(self._journal[key]["score"]), -order[key]

        known = [key for key in dict.fromkeys(keys) if key in self._journal]
        if tune is not None and known:
            held = max(known, key=rank)
        jobs = [self._job(key, live) for key, live in missing.items()]
        names = list(missing)
        for place, outcome in self._outcomes(jobs, state, tune):
            key = names[place]
            assert outcome.score is not None
            ahead = held is None or (self.merit(outcome.score), -order[key]) > rank(held)
            if outcome.weights is not None and ahead:
                self._journal.keep(key, outcome.weights)
            self._journal.record(key, score=outcome.score, shares=self.space.shares(missing[key]))
            if outcome.weights is not None and ahead:
                if held is not None:
                    self._journal.drop(held)
                held = key
        return [
            Evaluation(self.space.shares(live), float(self._journal[key]["score"]), live, key)
            for key, live in zip(keys, lives, strict=True)
        ]

    def _key(self, live: Mask, state: State, tune: Tune | None, use: str) -> str:
        return digest(state.key, live.tobytes(), "" if tune is None else f"trained {use}")

    def _job(self, key: str, live: Mask, *, scored: bool = True) -> Job:
        return Job(live, int(digest(str(self.seed), key)[:15], 16), scored)

    def _outcomes(self, jobs: Sequence[Job], state: State, tune: Tune | None) -> Iterator[tuple[int, Outcome]]:
        weights: Weights | None = state.weights
        return outcomes(self._executor, self._origin, weights, tune, jobs, self.space.analysis)
