"""SB3's own DQN with a spiking policy: scaling, target network, wrappers, callbacks, compilation, misuse."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from identity_envs import CHOICES, Identity, everything
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from spiking_rl import UserError
from spiking_rl.agents import (
    SpikingActorCriticCnnPolicy,
    SpikingActorCriticPolicy,
    SpikingCnnPolicy,
    SpikingDQN,
    SpikingFeaturesExtractor,
    SpikingMlpPolicy,
    SpikingPQN,
    SpikingQRCnnPolicy,
    SpikingQRMlpPolicy,
)

SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "buffer_size": 2000,
    "learning_starts": 50,
    "gradient_steps": 2,
    "target_update_interval": 100,
    "exploration_fraction": 0.5,
    "gamma": 0.5,
    "seed": 0,
    "device": "cpu",
}
SMALL = {"timesteps": 2, "network_kwargs": {"hidden": [32]}}


def identity(images: bool = False, envs: int = 1) -> VecEnv:
    return make_vec_env(Identity, envs, seed=0, env_kwargs={"images": images})


def stock(env: VecEnv | None = None) -> DQN:
    return DQN(SpikingMlpPolicy, env or identity(), policy_kwargs=copy.deepcopy(SMALL), **SETTINGS)


def test_scaling_follows_what_is_trained_on_and_nothing_else() -> None:
    model = stock()
    norm = model.q_net.norm
    model.predict(everything(False))
    assert norm.running_count == 0
    model.learn(200)
    seen = float(norm.running_count)
    assert seen > 0
    evaluate_policy(model, identity(), n_eval_episodes=2)
    assert norm.running_count == seen
    # One of four inputs is 1 at a time, so 1/4 on average, with variance 1/4 * 3/4.
    assert norm.running_mean.tolist() == pytest.approx([1 / 4] * 4, abs=0.08)
    assert norm.running_var.tolist() == pytest.approx([3 / 16] * 4, abs=0.06)


def test_first_layer_currents_start_at_unit_variance() -> None:
    model = DQN(SpikingMlpPolicy, identity(), policy_kwargs={"timesteps": 1}, **SETTINGS)
    network = model.q_net.network
    assert [n.threshold.item() for n in network.neurons] == [0.5, 0.5]
    current = network.maps[0](model.q_net.features(torch.as_tensor(everything(False))))
    assert current.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", [SpikingDQN, SpikingPQN])
def test_our_own_learners_feed_the_scaling_themselves(kind: type[Any]) -> None:
    model = kind("MlpPolicy", identity(), policy_kwargs=copy.deepcopy(SMALL), device="cpu")
    model.policy.set_training_mode(True)
    model.policy.q_net(torch.as_tensor(everything(False)))
    assert model.policy.q_net.norm.running_count == 0


def test_the_target_follows_thresholds_leaks_and_scaling() -> None:
    model = stock().learn(60)
    with torch.no_grad():
        model.q_net.network.neurons[0].threshold.fill_(0.77)
        model.q_net.network.neurons[0].leak.fill_(0.33)
        model.q_net.norm.running_mean.fill_(1.5)
    target = model.q_net_target
    assert target.network.neurons[0].threshold.item() != pytest.approx(0.77)
    for _ in range(100):
        model._on_step()
    assert target.network.neurons[0].threshold.item() == pytest.approx(0.77)
    assert target.network.neurons[0].leak.item() == pytest.approx(0.33)
    assert target.norm.running_mean.tolist() == [1.5] * 4
    assert not target.training


@pytest.mark.parametrize("wrap", [VecNormalize, lambda env: VecFrameStack(env, 2)])
def test_it_learns_behind_vector_wrappers(wrap: Any) -> None:
    model = stock(wrap(identity())).learn(900)
    env = model.get_env()
    assert env is not None
    if isinstance(env, VecNormalize):
        env.training = env.norm_reward = False
    assert evaluate_policy(model, env, n_eval_episodes=10)[0] > 9


def test_images_may_be_scaled_and_stacked_by_wrappers() -> None:
    kwargs = {"timesteps": 1, "network_kwargs": {"features": 8}}
    stacked = DQN(SpikingCnnPolicy, VecFrameStack(identity(images=True), 3), policy_kwargs=dict(kwargs), **SETTINGS)
    assert stacked.q_net.network.input_shape == (3, 36, 36)
    scaled = spaces.Box(-1, 1, (1, 36, 36), np.float32)
    policy = SpikingCnnPolicy(scaled, spaces.Discrete(2), lambda _: 1e-3, normalize_images=False, **kwargs)
    pixels = torch.rand(2, 1, 36, 36)
    assert torch.equal(policy.q_net.features(pixels), pixels)


def test_images_are_divided_by_255_and_keep_their_shape() -> None:
    model = DQN(SpikingCnnPolicy, identity(images=True), policy_kwargs={"timesteps": 1}, **SETTINGS)
    batch, _ = model.policy.obs_to_tensor(everything(True))
    features = model.q_net.features(batch)
    assert features.shape == (CHOICES, 1, 36, 36)
    assert features.unique().tolist() == [0, 1]
    assert model.q_net.norm is None


def test_callbacks_of_sb3_evaluate_and_store(tmp_path: Path) -> None:
    folder = str(tmp_path)
    evaluation = EvalCallback(identity(), eval_freq=200, n_eval_episodes=5, best_model_save_path=folder, verbose=0)
    store = CheckpointCallback(400, folder, name_prefix="at")
    stock().learn(900, callback=[evaluation, store])
    assert evaluation.best_mean_reward > 9
    for name in ("best_model", "at_800_steps"):
        again = DQN.load(tmp_path / name, device="cpu")
        assert again.predict(everything(False), deterministic=True)[0].tolist() == list(range(CHOICES))


@pytest.mark.filterwarnings("ignore")  # the compiler's own, not ours
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_the_same() -> None:
    model = DQN(SpikingMlpPolicy, identity(), policy_kwargs={"timesteps": 2, "network_kwargs": {"hidden": [8]}}, seed=0)
    plain = model.q_net
    torch.nn.init.normal_(plain.network.readout.weight)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend="aot_eager")  # one graph each way; what is built of it is not ours
    shown = torch.as_tensor(everything(False))
    torch.testing.assert_close(compiled(shown), plain(shown))
    compiled(shown).square().sum().backward()
    plain(shown).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name).grad, parameter.grad)
    assert twin.norm.running_count == plain.norm.running_count == 2 * CHOICES


@pytest.mark.parametrize("kind", [SpikingDQN, SpikingPQN])
def test_our_own_learners_know_the_short_name_of_the_cnn_policy(kind: type[Any], tmp_path: Path) -> None:
    own = {"calibration_steps": 64} if kind is SpikingPQN else {"learning_starts": 64, "buffer_size": 500}
    kwargs = {"timesteps": 2, "network_kwargs": {"features": 16}}
    model = kind("CnnPolicy", identity(images=True), policy_kwargs=kwargs, device="cpu", seed=0, **own)
    model.learn(128)
    assert model.calibrated
    model.save_checkpoint(tmp_path / "agent", environment="Identity")
    again = kind.load_checkpoint(tmp_path / "agent")
    shown, _ = model.policy.obs_to_tensor(everything(True))
    assert torch.equal(again.policy.q_net(shown), model.policy.q_net(shown))


BOX, IMAGE, TWO = spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (1, 36, 36), np.uint8), spaces.Discrete(2)
Q_VECTOR, Q_IMAGE = (SpikingMlpPolicy, SpikingQRMlpPolicy), (SpikingCnnPolicy, SpikingQRCnnPolicy)
VECTOR, IMAGES = (*Q_VECTOR, SpikingActorCriticPolicy), (*Q_IMAGE, SpikingActorCriticCnnPolicy)


@pytest.mark.parametrize(
    ("policies", "observations", "actions", "options", "message"),
    [
        (VECTOR, BOX, TWO, {"timesteps": 0}, "timesteps = 0"),
        (IMAGES, IMAGE, TWO, {"timesteps": 0}, "timesteps = 0"),
        (Q_VECTOR + Q_IMAGE, spaces.Dict({"a": BOX}), TWO, {}, "observation_space.*FlattenObservation"),
        ((SpikingActorCriticCnnPolicy,), spaces.Dict({"a": BOX}), TWO, {}, "nature_cnn takes images"),
        (Q_VECTOR, BOX, BOX, {}, "action_space.*take a Discrete space"),
        (Q_IMAGE, IMAGE, BOX, {}, "action_space.*take a Discrete space"),
        (VECTOR, IMAGE, TWO, {}, "observation_space.*SpikingCnnPolicy"),
        (IMAGES, BOX, TWO, {}, "observation_space.*SpikingMlpPolicy"),
        (IMAGES, spaces.Box(0, 255, (1, 35, 84), np.uint8), TWO, {}, r"\(1, 35, 84\).*36 x 36"),
        ((SpikingQRMlpPolicy,), BOX, TWO, {"n_quantiles": 0}, "n_quantiles = 0"),
        ((SpikingActorCriticPolicy,), BOX, TWO, {"net_arch": [64]}, "net_arch.*network_kwargs"),
    ],
)
def test_misuse_is_told_at_construction(
    policies: tuple[type[Any], ...],
    observations: spaces.Space[Any],
    actions: spaces.Space[Any],
    options: dict[str, Any],
    message: str,
) -> None:
    for policy in policies:
        with pytest.raises(UserError, match=message):
            policy(observations, actions, lambda _: 1e-3, **options)


def test_misuse_reaches_the_user_through_sb3() -> None:
    with pytest.raises(UserError, match="timesteps = 0"):
        DQN(SpikingMlpPolicy, identity(), policy_kwargs={"timesteps": 0})
    with pytest.raises(UserError, match="SpikingCnnPolicy"):
        DQN(SpikingMlpPolicy, identity(images=True), buffer_size=10)


def test_the_features_extractor_serves_another_algorithm() -> None:
    kwargs = {
        "features_extractor_class": SpikingFeaturesExtractor,
        "features_extractor_kwargs": {"timesteps": 3, "network_kwargs": {"hidden": [16, 8]}},
        "net_arch": [8],
    }
    model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, learning_starts=20, seed=0, device="cpu")
    extractor = model.actor.features_extractor
    assert extractor.features_dim == 8
    before = extractor.network.maps[0][0].weight.detach().clone()
    model.learn(60)
    assert not torch.equal(extractor.network.maps[0][0].weight, before)
    assert extractor.norm.running_count > 0
    features = extractor(torch.randn(50, 3))
    assert features.shape == (50, 8)
    thirds = (features * 3).round(decimals=4).unique().tolist()
    assert set(thirds) <= {0, 1, 2, 3}, "features are mean spikes over three timesteps"
    assert len(thirds) > 1


def test_the_features_extractor_chooses_its_network_by_the_observation() -> None:
    assert SpikingFeaturesExtractor(IMAGE, network_kwargs={"features": 16}).features_dim == 16
    assert SpikingFeaturesExtractor(spaces.Discrete(5)).features_dim == 256
