"""CartPole without velocities: one observation no longer tells what to do, memory must."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

MASKED_CARTPOLE = "spiking_rl/CartPoleMasked-v1"
"""CartPole-v1 observed as cart position and pole angle alone."""


class PositionsOnly(gym.ObservationWrapper[NDArray[np.float32], Any, NDArray[np.float32]]):
    """Hide the velocities of CartPole: observations are (cart position, pole angle), in m and rad."""

    def __init__(self, env: gym.Env[NDArray[np.float32], Any]) -> None:
        super().__init__(env)
        full = env.observation_space
        assert isinstance(full, spaces.Box)
        self.observation_space = spaces.Box(full.low[[0, 2]], full.high[[0, 2]], dtype=np.float32)

    def observation(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return position and angle of a full observation."""
        return observation[[0, 2]]


def make_masked(**options: Any) -> gym.Env[Any, Any]:
    """Make the environment that :data:`MASKED_CARTPOLE` names, without its time limit of 500 steps."""
    return PositionsOnly(gym.make("CartPole-v1", max_episode_steps=-1, disable_env_checker=True, **options))


gym.register(MASKED_CARTPOLE, entry_point=make_masked, max_episode_steps=500, reward_threshold=475.0)
