"""What users of Stable-Baselines3 do with agents beside training and playing them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from spiking_rl import LIF, TemporalPruning
from spiking_rl.agents import (
    DeployedAgent,
    SpikingActorCriticPolicy,
    SpikingDQN,
    SpikingFeaturesExtractor,
    SpikingMlpPolicy,
    SpikingPQN,
    TemporalPruningCallback,
    evaluate,
    load_agent,
    prune,
    record,
)
from spiking_rl.agents.exporting import agent_onnx
from spiking_rl.agents.replay import SequenceReplay
from spiking_rl.agents.spaces import space_from_json, space_to_json
from spiking_rl.errors import UserError

SMALL = {"timesteps": 1, "network_kwargs": {"hidden": [8]}}


def test_an_agent_loaded_to_play_learns_on_in_an_environment(tmp_path: Path) -> None:
    model = SpikingDQN(
        "MlpPolicy", "CartPole-v1", learning_rate=1e-3, learning_starts=50, buffer_size=500, policy_kwargs=SMALL
    )
    model.learn(100)
    model.save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    loaded = load_agent(tmp_path / "agent").model
    assert isinstance(loaded, SpikingDQN)
    loaded.save_checkpoint(tmp_path / "again", environment="CartPole-v1")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "agent" / "config.json").read_text()
    observations = torch.randn(5, 4).numpy()
    before = loaded.predict(observations, deterministic=True)[0]
    loaded.set_env(gym.make("CartPole-v1"))
    assert (loaded.predict(observations, deterministic=True)[0] == before).all()
    weights = [p.clone() for p in loaded.q_net.parameters()]
    loaded.learn(200)
    assert loaded.buffer_size == 500
    assert loaded._n_updates > 0
    assert not all(torch.equal(a, b) for a, b in zip(weights, loaded.q_net.parameters(), strict=True))


def test_an_agent_is_loaded_into_an_environment_to_learn_on_in() -> None:
    env = make_vec_env("CartPole-v1", 3, seed=0)
    model = load_agent("cartpole", env=env).model
    weights = [p.clone() for p in model.policy.q_net.parameters()]
    model.learn(1024)
    assert model.n_envs == 3
    assert not all(torch.equal(a, b) for a, b in zip(weights, model.policy.q_net.parameters(), strict=True))
    with pytest.raises(UserError, match=r"env = .*other spaces"):
        load_agent("cartpole", env="Acrobot-v1")


def test_a_stateful_agent_learns_on_in_fewer_environments_than_its_recipe_had() -> None:
    model = load_agent("cartpole-masked", env="spiking_rl/CartPoleMasked-v1").model
    assert (model.n_envs, model.n_minibatches) == (1, 8)  # type: ignore[union-attr]
    model.learn(64)


def test_a_refused_environment_costs_an_agent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    model = load_agent("cartpole-masked", device="cpu").model

    def actions() -> list[int]:
        state, chosen = None, []
        for row in seen:
            action, state = model.predict(row, state, deterministic=True)
            chosen.append(int(action))
        return chosen

    wanted = actions()
    assert 0 < sum(wanted) < 40

    def refuse(*_: Any) -> None:
        raise UserError("env", "any", "is refused when a new network is there already")

    with monkeypatch.context() as patch:
        patch.setattr(SpikingPQN, "_finish_setup", refuse)
        with pytest.raises(UserError, match="is refused"):
            model.set_env(gym.make("spiking_rl/CartPoleMasked-v1"))
    assert model.plays_only
    assert model.env is None
    assert actions() == wanted
    model.set_env(gym.make("spiking_rl/CartPoleMasked-v1"))
    assert actions() == wanted


def test_a_refused_environment_costs_a_replaying_agent_nothing(tmp_path: Path) -> None:
    made = SpikingDQN("MlpPolicy", "CartPole-v1", stateful=True, buffer_size=1000, policy_kwargs=SMALL)
    made.save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    model = load_agent(tmp_path / "agent").model
    assert isinstance(model, SpikingDQN)
    model.buffer_size, model.learning_starts = 5, 50
    with pytest.raises(UserError, match="buffer_size = 5"):
        model.set_env(gym.make("CartPole-v1"))
    assert model.plays_only
    model.buffer_size = 1000
    model.set_env(gym.make("CartPole-v1"))
    model.learn(100)


@pytest.mark.parametrize("algorithm", [SpikingPQN, SpikingDQN])
def test_weights_that_are_set_are_not_calibrated_again(algorithm: type[SpikingPQN | SpikingDQN]) -> None:
    options = {"policy_kwargs": SMALL, "learning_rate": 0.0, "seed": 0}
    options |= {"learning_starts": 50} if algorithm is SpikingDQN else {"calibration_steps": 64}
    model = algorithm("MlpPolicy", "CartPole-v1", **options)  # type: ignore[arg-type]
    model.learn(100)
    other = algorithm("MlpPolicy", "CartPole-v1", **{**options, "seed": 1})  # type: ignore[arg-type]
    other.set_parameters(model.get_parameters())
    other.learn(100)
    thresholds = [[float(n.threshold.detach()) for n in m.policy.q_net.network.neurons] for m in (model, other)]
    assert thresholds[0] == thresholds[1]
    fresh = algorithm("MlpPolicy", "CartPole-v1", **options)  # type: ignore[arg-type]
    fresh.set_parameters(algorithm("MlpPolicy", "CartPole-v1", **options).get_parameters())  # type: ignore[arg-type]
    assert not fresh.calibrated, "what was never set from data is still to be"


@pytest.mark.parametrize("norm_obs", [True, False])
def test_an_agent_of_scaled_observations_is_not_scored_without_them(norm_obs: bool, tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0), norm_obs=norm_obs)
    model = SpikingPQN("MlpPolicy", env, policy_kwargs={**SMALL, "timesteps": 2}, calibration_steps=64, seed=0)
    model.learn(256)
    model.save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    model.save(tmp_path / "zip")
    for again in (model, load_agent(tmp_path / "agent").model, SpikingPQN.load(tmp_path / "zip")):
        if norm_obs:
            with pytest.raises(UserError, match="learned behind VecNormalize"):
                evaluate(again, "CartPole-v1", episodes=1)
            with pytest.raises(UserError, match="learned behind VecNormalize"):
                agent_onnx(again)
            with pytest.raises(UserError, match="learned behind VecNormalize"):
                prune(again, "CartPole-v1", agent_steps=64, to=1)
        else:
            assert evaluate(again, "CartPole-v1", episodes=1, measure_latency=False).episodes == 1


def test_a_short_run_is_not_all_random_play() -> None:
    model = SpikingPQN("MlpPolicy", make_vec_env("CartPole-v1", 4), policy_kwargs=SMALL, n_steps=8)
    updates: list[int] = []
    train, model.train = model.train, lambda rollout: (updates.append(model.num_timesteps), train(rollout))  # type: ignore[assignment, method-assign, misc]
    model.learn(500)
    assert model.calibrated
    assert updates[0] < 300
    assert len(updates) >= 7


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_a_zip_of_an_agent_that_was_loaded_to_play_learns(tmp_path: Path, stateful: bool, later: bool) -> None:
    options = {"learning_starts": 50, "buffer_size": 500, "policy_kwargs": SMALL}
    SpikingDQN("MlpPolicy", "CartPole-v1", stateful=stateful, **options).save_checkpoint(  # type: ignore[arg-type]
        tmp_path / "agent", environment="CartPole-v1"
    )
    load_agent(tmp_path / "agent").model.save(tmp_path / "agent.zip")
    env = gym.make("CartPole-v1")
    model = SpikingDQN.load(tmp_path / "agent.zip", env=None if later else env)
    if later:
        model.set_env(env)
    model.learn(300)
    assert model._n_updates > 10
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() > 250


def test_an_agent_loaded_to_play_leaves_the_kind_of_replay_to_its_environment(tmp_path: Path) -> None:
    model = SpikingDQN("MlpPolicy", "CartPole-v1", buffer_size=500, n_steps=3, policy_kwargs=SMALL)
    model.save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    loaded = load_agent(tmp_path / "agent").model
    assert isinstance(loaded, SpikingDQN)
    assert loaded.replay_buffer_class is None
    loaded.set_env(gym.make("CartPole-v1"))
    assert type(loaded.replay_buffer) is type(model.replay_buffer)


class Counting(gym.Env[np.ndarray, int]):
    """Observes 1000 times its episode's number, plus the step in it; pays the number."""

    observation_space = gym.spaces.Box(0, 1e6, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    made = 0

    def _observation(self) -> np.ndarray:
        return np.array([1000 * self.episode + self.time], np.float32)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        super().reset(seed=seed)
        Counting.made += 1
        self.episode, self.time = Counting.made, 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self.time += 1
        return self._observation(), float(self.episode), self.time % 17 == 0, False, {}


class StopAt(BaseCallback):
    """Ends learning after so many agent steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.steps


@pytest.mark.parametrize("how", ["again", "another env", "from a file", "stopped", "stopped at an end"])
@pytest.mark.parametrize("stateful", [False, True])
def test_no_return_reaches_into_another_episode(tmp_path: Path, stateful: bool, how: str) -> None:
    options = {"buffer_size": 500, "learning_starts": 400, "n_steps": 3, "gamma": 1.0, "reward_scale": 1.0}
    model = SpikingDQN("MlpPolicy", Counting(), stateful=stateful, policy_kwargs=SMALL, **options)  # type: ignore[arg-type]
    stops = {"stopped": 40, "stopped at an end": 34}
    model.learn(40 if how not in stops else 90, StopAt(stops[how]) if how in stops else None)
    if how == "another env":
        model.set_env(Counting())
    if how == "from a file":
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "replay")
        model = SpikingDQN.load(tmp_path / "model", env=Counting())
        model.load_replay_buffer(tmp_path / "replay")
    model.learn(40, reset_num_timesteps=how not in {"from a file", *stops})
    replay = model.replay_buffer
    assert replay is not None
    if isinstance(replay, SequenceReplay):
        episodes = replay.observations[: replay.pos or int(replay.written[0]), 0, 0] // 1000
        decisions = replay.decisions[: len(episodes), 0]
        changes = np.flatnonzero(np.diff(episodes))
        assert len(changes) >= 4
        assert not decisions[changes].any(), "an episode ends with a frame without action"
        return
    if how in stops:
        assert replay.size() == stops[how] + 40, "the step at which learning was ended is kept"
    batch = replay.sample(2000)
    before, after = batch.observations.flatten() // 1000, batch.next_observations.flatten() // 1000
    assert torch.equal(before, after)
    assert set((batch.rewards.flatten() / before).unique().tolist()) <= {1.0, 2.0, 3.0}
    assert len(before.unique()) >= 5


def test_the_least_replay_of_a_stateful_agent_is_one_to_learn_from() -> None:
    options = {"n_steps": 3, "burn_in": 8, "sequence_length": 16, "learning_starts": 20, "policy_kwargs": SMALL}
    with pytest.raises(UserError, match=r"buffer_size = 39: holds no sequence; 40 frames are the least"):
        SpikingDQN("MlpPolicy", "CartPole-v1", stateful=True, buffer_size=39, **options)  # type: ignore[arg-type]
    model = SpikingDQN("MlpPolicy", "CartPole-v1", stateful=True, buffer_size=40, **options)  # type: ignore[arg-type]
    model.learn(120)
    assert model._n_updates > 10


@pytest.mark.parametrize("stateful", [False, True])
def test_replay_buffers_are_saved_and_loaded(tmp_path: Path, stateful: bool) -> None:
    options = {"buffer_size": 1000, "learning_starts": 50, "policy_kwargs": SMALL}
    model = SpikingDQN("MlpPolicy", "CartPole-v1", stateful=stateful, **options)  # type: ignore[arg-type]
    model.learn(100)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    again = SpikingDQN.load(tmp_path / "model", env=gym.make("CartPole-v1"))
    again.load_replay_buffer(tmp_path / "replay")
    assert again.replay_buffer is not None
    assert again.replay_buffer.size() == model.replay_buffer.size() > 0  # type: ignore[union-attr]
    again.learn(50, reset_num_timesteps=False)
    other = SpikingDQN("MlpPolicy", "CartPole-v1", stateful=not stateful, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"replay_buffer = .*which this agent learns from"):
        other.load_replay_buffer(tmp_path / "replay")


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 2**63 - 1, np.int64), (0, 2**64 - 1, np.uint64), (-np.inf, 0.1, np.float32)]
)
def test_spaces_come_back_as_they_are(low: float, high: float, dtype: type[np.generic]) -> None:
    space = gym.spaces.Box(low, high, (3,), dtype)  # type: ignore[arg-type]
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space


def test_a_stateful_agent_takes_no_other_replay() -> None:
    with pytest.raises(UserError, match="replay_buffer_class = 'ReplayBuffer'"):
        SpikingDQN("MlpPolicy", "CartPole-v1", stateful=True, replay_buffer_class=ReplayBuffer, policy_kwargs=SMALL)


def test_random_play_leaves_half_of_the_first_stage_to_learn_in() -> None:
    pruning = TemporalPruning(2, 1, first_budget=400, stage_budget=200)
    model = SpikingPQN("MlpPolicy", make_vec_env("CartPole-v1", 4), policy_kwargs={**SMALL, "timesteps": 2}, n_steps=8)
    learned: dict[int, int] = {}
    train = model.train

    def counted(rollout: Any) -> None:
        learned[model.policy.timesteps] = learned.get(model.policy.timesteps, 0) + 1
        train(rollout)

    model.train = counted  # type: ignore[method-assign]
    model.learn(10_000, callback=TemporalPruningCallback(pruning, report_every=100))
    assert pruning.finished
    assert learned[2] >= 5
    assert learned[1] >= 5


def test_a_first_stage_before_learning_starts_is_refused() -> None:
    model = SpikingDQN("MlpPolicy", "CartPole-v1", learning_starts=500, policy_kwargs={**SMALL, "timesteps": 2})
    callback = TemporalPruningCallback(TemporalPruning(2, 1, first_budget=500, stage_budget=200))
    with pytest.raises(UserError, match=r"learning_starts = 500: leaves nothing of the 500 agent steps"):
        model.learn(10_000, callback=callback)
    assert model.num_timesteps == 0


def test_no_stage_begins_that_nobody_trains() -> None:
    pruning = TemporalPruning(3, 1, 600, 300)
    callback = TemporalPruningCallback(pruning)
    model = PPO(SpikingActorCriticPolicy, "CartPole-v1", n_steps=512, policy_kwargs={**SMALL, "timesteps": 3}, seed=0)
    with pytest.warns(UserWarning, match="not finished: the model is at T=2 of 1"):
        model.learn(int(pruning.remaining), callback=callback)
    assert model.policy.timesteps == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(2000, callback=callback)
    assert pruning.finished
    assert model.policy.timesteps == 1
    assert [stage.reports > 0 for stage in pruning.stages] == [True] * 3


def test_an_extractor_keeps_its_parameters_in_range_after_loading(tmp_path: Path) -> None:
    options = {
        "features_extractor_class": SpikingFeaturesExtractor,
        "net_arch": [],
        "features_extractor_kwargs": {"timesteps": 2, "network_kwargs": {"hidden": [8]}},
    }
    A2C("MlpPolicy", "CartPole-v1", policy_kwargs=options, learning_rate=0.3, seed=0).save(tmp_path / "model")
    model = A2C.load(tmp_path / "model", env=gym.make("CartPole-v1"))
    model.learn(200)
    model.policy.set_training_mode(True)
    model.policy.extract_features(torch.zeros(1, 4))  # type: ignore[arg-type]
    for layer in (m for m in model.policy.modules() if isinstance(m, LIF)):
        assert layer.is_in_range()


class Stop(BaseCallback):
    ended = 0

    def _on_step(self) -> bool:
        return self.n_calls < 5

    def _on_training_end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("kind", [SpikingPQN, SpikingDQN])
def test_a_callback_that_stops_training_is_told_of_its_end(kind: type[SpikingPQN] | type[SpikingDQN]) -> None:
    stop = Stop()
    kind("MlpPolicy", "CartPole-v1", policy_kwargs=SMALL).learn(1000, callback=stop)
    assert stop.ended == 1


def test_timesteps_in_policy_kwargs_are_saved(tmp_path: Path) -> None:
    model = DQN(SpikingMlpPolicy, "CartPole-v1", buffer_size=100, policy_kwargs={**SMALL, "timesteps": 4})
    model.policy.set_timesteps(1)  # type: ignore[operator]
    model.policy_kwargs["timesteps"] = 1
    model.save(tmp_path / "model")
    assert DQN.load(tmp_path / "model").policy.timesteps == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"net_arch": [64]}, r"net_arch = \[64\]: is no option of spiking policies"),
        ({"network_kwargs": {"hidden": 64}}, "hidden = 64: must list"),
        ({"network_kwargs": {"gamma": -1.0}}, "gamma = -1.0: must be positive"),
        ({"network_kwargs": {"gamma": float("nan")}}, "gamma = nan: must be positive"),
        ({"timesteps": 0}, "timesteps = 0: must be a whole number"),
    ],
)
def test_what_spiking_policies_do_not_take_is_told(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DQN(SpikingMlpPolicy, "CartPole-v1", buffer_size=100, policy_kwargs=options)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    options = {"timesteps": np.int64(2), "network_kwargs": {"hidden": [np.int64(8)]}}
    model = DQN(SpikingMlpPolicy, "CartPole-v1", buffer_size=100, policy_kwargs=options)
    assert model.policy.timesteps == 2
    model.save(tmp_path / "model")
    assert DQN.load(tmp_path / "model").policy.timesteps == 2


def test_an_environment_to_evaluate_in_is_no_name() -> None:
    with pytest.raises(UserError, match=r"eval_env = 'CartPole-v1': .*gymnasium.make"):
        TemporalPruningCallback(TemporalPruning(2, 1, 10, 10), eval_env="CartPole-v1")  # type: ignore[arg-type]


def test_a_checkpoint_knows_where_its_agent_plays(tmp_path: Path) -> None:
    model = SpikingPQN("MlpPolicy", make_vec_env("CartPole-v1", 4), policy_kwargs=dict(SMALL))
    model.save_checkpoint(tmp_path / "agent")
    assert load_agent(tmp_path / "agent").trained_in == "CartPole-v1"
    SpikingPQN.load_checkpoint(tmp_path / "agent").save_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"names no environment; .* SpikingPQN\.load_checkpoint"):
        load_agent(tmp_path / "nowhere")
    for fact in ({"timesteps": 7}, {"algo": "dqn"}, {"policy": {}}):
        with pytest.raises(UserError, match="stated by the agent itself"):
            model.save_checkpoint(tmp_path / "agent", **fact)
    assert load_agent(tmp_path / "agent").model.policy.timesteps == 1


def test_an_optimiser_that_a_checkpoint_does_not_keep_is_told(tmp_path: Path) -> None:
    kwargs = {**SMALL, "optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
    model = SpikingDQN("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs)
    with pytest.warns(UserWarning, match="does not keep optimizer_class"):
        model.save_checkpoint(tmp_path / "agent")


class Order(BaseCallback):
    """Counts steps of a rollout, as a callback may that begins to count where SB3 says that one begins."""

    def _on_rollout_start(self) -> None:
        self.seen = 0

    def _on_step(self) -> bool:
        self.seen += 1
        assert self.locals["new_obs"].shape == (4, 4)
        return True


def test_callbacks_are_told_of_a_rollout_before_its_first_step() -> None:
    counter = Order()
    model = SpikingPQN("MlpPolicy", make_vec_env("CartPole-v1", 4), policy_kwargs=dict(SMALL), n_steps=8)
    model.learn(200, callback=counter)
    assert counter.seen == 8


def test_scaled_images_have_convolutions_too() -> None:
    space = gym.spaces.Box(0, 1, (1, 40, 40), np.float32)
    layers = SpikingFeaturesExtractor(space, timesteps=1, normalize_images=False).network
    assert any(isinstance(module, torch.nn.Conv2d) for module in layers.modules())


def test_what_the_last_step_moved_is_not_saved(tmp_path: Path) -> None:
    kwargs = {"features_extractor_class": SpikingFeaturesExtractor, "features_extractor_kwargs": {"timesteps": 2}}
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, n_steps=8, batch_size=8)
    neuron = next(m for m in model.policy.modules() if isinstance(m, LIF))
    with torch.no_grad():
        neuron.leak.fill_(1.25)
    model.save(tmp_path / "model")
    assert neuron.leak == 1
    assert all(m.is_in_range() for m in PPO.load(tmp_path / "model").policy.modules() if isinstance(m, LIF))
    with torch.no_grad():
        neuron.leak.fill_(1.25)
    model.predict(np.zeros(4, np.float32))
    assert neuron.leak == 1


@pytest.mark.parametrize("kind", [SpikingPQN, SpikingDQN])
def test_dict_observations_are_told_what_to_do(kind: type[Any]) -> None:
    class Parts(gym.Env[Any, Any]):
        observation_space = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (3,)), b=gym.spaces.Discrete(3))
        action_space = gym.spaces.Discrete(2)

    with pytest.raises(UserError, match="FlattenObservation"):
        kind("MultiInputPolicy", Parts())


def test_what_is_no_model_and_no_id_is_told() -> None:
    agent = load_agent("cartpole")
    for use in (DeployedAgent, lambda given: evaluate(given, "CartPole-v1")):
        with pytest.raises(UserError, match=r"LoadedAgent.*as \.model"):
            use(agent)
    with pytest.raises(UserError, match="name the environment by its id"):
        record(agent.model, gym.make("CartPole-v1"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reset returns"):
        DeployedAgent(agent.model).predict(gym.make("CartPole-v1").reset())  # type: ignore[arg-type]
    widths = {"timesteps": 1, "network_kwargs": {"hidden": np.array([8, 4])}}
    network = SpikingPQN("MlpPolicy", "CartPole-v1", policy_kwargs=widths).policy.q_net.network
    assert network.neuron_shapes() == [(8,), (4,)]


def test_a_stage_that_waits_for_an_episode_takes_no_steps_from_the_next() -> None:
    class Long(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(-1, 1, (3,))
        action_space = gym.spaces.Discrete(2)

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            return np.zeros(3, np.float32), {}

        def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return np.zeros(3, np.float32), 0.0, False, False, {}

    model = DQN(SpikingMlpPolicy, Long(), policy_kwargs=dict(SMALL) | {"timesteps": 2}, learning_starts=10)
    callback = TemporalPruningCallback(TemporalPruning(2, 1, first_budget=100, stage_budget=70))
    with pytest.warns(UserWarning, match="T=2 of 1; call learn again: 70 agent steps are left, and a stage ends with"):
        model.learn(150, callback=callback)
