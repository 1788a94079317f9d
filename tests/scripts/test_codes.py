"""Hybrid single-spike networks and early exit, through the real command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import Cli, as_flags, last_json, write_shades

CARTPOLE = {
    "timesteps": 3,
    "prune_to": 2,
    "agent_steps": 4096,
    "prune_steps": 1024,
    "eval_every": 2048,
    "eval_episodes": 3,
    "report_episodes": 5,
    "hidden": "32",
    "encoding": "hybrid",
    "kappa": 0.2,
}


@pytest.fixture(scope="module")
def agent(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "agent"
    done = cli("train", "cartpole", *as_flags(CARTPOLE), "--single-spike", "--run", run)
    assert done.returncode == 0, done.stderr
    return run


def test_an_agent_of_single_spikes_is_trained_scored_and_filmed(agent: Path) -> None:
    rows = json.loads((agent / "results.json").read_text())["rows"]
    assert [row["timesteps"] for row in rows] == [3, 2]
    for row in rows:
        # At most one spike per neuron and decision.
        assert all(0 < rate <= 1 / row["timesteps"] + 1e-9 for rate in row["spike_rate"].values())
        assert "input" not in row["spike_rate"]
    assert next((agent / "videos").glob("T2*.mp4")).stat().st_size > 1000


def test_exit_measures_an_agent_at_every_margin(cli: Cli, agent: Path) -> None:
    done = cli("exit", agent, "--margins", 0, 1, 1000, "--episodes", 5, "--json")
    assert done.returncode == 0, done.stderr
    rows = last_json(done.stdout)["rows"]
    assert [row["margin"] for row in rows] == [0, 1, 1000, None]
    used = [row["mean_timesteps"] for row in rows]
    assert used[0] == 1
    assert 1 <= used[1] <= 3
    assert used[2:] == [3, 3]
    # Nobody is ever so sure: then it is the whole network, with its score and energy.
    assert rows[2]["mean_return"] == rows[3]["mean_return"]
    assert rows[2]["energy_ratio"] == pytest.approx(rows[3]["energy_ratio"])
    assert rows[0]["energy_ratio"] > rows[3]["energy_ratio"]
    assert (agent / "figures" / "early-exit.png").stat().st_size > 1000
    assert (agent / "figures" / "early-exit.svg").stat().st_size > 1000
    with (agent / "figures" / "early-exit.csv").open() as file:
        drawn = list(csv.DictReader(file))
    assert [row["margin"] for row in drawn] == ["0.0", "1.0", "1000.0", ""]
    assert [float(row["mean_return"]) for row in drawn] == [row["mean_return"] for row in rows]


def test_exit_needs_spikes(cli: Cli, agent: Path, tmp_path: Path) -> None:
    run = tmp_path / "relu"
    shutil.copytree(agent, run, ignore=shutil.ignore_patterns("T*"))
    done = cli("exit", run)
    assert done.returncode == 2
    assert "holds no spiking network" in done.stderr


def test_exit_measures_a_classifier_too(cli: Cli, tmp_path: Path) -> None:
    data = write_shades(tmp_path / "images", {"train": 160, "test": 20})
    small = {"width": 0.03125, "timesteps": 3, "prune_to": 3, "ann_epochs": 3, "epochs": 2, "learning_rate": 0.003,
             "ann_optimizer": "adam", "ann_learning_rate": 0.003, "ann_batch_size": 8, "batch_size": 8, "threads": 1,
             "device": "cpu", "recipe": "single-spike"}  # fmt: skip
    run = tmp_path / "run"
    done = cli("classify", "train", "vgg6", "folder", "--data", data, *as_flags(small), "--run", run, "--json")
    assert done.returncode == 0, done.stderr
    row = last_json(done.stdout)["rows"][0]
    assert row["timesteps"] == 3
    assert row["top1"] > 90
    assert all(rate <= 1 / 3 for rate in row["spike_rate"].values())
    done = cli("exit", run, "--data", data, "--margins", 0, 1000, "--json")
    assert done.returncode == 0, done.stderr
    first, never, whole = last_json(done.stdout)["rows"]
    assert (first["mean_timesteps"], never["mean_timesteps"], whole["mean_timesteps"]) == (1, 3, 3)
    assert never["top1"] == whole["top1"] == row["top1"]
    assert whole["energy_ratio"] == pytest.approx(row["energy_ratio"])
    assert whole["energy_ratio_int32"] == pytest.approx(row["energy_ratio_int32"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--margins", "-1"), "margins"),
        (("--timesteps", "4"), "timesteps = 4: needs a checkpoint of at least 2"),
        (("--timesteps", "1"), "timesteps = 1"),
        (("--timesteps", "0"), "timesteps = 0"),
        (("--output", "curve.txt"), "output"),
        (("--episodes", "0"), "episodes"),
    ],
)
def test_exit_says_what_is_wrong(cli: Cli, agent: Path, arguments: tuple[str, ...], said: str) -> None:
    done = cli("exit", agent, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_codes_and_memory_do_not_go_together(cli: Cli, tmp_path: Path) -> None:
    for flags in (("--encoding", "hybrid"), ("--single-spike",), ("--kappa", "0.5")):
        done = cli("train", "cartpole", "--stateful", *flags, "--run", tmp_path / "run")
        assert done.returncode == 2
        assert flags[0].removeprefix("--").replace("-", "_") in done.stderr
        assert not (tmp_path / "run").exists()
