"""Atari: the same game for training, evaluation and film."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from spiking_rl import UserError
from spiking_rl.envs import make_single, make_vectorised
from spiking_rl.envs.atari import _games, _native, parse_atari
from spiking_rl.envs.make import can_be_saved, get_states, restart, set_states


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("ALE/Pong-v5", ("pong", 0.25, 4)),
        ("PongNoFrameskip-v4", ("pong", 0.0, 4)),
        ("ALE/MsPacman-v5?sticky_actions=0&frame_stack=1", ("ms_pacman", 0.0, 1)),
        ("ALE/SpaceInvaders-v5?frame_stack=2", ("space_invaders", 0.25, 2)),
    ],
)
def test_an_id_says_everything(env_id: str, expected: tuple[str, float, int]) -> None:
    atari = parse_atari(env_id)
    assert atari is not None
    assert (atari.game, atari.sticky_actions, atari.frame_stack) == expected
    assert parse_atari(str(atari)) == atari


def test_a_score_is_of_whole_games_whatever_a_life_means_to_the_learner() -> None:
    """The same games byte for byte; only the learner's ends of episodes differ, one for each of five lives."""
    lives = make_vectorised("ALE/Breakout-v5?sticky_actions=0&frame_stack=1&episodic_life=1", 2, 0)
    games = make_vectorised("ALE/Breakout-v5?sticky_actions=0&frame_stack=1&episodic_life=0", 2, 0)
    assert np.array_equal(lives.reset(), games.reset())
    rng = np.random.default_rng(0)
    deaths, whole = np.zeros(2, dtype=int), 0
    for step in range(900):
        if step == 450:  # as after a checkpoint
            assert np.array_equal(restart(lives), restart(games))
            deaths[:] = 0
        actions = rng.integers(4, size=2)
        seen, rewards, done, infos = lives.step(actions)
        seen_too, rewards_too, over, infos_too = games.step(actions)
        assert np.array_equal(seen, seen_too)
        assert np.array_equal(rewards, rewards_too)
        deaths += done
        for row in range(2):
            assert infos[row].get("episode") == infos_too[row].get("episode")
            assert done[row] == ("terminal_observation" in infos[row])
            if over[row]:
                assert deaths[row] == 5
                deaths[row] = 0
                whole += 1
    assert whole >= 4
    atari = parse_atari("ALE/Breakout-v5?episodic_life=1")
    assert atari is not None
    assert parse_atari(str(atari)) == atari


def test_other_environments_are_left_alone() -> None:
    assert parse_atari("CartPole-v1") is None
    assert parse_atari("my_module:Pong-v5") is None


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("ALE/Pnog-v5", ["Pnog", "did you mean 'ALE/Pong-v5'"]),
        ("ALE/Pong-v5?sticky=0", ["sticky", "sticky_actions, frame_stack and episodic_life"]),
        ("ALE/Breakout-v5?episodic_life=yes", ["episodic_life = 'yes'", "0 or 1"]),
        ("ALE/Pong-v5?sticky_actions=often", ["often", "no number"]),
        ("ALE/Pong-v5?sticky_actions=1", ["sticky_actions = 1", "below 1"]),
        ("ALE/Pong-v5?frame_stack=0", ["frame_stack = 0", "at least 1"]),
    ],
)
def test_a_mistake_in_an_id_is_told(env_id: str, words: list[str]) -> None:
    for make in (make_single, lambda e: make_vectorised(e, 2, 0)):
        with pytest.raises(UserError) as told:
            make(env_id)
        assert all(word in str(told.value) for word in words)


