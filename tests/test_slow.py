"""Long checks: `pytest -m slow`. Their dates and results stand in the README."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import COMMAND, SMALL, as_flags, environment, last_json

from spiking_rl import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for folder in sorted((run / "checkpoints").glob("T*")):
        found |= {f"{folder.name}/{k}": v for k, v in load_checkpoint(folder).tensors.items()}
    return found


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_killed_at_random_moments_again_and_again(algo: str, tmp_path: Path) -> None:
    """Kill each run up to five times at random moments, resuming in between; ten runs."""
    settings = {**SMALL, "agent_steps": 8192, "prune_steps": 4096, "eval_every": 2048, "save_every": 1024}
    if algo == "dqn":
        settings |= {"learning_starts": 1000, "gradient_steps": 4}

    def command(run: Path) -> list[str]:
        return [*COMMAND, "train", "cartpole", "--algo", algo, *as_flags(settings), "--run", str(run)]

    subprocess.run(command(tmp_path / "whole"), env=environment(), check=True, capture_output=True)
    expected = final_tensors(tmp_path / "whole")
    rng = random.Random(0)
    kills = 0
    for trial in range(10):
        run = tmp_path / f"killed{trial}"
        for _ in range(5):
            resume = ["--resume"] if (run / "config.yaml").is_file() else []
            process = subprocess.Popen(
                [*command(run), *resume], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(rng.uniform(3, 8))  # starting alone takes about three seconds
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        resume = ["--resume"] if (run / "config.yaml").is_file() else []
        done = subprocess.run([*command(run), *resume], env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        got = final_tensors(run)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], v) for k, v in expected.items()), f"trial {trial} ended differently"
    print(f"{algo}: {kills} kills")
    assert kills >= 10


def train_with_the_defaults(env: str, run: Path) -> list[dict[str, float]]:
    """Run the whole job and return its result rows."""
    command = [*COMMAND, "train", env, "--run", str(run), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = last_json(done.stdout)["rows"]
    assert isinstance(rows, list)
    assert [r["timesteps"] for r in rows] == [5, 4, 3, 2, 1]
    return rows


def test_cartpole_with_the_default_recipe(tmp_path: Path) -> None:
    """The README's main job: 500 or nearly at every T, under 1 GB resident."""
    rows = train_with_the_defaults("cartpole", tmp_path / "run")
    assert min(r["mean_return"] for r in rows) >= 495
    assert json.loads((tmp_path / "run" / "results.json").read_text())["peak_rss_mb"] < 1000


@pytest.mark.parametrize(("algo", "bar"), [("pqn", 495), ("dqn", 475)])
def test_five_seeds_of_cartpole(algo: str, bar: float, tmp_path: Path) -> None:
    """The results table: every seed, every T."""
    table = [sys.executable, "-m", "spiking_rl.scripts.table", "--algos", algo, "--methods", "pruned", "--jobs", "2"]
    output = tmp_path / "cartpole.json"
    command = [*table, "--runs", str(tmp_path / "runs"), "--output", str(output)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = json.loads(output.read_text())["rows"]
    assert len({(r["seed"], r["timesteps"]) for r in kept}) == len(kept) == 25
    assert min(r["mean_return"] for r in kept) >= bar


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_masked_cartpole_with_its_recipe(algo: str, tmp_path: Path) -> None:
    """One seed of the memory test; the README has five."""
    command = [*COMMAND, "train", "cartpole-masked", "--algo", algo, "--run", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = last_json(done.stdout)["rows"]
    assert row["timesteps"] == 1
    assert row["mean_return"] >= 475
    assert row["agent_steps"] <= 1_000_000


def test_acrobot_with_the_defaults(tmp_path: Path) -> None:
    rows = train_with_the_defaults("Acrobot-v1", tmp_path / "run")
    assert min(r["mean_return"] for r in rows) >= -100
