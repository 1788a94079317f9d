"""The pruning callback lowers T inside anyone's ``learn``, and the lowered T survives being stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from identity_envs import Identity, everything
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from spiking_rl import LayeredNetwork, TemporalPruning, UserError
from spiking_rl.agents import (
    SpikingActorCriticPolicy,
    SpikingDQN,
    SpikingMlpPolicy,
    SpikingPQN,
    SpikingQRMlpPolicy,
    TemporalPruningCallback,
)

REPLAY = {
    "learning_rate": 2e-3,
    "buffer_size": 2000,
    "learning_starts": 100,
    "target_update_interval": 50,
    "exploration_fraction": 0.3,
    "gamma": 0.5,
}
ON_POLICY = {"n_steps": 32, "learning_rate": 5e-3, "gamma": 0.5}
ALGORITHMS: dict[str, tuple[type[Any], type[Any] | str, dict[str, Any]]] = {
    "dqn": (DQN, SpikingMlpPolicy, REPLAY),
    "qrdqn": (QRDQN, SpikingQRMlpPolicy, REPLAY),
    "ppo": (PPO, SpikingActorCriticPolicy, ON_POLICY | {"batch_size": 32}),
    "a2c": (A2C, SpikingActorCriticPolicy, ON_POLICY),
    "ours-dqn": (SpikingDQN, "MlpPolicy", REPLAY),
    "ours-pqn": (SpikingPQN, "MlpPolicy", {"calibration_steps": 64, "n_steps": 32, "gamma": 0.5}),
}
FIRST, LATER = 800, 300


def identity(envs: int = 1) -> VecEnv:
    return make_vec_env(Identity, envs, seed=0)


def options_of(name: str, timesteps: int) -> dict[str, Any]:
    quantiles = {"n_quantiles": 8} if name == "qrdqn" else {}
    return {"timesteps": timesteps, "network_kwargs": {"hidden": [32]}, **quantiles}


def model_of(name: str, timesteps: int = 4, kwargs: dict[str, Any] | None = None) -> Any:
    algorithm, policy, settings = ALGORITHMS[name]
    kwargs = options_of(name, timesteps) if kwargs is None else kwargs
    return algorithm(policy, identity(), policy_kwargs=kwargs, seed=0, device="cpu", **settings)


def networks(model: BaseAlgorithm) -> list[LayeredNetwork]:
    """Return every network of the policy: online and target, or actor and critic."""
    return [m for m in model.policy.modules() if isinstance(m, LayeredNetwork)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_prunes_to_two_timesteps_and_the_stored_model_stays_there(name: str, tmp_path: Path) -> None:
    given = options_of(name, 4)
    model = model_of(name, kwargs=given)
    pruning = TemporalPruning(4, 2, FIRST, LATER)
    model.learn(10_000, callback=TemporalPruningCallback(pruning, report_every=100))
    assert pruning.finished
    assert [s.timesteps for s in pruning.stages] == [4, 3, 2]
    assert given["timesteps"] == 4, "the caller's dictionary was changed"
    spent = FIRST + 2 * LATER
    assert spent <= model.num_timesteps < spent + 200, "training stops when pruning is done"
    model.save(tmp_path / "model")
    again = type(model).load(tmp_path / "model", device="cpu")
    for m in (model, again):
        assert m.policy_kwargs["timesteps"] == m.policy.timesteps == 2
        assert len(networks(m)) == (1 if name == "ours-pqn" else 2)
        assert all(network.timesteps == 2 for network in networks(m))
    shown = everything(False)
    actions, _ = model.predict(shown, deterministic=True)
    assert (again.predict(shown, deterministic=True)[0] == actions).all()
    assert evaluate_policy(model, identity(), n_eval_episodes=10)[0] > 9, name


class Told(TemporalPruningCallback):
    """Scores by a list, and writes each report's number into a bias so that weights can be told apart."""

    def __init__(self, pruning: TemporalPruning, scores: list[float]) -> None:
        super().__init__(pruning, report_every=8)
        self.scores = scores
        self.marks: list[float] = []

    def _score(self) -> float:
        marker(self.model).fill_(len(self.marks))
        self.marks.append(len(self.marks))
        return self.scores[len(self.marks) - 1]


def marker(model: BaseAlgorithm) -> torch.Tensor:
    network = model.policy.q_net.network  # type: ignore[union-attr]
    return network.readout.bias.data  # type: ignore[union-attr, return-value]


