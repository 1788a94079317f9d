"""Both learners: they learn, keep their target in step, and behave as SB3 algorithms do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from spiking_rl import UserError, load_checkpoint
from spiking_rl.agents import SpikingDQN, SpikingPQN, evaluate, load_agent, train
from spiking_rl.agents.policies import RunningNorm, SpikingMlpPolicy
from spiking_rl.envs import make_vectorised


class Match(gym.Env[np.ndarray, int]):
    """Eight steps; the reward is 1 where the action equals the sign that is shown."""

    observation_space = spaces.Box(-3, 3, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 8
        return self._look(), {}

    def _look(self) -> np.ndarray:
        self.sign = int(self.np_random.integers(2))
        return np.array([2 * self.sign - 1, self.np_random.normal()], dtype=np.float32).clip(-3, 3)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.sign)
        self.left -= 1
        return self._look(), reward, self.left == 0, False, {}


gym.register("Match-v0", entry_point=Match)


def learner(
    algo: str, seed: int = 0, timesteps: int = 2, neuron: str = "lif", stateful: bool = False
) -> SpikingPQN | SpikingDQN:
    env = make_vectorised("Match-v0", 4, seed)
    network = {"hidden": [16, 16], "neuron": neuron}
    policy = {"timesteps": timesteps, "network_kwargs": network, "stateful": stateful}
    if algo == "pqn":
        quick = {"gamma": 0.5, "lam": 0.5, "calibration_steps": 256, "learning_rate": 3e-3}
        return SpikingPQN("MlpPolicy", env, seed=seed, device="cpu", policy_kwargs=policy, **quick)
    return SpikingDQN(
        "MlpPolicy",
        env,
        seed=seed,
        device="cpu",
        policy_kwargs=policy,
        learning_rate=3e-3,
        learning_starts=256,
        train_freq=8,
        gradient_steps=8,
        target_update_interval=64,
        exploration_fraction=0.5,
        gamma=0.5,
        n_steps=2,
        buffer_size=2000,
    )


@pytest.fixture(scope="module", params=["pqn", "dqn"])
def trained(request: pytest.FixtureRequest) -> SpikingPQN | SpikingDQN:
    return learner(request.param).learn(3000)


def test_it_learns(trained: SpikingPQN | SpikingDQN) -> None:
    # Chance is 4 of 8, perfect is 8.
    assert evaluate(trained, "Match-v0", episodes=20).mean_return > 7.5
    mean, _ = evaluate_policy(trained, make_vectorised("Match-v0", 4, 99), n_eval_episodes=20)
    assert mean > 7.5


def test_predict_takes_one_observation_or_many(trained: SpikingPQN | SpikingDQN) -> None:
    one, state = trained.predict(np.array([1, 0], dtype=np.float32), deterministic=True)
    assert one.shape == ()
    assert int(one) == 1
    assert state is None
    many, _ = trained.predict(np.array([[1, 0], [-1, 0], [1, 1]], dtype=np.float32), deterministic=True)
    assert many.tolist() == [1, 0, 1]


def test_exploration_reaches_each_environment_on_its_own(trained: SpikingPQN | SpikingDQN) -> None:
    old, trained.exploration_rate = trained.exploration_rate, 0.5
    actions, _ = trained.predict(np.tile(np.array([1, 0], dtype=np.float32), (400, 1)))
    trained.exploration_rate = old
    assert 0.15 < float(np.mean(actions == 0)) < 0.35  # half of them random, half of those wrong


def test_checkpoints_give_the_same_agent_back(trained: SpikingPQN | SpikingDQN, tmp_path: Any) -> None:
    trained.save_checkpoint(tmp_path / "agent", environment="Match-v0", score=1.0)
    again = load_agent(tmp_path / "agent").model
    assert type(again) is type(trained)
    assert again.gamma == trained.gamma
    seen = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32).clip(-3, 3)
    batch = torch.as_tensor(seen)
    torch.testing.assert_close(again.policy.q_net(batch), trained.policy.q_net(batch), rtol=0, atol=0)
    assert load_checkpoint(tmp_path / "agent").config["score"] == 1.0
    with pytest.raises(UserError, match="load_agent"):
        (SpikingDQN if isinstance(trained, SpikingPQN) else SpikingPQN).load_checkpoint(tmp_path / "agent")
    with pytest.raises(UserError, match="other spaces"):
        type(trained).load_checkpoint(tmp_path / "agent", env=make_vectorised("CartPole-v1", 1, 0))


def test_a_loaded_agent_goes_on_learning(trained: SpikingPQN | SpikingDQN, tmp_path: Any) -> None:
    trained.save_checkpoint(tmp_path / "agent", environment="Match-v0")
    again = type(trained).load_checkpoint(tmp_path / "agent", env=make_vectorised("Match-v0", 4, 5))
    before = copy.deepcopy(again.policy.q_net.state_dict())
    again.learn(1024)
    assert any(not torch.equal(v, before[k]) for k, v in again.policy.q_net.state_dict().items())


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_training_moves_every_threshold_and_leak_within_range(algo: str) -> None:
    model = learner(algo).learn(1024)
    before = [(float(n.threshold.detach()), float(n.leak.detach())) for n in model.policy.q_net.network.neurons]
    model.learn(2048, reset_num_timesteps=False)
    for neuron, (threshold, leak) in zip(model.policy.q_net.network.neurons, before, strict=True):
        assert 0 <= float(neuron.leak.detach()) <= 1
        assert float(neuron.threshold.detach()) > 0
        assert float(neuron.threshold.detach()) != threshold
        assert float(neuron.leak.detach()) != leak


def test_a_stage_lowers_t_with_a_fresh_optimiser_and_a_target_in_step() -> None:
    model = learner("dqn").learn(1024)
    assert model.policy.optimizer.state_dict()["state"]
    model.begin_stage(1)
    assert not model.policy.optimizer.state_dict()["state"]
    assert model.policy.q_net.network.timesteps == model.policy.q_net_target.network.timesteps == 1
    assert model.policy_kwargs["timesteps"] == 1
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() > 0
    online, target = model.policy.q_net.state_dict(), model.policy.q_net_target.state_dict()
    assert all(torch.equal(v, target[k]) for k, v in online.items())
    model.learn(512, reset_num_timesteps=False)
    assert model.exploration_rate == pytest.approx(0.05)  # no second exploration ramp


def test_the_target_follows_thresholds_leaks_and_scaling() -> None:
    model = learner("dqn")
    model.learn(1024)
    model.policy.q_net.network.neurons[0].threshold.data.fill_(0.77)
    model.policy.q_net.network.neurons[1].leak.data.fill_(0.33)
    model.policy.q_net.norm.running_mean.fill_(1.5)
    for _ in range(64):
        model._on_step()
    target = model.policy.q_net_target
    assert target.network.neurons[0].threshold.item() == pytest.approx(0.77)
    assert target.network.neurons[1].leak.item() == pytest.approx(0.33)
    assert target.norm.running_mean.tolist() == [1.5, 1.5]


def test_the_relu_control_learns_in_the_same_loop() -> None:
    model = learner("pqn", neuron="relu").learn(3000)
    result = evaluate(model, "Match-v0", episodes=20)
    assert result.mean_return > 7.5
    assert result.timesteps is None
    assert result.spike_rate is None
    assert result.energy_ratio == 1


def test_running_norm_equals_the_statistics_of_all_it_saw() -> None:
    norm = RunningNorm((3,))
    data = torch.randn(100, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 7.0, -2.0])
    for part in data.split([1, 9, 40, 50]):
        norm.update(part)
    torch.testing.assert_close(norm.running_mean, data.mean(0))
    torch.testing.assert_close(norm.running_var, data.var(0, unbiased=False))
    scaled = norm(data)
    torch.testing.assert_close(scaled.std(0, unbiased=False), torch.ones(3), rtol=1e-3, atol=1e-3)
    assert float(norm(torch.full((1, 3), 1e6)).max()) == 10


@pytest.mark.parametrize(
    ("env", "field"),
    [("Pendulum-v1", "action_space"), ("Blackjack-v1", "observation_space")],
)
def test_spaces_that_cannot_work_are_named(env: str, field: str) -> None:
    made = gym.make(env)
    with pytest.raises(UserError, match=field):
        SpikingMlpPolicy(made.observation_space, made.action_space, lambda _: 1e-3)  # type: ignore[arg-type]


def test_the_weight_average_lags_behind_and_is_what_evaluation_sees() -> None:
    model = learner("pqn")
    model.average_decay = 0.5
    weights = model.policy.q_net.network.readout.weight.data
    weights.fill_(1.0)
    model.update_average()
    weights.fill_(3.0)
    model.update_average()
    with model.averaged_weights():
        assert model.policy.q_net.network.readout.weight.detach().unique().tolist() == [2.0]
    assert model.policy.q_net.network.readout.weight.detach().unique().tolist() == [3.0]
    model.begin_stage(1)
    assert model.average is None


def test_the_weight_average_has_the_counters_of_batch_norm_as_they_are() -> None:
    model = learner("pqn")
    model.average_decay = 0.5
    model.policy.q_net.register_buffer("batches", torch.tensor(1))
    model.update_average()
    model.policy.q_net.get_buffer("batches").fill_(4)
    model.update_average()
    assert model.average is not None
    assert model.average["batches"] == 4


def test_learning_again_after_pruning_keeps_its_learning_rate_in_bounds() -> None:
    model = learner("pqn").learn(1024)
    model.begin_stage(1)
    model.learn(512, reset_num_timesteps=False)
    rates: list[float] = []
    update = model._update_learning_rate

    def watch(optimizer: torch.optim.Optimizer) -> None:
        update(optimizer)
        rates.append(model.policy.optimizer.param_groups[0]["lr"])

    model._update_learning_rate = watch  # type: ignore[method-assign, assignment]
    model.learn(512)  # counts its agent steps from zero again, as SB3's learn does
    assert rates
    assert max(rates) <= 3e-3


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_sb3_zip_copy_and_callbacks(algo: str, tmp_path: Any) -> None:
    shared = {"timesteps": 2, "network_kwargs": {"hidden": [16]}}
    given = copy.deepcopy(shared)
    kind = SpikingPQN if algo == "pqn" else SpikingDQN
    model = kind("MlpPolicy", make_vectorised("Match-v0", 2, 0), policy_kwargs=shared, seed=0, device="cpu")
    stop = StopTrainingOnMaxEpisodes(max_episodes=200)
    model.learn(2000, callback=stop)
    assert stop.n_episodes > 10
    model.begin_stage(1)
    assert shared == given, "the caller's dictionary was changed"
    model.save(tmp_path / "agent.zip")
    again = kind.load(tmp_path / "agent.zip", device="cpu")
    assert again.policy.timesteps == 1
    seen = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32).clip(-3, 3)
    actions = model.predict(seen, deterministic=True)[0]
    assert (again.predict(seen, deterministic=True)[0] == actions).all()
    policy = copy.deepcopy(model.policy)
    for group in policy.optimizer.param_groups:
        group["lr"] = 50.0
    policy.q_net(torch.as_tensor(seen)).square().sum().backward()
    for parameter in policy.q_net.parameters():
        parameter.grad = torch.full_like(parameter, -1.0)
    policy.optimizer.step()
    assert all(0 <= n.leak.item() <= 1 for n in policy.q_net.network.neurons), "the copy lost its clamp"


def test_dqn_behind_vecnormalize_scales_what_its_network_sees() -> None:
    env = VecNormalize(make_vectorised("Match-v0", 2, 0), norm_reward=False)
    model = SpikingDQN("MlpPolicy", env, seed=0, device="cpu", learning_starts=100, policy_kwargs={"timesteps": 1})
    env.obs_rms.mean[:] = 100.0
    env.obs_rms.count = 1e9  # the wrapper shifts everything by 100
    model.learn(400)
    assert float(model.policy.q_net.norm.running_mean.abs().max()) > 5


def test_a_run_starts_from_a_trained_agent(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"hidden": (32, 32), "gamma": 0.5, "report_episodes": 0, "video_episodes": 0}
    relu = str(tmp_path / "relu")
    train("Match-v0", neuron="relu", agent_steps=8000, learning_rate=3e-3, lam=0.5, run=relu, seed=1, **quick)
    # Hardly any training: what they can do, they got from there.
    hardly: dict[str, Any] = {"timesteps": 5, "prune_to": 5, "agent_steps": 512, "learning_rate": 1e-5, "seed": 2}
    hardly |= {"eval_every": 512, **quick}
    spiking = str(tmp_path / "spiking")
    converted = train("Match-v0", run=spiking, start_from=relu, **hardly)
    assert converted.policy.q_net.network.spiking
    assert evaluate(converted, "Match-v0", episodes=20).mean_return > 7
    fresh = train("Match-v0", **hardly)
    assert evaluate(fresh, "Match-v0", episodes=20).mean_return < 7
    # By the other learner, at another T.
    replay: dict[str, Any] = {"buffer_size": 600, "learning_starts": 100}
    lower = train("Match-v0", algo="dqn", start_from=spiking, **{**hardly, "timesteps": 2, "prune_to": 2}, **replay)
    assert evaluate(lower, "Match-v0", episodes=20).mean_return > 7
    thresholds = [[n.threshold for n in model.policy.q_net.network.neurons] for model in (converted, lower)]
    torch.testing.assert_close(thresholds[0], thresholds[1], rtol=0.05, atol=0)


def test_an_imitating_agent_learns_the_values_of_its_teacher(tmp_path: Path) -> None:
    """From play without any reward it learns what the teacher knows, and nothing where it stops."""
    quick: dict[str, Any] = {"hidden": (32, 32), "gamma": 0.5, "report_episodes": 0, "video_episodes": 0}
    relu = str(tmp_path / "relu")
    train("Match-v0", neuron="relu", agent_steps=8000, learning_rate=3e-3, lam=0.5, run=relu, seed=1, **quick)
    taught: dict[str, Any] = {"timesteps": 1, "prune_to": 1, "agent_steps": 6000, "learning_rate": 3e-3, "seed": 2}
    taught |= {"reward_scale": 1e-9, "average_decay": 0.0, "eval_every": 6000, **quick}
    student = train("Match-v0", start_from=relu, imitation=1.0, **taught)
    teacher = load_agent(relu).model.policy.q_net
    seen = torch.stack([torch.tensor([s, x]) for s in (-1.0, 1.0) for x in (-1.0, 0.0, 1.0)])
    with torch.no_grad():
        wanted, got = teacher(seen), student.policy.q_net(seen)
    assert (got - wanted).abs().mean() < 0.2 * wanted.abs().mean()
    alone = train("Match-v0", start_from=relu, **taught)
    with torch.no_grad():
        forgot = alone.policy.q_net(seen)
    assert (forgot - wanted).abs().mean() > 0.5 * wanted.abs().mean(), "its own rewards are nothing"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start_from": "nowhere"}, "neither a run nor a checkpoint"),
        ({"start_from": "cartpole"}, "other spaces"),
    ],
)
def test_a_start_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train("Match-v0", run=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_stateless_agent_cannot_be_the_start_of_a_stateful_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is stateless, and a stateful agent"):
        train("CartPole-v1", stateful=True, start_from="cartpole", run=tmp_path / "run")
    with pytest.raises(UserError, match="a ReLU network cannot start from it"):
        train("CartPole-v1", neuron="relu", start_from="cartpole", run=tmp_path / "run")


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
@pytest.mark.parametrize("neuron", ["relu", "lif"])
@pytest.mark.parametrize("setting", ["precision", "spike_precision"])
def test_bfloat16_trains_the_networks_it_is_asked_for(algo: str, neuron: str, setting: str) -> None:
    def trained(precision: str) -> torch.Tensor:
        model = learner(algo, neuron=neuron)
        setattr(model, setting, precision)
        model.learn(640)
        weights = torch.nn.utils.parameters_to_vector(model.policy.q_net.parameters()).detach()
        assert weights.dtype == torch.float32
        return weights

    same = torch.equal(trained("bfloat16"), trained("float32"))
    assert same == ((neuron == "lif") == (setting == "precision"))


@pytest.mark.parametrize("neuron", ["relu", "lif"])
def test_networks_learn_in_bfloat16(neuron: str) -> None:
    model = learner("pqn", neuron=neuron)
    model.precision = model.spike_precision = "bfloat16"
    model.learn(5_000)
    assert evaluate(model, "Match-v0", episodes=20, measure_latency=False).mean_return > 7


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_stateful_networks_are_trained_in_bfloat16_too(algo: str) -> None:
    weights = []
    for precision in ("float32", "bfloat16"):
        model = learner(algo, stateful=True)
        model.spike_precision = precision  # type: ignore[assignment]
        model.learn(640)
        weights.append(torch.nn.utils.parameters_to_vector(model.policy.q_net.parameters()).detach())
    assert weights[1].isfinite().all()
    assert not torch.equal(*weights)
    assert (weights[0] - weights[1]).norm() < 0.2 * weights[0].norm(), "it is the same training, rounded"


def test_small_updates_are_not_spent_on_launching_operations() -> None:
    model = SpikingPQN("MlpPolicy", "CartPole-v1", policy_kwargs={"network_kwargs": {"hidden": (8,)}})
    assert isinstance(model.policy.optimizer, torch.optim.RAdam)
    assert model.policy.optimizer.param_groups[0]["foreach"]
