"""Evaluation: named seeds, honest intervals, and a model left as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from spiking_rl import UserError
from spiking_rl.agents import SpikingPQN, evaluate, load_agent, prune, record, report
from spiking_rl.agents.evaluation import REPORT_SEED, SELECTION_SEED
from spiking_rl.envs import make_vectorised
from spiking_rl.runs import RunFolder


def test_scores_are_those_of_playing_each_seed_alone(small_run: Path) -> None:
    agent = load_agent(small_run)
    result = evaluate(agent.model, "CartPole-v1", episodes=30, seed=500, measure_latency=False)
    env = gym.make("CartPole-v1")
    for k in (0, 7, 29):
        observation, _ = env.reset(seed=500 + k)
        total, over = 0.0, False
        while not over:
            action, _ = agent.model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(int(action))
            total += float(reward)
            over = terminated or truncated
        assert result.returns[k] == total
    assert result.mean_return == pytest.approx(np.mean(result.returns))
    assert result.ci95 == pytest.approx(1.96 * np.std(result.returns, ddof=1) / np.sqrt(30))


def test_episodes_with_the_same_actions_count_as_one(small_run: Path) -> None:
    agent = load_agent(small_run)
    played = record(agent.model, "CartPole-v1", episodes=12, seed=500)
    episodes = np.split(played.actions, np.flatnonzero(played.episode_starts)[1:])
    distinct = len({tuple(actions.tolist()) for actions in episodes})
    result = evaluate(agent.model, "CartPole-v1", episodes=np.int64(12), seed=500, measure_latency=False)  # type: ignore[arg-type]
    assert result.distinct_episodes == distinct
    same = gym.spec("CartPole-v1").make().reset(seed=1)[0]
    gym.register("SameStart-v0", entry_point=lambda: SameStart(same), max_episode_steps=500)
    try:
        assert evaluate(agent.model, "SameStart-v0", episodes=5, measure_latency=False).distinct_episodes == 1
    finally:
        del gym.registry["SameStart-v0"]


class SameStart(CartPoleEnv):
    """CartPole whose episodes all begin alike."""

    def __init__(self, start: np.ndarray) -> None:
        super().__init__()
        self.start = start

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.start.copy()
        return self.start.copy(), {}


class LateParting(gym.Env[np.ndarray, int]):
    """All episodes look alike for four steps, then some do; the reward is the action."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.ways = [np.random.default_rng(0), np.random.default_rng((seed or 0) % 3)]
        self.steps = 0
        return self._look(), {}

    def _look(self) -> np.ndarray:
        return self.ways[self.steps >= 4].uniform(-1, 1, 3).astype(np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._look(), float(action), False, self.steps == 12, {}


@pytest.mark.parametrize("stateful", [False, True])
def test_episodes_that_look_alike_for_a_while_are_scored_as_if_each_were_alone(stateful: bool) -> None:
    gym.register("LateParting-v0", entry_point=LateParting, max_episode_steps=12)
    try:
        env = make_vectorised("LateParting-v0", 2, 0)
        policy = {"timesteps": 2, "network_kwargs": {"hidden": [32, 32], "threshold": 0.3}}
        model = SpikingPQN("MlpPolicy", env, stateful=stateful, n_minibatches=1, policy_kwargs=policy, seed=0)
        torch.nn.init.normal_(model.policy.q_net.network.readout.weight)  # type: ignore[arg-type]
        together = evaluate(model, "LateParting-v0", episodes=7, seed=30, measure_latency=False)
        alone = [evaluate(model, "LateParting-v0", episodes=1, seed=30 + k, measure_latency=False) for k in range(7)]
    finally:
        del gym.registry["LateParting-v0"]
    assert together.returns == [result.mean_return for result in alone]
    assert together.distinct_episodes == 3
    assert together.spike_rate is not None
    for layer, rate in together.spike_rate.items():
        assert 0 < rate == pytest.approx(np.mean([r.spike_rate[layer] for r in alone if r.spike_rate]))


def test_selection_report_and_training_use_disjoint_seeds() -> None:
    most = 100_000  # episodes of an evaluation, generously
    assert SELECTION_SEED + most < REPORT_SEED
    assert SELECTION_SEED > 2**20  # training environments are seeded seed, seed + 1, ...


def test_another_t_can_be_played_and_the_model_stays(small_run: Path) -> None:
    agent = load_agent(small_run, timesteps=3)
    assert agent.model.policy.timesteps == 3
    assert evaluate(agent.model, "CartPole-v1", episodes=1, timesteps=5).timesteps == 5
    assert agent.model.policy.timesteps == 3


def test_a_run_gives_its_lowest_t_unless_asked(small_run: Path) -> None:
    assert load_agent(small_run).model.policy.timesteps == 2
    with pytest.raises(UserError, match="T=3, T=2"):
        load_agent(small_run, timesteps=4)
    with pytest.raises(UserError, match="name the run"):
        load_agent(small_run / "checkpoints" / "T3", timesteps=2)


@pytest.mark.parametrize("episodes", [0, -3, 2.5])
def test_a_bad_number_of_episodes_is_named(small_run: Path, episodes: object) -> None:
    with pytest.raises(UserError, match="episodes"):
        evaluate(load_agent(small_run).model, "CartPole-v1", episodes=episodes)  # type: ignore[arg-type]


def test_a_foreign_model_is_named() -> None:
    from stable_baselines3 import DQN

    with pytest.raises(UserError, match="evaluate_policy"):
        evaluate(DQN("MlpPolicy", "CartPole-v1", buffer_size=10), "CartPole-v1")


def test_pruning_a_model_in_python(small_run: Path) -> None:
    model = load_agent(small_run / "checkpoints" / "T3").model
    venv = make_vectorised("CartPole-v1", 2, 0)
    model = type(model).load_checkpoint(small_run / "checkpoints" / "T3", env=venv)
    pruned = prune(model, "CartPole-v1", to=1, agent_steps=512, eval_every=256, eval_episodes=2)
    assert pruned is model
    assert pruned.policy.timesteps == 1
    with pytest.raises(UserError, match="T=1 already"):
        prune(model, "CartPole-v1", to=1)


@pytest.mark.parametrize("follows", [True, False])
def test_prune_leaves_leaks_alone_where_it_is_told_to(follows: bool) -> None:
    policy = {"timesteps": 2, "network_kwargs": {"hidden": [8, 8]}}
    model = SpikingPQN("MlpPolicy", make_vectorised("CartPole-v1", 16, 0), stateful=True, policy_kwargs=policy, seed=0)
    model.learn(1500)
    before = model.policy.q_net.network.neurons[0].leak.detach().clone()
    settings = {"eval_every": 10_000, "eval_episodes": 1, "n_steps": 8, "rescale_leak": follows}
    with pytest.raises(UserError, match=r"n_steps = 8: is the model's own, there 32"):
        prune(model, "CartPole-v1", to=1, agent_steps=128, **settings)
    with pytest.raises(UserError, match=r"learning_rate = 1e-09: is the model's own, there 0.001"):
        prune(model, "CartPole-v1", to=1, learning_rate=1e-9)
    model.lr_schedule = lambda left: 1e-3 * (1 - left)  # begins at 0
    prune(model, "CartPole-v1", to=1, agent_steps=128, **{**settings, "n_steps": 32})
    after = model.policy.q_net.network.neurons[0].leak.detach()
    expected, other = (before**2, before) if follows else (before, before**2)
    assert (after - expected).abs().mean() < 0.3 * (after - other).abs().mean()


class OneWay(gym.Env[np.ndarray, int]):
    """Always begins alike, and ends with the first action 1."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        super().reset(seed=seed)
        return np.full(3, 0.5, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        return np.full(3, 0.5, np.float32), 1.0, action == 1, False, {}


def test_every_episode_of_a_poisson_code_draws_its_own_spikes() -> None:
    gym.register("OneWay-v0", entry_point=OneWay, max_episode_steps=50)
    kwargs = {"timesteps": 1, "network_kwargs": {"hidden": [16], "encoding": "poisson", "layer_norm": False}}
    model = SpikingPQN("MlpPolicy", OneWay(), policy_kwargs=kwargs, seed=0)
    readout = model.policy.q_net.network.readout
    with torch.no_grad():
        readout.weight.normal_()
        for neuron in model.policy.q_net.network.neurons:
            neuron.threshold.fill_(0.05)
    result = evaluate(model, "OneWay-v0", episodes=40, measure_latency=False)
    assert len(set(result.returns)) > 1
    assert result.ci95 > 0


class Endless(gym.Env[np.ndarray, int]):
    """Never ends an episode."""

    observation_space = gym.make("CartPole-v1").observation_space
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        return np.zeros(4, np.float32), 1.0, False, False, {}


def test_an_episode_that_never_ends_is_cut(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gym.register("Endless-v0", entry_point=Endless)
    monkeypatch.setattr("spiking_rl.agents.evaluation.MAX_DECISIONS", 50)
    model = load_agent(small_run).model
    assert evaluate(model, "Endless-v0", episodes=3, measure_latency=False).returns == [50, 50, 50]


def test_a_bad_seed_or_another_environment_is_named(small_run: Path) -> None:
    model = load_agent(small_run).model
    with pytest.raises(UserError, match="seed = -1"):
        evaluate(model, "CartPole-v1", seed=-1)
    with pytest.raises(UserError, match=r"Acrobot-v1.*other spaces"):
        evaluate(model, "Acrobot-v1")


def test_a_report_that_was_cut_short_plays_on_where_it_was(small_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(small_run, run.path)
    played: list[int | None] = []
    score = report.evaluate

    def counted(model: Any, env: str, **options: Any) -> Any:
        played.append(model.policy.q_net.network.timesteps)
        if stops and len(set(played)) > 1:
            raise KeyboardInterrupt
        return score(model, env, **options)

    monkeypatch.setattr(report, "evaluate", counted)
    stops = True
    with pytest.raises(KeyboardInterrupt):
        report.evaluate_run(run, 3, "command")
    assert not run.results.exists()
    first, *_ = run.checkpoint_timesteps()
    stops, played = False, []
    rows = report.evaluate_run(run, 3, "command")["rows"]
    assert first not in played
    assert [row["timesteps"] for row in rows] == run.checkpoint_timesteps()
    assert not run.report.exists()
    # With other episodes, or other weights, nothing is taken over.
    run.write_report({"commit": None, "episodes": 3, "rows": [{"timesteps": first, "mean_return": 1e9}]})
    played = []
    assert report.evaluate_run(run, 2, "command")["rows"][0]["mean_return"] < 1e9
    assert first in played
