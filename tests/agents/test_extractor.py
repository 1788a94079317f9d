"""SpikingFeaturesExtractor in algorithms without a policy of ours: pruned as others are, fed with Dict observations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from identity_envs import Identity, everything
from sb3_contrib import QRDQN, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from spiking_rl import TemporalPruning, UserError
from spiking_rl.agents import (
    SpikingActorCriticPolicy,
    SpikingDQN,
    SpikingFeaturesExtractor,
    SpikingMlpPolicy,
    SpikingPQN,
    SpikingQRMlpPolicy,
    TemporalPruningCallback,
)


def extractor(timesteps: int, **other: Any) -> dict[str, Any]:
    """Return policy options with spiking hidden layers."""
    return {
        "features_extractor_class": SpikingFeaturesExtractor,
        "features_extractor_kwargs": {"timesteps": timesteps, "network_kwargs": {"hidden": [32]}},
        **other,
    }


def timesteps_of(model: Any) -> list[int]:
    """Return T of every network of the policy, targets too."""
    return [m.timesteps for m in model.policy.modules() if isinstance(m, SpikingFeaturesExtractor)]


def test_what_it_learned_it_keeps_at_fewer_timesteps(tmp_path: Path) -> None:
    given = extractor(4, net_arch=[])
    settings = {"buffer_size": 2000, "target_update_interval": 50, "exploration_fraction": 0.3, "gamma": 0.5}
    model = DQN(
        "MlpPolicy", make_vec_env(Identity, 1, seed=0), learning_rate=2e-3, policy_kwargs=given, seed=0, **settings
    )
    pruning = TemporalPruning(4, 2, 900, 300)
    model.learn(10_000, callback=TemporalPruningCallback(pruning, eval_env=Identity(), report_every=300))
    assert [s.timesteps for s in pruning.stages] == [4, 3, 2]
    assert given["features_extractor_kwargs"]["timesteps"] == 4, "the caller's dictionary was changed"
    model.save(tmp_path / "model")
    again = DQN.load(tmp_path / "model", device="cpu")
    assert timesteps_of(model) == timesteps_of(again) == [2, 2]
    actions, _ = model.predict(everything(False), deterministic=True)
    assert (again.predict(everything(False), deterministic=True)[0] == actions).all()
    assert evaluate_policy(model, Monitor(Identity()), n_eval_episodes=10)[0] > 9


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("algorithm", "networks"), [(SAC, 3), (TD3, 4)])
def test_continuous_actions_are_pruned(algorithm: Any, networks: int, share: bool, tmp_path: Path) -> None:
    """TD3 has an actor and a critic with a target each; SAC's actor has none."""
    kwargs = extractor(3, net_arch={"pi": [], "qf": [16]}, share_features_extractor=share)
    settings = {"learning_starts": 20, "train_freq": 20, "device": "cpu"}
    model = algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, seed=0, **settings)
    pruning = TemporalPruning(3, 1, 250, 250)
    callback = TemporalPruningCallback(pruning, report_every=200)
    begun: list[tuple[list[int], int, bool]] = []
    begin, keep = callback._begin_stage, callback._keep
    coefficients: list[float] = []

    def watch(timesteps: int) -> None:
        begin(timesteps)
        optimizers = [model.actor.optimizer, model.critic.optimizer]
        if algorithm is SAC:
            optimizers.append(model.ent_coef_optimizer)
            assert model.log_ent_coef.item() == coefficients[-1], "it is that of the best weights"
        learned = {n: t for n, t in model.policy.state_dict().items() if "_target" not in n}
        best = all(torch.equal(t, callback._best[n]) for n, t in learned.items())
        target = zip(model.critic.state_dict().values(), model.critic_target.state_dict().values(), strict=True)
        begun.append(
            (
                timesteps_of(model),
                sum(len(o.state) for o in optimizers),
                best and all(map(torch.equal, *zip(*target, strict=True))),
            )
        )

    def kept() -> None:
        keep()
        if algorithm is SAC:
            coefficients.append(model.log_ent_coef.item())

    callback._keep = kept  # type: ignore[method-assign]

    callback._begin_stage = watch  # type: ignore[method-assign]
    model.learn(2000, callback=callback)
    own = networks - share * (2 if algorithm is TD3 else 1)
    assert begun == [([t] * own, 0, True) for t in (2, 1)]
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", device="cpu")
    assert timesteps_of(again) == [1] * own
    again.set_env(gym.make("Pendulum-v1"))
    again.learn(30)


