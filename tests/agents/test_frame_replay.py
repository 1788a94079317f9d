"""The replay that keeps each frame once, against one that keeps every observation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_rl import UserError
from spiking_rl.agents.frame_replay import FrameReplayBuffer
from spiking_rl.envs import make_vectorised

STACK = 3
IMAGES = spaces.Box(0, 10_000, (STACK, 2, 2), np.int32)
ACTIONS = spaces.Discrete(5)
GAMMA = 0.5


class Games:
    """Environments whose n-th frame is full of n: an observation tells where it comes from."""

    def __init__(self, n_envs: int, seed: int, *, older: bool = False) -> None:
        self.older = older  # games begin with frames from before
        self.rng = np.random.default_rng(seed)
        self.n_envs = n_envs
        self.frame = 0
        self.obs = np.zeros((n_envs, *IMAGES.shape), dtype=np.int32)
        self.episodes: list[list[tuple[Any, ...]]] = [[] for _ in range(n_envs)]
        self.finished: list[list[tuple[Any, ...]]] = []
        for row in range(n_envs):
            self.reset(row)

    def new_frame(self) -> int:
        self.frame += 1
        return self.frame

    def reset(self, row: int) -> None:
        for back in range(STACK):
            self.obs[row, back] = self.new_frame() if self.older else 0
        self.obs[row, -1] = self.new_frame()

    def step(self, buffer: FrameReplayBuffer, end: float) -> None:
        """Play one step everywhere, write it, and remember it whole."""
        n = self.n_envs
        actions, rewards = self.rng.integers(5, size=n), self.rng.normal(size=n).astype(np.float32)
        done = self.rng.random(n) < end
        truncated = done & (self.rng.random(n) < 0.5)
        before = self.obs.copy()
        after = np.roll(before, -1, axis=1)
        for row in range(n):
            after[row, -1] = self.new_frame()
        buffer.add(before, after, actions, rewards, done, [{"TimeLimit.truncated": bool(t)} for t in truncated])
        for row in range(n):
            terminal = bool(done[row] and not truncated[row])
            self.episodes[row].append((before[row], int(actions[row]), float(rewards[row]), after[row], terminal))
            if done[row]:
                self.finish(row)
        self.obs[~done] = after[~done]
        for row in np.flatnonzero(done):
            self.reset(row)

    def finish(self, row: int) -> None:
        self.finished.append(self.episodes[row])
        self.episodes[row] = []

    def expected(self, n_steps: int) -> dict[tuple[bytes, int], tuple[Any, ...]]:
        """Return every transition by its observation and action, n-step returns by a plain loop."""
        found = {}
        for episode in [*self.finished, *self.episodes]:
            for start, (obs, action, _, _, _) in enumerate(episode):
                total, discount = 0.0, 1.0
                for _, _, reward, after, terminal in episode[start : start + n_steps]:
                    total += discount * reward
                    discount *= GAMMA
                    last = (after, terminal)
                found[(obs.tobytes(), action)] = (total, discount, *last)
        return found


def check(buffer: FrameReplayBuffer, games: Games, n_steps: int) -> int:
    """Compare everything that can be sampled; return how many different transitions were."""
    expected = games.expected(n_steps)
    seen = set()
    batch = buffer.sample(300)
    for i in range(300):
        key = (batch.observations[i].numpy().tobytes(), int(batch.actions[i]))
        total, discount, after, terminal = expected[key]
        assert float(batch.rewards[i]) == pytest.approx(total, abs=1e-5)
        assert batch.next_observations[i].numpy().tobytes() == after.tobytes()
        assert bool(batch.dones[i]) == terminal
        if batch.discounts is None:
            assert n_steps == 1, "a learner's own gamma is for one step"
        elif not terminal:
            assert float(batch.discounts[i]) == pytest.approx(discount)
        seen.add(key)
    return len(seen)


@settings(max_examples=40, deadline=None)
@given(
    n_envs=st.integers(1, 3),
    n_steps=st.integers(1, 4),
    steps=st.integers(10, 70),
    end=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 1000),
)
def test_it_gives_what_was_played(n_envs: int, n_steps: int, steps: int, end: float, seed: int) -> None:
    """Across episode ends, truncation and wrap-around: 20 rows a game, up to 70 steps and their finals."""
    np.random.seed(seed)
    buffer = FrameReplayBuffer(20 * n_envs, IMAGES, ACTIONS, "cpu", n_envs, n_steps=n_steps, gamma=GAMMA)
    games = Games(n_envs, seed)
    for _ in range(steps):
        games.step(buffer, end)
    assert check(buffer, games, n_steps) >= 3
    assert buffer.size() <= 20


def test_every_transition_is_drawn() -> None:
    np.random.seed(0)
    buffer = FrameReplayBuffer(100, IMAGES, ACTIONS, "cpu", 1, gamma=GAMMA)
    games = Games(1, 0)
    for _ in range(40):
        games.step(buffer, 0.1)
    assert check(buffer, games, 1) == 40 - 1 + (not games.episodes[0])


def test_a_cut_episode_bootstraps_from_where_it_was_left() -> None:
    np.random.seed(0)
    buffer = FrameReplayBuffer(100, IMAGES, ACTIONS, "cpu", 2, n_steps=3, gamma=GAMMA)
    games = Games(2, 0)
    for _ in range(3):
        for _ in range(7):
            games.step(buffer, 0.0)
        buffer.end_episodes(games.obs)
        for row in range(2):
            games.finish(row)
            games.reset(row)
    check(buffer, games, 3)


@pytest.mark.parametrize("rows", [24, 400])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_games_that_begin_with_older_frames(n_steps: int, rows: int) -> None:
    """As those after a lost life, in Breakout: the observation is that of a game that goes on."""
    np.random.seed(0)
    buffer = FrameReplayBuffer(2 * rows, IMAGES, ACTIONS, "cpu", 2, n_steps=n_steps, gamma=GAMMA)
    games = Games(2, 0, older=True)
    for step in range(60):
        games.step(buffer, 0.2)
        if step > 20 or (rows == 400 and step > 4):
            assert check(buffer, games, n_steps) >= 3
    opening = [episode[0][0] for episode in games.finished]
    drawn = {batch.tobytes() for batch in buffer.sample(5_000).observations.numpy()}
    if rows == 400:
        assert len(opening) > 10
        assert all(obs.tobytes() in drawn for obs in opening)


def test_games_that_were_begun_anew_without_a_word_are_cut() -> None:
    np.random.seed(0)
    buffer = FrameReplayBuffer(200, IMAGES, ACTIONS, "cpu", 2, n_steps=3, gamma=GAMMA)
    games = Games(2, 0)
    for _ in range(4):
        for _ in range(7):
            games.step(buffer, 0.0)
        for row in range(2):
            games.episodes[row].pop()  # its observation is the last that was seen
            games.finish(row)
            games.reset(row)
    games.step(buffer, 0.0)
    assert check(buffer, games, 3) > 30


def test_what_holds_no_decision_gives_no_transition() -> None:
    buffer = FrameReplayBuffer(100, IMAGES, ACTIONS, "cpu", 1, n_steps=1, gamma=GAMMA)
    games = Games(1, 0, older=True)
    games.step(buffer, 1.0)  # two older frames, a decision, a final observation
    assert buffer.transitions == 3
    buffer.cut(np.array([True]))
    buffer.decisions[:] = False
    assert buffer.transitions == 0
    with pytest.raises(UserError, match="nothing to sample"):
        buffer.sample(1)


def test_images_that_are_no_stack_of_frames_are_refused() -> None:
    colours = spaces.Box(0, 255, (3, 8, 8), np.uint8)
    buffer = FrameReplayBuffer(200, colours, ACTIONS, "cpu", 1)
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 3, 8, 8), dtype=np.uint8)
    with pytest.raises(UserError, match=r"an observation.*no stack of frames"):
        buffer.add(images[0], images[1], np.zeros(1), np.zeros(1), np.zeros(1), [{}])
    assert not buffer.written.any()


def test_single_frames_that_were_begun_anew_are_cut_too() -> None:
    single = spaces.Box(0, 255, (1, 2, 2), np.int32)
    buffer = FrameReplayBuffer(50, single, ACTIONS, "cpu", 1)
    frames = np.arange(8)[:, None, None, None, None] * np.ones((1, 1, 1, 2, 2), np.int32)
    for t in (1, 2, 5, 6):  # the game of 1, 2, 3 was left at 3
        buffer.add(frames[t], frames[t + 1], np.zeros(1), np.ones(1), np.zeros(1), [{}])
    batch = buffer.sample(200)
    pairs = {
        (int(a[0, 0, 0]), int(b[0, 0, 0])) for a, b in zip(batch.observations, batch.next_observations, strict=True)
    }
    assert pairs == {(1, 2), (5, 6)}


def test_a_frame_is_stored_once() -> None:
    pixels = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    buffer = FrameReplayBuffer(1000, pixels, ACTIONS, "cpu", 4)
    taken = sum(getattr(buffer, name).nbytes for name in buffer.ARRAYS)
    assert taken == 1000 * FrameReplayBuffer.row_bytes(pixels)
    assert taken / 1000 <= 8064


def test_mistakes_are_told() -> None:
    pixels = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    with pytest.raises(UserError, match=r"buffer_size.*GiB"):
        FrameReplayBuffer(10**12, pixels, ACTIONS, "cpu", 1)
    with pytest.raises(UserError, match="buffer_size"):
        FrameReplayBuffer(4, pixels, ACTIONS, "cpu", 1)
    with pytest.raises(UserError, match="observation_space"):
        FrameReplayBuffer(100, spaces.Box(-1, 1, (4,)), ACTIONS, "cpu", 1)
    buffer = FrameReplayBuffer(100, IMAGES, ACTIONS, "cpu", 1, gamma=GAMMA)
    with pytest.raises(UserError, match="nothing to sample"):
        buffer.sample(1)


def test_a_replay_takes_games_that_go_on_after_a_lost_life() -> None:
    env = make_vectorised("ALE/Breakout-v5?sticky_actions=0&frame_stack=4&episodic_life=1", 2, 0)
    replay = FrameReplayBuffer(4000, env.observation_space, env.action_space, "cpu", 2)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    seen, lost, played = env.reset(), 0, set()
    for _ in range(300):
        actions = rng.integers(4, size=2)
        after, rewards, done, infos = env.step(actions)
        final = after.copy()
        for row in np.flatnonzero(done):
            final[row] = infos[row]["terminal_observation"]
            lost += bool(after[row, :-1].any())
        replay.add(seen, final, actions, rewards, done, infos)
        played |= {observation.tobytes() for observation in seen}
        seen = after
    assert lost > 4
    assert played >= {observation.tobytes() for observation in replay.sample(2000).observations.numpy()}
