"""CartPole without velocities is CartPole in all but what is seen."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from spiking_rl.envs import MASKED_CARTPOLE, ReplayableEnv, make_single


def test_positions_are_seen_and_nothing_else_changes() -> None:
    masked, full = make_single(MASKED_CARTPOLE), make_single("CartPole-v1")
    assert masked.observation_space.shape == (2,)
    assert masked.spec is not None
    assert masked.spec.max_episode_steps == 500
    seen, whole = masked.reset(seed=3)[0], full.reset(seed=3)[0]
    rng = np.random.default_rng(0)
    over = False
    while not over:
        np.testing.assert_array_equal(seen, whole[[0, 2]])
        assert masked.observation_space.contains(seen)
        action = int(rng.integers(2))
        seen, reward, terminated, truncated, _ = masked.step(action)
        whole, *rest, _ = full.step(action)
        assert [reward, terminated, truncated] == rest
        over = terminated or truncated


def test_it_lasts_500_steps_and_no_longer() -> None:
    env = make_single(MASKED_CARTPOLE)
    env.reset(seed=0)
    cart = env.unwrapped
    for step in range(1, 501):
        cart.state = np.zeros(4)  # type: ignore[attr-defined]
        _, _, terminated, truncated, _ = env.step(step % 2)
        assert not terminated
        assert truncated == (step == 500)


def test_it_is_saved_and_restored_exactly() -> None:
    env, other = ReplayableEnv(make_single(MASKED_CARTPOLE)), ReplayableEnv(make_single(MASKED_CARTPOLE))
    env.reset(seed=7)
    for action in (0, 1, 1, 0):
        env.step(action)
    other.set_state(env.get_state())
    np.testing.assert_array_equal(env.step(1)[0], other.step(1)[0])


def test_any_gymnasium_user_can_make_it() -> None:
    assert gym.make(MASKED_CARTPOLE, render_mode="rgb_array").reset(seed=0)[0].shape == (2,)
