"""Same seed, same machine: the same weights, whatever ran before in the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL

from spiking_rl import load_checkpoint
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
    settings = {**SMALL, "agent_steps": 1536, "prune_steps": 512, "timesteps": 2, "prune_to": 1, **ALGORITHMS[name]}
    if algo == "dqn":
        settings |= {"learning_starts": 256, "train_freq": 64, "gradient_steps": 4, "buffer_size": 2048}
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
