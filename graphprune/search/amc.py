"""AMC: an agent goes from group to group and decides what each gives, and learns from what the model then scores."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from torch import Tensor, fx

from graphprune.errors import ConfigError
from graphprune.groups import ChannelGroup
from graphprune.search.agent import Agent, Learning, Observation, Step
from graphprune.search.candidate import Tune
from graphprune.search.space import Measure, Space
from graphprune.search.trials import Evaluation, Found, Run, Trials
from speedup.labels import Labels
from speedup.rules.call import raw_argument

Reward = Literal["error", "error * log(macs)"]


@dataclass(frozen=True)
class Episodes:
    """How long an agent explores.

    Attributes:
        count: Episodes in all.
        warm_up: Those in which the noise stays as it is and nothing is learnt.
        noise: Standard deviation of the noise on actions.
        decay: The noise of each episode after the warm-up is this times that of the one before.
        batch: Episodes that are evaluated at once, between updates.
    """

    count: int = 400
    warm_up: int = 100
    noise: float = 0.5
    decay: float = 0.99
    batch: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.warm_up < self.count or self.noise <= 0 or not 0 < self.decay <= 1:
            raise ConfigError(
                f"episodes: {self.count} with {self.warm_up} to warm up, noise {self.noise}, decay {self.decay} and "
                f"batches of {self.batch} cannot be. Use 400, 100, 0.5, 0.99 and 1."
            )


LONG = Episodes()
"""The lengths of the paper."""

PLAIN = Learning()


def amc(
    trials: Trials,
    ratio: float,
    *,
    of: Measure = "macs",
    keep_at_least: float = 0.2,
    round_to: int | None = None,
    reward: Reward = "error",
    perfect: float = 1.0,
    episodes: Episodes = LONG,
    learning: Learning = PLAIN,
    finetune: Tune | None = None,
) -> Found:
    """Returns the best model that a DDPG agent finds within a bound.

    He et al., AMC: AutoML for Model Compression and Acceleration on Mobile Devices, 2018. The agent goes through the
    groups in the order in which the model uses them. Of each it sees (place, kind of operator, n, c, h, w, stride, k,
    MACs, MACs that went so far, MACs of groups to come, last action), each in [0, 1], and answers with the share that
    goes. Algorithm 1 of the paper bounds the answer: at least as much goes that the bound can still be met if all
    groups to come give all they may; here that is found by counting, because what a group costs depends on its
    neighbours. Every step of an episode has the reward of its end: R = -error, or R = -error * log(MACs).

    Args:
        trials: How candidates are evaluated.
        ratio: What may be left, in (0, 1): a share of what ``of`` counts.
        of: What is bounded.
        keep_at_least: Share of the channels of every group that stays.
        round_to: What is kept of an axis is a multiple of this; None for what the space says, ``block``.
        reward: «error» for the best score within the bound; «error * log(macs)» to weigh the two.
        perfect: Score of a model without errors, 1 or 100 for accuracies; only the second reward depends on it.
        episodes: How long it explores.
        learning: How it learns.
        finetune: Trains the model that was found, in place.

    Raises:
        ConfigError: A number is out of range, or the bound cannot be met.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio {ratio}: is not in (0, 1]. Use one such as 0.5.")
    space = trials.space.limited(trials.space.block if round_to is None else round_to, keep_at_least)
    if (least := space.left(space.live(_all(space)), of)) > ratio + 1e-9:
        raise ConfigError(
            f"ratio {ratio:g}: {least:.3f} of the {of} stay even where every group gives all it may: of each "
            f"{space.keep_at_least:.0%} stay, and a multiple of {space.block}. Use a larger ratio, round to less, or "
            "let more groups go."
        )
    settings = {
        "sparsity": round(1 - ratio, 12),
        "of": of,
        "reward": reward,
        "perfect": perfect,
        **asdict(episodes),
        **asdict(learning),
    }
    with trials.over(space).begin("amc", **settings, finetune=finetune) as run:
        track = _Track(space, of, ratio)
        agent = Agent(track.features, learning, run.seed)
        noise, done = episodes.noise, 0
        while done < episodes.count:
            count = min(episodes.batch, episodes.count - done)
            walks = [track.walk(agent, noise) for _ in range(count)]
            for walk, found in zip(walks, run.evaluate([walk.shares for walk in walks], space.start), strict=True):
                agent.remember(walk.steps(_reward(run, space, found, reward, perfect)))
                done += 1
                if done > episodes.warm_up:
                    noise *= episodes.decay
                    agent.learn(len(walk.actions))
        key = {found.key: _reward(run, space, found, reward, perfect) for found in run.history}
        best = max(run.history, key=lambda found: key[found.key])
        return run.trained_and_found(best, space.start, finetune)


