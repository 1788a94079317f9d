"""An environment saved as JSON and restored has the same future as the one that went on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spiking_rl import UserError
from spiking_rl.envs import ReplayableEnv, make_single, make_vectorised
from spiking_rl.envs.make import get_states, set_states

NOISY = "NoisyToy-v0"


class NoisyToy(gym.Env[np.ndarray, int]):
    """A random walk that draws numbers in every step, and ends by chance."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode: str | None = None) -> None:
        self.place = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2)
        return self.place.copy(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place = self.place + action - 1 + self.np_random.normal(size=2)
        return self.place.copy(), float(self.place.sum()), bool(self.np_random.random() < 0.1), False, {}


@pytest.fixture(autouse=True)
def _noisy_toy() -> Iterator[None]:
    gym.register(NOISY, NoisyToy)
    yield
    gym.registry.pop(NOISY)


DISCRETE = pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", NOISY])


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state, allow_nan=False))


def play(env: gym.Env[Any, Any], actions: list[Any]) -> list[Any]:
    """Return everything that an environment answers, starting a new episode where one ends."""
    answers: list[Any] = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        episode = info.get("episode", {})
        answers.append((observation.tolist(), float(reward), terminated, truncated, episode.get("r"), episode.get("l")))
        if terminated or truncated:
            answers.append(env.reset()[0].tolist())
    return answers


def actions_for(env: gym.Env[Any, Any], count: int, seed: int) -> list[Any]:
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(count)]


def assert_same_future(env: ReplayableEnv, restored: ReplayableEnv, env_id: str) -> None:
    state = env.get_state()
    kept = through_json(state)
    restored.set_state(kept)
    assert through_json(restored.get_state()) == kept, "a restored environment can be saved again"
    future = actions_for(env, 60, seed=9)
    assert play(env, future) == play(restored, future), env_id
    assert through_json(state) == kept, "a saved state does not change when the environment goes on"


def replayable(env_id: str) -> ReplayableEnv:
    return ReplayableEnv(make_single(env_id))


@DISCRETE
@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("steps", [0, 1, 7, 70])
def test_the_future_is_the_same(env_id: str, seed: int | None, steps: int) -> None:
    env, restored = replayable(env_id), replayable(env_id)
    env.reset(seed=seed)
    play(env, actions_for(env, steps, seed=1))
    assert_same_future(env, restored, env_id)


@DISCRETE
def test_the_future_is_the_same_right_after_a_reset(env_id: str) -> None:
    env, restored = replayable(env_id), replayable(env_id)
    env.reset(seed=4)
    play(env, actions_for(env, 30, seed=1))
    env.reset()
    # What the other did before does not matter.
    restored.reset(seed=11)
    play(restored, actions_for(restored, 5, seed=2))
    assert_same_future(env, restored, env_id)


@pytest.mark.parametrize("env_id", ["MountainCarContinuous-v0", "Pendulum-v1"])
def test_continuous_actions_are_replayed_exactly(env_id: str) -> None:
    env, restored = replayable(env_id), replayable(env_id)
    env.reset(seed=4)
    play(env, actions_for(env, 40, seed=1))
    assert_same_future(env, restored, env_id)


def test_an_action_that_the_caller_overwrites_is_remembered_as_it_was() -> None:
    env = replayable("Pendulum-v1")
    env.reset(seed=0)
    buffer = np.zeros(1, np.float32)
    env.step(buffer)
    buffer[:] = 1
    assert env.get_state()["actions"] == [[0.0]]


def test_options_of_the_reset_are_remembered() -> None:
    env, restored = replayable("CartPole-v1"), replayable("CartPole-v1")
    env.reset(seed=0, options={"low": -0.2, "high": 0.2})
    assert_same_future(env, restored, "CartPole-v1")


def vectors(venv: Any, actions: np.ndarray) -> list[Any]:
    answers = []
    for row in actions:
        observations, rewards, dones, infos = venv.step(row)
        returns = [i.get("episode", {}).get("r") for i in infos]
        last = [
            np.asarray(i["terminal_observation"]).tolist() if d else None for i, d in zip(infos, dones, strict=True)
        ]
        answers.append((observations.tolist(), rewards.tolist(), dones.tolist(), returns, last))
    return answers


def random_actions(venv: Any, steps: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(venv.action_space.n, size=(steps, venv.num_envs))


@DISCRETE
@pytest.mark.parametrize("steps", [0, 1, 150])
def test_vectorised_environments_have_the_same_future(env_id: str, steps: int) -> None:
    venv, restored = make_vectorised(env_id, 3, seed=0), make_vectorised(env_id, 3, seed=77)
    venv.reset()
    past = vectors(venv, random_actions(venv, steps, seed=1))
    if steps == 150 and env_id in ("CartPole-v1", NOISY):
        assert sum(any(dones) for _, _, dones, _, _ in past) > 3, "several episodes must have ended"
    set_states(restored, through_json(get_states(venv)))
    future = random_actions(venv, 150, seed=2)
    assert vectors(venv, future) == vectors(restored, future)


def test_the_next_reset_is_the_same_too() -> None:
    venv, restored = make_vectorised(NOISY, 2, seed=0), make_vectorised(NOISY, 2, seed=0)
    venv.reset()
    vectors(venv, random_actions(venv, 20, seed=1))
    set_states(restored, through_json(get_states(venv)))
    assert np.array_equal(venv.reset(), restored.reset())


def test_restoring_draws_no_global_random_numbers() -> None:
    venv = make_vectorised(NOISY, 2, seed=0)
    venv.reset()
    states = get_states(venv)
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    set_states(venv, states)
    assert np.random.random() == expected


def test_another_number_of_environments_is_refused() -> None:
    venv = make_vectorised(NOISY, 2, seed=0)
    venv.reset()
    with pytest.raises(UserError, match="2 environments") as caught:
        set_states(make_vectorised(NOISY, 3, seed=0), get_states(venv))
    assert caught.value.field == "num_envs"
