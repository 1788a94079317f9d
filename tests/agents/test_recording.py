"""Recordings hold what was played, value for value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spiking_rl import UserError
from spiking_rl.agents import SpikingPQN, evaluate, record
from spiking_rl.envs import MASKED_CARTPOLE, make_vectorised


@pytest.mark.parametrize("stateful", [False, True])
def test_a_recording_is_the_play_itself(stateful: bool) -> None:
    env = MASKED_CARTPOLE if stateful else "CartPole-v1"
    policy = {"timesteps": 2, "network_kwargs": {"hidden": [12, 8]}}
    model = SpikingPQN("MlpPolicy", make_vectorised(env, 4, 0), stateful=stateful, policy_kwargs=policy, seed=0)
    model.learn(1500)
    made = record(model, env, episodes=3, seed=5)
    n = len(made.actions)
    assert made.episode_starts.sum() == 3
    assert made.rewards.sum() == 3 * evaluate(model, env, episodes=3, seed=5).mean_return
    assert made.spikes["layer1"].shape == (n, 2, 12)
    assert made.potentials["layer2"].shape == (n, 2, 8)
    for layer, neuron in zip(("layer1", "layer2"), model.policy.q_net.network.neurons, strict=True):
        fires = made.potentials[layer] > neuron.threshold.detach().numpy()
        np.testing.assert_array_equal(made.spikes[layer], fires)
        assert made.spikes[layer].any()
    assert made.actions.tolist() == made.q_values.argmax(1).tolist()
    # Played again through predict, the same actions come out of the same observations.
    state = None
    for observation, action, start in zip(made.observations, made.actions, made.episode_starts, strict=True):
        again, state = model.predict(observation, state, np.array([start]), deterministic=True)
        assert int(again) == action
    if not stateful:
        values = model.policy.q_net(torch.as_tensor(made.observations)).detach().numpy()
        np.testing.assert_allclose(made.q_values, values, atol=1e-5)


def test_a_recording_is_kept_as_plain_arrays(tmp_path: Path) -> None:
    model = SpikingPQN("MlpPolicy", make_vectorised("CartPole-v1", 2, 0), seed=0, n_minibatches=2)
    made = record(model, "CartPole-v1", episodes=50, decisions=30)
    assert len(made.actions) == 30
    made.save(tmp_path / "play.npz")
    with np.load(tmp_path / "play.npz", allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["spikes.layer2"], made.spikes["layer2"])
        np.testing.assert_array_equal(kept["q_values"], made.q_values)
    with pytest.raises(UserError, match="npz"):
        made.save(tmp_path / "play.txt")
    with pytest.raises(UserError, match="decisions"):
        record(model, "CartPole-v1", decisions=0)
