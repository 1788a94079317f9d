"""Exploration: the share of random steps, how long they last, and where they end."""

from __future__ import annotations

import numpy as np
import pytest

from spiking_rl.agents.exploration import EpsilonGreedy

GREEDY = 9  # an action that is never drawn at random below


def play(repeat: float, epsilon: float, steps: int = 4000) -> np.ndarray:
    np.random.seed(0)
    explorer = EpsilonGreedy(8, 5, repeat)
    return np.array([explorer.choose(np.full(8, GREEDY), epsilon) for _ in range(steps)])


@pytest.mark.parametrize("repeat", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0])
def test_epsilon_is_the_share_of_random_steps(repeat: float, epsilon: float) -> None:
    assert np.mean(play(repeat, epsilon) != GREEDY) == pytest.approx(epsilon, rel=0.1)


def test_random_actions_last_as_long_as_asked() -> None:
    column = play(8.0, 0.2)[:, 0]
    runs = np.split(column, np.flatnonzero(np.diff(column)) + 1)
    lengths = [len(run) for run in runs if run[0] != GREEDY]
    assert np.mean(lengths) == pytest.approx(8, rel=0.25)


def test_epsilon_zero_is_greedy() -> None:
    assert (play(4.0, 0.0, 100) == GREEDY).all()


def test_environments_explore_on_their_own() -> None:
    random = play(1.0, 0.5) != GREEDY
    together = np.corrcoef(random[:, 0], random[:, 1])[0, 1]
    assert abs(together) < 0.1


def test_an_episode_s_end_ends_the_run_of_its_environment() -> None:
    np.random.seed(0)
    explorer = EpsilonGreedy(2, 5, 1000.0)
    explorer.choose(np.array([GREEDY, GREEDY]), 1.0)
    explorer.end_episodes(np.array([True, False]))
    assert explorer.choose(np.array([GREEDY, GREEDY]), 0.0)[0] == GREEDY
    assert explorer.choose(np.array([GREEDY, GREEDY]), 0.0)[1] != GREEDY
