"""Spiking policies in algorithms that are not ours: each learns, acts, and survives being stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from identity_envs import CHOICES, Identity, everything
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from spiking_rl import LIF
from spiking_rl.agents import (
    SpikingActorCriticCnnPolicy,
    SpikingActorCriticPolicy,
    SpikingCnnPolicy,
    SpikingMlpPolicy,
    SpikingQRCnnPolicy,
    SpikingQRMlpPolicy,
)

REPLAY = {
    "learning_rate": 2e-3,
    "buffer_size": 2000,
    "learning_starts": 100,
    "gradient_steps": 2,
    "target_update_interval": 100,
    "exploration_fraction": 0.5,
    "gamma": 0.5,
}
PPO_SMALL = {"n_steps": 64, "batch_size": 64, "n_epochs": 6, "learning_rate": 3e-3, "gamma": 0.5}
MLP = {"network_kwargs": {"hidden": [32]}}
CNN = {"network_kwargs": {"features": 32}}


class Case(NamedTuple):
    """An algorithm with a spiking policy, and what it takes to learn the identity."""

    algorithm: type[Any]
    policy: type[Any]
    settings: dict[str, Any]
    policy_kwargs: dict[str, Any]
    agent_steps: int
    envs: int = 1

    @property
    def images(self) -> bool:
        return "Cnn" in self.policy.__name__

    def build(self, seed: int = 0) -> Any:
        env = make_vec_env(Identity, self.envs, seed=seed, env_kwargs={"images": self.images})
        kwargs = copy.deepcopy(self.policy_kwargs)
        return self.algorithm(self.policy, env, policy_kwargs=kwargs, seed=seed, device="cpu", **self.settings)


CASES = {
    "dqn": Case(DQN, SpikingMlpPolicy, REPLAY, {"timesteps": 4, **MLP}, 1000),
    "dqn-cnn": Case(DQN, SpikingCnnPolicy, REPLAY, {"timesteps": 2, **CNN}, 700),
    "qrdqn": Case(QRDQN, SpikingQRMlpPolicy, REPLAY, {"timesteps": 2, "n_quantiles": 8, **MLP}, 1000),
    "qrdqn-cnn": Case(QRDQN, SpikingQRCnnPolicy, REPLAY, {"timesteps": 2, "n_quantiles": 8, **CNN}, 700),
    "ppo": Case(PPO, SpikingActorCriticPolicy, PPO_SMALL, {"timesteps": 4, **MLP}, 2500, 4),
    "ppo-cnn": Case(PPO, SpikingActorCriticCnnPolicy, PPO_SMALL, {"timesteps": 2, **CNN}, 1500, 4),
    "a2c": Case(
        A2C,
        SpikingActorCriticPolicy,
        {"n_steps": 8, "learning_rate": 5e-3, "gamma": 0.5},
        {"timesteps": 2, **MLP},
        2500,
        4,
    ),
}


class Trained(NamedTuple):
    """A model that has learned; tests only read it."""

    case: Case
    model: Any


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest) -> Trained:
    case = CASES[request.param]
    return Trained(case, case.build().learn(case.agent_steps))


def outputs(model: BaseAlgorithm, observations: np.ndarray) -> torch.Tensor:
    """Return what the policy computes before it chooses, in evaluation mode."""
    policy = model.policy
    policy.set_training_mode(False)
    batch, _ = policy.obs_to_tensor(observations)
    with torch.no_grad():
        if isinstance(policy, SpikingMlpPolicy):
            return policy.q_net(batch)
        return torch.cat([policy.get_distribution(batch).distribution.logits, policy.predict_values(batch)], 1)


def test_it_learns(trained: Trained) -> None:
    mean, _ = evaluate_policy(trained.model, trained.model.get_env(), n_eval_episodes=20)
    assert mean > 9  # chance is 2.5, all right is 10
    untrained = trained.case.build()
    mean, _ = evaluate_policy(untrained, untrained.get_env(), n_eval_episodes=20)
    assert mean < 6


def test_predict_takes_one_observation_or_many(trained: Trained) -> None:
    shown = everything(trained.case.images)
    many, state = trained.model.predict(shown, deterministic=True)
    assert many.tolist() == list(range(CHOICES))
    assert state is None
    one, _ = trained.model.predict(shown[2], deterministic=True)
    assert one.shape == ()
    assert int(one) == 2


def test_spikes_are_what_it_computes_with(trained: Trained) -> None:
    neurons = [m for m in trained.model.policy.modules() if isinstance(m, LIF)]
    assert neurons
    fired: list[torch.Tensor] = []
    handles = [n.register_forward_hook(lambda _, __, scan: fired.append(scan.spikes)) for n in neurons]
    outputs(trained.model, everything(trained.case.images))
    for handle in handles:
        handle.remove()
    assert all(set(spikes.unique().tolist()) == {0.0, 1.0} for spikes in fired)
    assert all(len(spikes) == trained.case.policy_kwargs["timesteps"] for spikes in fired)


def test_a_saved_model_loads_with_the_same_outputs(trained: Trained, tmp_path: Path) -> None:
    trained.model.save(tmp_path / "model")
    again = trained.case.algorithm.load(tmp_path / "model", device="cpu")
    shown = everything(trained.case.images)
    assert torch.equal(outputs(again, shown), outputs(trained.model, shown))
    assert again.policy.timesteps == trained.case.policy_kwargs["timesteps"]


def test_a_loaded_model_goes_on_learning(trained: Trained, tmp_path: Path) -> None:
    trained.model.save(tmp_path / "model")
    again = trained.case.algorithm.load(tmp_path / "model", env=trained.model.get_env(), device="cpu")
    shown = everything(trained.case.images)
    before = outputs(again, shown)
    again.learn(256)
    assert not torch.equal(outputs(again, shown), before)


def test_a_saved_policy_loads_alone(trained: Trained, tmp_path: Path) -> None:
    trained.model.policy.save(tmp_path / "policy.pt")
    again = trained.case.policy.load(tmp_path / "policy.pt", device="cpu")
    shown = everything(trained.case.images)
    assert again.predict(shown, deterministic=True)[0].tolist() == list(range(CHOICES))
    assert again.timesteps == trained.case.policy_kwargs["timesteps"]


def test_copies_and_parameters_carry_the_outputs_over(trained: Trained) -> None:
    shown = everything(trained.case.images)
    expected = outputs(trained.model, shown)
    copied = copy.deepcopy(trained.model.policy)
    assert copied.predict(shown, deterministic=True)[0].tolist() == list(range(CHOICES))
    other = trained.case.build(seed=1)
    assert not torch.equal(outputs(other, shown), expected)
    other.set_parameters(trained.model.get_parameters())
    assert torch.equal(outputs(other, shown), expected)


@pytest.mark.parametrize("stored", ["built", "loaded", "copied", "rebuilt"])
@pytest.mark.parametrize("name", ["dqn", "qrdqn", "ppo", "a2c"])
def test_leaks_and_thresholds_stay_in_range_however_the_optimiser_came_about(
    name: str, stored: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model = case.build()
    if stored == "loaded":
        model.save(tmp_path / "model")
        model = case.algorithm.load(tmp_path / "model", device="cpu")
    policy = copy.deepcopy(model.policy) if stored == "copied" else model.policy
    if stored == "rebuilt":
        policy.rebuild_optimizer(1e-3)
    for group in policy.optimizer.param_groups:
        group["lr"] = 50.0
    neurons = [m for m in policy.modules() if isinstance(m, LIF)]
    trainable = [p for group in policy.optimizer.param_groups for p in group["params"]]
    assert any(n.leak is p for n in neurons for p in trainable)
    for direction in (1.0, -1.0):
        for parameter in trainable:
            parameter.grad = torch.full_like(parameter, direction)
        policy.optimizer.step()
        for neuron in neurons:
            assert 0 <= neuron.leak.min() <= neuron.leak.max() <= 1
            assert neuron.threshold.min() >= 1e-3


def test_a_huge_learning_rate_in_ppo_leaves_leaks_and_thresholds_in_range() -> None:
    case = CASES["ppo"]._replace(settings=PPO_SMALL | {"learning_rate": 1.0})
    model = case.build()
    neurons = model.policy.features_extractor.network.neurons
    before = [n.threshold.item() for n in neurons]
    model.learn(512)
    assert [n.threshold.item() for n in neurons] != before
    assert all(0 <= n.leak.item() <= 1 and n.threshold.item() >= 1e-3 for n in neurons)


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("ppo", {}, False),
        ("ppo", {"share_features_extractor": True}, True),
        ("ppo-cnn", {}, True),
        ("ppo-cnn", {"share_features_extractor": False}, False),
    ],
)
def test_actor_and_critic_have_hidden_layers_of_their_own_or_in_common(
    name: str, options: dict[str, bool], share: bool
) -> None:
    case = CASES[name]
    model = case._replace(policy_kwargs=case.policy_kwargs | options).build()
    assert (model.policy.pi_features_extractor is model.policy.vf_features_extractor) == share
    model.policy.set_timesteps(1)
    assert model.policy.pi_features_extractor.timesteps == model.policy.vf_features_extractor.timesteps == 1
    model.learn(256)


def test_sb3_does_not_initialise_over_the_spiking_layers() -> None:
    policy = CASES["ppo"].build().policy
    dense = policy.features_extractor.network.maps[0][0]
    # Orthogonal initialisation gives the columns one common norm; ours draws each weight alone.
    norms = dense.weight.detach().norm(dim=0)
    assert norms.std() > 1e-3
    probabilities = policy.get_distribution(torch.eye(CHOICES)).distribution.probs
    torch.testing.assert_close(probabilities, torch.full((CHOICES, CHOICES), 1 / CHOICES))


def test_qr_dqn_gets_quantiles_and_acts_on_their_mean() -> None:
    model = CASES["qrdqn"].build()
    torch.nn.init.normal_(model.policy.q_net.network.readout.weight)
    model.policy.set_training_mode(False)
    shown = torch.eye(CHOICES)
    quantiles = model.quantile_net(shown)
    assert quantiles.shape == (CHOICES, 8, CHOICES)
    assert len(quantiles[0, :, 0].unique()) > 1
    values, _ = model.quantile_net.q_values(shown)
    torch.testing.assert_close(values, quantiles.mean(1))
    assert model.predict(shown.numpy(), deterministic=True)[0].tolist() == values.argmax(1).tolist()