@pytest.mark.parametrize("sticky", [0, 0.25])
def test_one_game_and_a_row_of_many_give_the_same_bytes(sticky: float) -> None:
    """Over the end of a game: what evaluation plays is what training plays."""
    env_id = f"ALE/Pong-v5?sticky_actions={sticky}&frame_stack=2"
    atari = parse_atari(env_id)
    assert atari is not None
    many = _native(atari, 3, AutoresetMode.SAME_STEP)
    seen, _ = many.reset(seed=np.array([5, 6, 7]))
    one = make_single(env_id, render=True)
    observation, _ = one.reset(seed=7)
    rng = np.random.default_rng(0)
    over, steps = False, 0
    while not over:
        assert np.array_equal(observation, seen[2])
        actions = rng.integers(6, size=3)
        seen, rewards, terminated, _, info = many.step(actions)
        observation, reward, over, truncated, _ = one.step(int(actions[2]))
        assert reward == rewards[2]
        assert over == terminated[2]
        assert not truncated
        steps += 1
    assert np.array_equal(observation, info["final_obs"][2])
    assert 700 < steps < 3000
    picture = one.render()
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (210, 160, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) >= 4  # background, two paddles, score
    again, _ = one.reset(seed=5)
    assert not np.array_equal(again, observation)
    assert one.spec is not None
    assert one.spec.max_episode_steps == 27_000
    one.close()


def test_a_game_begins_with_any_seed_that_gymnasium_takes() -> None:
    env = make_single("ALE/Pong-v5?frame_stack=1")

    def play(seed: int) -> bytes:
        seen = [env.reset(seed=seed)[0]]
        seen += [env.step(k % 6)[0] for k in range(80)]
        return b"".join(frame.tobytes() for frame in seen)

    seeds = [0, 2**31 - 1, 2**31, 2**32 + 5, 2**70]
    games = [play(seed) for seed in seeds]
    assert games == [play(seed) for seed in seeds]
    assert len(set(games)) > 2, "other seeds begin otherwise"
    env.close()


@pytest.mark.parametrize("action", [-1, 6])
def test_an_action_that_the_game_does_not_have_is_refused(action: int) -> None:
    env = make_single("ALE/Pong-v5")
    env.reset(seed=0)
    with pytest.raises(UserError, match="must lie between 0 and 5"):
        env.step(action)
    env.close()
    venv = make_vectorised("ALE/Pong-v5", 2, 0)
    venv.reset()
    with pytest.raises(UserError, match="must lie between 0 and 5"):
        venv.step(np.array([0, action]))
    venv.close()
    venv.close()


def test_rewards_are_clipped_for_learning_and_counted_whole() -> None:
    venv = make_vectorised("ALE/MsPacman-v5?frame_stack=1", 2, 0)
    venv.reset()
    rng = np.random.default_rng(0)
    earned, episodes = np.zeros(2), []
    for _ in range(1500):
        _, rewards, _, infos = venv.step(rng.integers(9, size=2))
        assert set(np.unique(rewards)) <= {-1.0, 0.0, 1.0}
        earned += rewards
        episodes += [(info["episode"]["r"], earned[row]) for row, info in enumerate(infos) if "episode" in info]
        for row, info in enumerate(infos):
            if "episode" in info:
                assert info["terminal_observation"].shape == (1, 84, 84)
                earned[row] = 0
    assert episodes
    assert all(whole >= 10 * clipped for whole, clipped in episodes), "a pill is worth 10"
    venv.close()


def test_a_restart_follows_from_the_seed_and_its_number() -> None:
    def games(venv: VecEnv) -> bytes:
        """Return what thirty fixed decisions show."""
        shown = [venv.step(actions)[0] for actions in np.random.default_rng(0).integers(6, size=(30, 2))]
        return np.stack(shown).tobytes()

    venv, again, other = (make_vectorised("ALE/Pong-v5", 2, seed) for seed in (3, 3, 4))
    assert np.array_equal(venv.reset(), again.reset())
    other.reset()
    assert games(venv) == games(again) != games(other)
    assert not can_be_saved(venv)
    assert can_be_saved(make_vectorised("CartPole-v1", 1, 0))
    before = get_states(venv)
    restart(venv)
    set_states(again, get_states(venv))
    set_states(other, before)
    assert games(venv) == games(again) != games(other)


def test_a_missing_emulator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)  # what an import finds where nothing is installed
    _games.cache_clear()
    with pytest.raises(UserError, match=r"needs ale-py, .*pip install ale-py"):
        parse_atari("ALE/Pong-v5")
    assert parse_atari("CartPole-v1") is None
    monkeypatch.undo()
    assert parse_atari("ALE/Pong-v5") is not None


def test_other_ids_of_the_emulator_are_found_without_importing_it() -> None:
    code = "from spiking_rl.envs import make_single; print(make_single('Pong-v4').observation_space.shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "(210, 160, 3)", done.stderr
