"""A DDPG agent in plain torch: actor, critic, replay, and noise from a truncated normal distribution."""

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import truncnorm
from torch import Tensor, nn

Observation = NDArray[np.float32]


@dataclass(frozen=True)
class Learning:
    """How an agent learns; faster than in the paper (1e-4, 1e-3, 0.01), whose episodes have many more steps.

    Attributes:
        hidden: Width of both hidden layers of actor and critic.
        actor_rate: Learning rate of the actor.
        critic_rate: Learning rate of the critic.
        batch: Transitions of an update.
        memory: Transitions that are remembered.
        discount: Of future rewards.
        follow: Part by which the slow copies follow actor and critic at each update.
        baseline: Part that a new reward has in the moving average that is subtracted from rewards.
        restraint: Weight of the square of what goes into the actor's last sigmoid, so that it does not get stuck there.
        updates: Updates for each step of an episode.
    """

    hidden: int = 300
    actor_rate: float = 1e-3
    critic_rate: float = 3e-3
    batch: int = 64
    memory: int = 2000
    discount: float = 1.0
    follow: float = 0.05
    baseline: float = 0.05
    restraint: float = 0.01
    updates: int = 2


@dataclass(frozen=True)
class Step:
    """A transition: what was seen, what was done, what the episode brought, and what was seen next; None at its end."""

    seen: Observation
    action: float
    reward: float
    next: Observation | None


class Agent:
    """Deep deterministic policy gradient (Lillicrap et al., 2016) for one action in [0, 1].

    y_i = (r_i - b) / s + discount * Q'(s_{i+1}, mu'(s_{i+1})), with b the moving average of rewards (He et al., AMC,
    2018, equation 4) and s their spread, so that the units of rewards do not matter.
    """

    def __init__(self, features: int, learning: Learning, seed: int) -> None:
        """Makes an agent that sees ``features`` numbers; everything random comes from ``seed``."""
        self._learning = learning
        self._draws = np.random.default_rng(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self._actor = _network(features, learning.hidden)
            self._critic = _network(features + 1, learning.hidden)
        self._slow_actor, self._slow_critic = copy.deepcopy((self._actor, self._critic))
        self._for_actor = torch.optim.Adam(self._actor.parameters(), lr=learning.actor_rate)
        self._for_critic = torch.optim.Adam(self._critic.parameters(), lr=learning.critic_rate)
        self._memory: deque[Step] = deque(maxlen=learning.memory)
        self._average: float | None = None
        self._rewards: deque[float] = deque(maxlen=learning.memory)

    def act(self, seen: Observation, noise: float) -> float:
        """Returns an action for what is seen: that of the actor, or one around it.

        Args:
            seen: Shape (features,).
            noise: Standard deviation of the normal distribution, cut off at 0 and 1; 0 for none.
        """
        with torch.no_grad():
            mean = float(self._actor(torch.from_numpy(seen)[None]).sigmoid()[0, 0])
        if noise <= 0:
            return mean
        low, high = (0 - mean) / noise, (1 - mean) / noise
        return float(truncnorm.rvs(low, high, loc=mean, scale=noise, random_state=self._draws))

    def remember(self, steps: Sequence[Step]) -> None:
        """Takes in an episode, whose steps all have its reward."""
        reward = steps[-1].reward
        part = self._learning.baseline
        self._average = reward if self._average is None else (1 - part) * self._average + part * reward
        self._rewards.append(reward)
        self._memory.extend(steps)

    def learn(self, steps: int) -> None:
        """Makes the updates for an episode of so many steps."""
        for _ in range(steps * self._learning.updates):
            self._update()

    def _update(self) -> None:
        """Makes one update of actor and critic, and lets their slow copies follow."""
        picked = self._draws.integers(0, len(self._memory), size=self._learning.batch)
        steps = [self._memory[place] for place in picked.tolist()]
        seen = torch.from_numpy(np.stack([step.seen for step in steps]))
        actions = torch.tensor([[step.action] for step in steps], dtype=torch.float32)
        nothing = np.zeros_like(steps[0].seen)
        following = torch.from_numpy(np.stack([nothing if step.next is None else step.next for step in steps]))
        goes_on = torch.tensor([[float(step.next is not None)] for step in steps])
        spread = float(np.std(self._rewards)) or 1.0
        rewards = torch.tensor([[(step.reward - (self._average or 0.0)) / spread] for step in steps]).float()
        with torch.no_grad():
            later = _valued(self._slow_critic, following, self._slow_actor(following).sigmoid())
            wanted = rewards + self._learning.discount * goes_on * later
        _descend(self._for_critic, (_valued(self._critic, seen, actions) - wanted).square().mean())
        before = self._actor(seen)
        gain = _valued(self._critic, seen, before.sigmoid()).mean()
        _descend(self._for_actor, self._learning.restraint * before.square().mean() - gain)
        for slow, fast in ((self._slow_actor, self._actor), (self._slow_critic, self._critic)):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.data.lerp_(new.data, self._learning.follow)


def _network(inputs: int, hidden: int) -> nn.Module:
    last = nn.Linear(hidden, 1)
    nn.init.uniform_(last.weight, -3e-3, 3e-3)  # so that the first actions are in the middle
    nn.init.uniform_(last.bias, -3e-3, 3e-3)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last)


def _valued(critic: nn.Module, seen: Tensor, actions: Tensor) -> Tensor:
    value: Tensor = critic(torch.cat([seen, actions], 1))
    return value


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # of torch
    optimizer.step()
