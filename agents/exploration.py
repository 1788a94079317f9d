"""Epsilon-greedy exploration, each environment on its own, with random actions that may last.

A single random action rarely takes an agent anywhere: on Acrobot-v1 1 % of episodes of uniformly
random actions reach the goal, 44 % when each is held for 4 steps on average.

Source: temporally extended epsilon-greedy, Dabney, Ostrovski, Barreto 2021, here with a geometric
duration and epsilon kept as the share of exploratory steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Actions = NDArray[np.int64]


class EpsilonGreedy:
    """Replaces greedy actions by runs of a random one.

    Args:
        n_envs: environments played side by side.
        n_actions: size of the action space.
        repeat: mean length of a run of one random action, >= 1; 1 is plain epsilon-greedy.

    Attributes:
        left: steps that the current run still lasts, per environment.
        action: its action, per environment.
    """

    def __init__(self, n_envs: int, n_actions: int, repeat: float = 1.0) -> None:
        self.n_actions = n_actions
        self.repeat = repeat
        self.left: Actions = np.zeros(n_envs, dtype=np.int64)
        self.action: Actions = np.zeros(n_envs, dtype=np.int64)

    def choose(self, greedy: Actions, epsilon: float) -> Actions:
        """Return the actions to take; a share ``epsilon`` of all steps is exploratory.

        Draws from numpy's global generator, as SB3 does, so that ``set_random_seed`` governs it.
        """
        n = len(greedy)
        # Random runs last `repeat` steps, greedy ones (1 - enter) / enter: this makes the share epsilon.
        enter = epsilon / (epsilon + self.repeat * (1 - epsilon))
        begins = (self.left == 0) & (np.random.rand(n) < enter)
        lengths = np.random.geometric(1 / self.repeat, size=n)
        actions = np.random.randint(self.n_actions, size=n)
        self.left = np.where(begins, lengths, self.left)
        self.action = np.where(begins, actions, self.action)
        exploring = self.left > 0
        self.left = np.maximum(self.left - 1, 0)
        return np.where(exploring, self.action, greedy)

    def end_episodes(self, done: NDArray[np.bool_]) -> None:
        """End the runs of environments whose episode ended."""
        self.left = np.where(done, 0, self.left)
