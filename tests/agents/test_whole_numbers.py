"""Observations that are several whole numbers, or bits: one-hot as SB3 makes them, and everything else as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from spiking_rl.agents import (
    DeployedAgent,
    SpikingActorCriticPolicy,
    SpikingDQN,
    SpikingMlpPolicy,
    SpikingPQN,
    evaluate,
    load_agent,
)
from spiking_rl.agents.spaces import space_from_json, space_to_json
from spiking_rl.envs import make_vectorised
from spiking_rl.errors import UserError

NETWORK = {"timesteps": 2, "network_kwargs": {"hidden": [16]}}
STEPS = 8


class Numbers(gym.Env[np.ndarray, int]):
    """The answer is the first number that is shown; the others mean nothing."""

    def __init__(self, space: spaces.MultiDiscrete | spaces.MultiBinary) -> None:
        self.observation_space: spaces.Space[Any] = space
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = STEPS
        return self._look(), {}

    def _look(self) -> np.ndarray:
        counts = getattr(self.observation_space, "nvec", np.full(3, 2))
        self.shown = self.np_random.integers(counts).astype(self.observation_space.dtype)
        return self.shown.copy()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.shown[0])
        self.left -= 1
        return self._look(), reward, self.left == 0, False, {}


SPACES = {"Numbers-v0": spaces.MultiDiscrete([3, 2, 5]), "Bits-v0": spaces.MultiBinary(3)}
for name, space in SPACES.items():
    gym.register(name, entry_point=Numbers, kwargs={"space": space})


def everything(env_id: str) -> np.ndarray:
    """Return every observation there is."""
    counts = getattr(SPACES[env_id], "nvec", np.full(3, 2))
    return np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, counts))], 1).astype(SPACES[env_id].dtype)


@pytest.mark.parametrize("env_id", SPACES)
@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_agents_learn_from_them_and_come_back_from_a_checkpoint(algo: str, env_id: str, tmp_path: Path) -> None:
    env = make_vectorised(env_id, 4, 0)
    if algo == "pqn":
        quick = {"gamma": 0.1, "lam": 0.1, "calibration_steps": 256, "learning_rate": 3e-3}
        model: SpikingPQN | SpikingDQN = SpikingPQN("MlpPolicy", env, seed=0, policy_kwargs=NETWORK, **quick)
    else:
        quick = {"gamma": 0.1, "learning_starts": 256, "train_freq": 8, "gradient_steps": 8, "learning_rate": 3e-3}
        model = SpikingDQN(
            "MlpPolicy", env, seed=0, policy_kwargs=NETWORK, target_update_interval=64, buffer_size=2000, **quick
        )
    model.learn(2000)
    assert evaluate(model, env_id, episodes=20, measure_latency=False).mean_return > 0.9 * STEPS  # chance: a third

    model.save_checkpoint(tmp_path / "agent", environment=env_id)
    again = load_agent(tmp_path / "agent").model
    assert again.observation_space == SPACES[env_id]
    seen = everything(env_id)
    wanted = model.predict(seen, deterministic=True)[0]
    assert (wanted == seen[:, 0]).mean() > 0.9
    for agent in (again, DeployedAgent(model)):
        assert (agent.predict(seen, deterministic=True)[0] == wanted).all()
        assert [int(agent.predict(row, deterministic=True)[0]) for row in seen] == wanted.tolist()
    again.set_env(make_vectorised(env_id, 1, 0))
    again.learn(100)


@pytest.mark.parametrize("env_id", SPACES)
@pytest.mark.parametrize("algo", [SpikingPQN, SpikingDQN])
def test_stateful_agents_replay_them_as_they_were(algo: type[Any], env_id: str) -> None:
    model = algo("MlpPolicy", make_vectorised(env_id, 4, 0), stateful=True, policy_kwargs=NETWORK, seed=0)
    model.learn(300)
    if algo is SpikingDQN:
        stored = model.replay_buffer.observations[:60, 0]
        assert stored.dtype == SPACES[env_id].dtype
        assert {tuple(row) for row in stored} <= {tuple(row) for row in everything(env_id)}
    assert evaluate(model, env_id, episodes=2, measure_latency=False).spike_rate


@pytest.mark.parametrize("env_id", SPACES)
@pytest.mark.parametrize(("algo", "policy"), [(DQN, SpikingMlpPolicy), (PPO, SpikingActorCriticPolicy)])
def test_policies_in_algorithms_of_stable_baselines3(
    algo: type[BaseAlgorithm], policy: Any, env_id: str, tmp_path: Path
) -> None:
    options = {"n_steps": 64} if algo is PPO else {"learning_starts": 50}
    model = algo(policy, gym.make(env_id), policy_kwargs=NETWORK, seed=0, **options)  # type: ignore[arg-type]
    model.learn(128)
    model.save(tmp_path / "model")
    seen = everything(env_id)
    again = algo.load(tmp_path / "model").predict(seen, deterministic=True)[0]
    assert (model.predict(seen, deterministic=True)[0] == again).all()


@pytest.mark.parametrize(
    "space",
    [
        *SPACES.values(),
        spaces.MultiDiscrete([4, 200], dtype=np.uint8),
        spaces.MultiBinary((2, 3)),
        spaces.MultiBinary((3,)),
        spaces.Discrete(7),
    ],
    ids=str,
)
def test_spaces_come_back_as_they_are(space: spaces.Space[Any]) -> None:
    back = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert back == space
    assert back.dtype == space.dtype


@pytest.mark.parametrize(
    "described",
    [
        {"type": "MultiDiscrete", "nvec": [2**26, 1], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [0, 1], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [300], "dtype": "uint8"},
        {"type": "MultiDiscrete", "nvec": [3], "dtype": "float32"},
        {"type": "MultiDiscrete", "nvec": [[3]], "dtype": "int64"},
        {"type": "MultiBinary", "n": 2**27},
        {"type": "MultiBinary", "n": [-2, -3]},
        {"type": "Text", "n": 8},
    ],
    ids=str,
)
def test_descriptions_that_no_agent_has(described: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, ArithmeticError)):
        space_from_json(described)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.MultiDiscrete([2, 3], start=[0, 1]), "must count from 0"),
        (spaces.MultiDiscrete([[2, 3], [2, 3]]), "is no vector"),
        (spaces.Box(-1, 1, ()), "is no vector"),
        (spaces.Box(-1, 1, (0,)), "is no vector"),
        (spaces.Box(-1, 1, (3, 0)), "is no vector"),
        (spaces.Tuple([spaces.Discrete(2)]), "Box, Discrete, MultiDiscrete or MultiBinary.*FlattenObservation"),
    ],
)
def test_what_cannot_be_made_one_hot_is_told(space: spaces.Space[Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"observation_space = .*{said}"):
        SpikingMlpPolicy(space, spaces.Discrete(2), lambda _: 1e-3)


def test_every_bit_reaches_the_network() -> None:
    policy = SpikingMlpPolicy(spaces.MultiBinary((2, 3)), spaces.Discrete(2), lambda _: 1e-3)
    bits = torch.eye(6).reshape(6, 2, 3)
    assert policy.q_net.network.input_shape == (6,)
    assert len(policy.q_net.features(bits).unique(dim=0)) == 6
