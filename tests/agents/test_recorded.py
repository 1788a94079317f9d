"""Agents that act and learn by CUDA graphs learn what they learn without, on a stand-in for the device."""

from __future__ import annotations

import copy
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
    replayed = trained(name, tmp_path / "replayed", 0)
    assert Tape.replays > 100
    monkeypatch.setattr(Tape, "replays", 0)
    monkeypatch.setattr(graphs, "_WARM_UP", 10**9)  # the same optimiser, never recorded
    plain = trained(name, tmp_path / "plain", 0)
    assert Tape.replays == 0
    assert all(torch.equal(replayed[key], plain[key]) for key in plain)


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
    observations = np.zeros((4, 4), dtype=np.float32)
    for margin in (None, 0.1):
        model.policy.q_net.network.set_exit_margin(margin)
        for _ in range(6):
            model.act_values(observations)
    assert Tape.replays == 3, "without a margin, from the fourth call on"


def recorded(model: SpikingPQN | SpikingDQN) -> set[str]:
    return set() if model._recorder is None else model._recorder.names


@pytest.mark.usefixtures("recording_device")
@pytest.mark.parametrize("algorithm", [SpikingPQN, SpikingDQN])
@pytest.mark.parametrize("change", ["parameters", "rate", "copy"])
def test_updates_go_on_with_what_the_optimiser_holds_now(
    algorithm: type[SpikingPQN | SpikingDQN], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"policy_kwargs": {"timesteps": 1, "network_kwargs": {"hidden": [8]}}, "seed": 0}
    model = algorithm("MlpPolicy", "CartPole-v1", **quick)  # type: ignore[arg-type]

    def update(learner: SpikingPQN | SpikingDQN) -> None:
        wanted = torch.randn(5, 2)
        batch = (torch.randn(5, 4), wanted[:, :1].long(), wanted)
        learner.learn_from(learner._imitation, *(batch if isinstance(learner, SpikingPQN) else batch[::2]))

    def weights(learner: SpikingPQN | SpikingDQN) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(learner.policy.q_net.parameters()).detach().clone()

    def steps(learner: SpikingPQN | SpikingDQN) -> set[float]:
        return {float(slots["step"]) for slots in learner.policy.optimizer.state.values()}

    for _ in range(6):
        update(model)
    assert recorded(model) == {"_imitation"}
    assert steps(model) == {6}
    if change == "parameters":  # as SB3 loads in place
        model.set_parameters(model.get_parameters())
    elif change == "rate":
        model.policy.optimizer.param_groups[0]["lr"] = 0.0
    untouched = weights(model)
    learner = copy.deepcopy(model) if change == "copy" else model
    for _ in range(6):
        update(learner)
    assert recorded(learner) == {"_imitation"}
    assert steps(learner) == {12}
    assert torch.equal(weights(learner), untouched) == (change == "rate")
    if change == "copy":
        assert torch.equal(weights(model), untouched), "the copy trains the original"
    monkeypatch.setenv("SPIKING_RL_GRAPHS", "0")
    update(learner)
    assert steps(learner) == {13}


@pytest.mark.usefixtures("recording_device")
@pytest.mark.parametrize("name", ["gamma", "max_grad_norm", "optimizer", "timesteps"])
def test_what_a_recording_holds_ends_it(name: str) -> None:
    model = SpikingDQN(
        "MlpPolicy", make_vec_env("CartPole-v1", 4, seed=0), policy_kwargs={"timesteps": 3}, learning_starts=64, seed=0
    )
    model.learn(192)
    assert recorded(model) == {"act", "_regression"}
    recordings = list(model._recorder._recordings.values())
    if name == "optimizer":
        model.policy.rebuild_optimizer(1e-3)
    elif name == "timesteps":
        model.policy.set_timesteps(2)
    else:
        setattr(model, name, 0.5)
    model.learn(192)
    assert recorded(model) == {"act", "_regression"}
    assert not any(new is old for new in model._recorder._recordings.values() for old in recordings)


@pytest.mark.usefixtures("recording_device")
def test_an_optimiser_that_cannot_be_recorded_learns() -> None:
    model = SpikingPQN(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 4, seed=0),
        policy_kwargs={"timesteps": 2, "optimizer_class": torch.optim.SGD},
        seed=0,
    )
    model.learn(128 * 9)
    assert recorded(model) == {"act"}
    assert model.last_loss is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("algorithm", [SpikingPQN, SpikingDQN])
@pytest.mark.parametrize("stateful", [False, True])
def test_agents_are_recorded_on_a_gpu(algorithm: type[SpikingPQN | SpikingDQN], stateful: bool) -> None:
    env = make_vec_env("CartPole-v1", 4, seed=0)
    model = algorithm("MlpPolicy", env, policy_kwargs={"timesteps": 2}, seed=0, device="cuda", stateful=stateful)
    model.learn(2048)
    assert recorded(model) == ({"act"} if algorithm is SpikingDQN and stateful else {"act", "_regression"})
    weights = torch.nn.utils.parameters_to_vector(model.policy.q_net.parameters())
    assert weights.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("algorithm", [SpikingPQN, SpikingDQN])
def test_an_update_of_a_gpu_is_the_same_recorded(algorithm: type[SpikingPQN | SpikingDQN]) -> None:
    """From the same weights and the same batch; whole trainings part with the order of sums."""
    after = []
    for record in (True, False):
        model = algorithm("MlpPolicy", "CartPole-v1", policy_kwargs={"timesteps": 2}, seed=0, device="cuda")
        torch.nn.init.normal_(model.policy.q_net.network.readout.weight, std=0.1)
        torch.manual_seed(1)
        for _ in range(8):
            observations, wanted = torch.randn(32, 4, device="cuda"), torch.randn(32, 2, device="cuda")
            batch = (observations, wanted[:, :1].long(), wanted) if algorithm is SpikingPQN else (observations, wanted)
            model.learn_from(model._imitation, *batch, record=record)
        assert recorded(model) == ({"_imitation"} if record else set())
        after.append(torch.nn.utils.parameters_to_vector(model.policy.q_net.parameters()).detach())
    torch.testing.assert_close(*after, rtol=1e-3, atol=1e-4)