def _reward(run: Run, space: Space, found: Evaluation, kind: Reward, perfect: float) -> float:
    """R = -error, up to a constant that the baseline takes away, or R = -error * log(MACs)."""
    if kind == "error":
        return run.merit(found.score)
    error = found.score if run.minimize else perfect - found.score
    return -error * math.log(max(space.tally.macs(found.live), 2))


def _all(space: Space) -> dict[str, float]:
    return {name: space.most(name) for name in space.groups}


@dataclass(frozen=True)
class Walk:
    """An episode: what was seen and done of each group, and the shares that came of it."""

    seen: tuple[Observation, ...]
    actions: tuple[float, ...]
    shares: Mapping[str, float]

    def steps(self, reward: float) -> list[Step]:
        """The transitions of the episode."""
        return [
            Step(seen, action, reward, following)
            for seen, action, following in zip(self.seen, self.actions, (*self.seen[1:], None), strict=True)
        ]


class _Track:
    """The groups one after the other, as an agent sees them."""

    def __init__(self, space: Space, of: Measure, ratio: float) -> None:
        self._space, self._of, self._ratio = space, of, ratio
        self._names = list(space.groups)
        self._fixed, self._macs = _layer_features(space)
        self._dense = max(space.tally.macs(space.start.live), 1)
        self.features = self._fixed.shape[1] + 3

    def walk(self, agent: Agent, noise: float) -> Walk:
        """Returns an episode in which the agent acts with some noise."""
        shares: dict[str, float] = {}
        seen, actions = [], []
        last = 0.0
        for place, name in enumerate(self._names):
            reduced = 1 - self._space.tally.macs(self._space.live(shares)) / self._dense
            rest = self._macs[place + 1 :].sum() / max(self._macs.sum(), 1)
            seen.append(np.append(self._fixed[place], [reduced, rest, last]).astype(np.float32))
            shares[name] = self._bounded(place, agent.act(seen[-1], noise) * self._space.most(name), shares)
            last = shares[name]
            actions.append(last / max(self._space.most(name), 1e-9))
        return Walk(tuple(seen), tuple(actions), shares)

    def _bounded(self, place: int, share: float, chosen: Mapping[str, float]) -> float:
        """The share, or the smallest larger one with which the bound can still be met."""
        name, to_come = self._names[place], self._names[place + 1 :]
        rest = {other: self._space.most(other) for other in to_come}

        def meets(share: float) -> bool:
            live = self._space.live({**chosen, name: share, **rest})
            return self._space.left(live, self._of) <= self._ratio + 1e-9

        most, units = self._space.most(name), max(self._space.groups[name].size, 1)
        if meets(share):
            return share
        low, high = math.floor(share * units), math.ceil(most * units - 1e-9)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(min(middle / units, most)) else (middle, high)
        return min(high / units, most)


def _layer_features(
    space: Space,
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """For each group (place, kind, n, c, h, w, stride, k, MACs), each column divided by its largest; and the MACs."""
    rows, macs = [], []
    kinds: dict[str, int] = {}
    for place, group in enumerate(space.groups.values()):
        nodes = _producers(space, group)
        macs.append(float(sum(space.tally.dense[node] for node in nodes)))
        row = [float(place), 0.0, float(group.units), 0.0, 1.0, 1.0, 1.0, 1.0, macs[-1]]
        if nodes:
            row[1] = float(kinds.setdefault(str(nodes[0].target), len(kinds) + 1))
            row[3:8] = _shape_features(space, nodes[0])
        rows.append(row)
    table = np.array(rows)
    return table / np.maximum(table.max(axis=0), 1e-12), np.array(macs)


def _producers(space: Space, group: ChannelGroup) -> list[fx.Node]:
    """The nodes that multiply and give out the channels of a group."""
    found: dict[fx.Node, None] = {}
    for member in group.members:
        if member.role == "out":
            nodes = space.analysis.producers(member.tensor, group.classes)
            found |= dict.fromkeys(node for node in nodes if node in space.tally.dense)
    return list(found)


def _shape_features(space: Space, node: fx.Node) -> list[float]:
    """Input channels, height, width, stride and kernel size of a node."""
    sources = [
        space.analysis.labels[source.name]
        for source in node.all_input_nodes
        if isinstance(source.meta.get("val"), Tensor)
    ]
    shapes = [labels.shape for labels in sources if isinstance(labels, Labels)]
    x, weight = shapes[0], shapes[1] if len(shapes) > 1 else shapes[0]
    spatial = [*x[2:], 1, 1] if len(weight) > 2 else [1, 1]
    stride = raw_argument(node, "stride")
    stride = stride[0] if isinstance(stride, list | tuple) and stride else 1
    return [
        float(weight[min(1, len(weight) - 1)]),
        float(spatial[0]),
        float(spatial[1]),
        float(stride),
        float([*weight[2:], 1][0]),
    ]
