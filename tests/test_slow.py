"""Long checks: `pytest -m slow -n 0`. Their dates and results stand in docs/results/checks.md."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import COMMAND, SMALL, as_flags, environment, last_json, write_shades

from spiking_rl import load_checkpoint
from spiking_rl.agents.config import load_config, load_recipe
from spiking_rl.agents.loading import load_agent
from spiking_rl.agents.resume import load_training_state, save_training_state
from spiking_rl.agents.training import replace_settings, start_run
from spiking_rl.provenance import rss_mb
from spiking_rl.runs import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for folder in sorted((run / "checkpoints").glob("T*")):
        found |= {f"{folder.name}/{k}": v for k, v in load_checkpoint(folder).tensors.items()}
    return found


def killed(command: Sequence[str], seconds: float) -> bool:
    """Run a command and kill it after so many seconds; tell whether it was still running."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def ends_alike_whenever_it_is_killed(command: Sequence[str], tmp_path: Path, seconds: tuple[float, float]) -> None:
    """Kill each of ten runs up to five times at random moments, resuming in between.

    Args:
        command: the arguments of the command line but for ``--run`` and ``--resume``.
        tmp_path: an empty folder.
        seconds: between which a run is killed after its start; starting alone takes about three.
    """

    def started(run: Path) -> list[str]:
        resume = ["--resume"] if (run / "config.yaml").is_file() else []
        return [*COMMAND, *command, "--run", str(run), *resume]

    subprocess.run(started(tmp_path / "whole"), env=environment(), check=True, capture_output=True)
    expected = final_tensors(tmp_path / "whole")
    assert expected
    rng = random.Random(0)
    kills = 0
    for trial in range(10):
        run = tmp_path / f"killed{trial}"
        for _ in range(5):
            if not killed(started(run), rng.uniform(*seconds)):
                break
            kills += 1
        if not (run / "results.json").is_file():
            done = subprocess.run(started(run), env=environment(), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        got = final_tensors(run)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], v) for k, v in expected.items()), f"trial {trial} ended differently"
    print(f"{kills} kills")
    assert kills >= 10


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_an_agent_killed_at_random_moments(algo: str, tmp_path: Path) -> None:
    settings = {**SMALL, "agent_steps": 8192, "prune_steps": 4096, "eval_every": 2048, "save_every": 1024}
    if algo == "dqn":
        settings |= {"learning_starts": 1000, "gradient_steps": 4}
    command = ["train", "cartpole", "--algo", algo, *as_flags(settings)]
    ends_alike_whenever_it_is_killed(command, tmp_path, (3, 8))


def test_pruning_killed_at_random_moments(tmp_path: Path) -> None:
    """`spiking-rl prune` of a finished run: called again where it had not begun, else resumed."""
    settings = {**SMALL, "agent_steps": 4096, "prune_steps": 8192, "save_every": 1024}
    train = [*COMMAND, "train", "cartpole", *as_flags(settings), "--run"]
    subprocess.run([*train, str(tmp_path / "first")], env=environment(), check=True, capture_output=True)

    def go_on(run: Path) -> list[str]:
        pruning = load_config(run / "config.yaml").prune_to == 1
        return [*train, str(run), "--resume"] if pruning else [*COMMAND, "prune", str(run), "--to", "1"]

    # The flags say prune_to 2 and the run says 1 by then: only what was not asked for may differ.
    train.remove("--prune-to")
    train.remove(str(SMALL["prune_to"]))
    rng, kills = random.Random(0), 0
    ends = []
    for trial in range(8):
        run = tmp_path / f"run{trial}"
        shutil.copytree(tmp_path / "first", run, ignore=shutil.ignore_patterns(".lock"))
        (run / "results.json").unlink()
        for _ in range(4 if trial else 0):  # the first one is left alone
            if not killed(go_on(run), rng.uniform(2, 9)):
                break
            kills += 1
        while not (run / "results.json").is_file():
            done = subprocess.run(go_on(run), env=environment(), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        ends.append(final_tensors(run))
        assert any(name.startswith("T1-end/") for name in ends[-1])
        assert ends[-1].keys() == ends[0].keys()
        assert all(torch.equal(ends[-1][k], v) for k, v in ends[0].items()), f"trial {trial} ended differently"
    print(f"{kills} kills")
    assert kills >= 6


def test_a_thousand_saves_and_loads(tmp_path: Path) -> None:
    """The same bits after a thousand rounds, and no memory lost on the way."""
    folder = RunFolder(tmp_path / "run")
    config = replace_settings(load_recipe("cartpole", "dqn")[1], {**SMALL, "learning_starts": 500, "prune_to": 3})
    session = start_run(config, folder, device="cpu")
    session.run()
    model, before = session.model, session.model.policy.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    sizes = []
    for k in range(1000):
        save_training_state(folder.resume, model, {"k": k})
        assert load_training_state(folder.resume, model)["k"] == k
        model.save_checkpoint(tmp_path / "agent", environment=config.env)
        if k in (100, 999):
            sizes.append(rss_mb() or 0.0)
    after = load_agent(tmp_path / "agent").model.policy.q_net.state_dict()
    assert all(torch.equal(tensor, model.policy.state_dict()[name]) for name, tensor in kept.items())
    assert all(torch.equal(tensor, kept[f"q_net.{name}"]) for name, tensor in after.items())
    print(f"resident after 100 and 1,000 rounds: {sizes} MB")
    assert sizes[1] - sizes[0] < 30


def test_a_classifier_killed_at_random_moments(tmp_path: Path) -> None:
    images = write_shades(tmp_path / "images", {"train": 160, "test": 20})
    settings = {"width": 1 / 16, "timesteps": 3, "ann_epochs": 4, "epochs": 4, "prune_epochs": 4, "threads": 1}
    settings |= {"ann_batch_size": 16, "batch_size": 16, "save_every": 0.005}
    command = ["classify", "train", "vgg6", "folder", "--data", str(images), *as_flags(settings)]
    ends_alike_whenever_it_is_killed(command, tmp_path, (4, 10))


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
    """One seed of the memory test; docs/results/memory.md has five."""
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
