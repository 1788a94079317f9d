"""What the learners learn is what the equations say: values of a decision problem that is solved by hand."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from spiking_rl.agents import SpikingDQN, SpikingPQN

GAMMA = 0.8
END = 0.5  # for action 1, which ends the episode
# Action 0 goes back and forth for ever between two places, for a reward of 1 on the way to the second: from the first
# 1 + GAMMA * 0 + GAMMA^2 * 1 + ... = 1 / (1 - GAMMA^2), from the second a step later. A time limit takes none away.
FIRST = 1 / (1 - GAMMA**2)
VALUES = [[FIRST, END], [GAMMA * FIRST, END]]


class TwoPlaces(gym.Env[Any, Any]):
    """As above, cut off after three steps."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 1, (2,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.steps = int(self.np_random.integers(2)), 0
        return self.seen(), {}

    def seen(self) -> Any:
        return np.eye(2, dtype=np.float32)[self.place]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if action == 1:
            return self.seen(), END, True, False, {}
        self.place = 1 - self.place
        return self.seen(), float(self.place), False, self.steps == 3, {}


@pytest.mark.parametrize("learner", ["pqn", "dqn"])
def test_values_are_those_of_the_equations(learner: str) -> None:
    network = {"timesteps": 1, "network_kwargs": {"hidden": (32, 32)}}
    settings: dict[str, Any] = {"gamma": GAMMA, "policy_kwargs": network, "seed": 0}
    model: SpikingPQN | SpikingDQN
    if learner == "pqn":
        model = SpikingPQN("MlpPolicy", make_vec_env(TwoPlaces, 8, seed=0), learning_rate=1e-3, **settings)
    else:
        # Returns of several steps would know what exploration costs, too.
        settings |= {"learning_rate": 3e-3, "target_update_interval": 50, "learning_starts": 200, "train_freq": 2}
        model = SpikingDQN("MlpPolicy", make_vec_env(TwoPlaces, 1, seed=0), n_steps=1, **settings)
    model.learn(12_000 if learner == "pqn" else 2_500)
    with torch.no_grad():
        values = model.policy.q_net.q_values(torch.eye(2))[0] / model.reward_scale
    # Where a time limit counted as an end, or an end did not, the values would be a whole point from these.
    assert values.numpy() == pytest.approx(np.array(VALUES), abs=0.15)
