"""Sequences come out of the replay as they went in, with their membranes, ends and final observations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_rl.agents.replay import SequenceReplay
from spiking_rl.agents.targets import sequence_targets

SPACE = spaces.Box(-1e9, 1e9, (1,), np.float32)


def play(steps: int, n_envs: int, seed: int, replay: SequenceReplay) -> list[list[dict[str, Any]]]:
    """Feed random episodes; return every environment's frames as they should be stored."""
    rng = np.random.default_rng(seed)
    frames: list[list[dict[str, Any]]] = [[] for _ in range(n_envs)]
    starts = np.ones(n_envs, dtype=bool)
    number = 0
    for _ in range(steps):
        observations = np.arange(number, number + n_envs, dtype=np.float32)[:, None]
        final = observations + 0.5
        number += n_envs
        actions = rng.integers(0, 5, n_envs)
        rewards = rng.normal(size=n_envs).astype(np.float32)
        ended = rng.random(n_envs) < 0.2
        terminated = ended & (rng.random(n_envs) < 0.5)
        before = np.repeat(observations, 3, 1) / 64  # exact in float16
        after = before + 0.5
        replay.add(observations, actions, rewards, starts.copy(), terminated, ended, final, before, after)
        for n in range(n_envs):
            frames[n].append(
                {
                    "observations": observations[n, 0],
                    "actions": actions[n],
                    "rewards": float(rewards[n]),
                    "starts": starts[n],
                    "terminal": terminated[n],
                    "decisions": True,
                    "membrane": before[n, 0],
                }
            )
            if ended[n]:
                frames[n].append(
                    {
                        "observations": final[n, 0],
                        "actions": 0,
                        "rewards": 0.0,
                        "starts": False,
                        "terminal": False,
                        "decisions": False,
                        "membrane": after[n, 0],
                    }
                )
        starts = ended
    return frames


@pytest.mark.parametrize("steps", [13, 200])  # before and after the ring is full
def test_sampled_sequences_are_what_was_played(steps: int) -> None:
    replay = SequenceReplay(3 * 40, SPACE, spaces.Discrete(5), "cpu", 3, span=7, stride=4)
    frames = play(steps, 3, steps, replay)
    where = {f["observations"]: (n, i) for n in range(3) for i, f in enumerate(frames[n])}
    np.random.seed(0)
    batch = replay.sample(200)
    assert batch.observations.shape == (7, 200, 1)
    begins = set()
    for b in range(200):
        n, i = where[float(batch.observations[0, b, 0])]
        begins.add((n, i))
        assert i % 4 == 0
        assert i >= len(frames[n]) - replay.buffer_size, "nothing overwritten is sampled"
        for t in range(7):
            for name, values in batch._asdict().items():
                if name != "membranes":
                    assert float(values[t, b]) == float(frames[n][i + t][name]), (name, t)
        assert batch.membranes[b].tolist() == [frames[n][i]["membrane"]] * 3
    assert len(begins) == replay.sequences, "every sequence that exists is drawn at times"


def test_the_latest_frames_are_in_order() -> None:
    replay = SequenceReplay(2 * 16, SPACE, spaces.Discrete(5), "cpu", 2, span=4, stride=4)
    frames = play(50, 2, 1, replay)
    observations, starts = replay.latest(6)
    for n in range(2):
        assert observations[:, n, 0].tolist() == [f["observations"] for f in frames[n][-6:]]
        assert starts[:, n].tolist() == [f["starts"] for f in frames[n][-6:]]


def targets_by_hand(rewards: Any, terminal: Any, decisions: Any, gamma: float, n: int, values: Any) -> list[float]:
    found = []
    for t in range(len(rewards) - n):
        total, discount, at = 0.0, 1.0, t
        while at < t + n and decisions[at]:
            total += discount * rewards[at]
            discount *= gamma
            at += 1
            if terminal[at - 1]:
                discount = 0.0
                break
        found.append(total + discount * values[at])
    return found


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 12), steps=st.integers(1, 4))
def test_sequence_targets_against_a_plain_loop(seed: int, length: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    size = length + steps
    replay = SequenceReplay(64, SPACE, spaces.Discrete(5), "cpu", 1, span=size, stride=1)
    frames = play(size, 1, seed, replay)[0][:size]
    rewards, terminal, decisions = ([f[k] for f in frames] for k in ("rewards", "terminal", "decisions"))
    online, target = rng.normal(size=(2, size, 3))
    values = [target[t, online[t].argmax()] for t in range(size)]
    got = sequence_targets(
        torch.tensor(np.array(rewards, dtype=np.float64)).unsqueeze(1),
        torch.tensor(terminal).unsqueeze(1),
        torch.tensor(decisions).unsqueeze(1),
        0.9,
        steps,
        torch.tensor(online).unsqueeze(1),
        torch.tensor(target).unsqueeze(1),
    )
    expected = targets_by_hand(rewards, terminal, decisions, 0.9, steps, values)
    for t in range(length):
        if decisions[t]:
            assert got[t, 0].item() == pytest.approx(expected[t])