class Fixed(SpikingFeaturesExtractor):
    """An extractor of somebody's own, that nobody can tell another T."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__(space, timesteps=3, network_kwargs={"hidden": [8]})


class Passing(SpikingFeaturesExtractor):
    """Another, that hands on what it is told."""

    def __init__(self, space: spaces.Space[Any], **options: Any) -> None:
        super().__init__(space, **options)


class OfPicture(BaseFeaturesExtractor):
    """One that reads a part of a Dict with spikes, and the other without."""

    def __init__(self, space: spaces.Dict, timesteps: int = 3) -> None:
        super().__init__(space, 8 + 4)
        own = spaces.Dict({"observation": space["observation"]})
        self.spikes = SpikingFeaturesExtractor(own, timesteps, network_kwargs={"hidden": [8]})

    def forward(self, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.spikes({"observation": seen["observation"]}), seen["desired_goal"]], 1)


class OwnPolicy(ActorCriticPolicy):
    """A policy that brings its extractor along."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, **extractor(3))


def test_what_could_not_be_loaded_again_is_refused_before_it_is_pruned() -> None:
    callback = TemporalPruningCallback(TemporalPruning(3, 1, 100, 100))
    options: dict[str, Any] = {"n_steps": 64, "device": "cpu"}
    kwargs = {"features_extractor_class": Fixed}
    with pytest.raises(UserError, match=r"features_extractor_class = 'Fixed': takes no timesteps"):
        PPO("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, **options).learn(64, callback=callback)
    with pytest.raises(UserError, match=r"policy = 'OwnPolicy'.*name it in policy_kwargs"):
        PPO(OwnPolicy, "CartPole-v1", **options).learn(64, callback=callback)


@pytest.mark.parametrize("kind", [Passing, OfPicture])
def test_extractors_of_ones_own_are_pruned(kind: type[Any], tmp_path: Path) -> None:
    joins = kind is OfPicture
    env = BitFlippingEnv(n_bits=4, continuous=False, max_steps=4) if joins else gym.make("CartPole-v1")
    told = {"timesteps": 3} if joins else extractor(3)["features_extractor_kwargs"]
    kwargs = {"features_extractor_class": kind, "features_extractor_kwargs": told}
    policy = "MultiInputPolicy" if joins else "MlpPolicy"
    model = PPO(policy, env, n_steps=64, n_epochs=1, policy_kwargs=kwargs, seed=0, device="cpu")
    model.learn(500, callback=TemporalPruningCallback(TemporalPruning(3, 1, 64, 64), report_every=50))
    model.save(tmp_path / "model")
    assert timesteps_of(model) == timesteps_of(PPO.load(tmp_path / "model", device="cpu")) == [1]


def test_a_callback_that_is_used_again_prunes_the_model_before_it() -> None:
    settings = {"learning_starts": 10, "seed": 0, "device": "cpu"}
    callback = TemporalPruningCallback(TemporalPruning(2, 1, 100, 100), report_every=50)
    with pytest.warns(UserWarning, match="not finished"):
        DQN("MlpPolicy", "CartPole-v1", policy_kwargs=extractor(2), **settings).learn(30, callback=callback)
    model = DQN(SpikingMlpPolicy, "CartPole-v1", policy_kwargs={"timesteps": 2}, **settings)
    model.learn(600, callback=callback)
    assert callback.pruning.finished
    assert model.policy.timesteps == model.policy_kwargs["timesteps"] == 1


def test_a_goal_and_what_is_seen_are_read_side_by_side() -> None:
    """As hindsight experience replay needs it: a Dict of three vectors."""
    env = BitFlippingEnv(n_bits=4, continuous=False, max_steps=4)
    settings = {"replay_buffer_class": HerReplayBuffer, "learning_starts": 50, "buffer_size": 500, "gamma": 0.9}
    model = DQN("MultiInputPolicy", env, policy_kwargs=extractor(2, net_arch=[]), seed=0, device="cpu", **settings)
    features = model.policy.q_net.features_extractor
    assert features.norm.running_mean.shape == (12,)
    before = features.network.maps[0][0].weight.detach().clone()
    model.learn(100)
    assert not torch.equal(features.network.maps[0][0].weight, before)
    model.policy.set_training_mode(False)
    seen = {name: torch.zeros(1, 4) for name in env.observation_space}
    for name in seen:
        other = {**seen, name: torch.full((1, 4), 5.0)}
        assert not torch.equal(features(other), features(seen)), name
        assert torch.equal(features(dict(reversed(other.items()))), features(other)), "their order is the space's"


def test_actor_and_critic_read_them_too(tmp_path: Path) -> None:
    env = BitFlippingEnv(n_bits=4, continuous=False, max_steps=4)
    options = {"timesteps": 2, "network_kwargs": {"hidden": [32]}}
    model = PPO(SpikingActorCriticPolicy, env, n_steps=64, policy_kwargs=options, seed=0, device="cpu")
    model.learn(64)
    model.save(tmp_path / "model")
    seen = {name: np.eye(4, dtype=np.int8) for name in env.observation_space}
    actions = [m.predict(seen, deterministic=True)[0].tolist() for m in (model, PPO.load(tmp_path / "model"))]
    assert actions[0] == actions[1]


def test_images_within_a_dict_are_refused_by_name() -> None:
    space = spaces.Dict({"camera": spaces.Box(0, 255, (3, 36, 36), np.uint8), "speed": spaces.Box(-1, 1, (2,))})
    with pytest.raises(UserError, match=r"observation_space = 'camera: .*only vectors.*FilterObservation"):
        SpikingFeaturesExtractor(space)
    for part, said in (
        (spaces.Discrete(3, start=1), "must count from 0"),
        (spaces.MultiDiscrete([2, 3], start=[0, 1]), "must count from 0"),
        (spaces.MultiDiscrete([[2, 3], [2, 3]]), "is no vector"),
        (spaces.Box(0, 1, ()), "is no vector"),
        (spaces.Text(3), "only vectors"),
    ):
        with pytest.raises(UserError, match=said):
            SpikingFeaturesExtractor(spaces.Dict({"part": part, "speed": spaces.Box(-1, 1, (2,))}))
    with pytest.raises(UserError, match="empty Dict"):
        SpikingFeaturesExtractor(spaces.Dict({}))
    with pytest.raises(UserError, match="nature_cnn"):
        SpikingFeaturesExtractor(spaces.Dict({"speed": spaces.Box(-1, 1, (2,))}), network="nature_cnn")


@pytest.mark.parametrize(
    ("algorithm", "policy", "env", "said"),
    [
        (PPO, SpikingMlpPolicy, "CartPole-v1", "PPO and A2C take SpikingActorCriticPolicy"),
        (SAC, SpikingMlpPolicy, "Pendulum-v1", "SAC and TD3 SpikingFeaturesExtractor"),
        (TD3, SpikingMlpPolicy, "Pendulum-v1", "SAC and TD3 take SpikingFeaturesExtractor"),
        (PPO, SpikingQRMlpPolicy, "CartPole-v1", "gives quantiles, for sb3_contrib.QRDQN; PPO and A2C take"),
        (SpikingDQN, SpikingQRMlpPolicy, "CartPole-v1", "gives quantiles.*use MlpPolicy"),
        (SpikingPQN, SpikingQRMlpPolicy, "CartPole-v1", "gives quantiles.*use MlpPolicy"),
        (SpikingPQN, SpikingActorCriticPolicy, "CartPole-v1", "gives no Q-values; use MlpPolicy"),
        (RecurrentPPO, SpikingActorCriticPolicy, "CartPole-v1", "RecurrentPPO takes SpikingFeaturesExtractor"),
        (QRDQN, SpikingMlpPolicy, "CartPole-v1", "QRDQN takes SpikingQRMlpPolicy"),
        (DQN, SpikingActorCriticPolicy, "CartPole-v1", "DQN takes SpikingMlpPolicy"),
        (SpikingDQN, SpikingActorCriticPolicy, "CartPole-v1", "DQN takes SpikingMlpPolicy"),
        (QRDQN, SpikingActorCriticPolicy, "CartPole-v1", "QRDQN takes SpikingQRMlpPolicy"),
        (SAC, SpikingActorCriticPolicy, "Pendulum-v1", "SAC and TD3 take SpikingFeaturesExtractor"),
        (TD3, SpikingActorCriticPolicy, "Pendulum-v1", "SAC and TD3 take SpikingFeaturesExtractor"),
    ],
)
def test_a_policy_of_another_family_names_the_right_one(algorithm: Any, policy: Any, env: str, said: str) -> None:
    with pytest.raises((UserError, AttributeError), match=said):
        algorithm(policy, env, device="cpu")


def test_an_option_that_nobody_knows_is_named() -> None:
    with pytest.raises(UserError, match=r"timestep = 3: is no option of SpikingActorCriticPolicy; name timesteps"):
        A2C(SpikingActorCriticPolicy, "CartPole-v1", policy_kwargs={"timestep": 3}, device="cpu")