def test_the_next_stage_starts_from_the_best_weights_with_a_fresh_optimiser() -> None:
    model = model_of("dqn", 2)
    model.learning_starts = model.gradient_steps = 0  # nothing is trained: only the callback changes weights
    model.policy.optimizer.state[marker(model)] = {"old": torch.zeros(1)}
    # Reports 0..3 in the first stage (best is 1), 4 and on in the second (best is 5).
    callback = Told(TemporalPruning(2, 1, 32, 32), [0.1, 0.9, 0.5, 0.2, 0.3, 0.8, 0.7, 0.6])
    seen: list[tuple[int, float, float, int]] = []
    begin = callback._begin_stage

    def watch(timesteps: int) -> None:
        begin(timesteps)
        target = model.q_net_target.network
        state = model.policy.optimizer.state_dict()["state"]
        seen.append((target.timesteps, marker(model)[0].item(), target.readout.bias[0].item(), len(state)))

    callback._begin_stage = watch  # type: ignore[method-assign]
    model.learn(1000, callback=callback)
    assert seen == [(1, 1.0, 1.0, 0)]
    assert callback.marks == list(range(8))
    assert marker(model).unique().tolist() == [5.0]
    assert model.q_net_target.network.readout.bias.unique().tolist() == [5.0]


@pytest.mark.filterwarnings("ignore:temporal pruning is not finished")
def test_pruning_goes_on_in_a_second_call_of_learn() -> None:
    model = model_of("a2c")
    pruning = TemporalPruning(4, 3, 200, 200)
    callback = TemporalPruningCallback(pruning, report_every=50)
    model.learn(96, callback=callback)
    assert pruning.timesteps == 4
    model.learn(128, callback=callback)  # counts its agent steps from zero again
    assert pruning.timesteps == 4, "the next stage begins when somebody trains it"
    model.learn(192, callback=callback, reset_num_timesteps=False)
    assert pruning.timesteps == 3
    assert not pruning.finished
    model.learn(32, callback=callback, reset_num_timesteps=False)
    assert pruning.finished
    assert model.policy.timesteps == 3


def test_a_given_environment_scores_by_greedy_play() -> None:
    model = model_of("dqn", 2)
    model.exploration_initial_eps = model.exploration_final_eps = 1.0
    pruning = TemporalPruning(2, 2, 900, 100)
    model.learn(900, callback=TemporalPruningCallback(pruning, eval_env=Identity(), eval_episodes=5, report_every=300))
    assert pruning.finished, "the last report is due when learning ends"
    assert pruning.stages[0].reports == 3
    assert pruning.stages[0].best > 9  # type: ignore[operator]


def test_misuse_is_told_before_training() -> None:
    pruning = TemporalPruning(4, 2, 100, 100)
    with pytest.raises(UserError, match="report_every = 0"):
        TemporalPruningCallback(pruning, report_every=0)
    with pytest.raises(UserError, match=r"policy.*no timesteps"):
        DQN("MlpPolicy", identity(), device="cpu").learn(10, callback=TemporalPruningCallback(pruning))
    with pytest.raises(UserError, match=r"timesteps = 2.*T=4"):
        model_of("dqn", 2).learn(10, callback=TemporalPruningCallback(pruning))
    blind = DummyVecEnv([Identity])
    model = DQN(SpikingMlpPolicy, blind, policy_kwargs={"timesteps": 4}, device="cpu")
    with pytest.raises(UserError, match=r"eval_env.*VecMonitor"):
        model.learn(10, callback=TemporalPruningCallback(pruning))
    normalised = DQN(SpikingMlpPolicy, VecNormalize(identity()), policy_kwargs={"timesteps": 4}, device="cpu")
    with pytest.raises(UserError, match=r"eval_env.*VecNormalize"):
        normalised.learn(10, callback=TemporalPruningCallback(pruning, eval_env=Identity()))


def test_evaluation_sees_the_normalisation_of_the_training_environment() -> None:
    model = DQN(
        SpikingMlpPolicy, VecNormalize(identity()), policy_kwargs=options_of("dqn", 2), seed=0, device="cpu", **REPLAY
    )
    evaluated = VecNormalize(identity(), training=False)
    callback = TemporalPruningCallback(TemporalPruning(2, 2, 200, 200), eval_env=evaluated, eval_episodes=2)
    model.learn(200, callback=callback)
    assert callback.pruning.finished
    training = model.get_vec_normalize_env()
    assert training is not None
    assert evaluated.obs_rms.mean.tolist() == training.obs_rms.mean.tolist() != [0.0] * 4
