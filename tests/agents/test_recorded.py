"""Agents that act and learn by CUDA graphs learn what they learn without, on a stand-in for the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recording_device import Tape, recording_device  # noqa: F401
from stable_baselines3.common.env_util import make_vec_env
from test_determinism import ALGORITHMS, trained

from spiking_rl import graphs
from spiking_rl.agents import SpikingDQN, SpikingPQN
from spiking_rl.agents.optimisation import learning_rate


@pytest.mark.usefixtures("recording_device")
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if "ReLU" not in name])
def test_recorded_agents_are_plain_agents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = trained(name, tmp_path / "recorded", 0)
    assert Tape.replays > 100
    monkeypatch.setattr(Tape, "replays", 0)
    monkeypatch.setattr(graphs, "_WARM_UP", 10**9)  # the same optimiser, never recorded
    plain = trained(name, tmp_path / "plain", 0)
    assert Tape.replays == 0
    assert all(torch.equal(recorded[key], plain[key]) for key in plain)


@pytest.mark.usefixtures("recording_device")
@pytest.mark.parametrize("algorithm", [SpikingPQN, SpikingDQN])
def test_what_a_gpu_saved_learns_on_elsewhere(
    algorithm: type[SpikingPQN | SpikingDQN], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train_freq": 8, "learning_starts": 64} if algorithm is SpikingDQN else {"n_steps": 8}
    env = make_vec_env("CartPole-v1", 4, seed=0)
    model = algorithm("MlpPolicy", env, policy_kwargs={"timesteps": 2}, seed=0, **options)  # type: ignore[arg-type]
    model.learn(1152)
    assert Tape.replays > 0
    model.save(tmp_path / "model.zip")
    monkeypatch.setattr(graphs, "_DEVICES", ("cuda",))
    monkeypatch.setattr(Tape, "replays", 0)
    loaded = algorithm.load(tmp_path / "model.zip", env=env)
    optimizer, recorded = loaded.policy.optimizer, model.policy.optimizer
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert learning_rate(optimizer) == pytest.approx(learning_rate(recorded))
    assert not optimizer.param_groups[0]["capturable"]
    weights = {name: tensor.clone() for name, tensor in loaded.policy.state_dict().items()}
    loaded.learn(1152)
    assert Tape.replays == 0
    assert any(not torch.equal(weights[name], tensor) for name, tensor in loaded.policy.state_dict().items())


@pytest.mark.usefixtures("recording_device")
def test_an_early_exit_is_not_recorded() -> None:
    model = SpikingPQN("MlpPolicy", make_vec_env("CartPole-v1", 4, seed=0), policy_kwargs={"timesteps": 3}, seed=0)
    model.learn(128 * 9)
    model.policy.q_net.network.set_exit_margin(0.1)
    replays = Tape.replays
    observations = np.zeros((4, 4), dtype=np.float32)
    for _ in range(6):
        model.act_values(observations)
    assert Tape.replays == replays


@pytest.mark.usefixtures("recording_device")
@pytest.mark.parametrize("name", ["gamma", "max_grad_norm", "optimizer", "timesteps"])
def test_what_a_recording_holds_ends_it(name: str) -> None:
    model = SpikingDQN(
        "MlpPolicy", make_vec_env("CartPole-v1", 4, seed=0), policy_kwargs={"timesteps": 3}, learning_starts=64, seed=0
    )
    model.learn(512)
    before = model._recorded[1]["_regression"]
    if name == "optimizer":
        model.policy.rebuild_optimizer(1e-3)
    elif name == "timesteps":
        model.policy.set_timesteps(2)
    else:
        setattr(model, name, 0.5)
    model.learn(512)
    assert model._recorded[1]["_regression"] is not before


@pytest.mark.usefixtures("recording_device")
def test_an_optimiser_that_cannot_be_recorded_learns() -> None:
    model = SpikingPQN(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 4, seed=0),
        policy_kwargs={"timesteps": 2, "optimizer_class": torch.optim.SGD},
        seed=0,
    )
    model.learn(128 * 9)
    assert set(model._recorded[1]) == {"act"}
    assert model.last_loss is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("algorithm", [SpikingPQN, SpikingDQN])
@pytest.mark.parametrize("stateful", [False, True])
def test_agents_are_recorded_on_a_gpu(algorithm: type[SpikingPQN | SpikingDQN], stateful: bool) -> None:
    env = make_vec_env("CartPole-v1", 4, seed=0)
    model = algorithm("MlpPolicy", env, policy_kwargs={"timesteps": 2}, seed=0, device="cuda", stateful=stateful)
    model.learn(2048)
    assert all(function._recordings and not function._failed for function in model._recorded[1].values())
    assert model._recorded[1].keys() == {"act"} if algorithm is SpikingDQN and stateful else {"act", "_regression"}
