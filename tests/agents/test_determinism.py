"""Same seed, same machine: the same weights, whatever ran before in the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from spiking_rl import load_checkpoint
from spiking_rl.agents import SpikingActorCriticPolicy, SpikingMlpPolicy, SpikingQRMlpPolicy
from spiking_rl.agents.config import load_recipe
from spiking_rl.agents.training import replace_settings, start_run
from spiking_rl.runs import RunFolder

ALGORITHMS = {
    "pqn": {},
    "pqn, stateful": {"stateful": True},
    "pqn, single spikes": {"encoding": "hybrid", "single_spike": True, "kappa": 0.2},
    "pqn, drawn inputs": {"encoding": "poisson"},
    "pqn, ReLU": {"neuron": "relu"},
    "dqn": {},
    "dqn, stateful": {"stateful": True, "burn_in": 2, "sequence_length": 4},
}


def trained(name: str, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    algo = name.split(",")[0]
    settings = {**SMALL, "agent_steps": 1280, "prune_steps": 256, "timesteps": 2, "prune_to": 1, **ALGORITHMS[name]}
    if algo == "dqn":
        settings |= {"learning_starts": 128, "train_freq": 64, "gradient_steps": 4, "buffer_size": 2048}
    config = replace_settings(load_recipe("cartpole", algo)[1], {**settings, "seed": seed})
    session = start_run(config, RunFolder(folder), device="cpu")
    session.run()
    (last,) = (p for p in (folder / "checkpoints").iterdir() if p.name in ("T1-end", "relu-end"))
    return load_checkpoint(last).tensors


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_seed_names_a_run(name: str, tmp_path: Path) -> None:
    first = trained(name, tmp_path / "first", 0)
    np.random.seed(7)
    torch.manual_seed(7)
    torch.rand(100)
    again = trained(name, tmp_path / "again", 0)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = trained(name, tmp_path / "other", 1)
    assert any(not torch.equal(first[key], other[key]) for key in first)


STOCK = {
    "DQN": (DQN, SpikingMlpPolicy, {"learning_starts": 64, "train_freq": 16}),
    "QRDQN": (QRDQN, SpikingQRMlpPolicy, {"learning_starts": 64, "train_freq": 16}),
    "PPO": (PPO, SpikingActorCriticPolicy, {"n_steps": 64, "n_epochs": 2}),
    "A2C": (A2C, SpikingActorCriticPolicy, {}),
}


@pytest.mark.parametrize("name", STOCK)
def test_in_algorithms_of_stable_baselines3_too(name: str) -> None:
    algorithm, policy, options = STOCK[name]

    def learned(seed: int) -> dict[str, torch.Tensor]:
        own = {"timesteps": 2, "network_kwargs": {"hidden": [16, 16]}}
        model: BaseAlgorithm = algorithm(policy, "CartPole-v1", policy_kwargs=own, seed=seed, device="cpu", **options)
        return model.learn(256).policy.state_dict()

    first = learned(0)
    torch.rand(100)
    again, other = learned(0), learned(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
