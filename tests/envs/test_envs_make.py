"""Making environments: what a wrong id is told, and that the factory is one for every purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from spiking_rl import UserError
from spiking_rl.envs import check_environment, make_single, make_vectorised


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("CartPol-v1", "did you mean 'CartPole-v1'?"),
        ("cartpole-v1", "did you mean 'CartPole-v1'?"),
        ("CartPole-v99", "did you mean 'CartPole-v1'?"),
        ("lunarlander", "did you mean 'LunarLander-v3'?"),
        ("CartPoleMasked", "did you mean 'spiking_rl/CartPoleMasked-v1'?"),
        ("pong", "did you mean 'ALE/Pong-v5'?"),
        ("Snake-v0", "no such environment; see gymnasium.pprint_registry()"),
        ("Acrobat-v1", "did you mean 'Acrobot-v1'?"),
        ("Taxi-v2", "deprecated"),
        ("qqqqqqqq", "no such environment"),
        ("", "no such environment"),
        ("no spaces allowed-v0", "no such environment"),
        ("no_such_module:Env-v0", "no_such_module"),
        ("json:Env-v0", "no such environment"),
        (":CartPole-v1", "module:EnvId"),
        ("a:b:CartPole-v1", "module:EnvId"),
    ],
)
def test_an_id_that_cannot_be_made_is_explained(env_id: str, words: str) -> None:
    for refuse in (make_single, check_environment, lambda e: make_vectorised(e, 2, 0)):
        with pytest.raises(UserError) as caught:
            refuse(env_id)
        assert caught.value.field == "env"
        assert repr(env_id) in str(caught.value)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_dependency_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_point(**_: object) -> gym.Env[int, int]:
        raise gym.error.DependencyNotInstalled("box of\ntricks is missing")

    monkeypatch.setitem(gym.registry, "Needy-v0", gym.envs.registration.EnvSpec("Needy-v0", entry_point))
    with pytest.raises(UserError, match="not installed: box of tricks is missing"):
        make_single("Needy-v0")


def test_a_module_of_the_user_is_imported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_world.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gymnasium.register('MyWorld-v0', CartPoleEnv)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = make_single("my_own_world:MyWorld-v0")
        assert env.observation_space.shape == (4,)
    finally:
        gym.registry.pop("MyWorld-v0", None)
        sys.modules.pop("my_own_world", None)


def test_the_spaces_are_told() -> None:
    observations, actions = check_environment("CartPole-v1")
    assert observations.shape == (4,)
    assert actions == gym.spaces.Discrete(2)


def test_an_outdated_id_works_in_silence() -> None:
    make_single("CartPole-v0").close()  # warnings are errors here


def test_the_episode_return_is_reported() -> None:
    env = make_single("CartPole-v1")
    env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, info = env.step(0)
        total += float(reward)
        over = terminated or truncated
    assert info["episode"]["r"] == total
    assert info["episode"]["l"] == total


def test_frames_come_only_when_asked_for() -> None:
    assert make_single("CartPole-v1").render_mode is None
    env = make_single("CartPole-v1", render=True)
    env.reset(seed=0)
    frame = np.asarray(env.render())
    env.close()
    assert frame.dtype == np.uint8
    assert frame.shape == (400, 600, 3)
    assert frame.std() > 1


def test_vectorised_environments_have_seeds_of_their_own() -> None:
    first = make_vectorised("CartPole-v1", 3, seed=5).reset()
    again = make_vectorised("CartPole-v1", 3, seed=5).reset()
    next_seed = make_vectorised("CartPole-v1", 3, seed=6).reset()
    assert np.array_equal(first, again)
    assert len(np.unique(first, axis=0)) == 3
    assert np.array_equal(first[1:], next_seed[:2]), "seed, seed+1, ..."
    alone, _ = make_single("CartPole-v1").reset(seed=5)
    assert np.array_equal(first[0], alone)
