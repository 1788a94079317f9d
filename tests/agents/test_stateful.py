"""Agents whose membranes are their memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn

from spiking_rl import LayeredNetwork, LIFState, UserError
from spiking_rl.agents import SpikingDQN, SpikingMlpPolicy, SpikingPQN, evaluate, load_agent
from spiking_rl.agents.building import build_model
from spiking_rl.agents.config import load_recipe
from spiking_rl.agents.staged import flat_membranes, split_membranes
from spiking_rl.agents.training import replace_settings
from spiking_rl.envs import make_vectorised


class Recall(gym.Env[np.ndarray, int]):
    """A sign is shown once; three steps later the action must equal it. Chance is 0.5."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.sign = int(self.np_random.integers(2))
        self.left = 4
        return np.array([2 * self.sign - 1, 0], dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        over = self.left == 0
        reward = float(over and action == self.sign)
        return np.array([0, float(self.left == 1)], dtype=np.float32), reward, over, False, {}


gym.register("Recall-v0", entry_point=Recall)
gym.register("ShortCartPole-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=6)


def learner(algo: str, *, stateful: bool = True, timesteps: int = 1, env: str = "Recall-v0") -> SpikingPQN | SpikingDQN:
    venv = make_vectorised(env, 8, 0)
    network = {"hidden": [32, 32], "gamma": 1.0}
    if stateful:
        network["time_constants"] = [0.5, 8.0]
    common: dict[str, Any] = {
        "stateful": stateful,
        "seed": 0,
        "device": "cpu",
        "gamma": 0.9,
        "exploration_fraction": 0.5,
        "policy_kwargs": {"timesteps": timesteps, "network_kwargs": network},
    }
    if algo == "pqn":
        return SpikingPQN("MlpPolicy", venv, n_steps=16, reward_scale=1.0, learning_rate=3e-3, **common)
    quick = {"train_freq": 4, "gradient_steps": 4, "target_update_interval": 200, "learning_starts": 1000}
    lengths = {"burn_in": 4, "sequence_length": 8, "batch_size": 128, "buffer_size": 8000}
    return SpikingDQN("MlpPolicy", venv, learning_rate=3e-3, n_steps=2, **quick, **lengths, **common)


@pytest.fixture(scope="module", params=["pqn", "dqn"])
def trained(request: pytest.FixtureRequest) -> SpikingPQN | SpikingDQN:
    return learner(request.param).learn(5_000)


def test_it_remembers(trained: SpikingPQN | SpikingDQN) -> None:
    assert evaluate(trained, "Recall-v0", episodes=60).mean_return > 0.9
    # SB3's own evaluation passes the state and episode starts through predict.
    mean, _ = evaluate_policy(trained, make_vectorised("Recall-v0", 5, 99), n_eval_episodes=40)
    assert mean > 0.9


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_without_a_state_it_cannot(algo: str) -> None:
    model = learner(algo, stateful=False).learn(5_000)
    assert evaluate(model, "Recall-v0", episodes=60).mean_return < 0.75


def test_checkpoints_keep_the_memory(trained: SpikingPQN | SpikingDQN, tmp_path: Path) -> None:
    trained.save_checkpoint(tmp_path / "agent", environment="Recall-v0")
    again = load_agent(tmp_path / "agent").model
    assert again.stateful
    assert evaluate(again, "Recall-v0", episodes=60).mean_return > 0.9
    trained.save(tmp_path / "zip")
    assert evaluate(type(trained).load(tmp_path / "zip"), "Recall-v0", episodes=60).mean_return > 0.9


def sequence(steps: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    starts = rng.random((steps, batch)) < 0.15  # each row at its own times
    return rng.uniform(-1, 1, (steps, batch, 2)).astype(np.float32), starts


@pytest.mark.parametrize("timesteps", [1, 3])
def test_step_by_step_equals_the_whole_sequence(timesteps: int) -> None:
    model = learner("pqn", timesteps=timesteps).learn(1024)
    observations, starts = sequence(40, 6)
    q_net = model.policy.q_net
    state = q_net.network.initial_state(6)
    spikes: dict[str, list[torch.Tensor]] = {"whole": [], "steps": []}

    def seen(kind: str) -> Any:
        return lambda _, output, __: spikes[kind].append(output)

    with torch.no_grad():
        inputs = q_net.features(torch.as_tensor(observations).flatten(0, 1)).reshape(40, 6, 2)
        whole, _ = q_net.network(inputs, state, torch.as_tensor(starts), seen("whole"))
    membranes = None
    for t in range(40):
        with torch.no_grad():
            values, state = q_net.q_values(
                torch.as_tensor(observations[t]), state, torch.as_tensor(starts[t]), seen("steps")
            )
        torch.testing.assert_close(values, whole[t])
        actions, membranes = model.predict(observations[t], membranes, starts[t], deterministic=True)
        assert actions.tolist() == whole[t].argmax(1).tolist()
        assert membranes is not None
        np.testing.assert_array_equal(membranes[0], state[0].membrane.numpy())
    for layer in range(2):
        step_by_step = torch.cat(spikes["steps"][layer::2])
        assert torch.equal(step_by_step, spikes["whole"][layer]), "spike for spike"
        assert 0.02 < float(step_by_step.mean()) < 0.9


def test_the_first_decision_of_an_episode_knows_nothing_of_the_last() -> None:
    model = learner("pqn").learn(512)
    observations, _ = sequence(5, 4)
    state = None
    for t in range(4):
        _, state = model.predict(observations[t], state, np.zeros(4, dtype=bool), deterministic=True)
    _, fresh = model.predict(observations[4], None, None, deterministic=True)
    _, mixed = model.predict(observations[4], state, np.array([True, False, True, False]), deterministic=True)
    assert fresh is not None
    assert mixed is not None
    for layer in range(2):
        np.testing.assert_array_equal(mixed[layer][[0, 2]], fresh[layer][[0, 2]])
        assert not np.array_equal(mixed[layer][[1, 3]], fresh[layer][[1, 3]])


def test_one_observation_has_one_action() -> None:
    model = learner("pqn").learn(512)
    action, state = model.predict(np.zeros(2, dtype=np.float32), deterministic=True)
    assert np.shape(action) == ()
    assert state is not None
    assert [s.shape for s in state] == [(1, 32), (1, 32)]


def test_random_actions_advance_the_membrane() -> None:
    model = learner("pqn").learn(512)
    observations, _ = sequence(3, 4)
    _, greedy = model.predict(observations[0], deterministic=True)
    model.exploration_rate = 1.0
    _, random = model.predict(observations[0])
    assert greedy is not None
    assert random is not None
    np.testing.assert_array_equal(greedy[0], random[0])


def test_a_truncated_episode_bootstraps_with_the_membrane_it_ended_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learner("pqn", env="ShortCartPole-v0").learn(2500)
    seen = []
    ahead = SpikingPQN._values_ahead

    def spy(self: SpikingPQN, observations: np.ndarray, rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            state = tuple(LIFState(m.membrane[rows]) for m in self.current_membranes())
            expected = self.policy.q_net.q_values(torch.as_tensor(observations), state)[0].max(1).values
            reset = self.policy.q_net(torch.as_tensor(observations)).max(1).values
        values = ahead(self, observations, rows)
        seen.append((values, expected.numpy(), reset.numpy()))
        return values

    monkeypatch.setattr(SpikingPQN, "_values_ahead", spy)
    model.learn(128, reset_num_timesteps=False)
    assert len(seen) > 3, "episodes were truncated"
    for values, expected, _ in seen:
        np.testing.assert_array_equal(values, expected)
    assert any(not np.allclose(values, reset) for values, _, reset in seen)


def test_the_sequence_loss_meets_the_membranes_that_were_played_with() -> None:
    """With the weights unchanged, Q-values after a stored start are those of the play itself."""
    model = learner("dqn", timesteps=2)
    model.learn(2_000)
    replay = model.replay_buffer
    replay.written[:] = 0
    for _ in range(40):  # play on without training
        before = flat_membranes(model.current_membranes())
        assert model._last_obs is not None
        observations = model._last_obs
        values = model.act_values(observations)
        actions = values.argmax(1)
        model._last_obs, _, dones, infos = model.env.step(actions)
        final = np.stack([i.get("terminal_observation", o) for i, o in zip(infos, model._last_obs, strict=True)])
        after = flat_membranes(model.current_membranes())
        # The rewards carry the Q-values played with, to compare with below.
        replay.add(observations, actions, values[:, 0], model.episode_starts, dones, dones, final, before, after)
        model.episode_starts = dones.copy()
    batch = replay.sample(64)
    state = split_membranes(batch.membranes, model.q_net.network.neuron_shapes())
    with torch.no_grad():
        again = model.q_net.q_sequence(batch.observations, state, batch.starts)[..., 0]
    close = torch.isclose(again, batch.rewards, atol=2e-2)[batch.decisions]
    assert float(close.float().mean()) > 0.97, "float16 membranes may flip a spike now and then"


def test_leaks_follow_the_timesteps_so_that_memory_lasts() -> None:
    model = learner("pqn", timesteps=4)
    before = [n.leak.detach() ** 4 for n in model.policy.q_net.network.neurons]
    model.begin_stage(3)
    for neuron, old in zip(model.policy.q_net.network.neurons, before, strict=True):
        torch.testing.assert_close(neuron.leak.detach() ** 3, old)
    kept = [n.leak.detach().clone() for n in model.policy.q_net.network.neurons]
    model.rescale_leak = False
    model.begin_stage(2)
    assert all(torch.equal(n.leak, old) for n, old in zip(model.policy.q_net.network.neurons, kept, strict=True))


def test_time_constants_and_first_normalisation_follow_the_settings() -> None:
    """The defaults are those of a memory; an ablation can take each away."""
    _, recipe = load_recipe("cartpole-masked", "pqn")
    small = {"hidden": (16, 8), "num_envs": 8}

    def built(**settings: object) -> LayeredNetwork:
        model = build_model(replace_settings(recipe, {**small, **settings}), "cpu")
        return model.policy.q_net.network

    def normalised(network: LayeredNetwork) -> list[bool]:
        return [any(isinstance(m, nn.LayerNorm) for m in layer.modules()) for layer in network.maps]

    default, one_leak = built(), built(time_constants=None, leak=0.45)
    stateless, forced = built(stateful=False), built(first_layer_norm=True)
    leaks = default.neurons[0].leak
    assert leaks.shape == (16,)
    assert leaks.min().item() == pytest.approx(math.exp(-1 / 0.2), rel=1e-4)
    assert leaks.max().item() == pytest.approx(math.exp(-1 / 8), rel=1e-4)
    assert one_leak.neurons[0].leak.shape == ()
    assert one_leak.neurons[0].leak.item() == pytest.approx(0.45)
    assert normalised(default) == normalised(one_leak) == [False, True]
    assert normalised(stateless) == normalised(forced) == [True, True]


def test_misuse_is_told_at_construction() -> None:
    venv = make_vectorised("Recall-v0", 2, 0)
    with pytest.raises(UserError, match="SpikingDQN"):
        DQN(SpikingMlpPolicy, venv, policy_kwargs={"stateful": True})
    with pytest.raises(UserError, match="buffer_size"):
        SpikingDQN("MlpPolicy", venv, stateful=True, buffer_size=40)
    with pytest.raises(UserError, match="n_minibatches"):
        SpikingPQN("MlpPolicy", venv, stateful=True, n_minibatches=4)
    assert SpikingPQN("MlpPolicy", venv, stateful=True).n_minibatches == 2, "as many as it can"
    assert SpikingPQN("MlpPolicy", venv).n_minibatches == 4
    with pytest.warns(UserWarning, match="stack"):
        SpikingPQN("MlpPolicy", VecFrameStack(make_vectorised("Recall-v0", 4, 0), 3), stateful=True)
    made = SpikingDQN(SpikingMlpPolicy, venv, stateful=True, buffer_size=1000)
    assert made.policy.stateful


def test_the_pretrained_agent_balances_a_pole_that_it_cannot_see_moving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = load_agent("cartpole-masked", device="cpu")
    assert agent.model.policy.timesteps == 1
    assert evaluate(agent.model, agent.environment, episodes=20, seed=7_000, measure_latency=False).mean_return >= 475
    # What it remembers is what it balances with.
    with_memory = agent.model.policy.q_net.stateful
    agent.model.policy.q_net.stateful = False
    forgetful = evaluate(agent.model, agent.environment, episodes=20, seed=7_000, measure_latency=False)
    assert with_memory
    assert forgetful.mean_return < 150
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cartpole-masked").mkdir()
    with pytest.raises(UserError, match=r"neither a run nor a checkpoint.*pretrained agent: .*cartpole-masked"):
        load_agent("cartpole-masked")  # an existing path wins
